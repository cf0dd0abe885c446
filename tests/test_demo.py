"""The demo checkpoint's common part: reproducible, complete or absent, safe when asked for twice."""

import threading

import pytest

from common.demo import cache_home, made_once, write_text_encoder

CAPTIONS = [f"A {c} {s}." for c in ("red", "green", "blue") for s in ("circle", "square")]


def test_the_text_encoder_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write_text_encoder(tmp_path / name, CAPTIONS, seed=3, d_model=16, heads=2, d_kv=8, d_ff=16)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    write_text_encoder(tmp_path / "c", CAPTIONS, seed=4, d_model=16, heads=2, d_kv=8, d_ff=16)
    weights = "text_encoder/model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def test_a_folder_is_made_once_and_only_whole(tmp_path):
    target, gate, made = tmp_path / "deep" / "checkpoint", threading.Barrier(3), []

    def make(folder):
        gate.wait(10)
        (folder / "file").write_text("whole")
        made.append(folder)

    threads = [threading.Thread(target=made_once, args=(target, make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and (target / "file").read_text() == "whole"
    assert [p.name for p in target.parent.iterdir()] == ["checkpoint"]
    assert made_once(target, None) == target


def test_a_failed_making_leaves_nothing(tmp_path):
    def make(folder):
        (folder / "half").touch()
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        made_once(tmp_path / "checkpoint", make)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        made_once(tmp_path / "file" / "checkpoint", make)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "xdit"
    assert cache_home("/x").as_posix() == "/x"
