"""States of a sampling: held for the ranks, joined, written now and then, known again."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.registry.request import Request, WrongUse
from common.run.command_line import parse
from common.run.resume import pack, read_state
from common.run.states import At, Record, Saver, Slots, StateFile, join, newest
from common.run.unfinished import digest, state_file, state_path, states_saved, taken_up, with_interrupted
from mochi_xdit.fork import FORK


@pytest.fixture
def ranks():
    made = [Slots.create() for _ in range(3)]
    yield made
    for slots in made:
        slots.close()


def test_the_newest_state_is_one_that_every_rank_has_written(ranks):
    assert newest(ranks) is None
    for step, written in enumerate((3, 3, 3, 2, 1)):  # as far apart as ranks in collectives can be
        for slots in ranks[:written]:
            slots.write(At(0, step), 9, f"{step}".encode())
    found = newest(ranks)
    assert found == Record(At(0, 2), 9, (b"2", b"2", b"2"))
    for slots in ranks:
        slots.write(At(1, 0), 9, b"")
    assert newest(ranks) == Record(At(1, 0), 9, (b"", b"", b""))


def test_a_state_that_is_being_written_over_is_not_read(ranks):
    (slots, *_) = ranks
    slots.write(At(0, 1), 9, b"long part")
    slots.write(At(0, 4), 9, b"short")
    assert slots.read(At(0, 1)) is None and slots.read(At(0, 4)) == b"short"
    slots.write(At(0, 5), 9, b"")
    assert slots.held() == {At(0, 4): 9, At(0, 5): 9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_of_any_length_are_joined_as_cat_joins_tensors(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(1, n, 5, generator=generator).to(dtype) for n in (4, 0, 1)]
    before = [torch.randn(1, n, 2, 3, generator=generator).to(dtype) for n in (4, 0, 1)]
    whole = {"generator": generator.get_state()}
    parts = [pack({"z": a, "before": b}, whole) for a, b in zip(z, before)]
    path = tmp_path / "x"
    path.write_bytes(join(parts, {"step": "3"}))
    state = read_state(path)
    assert state.step == 3 and torch.equal(state.whole["generator"], whole["generator"])
    assert torch.equal(state.shards["z"], torch.cat(z, 1)) and state.shards["z"].dtype == dtype
    assert torch.equal(state.shards["before"], torch.cat(before, 1))


def test_a_file_that_is_no_state_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no state of a sampling"):
        read_state(path)


def waited(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_states_are_saved_at_the_ends_of_a_sampling_and_in_between_now_and_then(ranks):
    saved: list[At] = []
    saver = Saver(ranks[:1], lambda record: saved.append(record.at), every=1000)
    (slots, *_) = ranks
    slots.write(At(0, 0), 3, b"")
    waited(lambda: saved == [At(0, 0)])
    slots.write(At(0, 1), 3, b"a")
    slots.write(At(0, 3), 3, b"c")
    waited(lambda: saved[-1] == At(0, 3))
    slots.write(At(1, 0), 3, b"")
    waited(lambda: saved[-1] == At(1, 0))
    slots.write(At(1, 1), 3, b"a")
    assert saver.close(finished=False) == (At(1, 1), 3)
    assert saved == [At(0, 0), At(0, 3), At(1, 0), At(1, 1)]
    often = Saver(ranks[:1], lambda record: saved.append(record.at), every=0)
    slots.write(At(1, 2), 3, b"b")
    waited(lambda: saved[-1] == At(1, 2))
    assert often.close(finished=True) == (At(1, 2), 3)


def test_a_full_disk_stops_nothing_and_is_said_once(ranks, capfd):
    tried = []

    def write(record: Record) -> None:
        tried.append(record.at)
        raise OSError("no space left on device")

    saver = Saver(ranks[:1], write, every=0)
    for step in (0, 1):
        ranks[0].write(At(0, step), 3, b"a")
        waited(lambda step=step: At(0, step) in tried)
    assert saver.close(finished=False) is None
    assert capfd.readouterr().err.count("the state of the sampling is not saved: no space left on device") == 1


# --- Commands ---------------------------------------------------------------------------------------------------------


def command(folder: Path, *more: str) -> list[str]:
    return ["--demo", "--device", "cpu", "--output", str(folder / "x.mp4"), *more]


def request(folder: Path, *more: str) -> Request:
    return parse(FORK, command(folder, *more))


@pytest.mark.parametrize(
    "more, same",
    [
        (("--gpus", "3", "--vae", "tiled", "--save-every", "5", "--timeout", "9"), True),
        (("--offload", "block", "--fps", "3"), True),
        (("--num-steps", "9"), False),
        (("--prompt", "a blue box"), False),
        (("--threshold-noise", "0.5"), False),
        (("--dtype", "fp64"), False),
        (("--num-videos", "2"), False),
        (("--seed", "2"), False),
    ],
)
def test_what_decides_a_video_tells_commands_apart(tmp_path, more, same):
    assert (digest(request(tmp_path)) == digest(request(tmp_path, *more))) == same


def leave_state(folder: Path, *more: str, video: int = 0) -> Request:
    """As a command that was killed leaves one."""
    left = taken_up(request(folder, *more))
    part = pack({"z": torch.ones(1, 2, 3)}, {})
    state_file(left, command(folder, *more)).write(Record(At(video, 2), 8, (part,)))
    return left


def test_the_same_command_goes_on_with_its_seed(tmp_path):
    left = leave_state(tmp_path, "--num-videos", "3", video=1)
    again = taken_up(request(tmp_path, "--num-videos", "3", "--gpus", "3"))
    assert [video.seed for video in again.videos] == [video.seed for video in left.videos]
    assert again.unfinished is not None
    assert (again.unfinished.video, again.unfinished.step, again.unfinished.steps) == (1, 2, 8)
    assert "going on with an interrupted run: video 2 of 3, step 2 of 8 is done" in again.remarks


def test_another_command_does_not_take_a_state_over(tmp_path):
    leave_state(tmp_path)
    with pytest.raises(WrongUse, match="an interrupted run of other settings; go on with it by --resume"):
        taken_up(request(tmp_path, "--num-steps", "9"))
    assert taken_up(request(tmp_path, "--num-steps", "9"), fresh=True).unfinished is None
    state_path(tmp_path / "x.mp4").write_bytes(b"something else")
    with pytest.raises(WrongUse, match="is no state of an interrupted run"):
        taken_up(request(tmp_path))


def test_resume_is_the_command_that_left_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = leave_state(tmp_path, "--num-steps", "9", "--seed", "4")
    path = state_path(left.output)
    for spelled in (["--resume", str(path)], [f"--resume={path.name}"]):
        arguments = with_interrupted([*spelled, "--gpus", "3"], FORK.program)
        again = taken_up(parse(FORK, arguments))
        assert again.unfinished is not None and again.layout.ranks == 3 and again.videos == left.videos
    assert with_interrupted(arguments, FORK.program) == arguments


def test_a_folder_has_a_state_of_its_own_whatever_its_name_looks_like(tmp_path):
    for name in ("v1.5", "v1.6"):
        more = ("--output", f"{tmp_path / name}/")
        left = taken_up(request(tmp_path, *more))
        file = state_file(left, command(tmp_path, *more))
        assert file.path == tmp_path / f"{name}.frames.state.safetensors"
        file.write(Record(At(0, 2), 8, (b"",)))
        again = taken_up(parse(FORK, with_interrupted(["--resume", str(file.path)], FORK.program)))
        assert again.unfinished is not None and again.videos == left.videos


def test_a_checkpoint_with_a_link_to_nowhere_tells_commands_apart_too(tmp_path):
    made = request(tmp_path)
    made = replace(made, source=replace(made.source, demo=None, model_dir=tmp_path))
    before = digest(made)
    (tmp_path / "dit.safetensors").symlink_to("gone")
    assert digest(made) != before


def test_what_a_killed_writer_has_left_goes_with_the_file(tmp_path):
    file = StateFile(tmp_path / "x.state.safetensors", {})
    left = tmp_path / ".x.state.abc.partial.safetensors"
    left.write_bytes(b"half")
    file.write(Record(At(0, 1), 2, (b"",)))
    file.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"program": "cogvideox-xdit"}, "is of cogvideox-xdit; go on with that program"),
        ({"output": "../y.mp4"}, "was renamed; its run writes y.mp4"),
        ({"arguments": json.dumps({"a": 1})}, "is no state of an interrupted run"),
        ({"cwd": "/nowhere/at/all"}, "its folder /nowhere/at/all is not there"),
        ({"step": "-1"}, "is no state of an interrupted run"),
        ({"format": "other"}, "is no state of an interrupted run"),
    ],
)
def test_a_state_that_cannot_be_gone_on_with_is_refused_in_one_line(tmp_path, change, said):
    left = leave_state(tmp_path)
    file = state_file(left, command(tmp_path))
    numbers = {"video": "0", "step": "2", "steps": "8"}
    file.path.write_bytes(join([], {**file.identity, **numbers, **change}))
    with pytest.raises(WrongUse, match=said) as wrong:
        with_interrupted(["--resume", str(file.path)], FORK.program)
    assert len(wrong.value.problems) == 1


def test_a_file_stays_after_a_failure_and_goes_with_the_last_video(tmp_path):
    left = taken_up(request(tmp_path, "--num-videos", "2"))
    path = state_path(left.output)
    for done in (False, True):
        with states_saved(left, ["--demo"], 1) as (running, close):
            slots = Slots(running.slots[0])
            slots.write(At(1, 3), 8, pack({"z": torch.ones(1, 2, 3)}, {}))
            said = close(done, False)
        assert path.exists() != done and ("step 3 of video 2 is kept" in said) != done
        if not done:
            assert torch.equal(load_file(path)["tokens.z"], torch.ones(1, 2, 3))
    with states_saved(left, ["--demo"], 1) as (running, close):
        Slots(running.slots[0]).write(At(0, 0), 8, b"")
        assert close(False, False) == ""
    assert not path.exists(), "nothing was done, so there is nothing to go on with"


@pytest.mark.parametrize("count, kept", [(1, False), (2, True)])
def test_finished_latents_are_kept_once(tmp_path, count, kept):
    left = taken_up(request(tmp_path, "--num-videos", str(count)))
    with states_saved(left, ["--demo"], 1) as (running, close):
        Slots(running.slots[0]).write(At(0, 8), 8, pack({"z": torch.ones(1, 2, 3)}, {}))
        assert bool(close(False, True)) == kept == state_path(left.output).exists()


def test_nothing_is_kept_where_nothing_is_sampled(tmp_path):
    made = request(tmp_path)
    decoding = replace(made, videos=tuple(replace(video, latents=tmp_path / "z") for video in made.videos))
    with states_saved(decoding, [], 1) as (running, close):
        assert running.slots == () and close(False, False) == ""


def test_a_state_file_is_whole_or_not_there(tmp_path):
    file = StateFile(tmp_path / "no" / "x", {})
    with pytest.raises(OSError, match="cannot write"):
        file.write(Record(At(0, 1), 2, (b"",)))
