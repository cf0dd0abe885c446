"""Requests that are wrong or meant to harm: each gets its status, nothing is written elsewhere, the server goes on."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.helpers.fake_server import Served, served

KEYS = ("first-key-123", "second-key-456")
JSON = {"Content-Type": "application/json"}
I2V = "cogvideox-demo-5b-i2v"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder / "data", "--body-seconds", "1.5", "--keys", *KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        yield http


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says how large it would be."""
    header = struct.pack(">II", width, height) + bytes([8, 2, 0, 0, 0])
    data = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture(kind: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


DEEP = '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}"
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\xff\xff\xff\xffmoov" + bytes(range(256)) * 40
MKV = b"\x1a\x45\xdf\xa3" + b"\x01\xff\xff\xff\xff\xff\xff\xff" + bytes(4000)
PLAYLIST = b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

FIELDS: list[tuple[dict[str, Any], str | None]] = [
    # What is sent beside prompt and model, and which field the answer blames.
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "x" * 10_000_000}, "prompt"),
    ({"prompt": "a\x00b"}, "prompt"),
    ({"prompt": "a\x1b[2Jb"}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"negative_prompt": "y" * 10_001}, "negative_prompt"),
    ({"model": "../../etc/passwd"}, "model"),
    ({"model": "\u202e\x00\ud800"}, "model"),
    ({"model": {"a": 1}}, "model"),
    ({"model": "x" * 100_000}, "model"),
    ({"size": "64"}, "size"),
    ({"size": "0x0"}, "size"),
    ({"size": "-64x64"}, "size"),
    ({"size": "65x64"}, "size"),
    ({"size": "999999x999999"}, "size"),
    ({"size": [64, 64]}, "size"),
    ({"size": "64x64", "width": 64}, "size"),
    ({"size": "16000x64"}, None),  # memory
    ({"width": 1e400}, "width"),
    ({"width": "1e3"}, "width"),
    ({"num_frames": True}, "num_frames"),
    ({"num_frames": 12}, "num_frames"),
    ({"num_frames": -1}, "num_frames"),
    ({"num_frames": 10**18}, "num_frames"),
    ({"num_frames": 13, "seconds": 2}, "seconds"),
    ({"seconds": "nan"}, "seconds"),
    ({"seconds": "1e300"}, "seconds"),
    ({"seconds": -5}, "seconds"),
    ({"seconds": "4; rm -rf /"}, "seconds"),
    ({"fps": 0}, "fps"),
    ({"fps": "thirty"}, "fps"),
    ({"seed": -5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"num_inference_steps": 10**15}, "num_inference_steps"),
    ({"num_inference_steps": 5, "num_steps": 5}, "num_steps"),
    ({"guidance_scale": "Infinity"}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"threshold_noise": 7}, "threshold_noise"),
    ({"previews": "maybe"}, "previews"),
    ({"user": {}}, "user"),
    ({"output": "/etc/cron.d/x"}, "output"),
    ({"model_dir": "/etc"}, "model_dir"),
    ({"image": "/etc/passwd"}, "image"),
    ({"text_cache": "/tmp"}, "text_cache"),
    ({"--output": "/tmp/x.mp4"}, "--output"),
    ({"__class__": "x"}, "__class__"),
    ({"input_reference": url(picture())}, "input_reference"),  # of a model that takes none
    ({"model": I2V, "input_reference": "http://169.254.169.254/latest"}, "input_reference"),
    ({"model": I2V, "input_reference": "file:///etc/passwd"}, "input_reference"),
    ({"model": I2V, "input_reference": "/etc/passwd"}, "input_reference"),
    ({"model": I2V, "input_reference": {"file_id": "../x"}}, "input_reference"),
    ({"model": I2V, "input_reference": {"image_url": {"url": "x"}}}, "input_reference"),
    ({"model": I2V, "input_reference": "data:image/png;base64,@@@@"}, "input_reference"),
    ({"model": I2V, "input_reference": url(b"no picture")}, "input_reference"),
    ({"model": I2V, "input_reference": url(SVG)}, "input_reference"),
    ({"model": I2V, "input_reference": url(PLAYLIST)}, "input_reference"),
    ({"model": I2V, "input_reference": url(bomb(100_000, 100_000))}, "input_reference"),
    ({"model": I2V, "input_reference": url(bomb(9000, 9000))}, "input_reference"),
    ({"model": I2V, "input_reference": url(picture()[:60])}, "input_reference"),
    ({"model": "cogvideox-demo-2b", "input_reference": url(MP4, "video/mp4")}, "input_reference"),
    ({"model": "cogvideox-demo-2b", "input_reference": url(MKV, "video/webm")}, "input_reference"),
    ({"model": "wan-demo", "input_reference": url(MP4, "video/mp4")}, "input_reference"),
]
BODIES: list[tuple[str, bytes, dict[str, str], int]] = [
    ("empty", b"", JSON, 400),
    ("no JSON", b"{", JSON, 400),
    ("a list", b"[1]", JSON, 400),
    ("not UTF-8", b'{"prompt": "\xff\xfe"}', JSON, 400),
    ("deep", DEEP.encode(), JSON, 400),
    ("a number of many digits", b'{"seed": ' + b"9" * 100_000 + b"}", JSON, 400),
    ("many fields", json.dumps({f"f{i}": i for i in range(5000)}).encode(), JSON, 400),
    ("too large", b'{"prompt": "' + b"x" * (46 << 20) + b'"}', JSON, 413),
    ("no type", b'{"prompt": "x"}', {}, 415),
    ("another type", b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("compressed", zlib.compress(b'{"prompt": "x"}'), {**JSON, "Content-Encoding": "deflate"}, 400),
    ("a form without boundary", b"x", {"Content-Type": "multipart/form-data"}, 400),
    ("a form of another boundary", b"--a\r\n\r\n", {"Content-Type": "multipart/form-data; boundary=b"}, 400),
    ("a form cut off", b"--b\r\nContent-Disp", {"Content-Type": "multipart/form-data; boundary=b"}, 400),
]


@pytest.fixture(autouse=True)
def nothing_is_written_elsewhere(folder: Path, http: httpx.Client) -> Iterator[None]:
    before = {path for path in folder.rglob("*") if (folder / "data") not in path.parents}
    jobs = set((folder / "data" / "jobs").iterdir())
    yield
    assert {path for path in folder.rglob("*") if (folder / "data") not in path.parents} == before
    known = {job["id"] for job in http.get("/v1/videos?limit=100").json()["data"]}
    assert {path.name for path in set((folder / "data" / "jobs").iterdir()) - jobs} <= known
    assert http.get("/health").status_code == 200


def told(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which is one line of ASCII that OpenAI's client can read."""
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(answer.content) < 5000
    assert error["message"] and error["message"].isprintable() and "/hostile" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("given", "param"), FIELDS, ids=lambda value: str(value)[:60].encode("ascii", "replace").decode()
)
def test_a_field_that_is_wrong_is_named(http: httpx.Client, given: dict[str, Any], param: str | None) -> None:
    body = json.dumps({"prompt": "x", "model": "mochi-demo", **given}).encode()
    assert told(http.post("/v1/videos", content=body, headers=JSON), 400)["param"] == param
    if (
        param not in ("input_reference", None)
        and given.get("prompt") != "\ud800"  # which no form can carry
        and all(isinstance(value, str) for value in given.values())
    ):
        form = {
            name: (None, value.encode("utf-8", "replace"))
            for name, value in {"prompt": "x", "model": "mochi-demo", **given}.items()
        }
        told(http.post("/v1/videos", files=form), 400)  # the same as a form


@pytest.mark.parametrize(
    ("content", "headers", "status"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES]
)
def test_a_body_that_cannot_be_read(http: httpx.Client, content: bytes, headers: dict[str, str], status: int) -> None:
    told(http.post("/v1/videos", content=content, headers=headers), status)


def test_names_of_files_are_no_paths(http: httpx.Client, folder: Path) -> None:
    for name in ("../../../escaped.png", "a\x00b", "." * 300):
        files = {"input_reference": (name, picture(), "image/png")}
        answer = http.post("/v1/videos", data={"prompt": "x", "model": I2V}, files=files)
        assert answer.status_code in (200, 400), answer.text
    assert not list(folder.rglob("*escaped*"))
    names = {path.name for path in (folder / "data" / "jobs").glob("*/*")}
    assert names <= {"input.image", "video.mp4", "video.json", "state.safetensors"} or any(
        n.startswith(".") for n in names
    )
    form = [("input_reference", ("a", picture())), ("input_reference", ("b", picture()))]
    told(http.post("/v1/videos", data={"prompt": "x", "model": I2V}, files=form), 400)
    told(http.post("/v1/videos", files={"prompt": ("a", b"x"), "model": (None, I2V)}), 400)


def test_what_is_kept_of_a_picture_is_ours(http: httpx.Client, folder: Path) -> None:
    hidden = picture("JPEG", (30, 20)) + b"PK\x03\x04 a zip behind a picture"
    answer = http.post("/v1/videos", json={"prompt": "x", "model": I2V, "input_reference": url(hidden)})
    kept = folder / "data" / "jobs" / answer.json()["id"] / "input.image"
    assert kept.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and b"PK\x03\x04" not in kept.read_bytes()
    assert Image.open(kept).size == (30, 20)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/videos/../../etc/passwd", 404),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/videos/..%2f..%2fjobs.sqlite3/content", 404),
        ("GET", "/v1/videos/video_%00/content", 404),
        ("GET", "/v1/videos/%ff%fe", 404),
        ("GET", "/v1/videos/" + "x" * 20_000, 404),
        ("GET", "/v1/videos/%27%20OR%201%3D1--", 404),
        ("GET", "/v1/videos?limit=0", 400),
        ("GET", "/v1/videos?limit=99999999999999999999", 400),
        ("GET", "/v1/videos?limit=%D9%A1", 400),
        ("GET", "/v1/videos?order=sideways", 400),
        ("GET", "/v1/videos?after=nobody", 400),
        ("GET", "/v1/images/x/content", 404),
        ("PUT", "/v1/videos", 405),
        ("DELETE", "/v1/videos/none", 404),
        ("GET", "/v1/models/%2e%2e", 404),
        ("GET", "/docs", 404),
    ],
)
def test_paths_lead_nowhere(http: httpx.Client, method: str, path: str, status: int) -> None:
    told(http.request(method, path), status)


def test_wrong_keys_get_in_nowhere(server: Served, http: httpx.Client) -> None:
    long = "x" * 10_000
    for given in (
        "",
        "Bearer",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0]}x",
        f"Basic {KEYS[0]}",
        f"Bearer {long}",
    ):
        answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x"}, headers={"Authorization": given})
        assert told(answer, 401)["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
    answer = httpx.get(f"{server.url}/v1/videos", headers={"Authorization": "Bearer \xff\xfe".encode("latin-1")})
    told(answer, 401)


def raw(server: Served, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back to bytes that are sent one part after another; the connection is left at the end."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as link:
        for part in parts:
            link.sendall(part)
            time.sleep(pause)
        found = b""
        while piece := link.recv(65536):
            found += piece
            if b"\r\n\r\n" in found:
                break
        return found


def test_a_slow_body_is_not_waited_for(server: Served) -> None:
    head = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    began = time.monotonic()
    assert b" 408 " in raw(server, head.encode(), b"{")
    assert time.monotonic() - began < 15


def test_what_is_no_http_is_refused(server: Served, http: httpx.Client) -> None:
    key = f"Authorization: Bearer {KEYS[0]}\r\n".encode()
    assert b" 400 " in raw(server, b"\x16\x03\x01\x02\x00 no http\r\n\r\n")
    assert b" 400 " in raw(server, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
    head = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + key
    assert b" 400 " in raw(server, head + b"Content-Length: -5\r\n\r\n{}")
    assert b" 400 " in raw(server, head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert b" 413 " in raw(server, head + b"Content-Length: 99999999999\r\n\r\n")


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: Served, http: httpx.Client, folder: Path) -> None:
    before = set((folder / "data" / "jobs").iterdir())
    host, port = server.url.removeprefix("http://").split(":")
    for body in (
        b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x"\r\n\r\n' + bytes(70_000),
        b"--b",
    ):
        with socket.create_connection((host, int(port))) as link:
            head = (
                f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Length: 900000\r\n"
            )
            link.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + body)
    time.sleep(0.3)
    assert http.get("/health").status_code == 200 and set((folder / "data" / "jobs").iterdir()) == before


def test_a_server_without_keys_answers_no_page_from_elsewhere(tmp_path: Path) -> None:
    with served(tmp_path / "data") as server:
        body = {"prompt": "x", "model": "mochi-demo"}
        told(httpx.get(f"{server.url}/v1/videos", headers={"Host": "evil.example"}), 403)
        told(httpx.post(f"{server.url}/v1/videos", json=body, headers={"Origin": "https://evil.example"}), 403)
        assert httpx.post(f"{server.url}/v1/videos", json=body, headers={"Origin": server.url}).status_code == 200
        answer = httpx.get(f"{server.url}/v1/videos", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


BOUNDED = """
import os, sys
sys.path[:0] = [sys.argv[1]]
from xdit_serve.decode import bound
bound()
try:
    os.write(os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY), b"x")
except OSError:
    print("no file")
try:
    bytearray(4 << 30)
except MemoryError:
    print("no memory")
"""


def test_a_decoder_can_do_little(tmp_path: Path) -> None:
    """Bounds that hold whatever it is made to do."""
    command = [sys.executable, "-c", BOUNDED, str(Path(__file__).parents[1]), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "no file\nno memory\n", done
