"""Pictures, videos and identity files that are damaged, disguised or made to harm."""

from __future__ import annotations

import itertools
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file

from common.run.options import unreadable_image
from common.video.files import read_frames, read_video
from common.video.formats import write_frames
from common.video.inputs import image_frames, video_frames
from common.video.pictures import read_image
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.face import FaceConfig, IdentityFeatures, load_identity
from tests.fuzz.media import FORMATS, REFUSED, mutated_files, picture

CASES = int(os.environ.get("FUZZ_CASES", "300"))
WRITABLE = [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")]


def line(path: Path, read) -> str | None:
    """What `read` says of a file it refuses: one printable line with the file's name."""
    try:
        read(path)
    except ValueError as error:
        said = str(error)
        assert str(path) in said and said.isprintable() and len(said) < 1000, ascii(said[:500])
        return said
    return None


@pytest.mark.parametrize("kind", WRITABLE)
def test_formats_that_are_read(tmp_path, kind):
    (tmp_path / "a").write_bytes(picture(kind))
    assert read_image(tmp_path / "a").shape == (16, 24, 3)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_formats_never_reach_their_decoders(tmp_path, kind, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture(kind))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("ran Ghostscript"))
    assert "none of PNG, JPEG" in str(line(tmp_path / "a.png", read_image))


def test_mutated_pictures_are_read_or_refused_in_one_line(tmp_path, recwarn):
    path = tmp_path / "a"
    contents = [picture(kind) for kind in (*WRITABLE, *REFUSED)] + [picture("PNG", mode="P"), picture("GIF", mode="L")]
    seen = set()
    for content in itertools.islice(mutated_files(contents, seed=3), CASES):
        path.write_bytes(content)
        seen.add(line(path, read_image) is None)
    assert seen == {True, False} and not [w for w in recwarn if "PIL" in str(w.filename)]


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    for side in (12_000, 100_000):
        header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(png)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "pixels" in str(line(tmp_path / "bomb.png", read_image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 2, 2))
    path = tmp_path / "a.png"
    if mode == "P":
        image.quantize(4).save(path)
    else:
        (image.convert(mode) if mode != "PA" else image).save(path.with_suffix(".tif" if mode == "PA" else ".png"))
    path = next(tmp_path.iterdir())
    assert (read_image(path)[:, 2:] == 255).all() and (read_image(path)[:, :2] < 255).any()
    assert torch.equal(image_frames(Image.open(path), 2, 4), image_frames(path, 2, 4))


def test_numbers_without_an_agreed_white_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    assert "floating point" in str(line(tmp_path / "f.tif", read_image))
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "i.tif")
    assert "more than 16 bits" in str(line(tmp_path / "i.tif", read_image))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_frames(path, np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8), 8)
    return path


def test_a_video_is_a_file_whatever_its_name_looks_like(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tcp:x.mp4", "http:a", "concat:a|b.mp4", "-i.mp4", "%03d.mp4"):
        Path(name).write_bytes(clip.read_bytes())
        assert len(read_video(name)[0]) == 9


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{clip}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_a_list_of_other_files_is_not_followed(tmp_path, clip, text):
    path = tmp_path / "a.mp4"
    path.write_text(text.format(clip=clip))
    assert line(path, read_video) is not None
    other = path.with_suffix(".m3u8" if "EXTM3U" in text else ".ffconcat")
    path.rename(other)
    assert line(other, read_video) is not None


def test_frames_come_one_by_one(clip):
    frames = read_frames(clip, 5)
    assert next(frames).shape == (32, 48, 3) and len(list(frames)) == 4
    assert np.array_equal(np.stack(list(read_frames(clip))), read_video(clip)[0])
    assert torch.equal(video_frames(clip, 16, 24, 9), video_frames(read_video(clip)[0], 16, 24, 9))
    with pytest.raises(ValueError, match=r"a\.mp4 has 9 frames, fewer than the 10"):
        video_frames(clip, 16, 24, 10)


@pytest.mark.slow
def test_mutated_videos_are_read_or_refused_in_one_line(tmp_path, clip):
    path = tmp_path / "a.mp4"
    for content in itertools.islice(mutated_files([clip.read_bytes()], seed=4), CASES // 15):
        path.write_bytes(content)
        line(path, lambda path: list(read_frames(path, 9)))


def test_the_command_line_names_damaged_pictures(tmp_path):
    content = picture("AVIF") if "AVIF" in WRITABLE else picture("PNG")
    path = tmp_path / "a.avif"
    for middle in range(len(content) // 2, len(content), 7):
        path.write_bytes(content[:middle] + bytes(7) + content[middle + 7 :])
        said = unreadable_image(path)
        assert all(text.startswith(f"--image {path}") for text in said)


def identity(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    hidden = tuple(torch.ones(1, 3, 1024) for _ in range(5))
    made = IdentityFeatures(torch.ones(1, 1280), hidden, torch.ones(4, 4, 3, dtype=torch.uint8), torch.ones(5, 2))
    return made.tensors() | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"id_cond": torch.ones(0, 1280)},
        {"id_cond": torch.ones(2, 1280)},
        {"id_cond": torch.ones(1, 1279)},
        {"id_cond": torch.full((1, 1280), float("nan"))},
        {"id_cond": torch.ones(1, 1280, dtype=torch.int64)},
        {"id_vit_hidden.2": torch.ones(2, 3, 1024)},
        {"id_vit_hidden.2": torch.ones(1, 4, 1024)},
        {"id_vit_hidden.4": torch.full((1, 3, 1024), float("inf"))},
        {"id_vit_hidden.5": torch.ones(1, 3, 1024)},
        {f"id_vit_hidden.{i}": torch.ones(1, 3, 7) for i in range(5)},
        {"face_kps": torch.full((5, 2), float("nan"))},
        {"image": torch.ones(0, 4, 3, dtype=torch.uint8)},
        {"image": torch.tensor(1, dtype=torch.uint8)},
    ],
)
def test_identity_files_are_checked_whole(tmp_path, changes):
    path = tmp_path / "who.safetensors"
    save_file(identity(), path)
    load_identity(path, ConsisIDConfig())
    save_file(identity(**changes), path)
    assert "make the file again" in str(line(path, lambda path: load_identity(path, ConsisIDConfig())))


@pytest.mark.parametrize(
    "text", ['{"tower": 7}', '{"tower": {"layers": 1000000000}}', '{"parser_base": "x"}', '{"other": 1}', "[]", "{"]
)
def test_descriptions_of_face_models(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert line(tmp_path / "config.json", lambda path: FaceConfig.read(path.parent))
