"""The page, as a browser shows it and as strangers ask for it. Chromium is Debian's (`apt-get install chromium`)."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.helpers.fake_server import Served, served
from xdit_serve.keys import Keys
from xdit_serve.sessions import Sessions

CHROMIUM = shutil.which("chromium")
KEYS = ("the first of the keys", "the second of the keys")
PATIENCE = 120_000
"""Milliseconds that a busy machine may take."""
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed (the extra page)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("open") / "data", "--page", "--step-seconds", "0.01") as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("locked") / "data", "--page", "--keys", *KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or find_spec("playwright") is None:
        pytest.skip("needs Chromium (apt-get install chromium) and playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """The page, open; whatever it asked of other hosts fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, elsewhere = context.new_page(), []
    own = (server.url, "data:", "blob:")
    opened.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
    opened.set_default_timeout(PATIENCE)
    opened.goto(server.url)
    opened.get_by_text("A small demo.").wait_for()
    yield opened
    context.close()
    assert not elsewhere


def make(page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Make", exact=True).click()


def test_a_video_is_made_watched_and_played(page) -> None:
    make(page, "a red circle [play] [slow 0.3]")
    bar = page.get_by_role("progressbar")
    bar.wait_for()
    page.get_by_text(re.compile(r"Sampling: step \d+ of 20, about \d+ s left\.")).wait_for()
    page.get_by_alt_text(re.compile("Preview after step")).wait_for()
    page.reload()
    bar.wait_for()  # it is still there
    video = page.locator("video").first
    video.wait_for()
    assert bar.count() == 0 or not bar.is_visible()
    video.evaluate("video => video.play()")
    page.wait_for_function("document.querySelector('video').currentTime > 0.5")
    assert video.evaluate("video => video.videoWidth") == 64


def test_again_with_these_fills_the_form(page, server) -> None:
    fields = {"model": "mochi-demo", "prompt": "a <b>green</b> ball", "seed": 77, "num_inference_steps": 3}
    job = httpx.post(f"{server.url}/v1/videos", json=fields).json()["id"]
    shown = page.get_by_text("a <b>green</b> ball")  # as text, not as HTML
    shown.first.wait_for()
    page.get_by_role("button", name="Again with these").first.click()
    page.wait_for_function("document.querySelector('textarea').value == 'a <b>green</b> ball'")
    page.get_by_text("Advanced settings").click()
    assert page.get_by_label("Seed").input_value() == "77"
    assert page.get_by_label("Steps").input_value() == "3"
    page.get_by_role("button", name="Delete").first.click()
    shown.first.wait_for(state="hidden")
    assert httpx.get(f"{server.url}/v1/videos/{job}").status_code == 404


def test_a_job_is_cancelled_and_one_behind_it_knows_its_place(page, server) -> None:
    make(page, "the first [slow 0.5]")
    page.get_by_text("Sampling").wait_for()
    make(page, "the second [slow 0.5]")
    page.get_by_text("Next in the queue.").wait_for()
    for left in (1, 0):
        page.get_by_role("button", name="Cancel").first.click()
        page.wait_for_function(f"document.querySelectorAll('[role=progressbar]').length == {left}")
    page.get_by_text("Nothing is being made.").wait_for()
    jobs = httpx.get(f"{server.url}/v1/videos").json()["data"]
    assert not [job for job in jobs if job["status"] in ("queued", "in_progress")]


def test_what_cannot_be_is_said_in_the_form_and_failures_where_videos_are(page) -> None:
    page.get_by_label("Seconds").fill("100000")
    make(page, "a ball")
    alert = page.get_by_role("alert")
    alert.first.wait_for()
    assert "not a length that can be made" in alert.first.inner_text()
    page.get_by_label("Seconds").fill("1")
    make(page, "a ball [fail]")
    page.get_by_text("Failed: it was told to fail").wait_for()


def test_it_fits_a_phone_and_works_by_keyboard(page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    time.sleep(0.5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("by keyboard [slow 0.3]")
    prompt.press("Shift+Enter")
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="Cancel").first.press("Enter")
    page.get_by_role("progressbar").wait_for(state="hidden")


@contextmanager
def login(url: str, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/login", data={"key": key})
        assert answer.status_code == 303 and "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
        yield client


def test_a_stranger_sees_nothing_but_the_question_for_a_key(locked) -> None:
    with httpx.Client(base_url=locked.url, timeout=60) as stranger:
        assert stranger.get("/").headers["location"] == "/login"
        assert "asks for a key" in stranger.get("/login").text
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/assets/x.js", "/theme.css"):
            assert stranger.get(path).status_code == 401, path
        assert stranger.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
        assert stranger.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        refused = stranger.post("/login", data={"key": "<script>"})
        assert refused.status_code == 401 and "<script>" not in refused.text
        assert stranger.get("/", headers={"cookie": "xdit_session=made-up"}).status_code == 303


def test_a_key_opens_the_page_and_its_own_videos_alone(locked: Served) -> None:
    with login(locked.url, KEYS[0]) as one, login(locked.url, KEYS[1]) as other:
        page = one.get("/")
        assert page.status_code == 200 and "frame-ancestors 'none'" in page.headers["content-security-policy"]
        bearer = {"authorization": f"Bearer {KEYS[0]}"}
        job = one.post("/v1/videos", json={"model": "mochi-demo", "prompt": "x"}, headers=bearer).json()["id"]
        end = time.monotonic() + 60
        while (answer := one.get(f"/v1/videos/{job}/content")).status_code != 200:
            assert time.monotonic() < end and answer.status_code == 409
            time.sleep(0.1)
        assert other.get(f"/v1/videos/{job}/content").status_code == 404
        # The cookie is for looking: what changes something wants the key itself.
        assert one.delete(f"/v1/videos/{job}").status_code == 401
        assert one.post("/v1/videos", json={"model": "mochi-demo", "prompt": "x"}).status_code == 401


def test_a_session_is_found_beside_cookies_of_other_programs() -> None:
    sessions = Sessions(Keys(KEYS))
    token = sessions.begin(KEYS[0])
    assert token is not None
    for other in ('a={"b": 1}', "[c]=2", "d=e"):
        assert sessions.owner({b"cookie": f"{other}; xdit_session={token}".encode()}) is not None, other


def test_bodies_and_paths_have_an_end(server: Served, tmp_path: Path) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=../../jobs.db", "/file=/etc/passwd"):
            assert client.get(path).status_code in (403, 404)
        try:
            large = client.post("/gradio_api/queue/join", content=b" " * (3 << 20)).status_code
        except httpx.HTTPError:
            large = 400  # the connection was closed
        assert large >= 400
        assert client.get("/gradio_api/info").status_code == 200
        foreign = client.post("/gradio_api/queue/join", json={}, headers={"origin": "https://elsewhere.example"})
        assert foreign.status_code == 403
