"""The server as its clients see it, over a group without ranks: the openai client unchanged, events, keys, ends."""

from __future__ import annotations

import base64
import io
import json
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from tests.helpers.fake_group import PNG, content
from tests.helpers.fake_server import Served, served

KEYS = ("first-key-123", "second-key-456")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served") / "data", "--step-seconds", "0.01", "--keys", *KEYS) as server:
        yield server


def client(server: Served, key: str = KEYS[0], retries: int = 0) -> openai.OpenAI:
    warnings.filterwarnings("ignore", message=".*[Vv]ideos? API.*")
    return openai.OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=retries)


def web(server: Served, key: str = KEYS[0]) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def make(http: httpx.Client, prompt: str = "a ball", **more: object) -> dict:
    answer = http.post("/v1/videos", json={"prompt": prompt, "model": "mochi-demo", **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def until(http: httpx.Client, job: str, *statuses: str, seconds: float = 20) -> dict:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = http.get(f"/v1/videos/{job}").json()
        if found.get("status") in statuses:
            return found
        time.sleep(0.02)
    raise AssertionError(found)


def test_the_openai_client_makes_polls_lists_downloads_and_deletes(server: Served) -> None:
    api = client(server, KEYS[1])
    more = {"seed": 7, "num_inference_steps": 5, "guidance_scale": 2.5, "fps": 6}
    video = api.videos.create_and_poll(
        prompt="a red ball", model="mochi-demo", seconds="2", size="96x64", extra_body=more, poll_interval_ms=50
    )
    assert (video.status, video.progress, video.size, video.error) == ("completed", 100, "96x64", None)
    assert (video.seconds, video.model, video.prompt) == (
        "2.16667",
        "mochi-demo",
        "a red ball",
    )  # 13 frames of 6 a second
    told = video.to_dict()
    assert (told["num_frames"], told["seed"], told["num_inference_steps"], told["guidance_scale"]) == (13, 7, 5, 2.5)
    assert video.created_at <= video.completed_at < video.expires_at
    assert api.videos.download_content(video.id).read() == content("a red ball", 7)
    others = [api.videos.create(prompt=f"ball {i}", model="mochi-demo").id for i in range(4)]
    assert [one.id for one in api.videos.list(limit=2)] == [*others[::-1], video.id]  # pages by itself
    assert [one.id for one in api.videos.list(limit=3, order="asc", after=video.id)] == others
    assert api.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.videos.retrieve(video.id)
    with pytest.raises(openai.NotFoundError):
        api.videos.download_content(video.id)
    assert "mochi-demo" in [model.id for model in api.models.list()]
    with pytest.raises(openai.BadRequestError) as refused:
        api.videos.create(prompt="x", model="mochi-demo", size="65x64")
    assert refused.value.param == "size" and "nearest: 64 or 80" in refused.value.message


def test_a_picture_comes_with_the_form_or_as_a_data_url(server: Served) -> None:
    api = client(server)
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "JPEG")
    video = api.videos.create(
        prompt="go", model="cogvideox-demo-5b-i2v", input_reference=("../../x.jpg", file.getvalue())
    )
    assert api.videos.poll(video.id, poll_interval_ms=50).status == "completed"
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    reference = {"input_reference": {"image_url": url}}
    video = api.videos.create(prompt="go", model="cogvideox-demo-5b-i2v", extra_body=reference)
    assert api.videos.poll(video.id, poll_interval_ms=50).status == "completed"
    with web(server) as http:
        assert make(http, "go", model="cogvideox-demo-5b-i2v", input_reference=url)["status"] == "queued"
        answer = http.post("/v1/videos", json={"prompt": "go", "model": "mochi-demo", "input_reference": url})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")


def test_events_tell_every_step_and_the_end(server: Served) -> None:
    with web(server) as http:
        job = make(http, "[slow 0.3]", num_inference_steps=3)["id"]
        with http.stream("GET", f"/v1/videos/{job}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in stream.iter_lines() if line]
    found = [
        (lines[i].removeprefix("event: "), json.loads(lines[i + 1].removeprefix("data: ")))
        for i in range(0, len(lines), 2)
    ]
    steps = [
        (told["step"], told["steps"])
        for event, told in found
        if event == "progress" and told.get("stage") == "sampling"
    ]
    assert steps[:2] == [(1, 3), (2, 3)]
    progress = [told["progress"] for event, told in found if event != "preview"]
    assert progress == sorted(progress) and progress[-1] == 100
    assert found[-1][0] == "completed"
    previews = [told for event, told in found if event == "preview"]
    assert previews and base64.b64decode(previews[0]["image"].split(",")[1]) == PNG


def test_previews_can_be_left_out(server: Served) -> None:
    with web(server) as http:
        job = make(http, "[slow 0.2]", num_inference_steps=3, previews="false")["id"]
        with http.stream("GET", f"/v1/videos/{job}/events") as stream:
            assert not [line for line in stream.iter_lines() if line == "event: preview"]


def test_sync_answers_with_the_video_or_why_not(server: Served) -> None:
    with web(server) as http:
        fields = {"prompt": "now", "model": "mochi-demo", "seed": 3}
        answer = http.post("/v1/videos/sync", json=fields)
        assert (answer.headers["content-type"], answer.content) == ("video/mp4", content("now", 3))
        part = http.get(f"/v1/videos/{answer.headers['x-job-id']}/content", headers={"Range": "bytes=2-5"})
        assert (part.status_code, part.content) == (206, content("now", 3)[2:6])
        for word, status, code in (
            ("wrong", 400, "invalid_request"),
            ("memory", 500, "out_of_memory"),
            ("fail", 500, "generation_failed"),
        ):
            answer = http.post("/v1/videos/sync", json=fields | {"prompt": f"[{word}]"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_client_that_leaves_a_sync_request_takes_its_job_along(server: Served) -> None:
    with web(server) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/videos/sync", json={"prompt": "[slow 0.1] left alone", "model": "mochi-demo"}, timeout=0.5)
        end = time.monotonic() + 10
        while any("left alone" in job["prompt"] for job in http.get("/v1/videos").json()["data"]):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_deleting_a_running_video_ends_it_and_the_next_begins(server: Served) -> None:
    with web(server) as http:
        long, following = make(http, "[slow 0.2] long", num_inference_steps=100)["id"], make(http, "following")["id"]
        until(http, long, "in_progress")
        assert http.get(f"/v1/videos/{following}").json()["queue_position"] == 0
        assert http.get(f"/v1/videos/{long}/content").status_code == 409
        assert http.delete(f"/v1/videos/{long}").json() == {"id": long, "object": "video.deleted", "deleted": True}
        assert http.get(f"/v1/videos/{long}").status_code == 404
        until(http, following, "completed", seconds=5)  # the long one would take twenty


def test_a_job_whose_ranks_are_lost_goes_on_or_fails_at_the_third_time(server: Served) -> None:
    with web(server) as http:
        job = make(http, "[lost once at 3]", seed=5)["id"]
        assert until(http, job, "completed")["error"] is None
        assert http.get(f"/v1/videos/{job}/content").content == content("[lost once at 3]", 5)
        waits = make(http, "[full once]", seed=6)["id"]  # for room on the disk
        again, following = make(http, "[lost at 2]")["id"], make(http, "after it")["id"]
        error = until(http, again, "failed")["error"]
        assert error["code"] == "generation_failed" and "rank 1 was killed by signal 9" in error["message"]
        assert http.get(f"/v1/videos/{waits}/content").content == content("[full once]", 6)
        assert "3 times" in error["message"] and http.get(f"/v1/videos/{again}/content").status_code == 404
        until(http, following, "completed")
        said = http.get("/metrics").text
        assert 'xdit_restarts{group="0"} 4.0' in said and 'xdit_steps_total{model="mochi-demo"}' in said
        assert "xdit_queue_length 0.0" in said and "xdit_memory_bytes" in said


def test_a_key_sees_its_own_jobs_alone(server: Served) -> None:
    with web(server) as first, web(server, KEYS[1]) as second:
        mine = make(first)["id"]
        until(first, mine, "completed")
        assert mine in [job["id"] for job in first.get("/v1/videos?limit=100").json()["data"]]
        assert mine not in [job["id"] for job in second.get("/v1/videos?limit=100").json()["data"]]
        for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
            answer = second.request(method, f"/v1/videos/{mine}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert second.get(f"/v1/videos?after={mine}").status_code == 400
        assert first.get(f"/v1/videos/{mine}").json()["status"] == "completed"
    with pytest.raises(openai.AuthenticationError):
        client(server, "no-such-key").videos.list()
    for path in ("/v1/videos", "/v1/models", "/metrics"):
        assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url + "/health").json()["status"] == "ready"


def test_every_answer_is_a_line_of_json_without_keys(server: Served) -> None:
    httpx.get(server.url + "/v1/no%E2%80%AEsuch%1B[2J", headers={"Authorization": f"Bearer {KEYS[0]}"})
    end = time.monotonic() + 10
    while not (found := [line for line in server.said.splitlines() if line.startswith("{") and "such" in line]):
        assert time.monotonic() < end  # the line comes after the answer
        time.sleep(0.02)
    last = json.loads(found[-1])
    assert (last["method"], last["status"], last["client"]) == ("GET", 404, "127.0.0.1") and last["seconds"] >= 0
    assert last["key"] and not any(key in server.said for key in KEYS) and server.said.isascii()


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with served(tmp_path / "data", "--queue", "2", "--step-seconds", "0.2") as server, web(server) as http:
        running = make(http)["id"]
        until(http, running, "in_progress")
        make(http), make(http)
        answer = http.post("/v1/videos", json={"prompt": "x", "model": "mochi-demo"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        assert len(list((tmp_path / "data" / "jobs").iterdir())) == 3
        with pytest.raises(openai.RateLimitError):
            client(server).videos.create(prompt="x", model="mochi-demo")


def test_sigterm_lets_no_job_in_and_keeps_the_running_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(tmp_path / "data", "--step-seconds", "0.1", "--log", str(log)) as server, web(server) as http:
        running, waiting = make(http, seed=1)["id"], make(http, seed=2)["id"]
        assert until(http, running, "in_progress")
        while http.get(f"/v1/videos/{running}").json().get("step", 0) < 3:
            time.sleep(0.02)
        held = []
        with http.stream("GET", f"/v1/videos/{running}/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            following = threading.Thread(target=lambda: held.extend(lines))
            following.start()
            began = time.monotonic()
            assert server.end() == 0 and time.monotonic() - began < 30
            following.join(5)
    assert held and not following.is_alive()
    with served(tmp_path / "data", "--log", str(log)) as server, web(server) as http:
        for job, seed in ((running, 1), (waiting, 2)):
            until(http, job, "completed")
            assert http.get(f"/v1/videos/{job}/content").content == content("a ball", seed)
    begun = [line.split() for line in log.read_text().splitlines()]
    assert [(name.split(".")[0]) for name, _ in begun] == [running, running, waiting]
    assert int(begun[1][1]) >= 3  # from its last step, not anew


def test_killed_at_any_time_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """Every video is made once and whole; one that ran goes on from a step."""
    log, made = tmp_path / "log", {}
    for life in range(3):
        with served(tmp_path / "data", "--step-seconds", "0.02", "--log", str(log)) as server, web(server) as http:
            for i in range(3):
                seed = 10 * life + i
                made[make(http, seed=seed, num_inference_steps=12)["id"]] = seed
            time.sleep(0.15 + 0.2 * life)
            server.end(signal.SIGKILL)
    with served(tmp_path / "data", "--log", str(log)) as server, web(server) as http:
        for job, seed in made.items():
            until(http, job, "completed")
            assert http.get(f"/v1/videos/{job}/content").content == content("a ball", seed)
        listed = [job["id"] for job in http.get("/v1/videos?limit=100&order=asc").json()["data"]]
        assert listed == list(made)
    begun = [(line.split()[0].split(".")[0], int(line.split()[1])) for line in log.read_text().splitlines()]
    order = list(dict.fromkeys(job for job, _ in begun))
    assert order == list(made) and max(Counter(job for job, _ in begun).values()) <= 4
    assert any(step > 0 for _, step in begun)
    files = {path.name for path in (tmp_path / "data" / "jobs").glob("*/*")}
    assert files == {"video.mp4", "video.json"}
