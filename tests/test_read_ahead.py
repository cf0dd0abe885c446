"""Files read ahead: whole, in the background, and never in the way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from common.weights import ahead


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened to be read ahead."""
    opened: list[str] = []
    own = Path.open

    def noted(path: Path, *given: object, **more: object) -> object:
        opened.append(path.name)
        return own(path, *given, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", noted)
    return opened


def write(folder: Path) -> list[Path]:
    files = [folder / "a", folder / "b"]
    for file in files:
        file.write_bytes(b"x" * 1000)
    return files


def test_files_are_read_to_their_ends(tmp_path: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PIECE", 300)
    files, done = write(tmp_path), threading.Event()
    seen.clear()
    own = ahead._read
    monkeypatch.setattr(ahead, "_read", lambda *given: (own(*given), done.set()))
    with ahead.read_ahead([files[0], tmp_path / "gone", files[1]], 10_000):
        assert done.wait(60)
    assert seen == ["a", "gone", "b"]
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_what_does_not_fit_into_memory_is_left_alone(tmp_path: Path, seen: list[str]) -> None:
    files = write(tmp_path)
    seen.clear()
    with ahead.read_ahead(files, 1999):
        pass
    assert seen == []


def test_leaving_stops_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PIECE", 1)
    file = tmp_path / "long"
    with file.open("wb") as made:
        made.truncate(1 << 40)  # a hole, which would be read for days
    with ahead.read_ahead([file], 1 << 41), pytest.raises(RuntimeError, match="a step failed"):
        raise RuntimeError("a step failed")
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]
