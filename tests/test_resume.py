"""A sampling that ends after some step, gone on with on other layouts, makes the same video."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_xdit import CogVideoXPipeline
from common.parallel.mesh import Layout, Mesh, distributed
from common.run.resume import pack, read_state
from common.run.states import join
from common.run.unfinished import metadata
from common.system.files import write_file
from common.video.states import State, StateKeeper
from mochi_xdit import MochiPipeline
from mochi_xdit.fork import FORK as MOCHI
from tests.helpers import cogvideox, mochi
from tests.helpers.programs import main
from wan_xdit import WanPipeline
from wan_xdit.demo import demo_config, demo_vae, random_checkpoint

STEPS = 4
KIND = "t2v-a14b"
CASES = {
    "mochi": (MochiPipeline, {}, {"height": 48, "width": 80, "num_frames": 19}),
    "ddim": (CogVideoXPipeline, {"scheduler": "ddim"}, {"height": 48, "width": 32, "num_frames": 17}),
    "dpm": (CogVideoXPipeline, {"scheduler": "dpm"}, {"height": 48, "width": 32, "num_frames": 17}),
    "wan-unipc": (WanPipeline, {}, {"height": 48, "width": 32, "num_frames": 9, "cfg_scale_2": 3.0}),
    "wan-dpm": (WanPipeline, {}, {"height": 48, "width": 32, "num_frames": 9, "solver": "dpm"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    of_cogvideox = cogvideox.write_checkpoint(tmp_path_factory.mktemp("cogvideox"), "5b")
    of_mochi = mochi.write_checkpoint(tmp_path_factory.mktemp("mochi"))
    of_wan = tmp_path_factory.mktemp("wan")
    random_checkpoint(of_wan, KIND, demo_config(KIND), demo_vae(KIND), torch.float32)
    folders = {"mochi": of_mochi, "ddim": of_cogvideox, "dpm": of_cogvideox}
    return folders | {"wan-unipc": of_wan, "wan-dpm": of_wan}


def sampled(
    case: str, folder: Path, layout: Layout, begun: Path | None = None, gather: bool = False
) -> tuple[Tensor, dict[int, bytes]]:
    """The latents, and this rank's part of the state after every step."""
    kind, options, size = CASES[case]
    mesh: Mesh = distributed(layout)
    parts: dict[int, bytes] = {}

    def deliver(step, steps, shards, whole, view) -> None:
        parts[step] = pack(shards, whole, view)

    load = None if begun is None else (lambda: read_state(begun))
    keeper = StateKeeper(load, deliver, gather)
    pipe = kind.from_pretrained(folder, mesh=mesh, dtype="fp64", **options)
    latents = pipe("a red ball", "a blue box", **size, num_steps=STEPS, seed=7, output="latent", keeper=keeper)
    keeper.wait()
    return latents, parts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_another_layout_goes_on_after_any_step(run_ranks, folders, tmp_path, case):
    folder = folders[case]
    expected, kept = sampled(case, folder, Layout())
    assert sorted(kept) == list(range(STEPS + 1))
    layouts = [Layout(ulysses=2), Layout(cfg=2, ring=2), Layout(ring=3), Layout()]
    begun = None
    for step, layout in zip((1, 3, STEPS, None), layouts):
        results = run_ranks(layout.ranks, sampled, case, folder, layout, begun)
        for latents, _ in results:
            assert (latents - expected).abs().max() <= 1e-10
        if step is not None:
            of_tokens = results[: layout.ring * layout.ulysses]
            begun = tmp_path / str(step)
            write_file(begun, join([parts[step] for _, parts in of_tokens], {"step": str(step)}))
            assert (begun.stat().st_size > 1000) and torch.isfinite(read_state(begun).shards["z"]).all()


@pytest.mark.slow
def test_one_rank_can_keep_the_tokens_of_all(run_ranks, folders, tmp_path):
    (_, alone), *_ = run_ranks(1, sampled, "dpm", folders["dpm"], Layout())
    for _, parts in run_ranks(3, sampled, "dpm", folders["dpm"], Layout(ring=3), None, True):
        (tmp_path / "theirs").write_bytes(join([parts[2]], {"step": "2"}))
        (tmp_path / "ours").write_bytes(join([alone[2]], {"step": "2"}))
        theirs, ours = read_state(tmp_path / "theirs"), read_state(tmp_path / "ours")
        assert theirs.shards.keys() == ours.shards.keys() == {"z", "before"}
        for name, tensor in ours.shards.items():
            assert (theirs.shards[name] - tensor).abs().max() <= 1e-10
        assert torch.equal(theirs.whole["generator"], ours.whole["generator"])


def test_a_state_of_another_size_is_refused(folders):
    pipe = MochiPipeline.from_pretrained(folders["mochi"], dtype="fp64")
    for state in (State(1, {"z": torch.zeros(1, 3, 12)}), State(9, {"z": torch.zeros(1, 60, 48)}), State(1, {})):
        with pytest.raises(ValueError, match="the kept state is of another"):
            pipe("a", height=48, width=80, num_frames=19, num_steps=STEPS, keeper=StateKeeper(lambda s=state: s))


@pytest.mark.slow
def test_a_killed_program_goes_on_with_other_ranks(tmp_path, monkeypatch, capfd):
    """Killed at once, with all its ranks, in the middle of the second of two videos."""
    program = Path(sys.executable).with_name("mochi-xdit")
    command = [str(program), "--demo", "--device", "cpu", "--seed", "3", "--dtype", "fp32", "--num-videos", "2"]
    command += ["--num-steps", "40", "--save-every", "0", "--output"]
    monkeypatch.chdir(tmp_path)
    assert main(MOCHI, [*command[1:], "ref.mp4", "--gpus", "1"]) == 0
    capfd.readouterr()
    with subprocess.Popen([*command, "x.mp4", "--gpus", "2"], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        path, end = tmp_path / "x.state.safetensors", time.monotonic() + 120
        while not (path.exists() and (kept := metadata(path))["video"] == "1" and int(kept["step"]) > 1):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    first = (tmp_path / "x-1.mp4").stat().st_mtime_ns
    assert not (tmp_path / "x-2.mp4").exists()
    assert main(MOCHI, [*command[1:], "x.mp4", "--gpus", "1"]) == 0
    assert "going on with an interrupted run: video 2 of 2" in capfd.readouterr().err
    assert (tmp_path / "x-1.mp4").stat().st_mtime_ns == first
    assert sorted(p.name for p in tmp_path.glob("x*")) == ["x-1.json", "x-1.mp4", "x-2.json", "x-2.mp4"]
    assert frames(tmp_path / "x-2.mp4").sub(frames(tmp_path / "ref-2.mp4")).abs().max() <= 3


def frames(path: Path) -> Tensor:
    """Of a coded video, int."""
    from common.video.files import read_video

    return torch.from_numpy(read_video(path)[0]).int()
