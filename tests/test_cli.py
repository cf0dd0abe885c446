"""The command line: every spelling, every mistake, and mochi-xdit's published commands. Nothing here imports torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.registry.checks import Ranks, Rules, choose_degrees, layout_problems, nearest
from common.registry.request import Request, WrongUse, draw_seeds, settings
from common.run.command_line import parse
from common.system import environment
from common.system.environment import Process
from mochi_xdit.fork import FORK
from tests.fake_fork.fork import FORK as FAKE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    config = tmp_path / "model" / "transformer" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"num_attention_heads": 24}')
    return str(tmp_path / "model")


def read(*arguments: str, at: Process | None = None) -> Request:
    return parse(FORK, arguments, at)


def cpu(ranks: int) -> tuple[str, ...]:
    return "--device", "cpu", "--gpus", str(ranks)


def problems(*arguments: str, at: Process | None = None) -> list[str]:
    with pytest.raises(WrongUse) as wrong:
        read(*arguments, at=at)
    return wrong.value.problems


def test_published_single_gpu_command(checkpoint):
    request = read("--model_dir", checkpoint, "--prompt", "a prompt")
    assert request.layout.ranks == 1 and request.layout.degrees == (1, 1, 1)
    video = request.videos[0]
    assert (
        video.sampling.width,
        video.sampling.height,
        video.sampling.num_frames,
        video.sampling.num_steps,
        video.sampling.cfg_scale,
    ) == (848, 480, 49, 64, 4.5)
    assert video.output.parent == Path("outputs") and video.output.suffix == ".mp4"


@pytest.mark.parametrize(
    ("degrees", "ranks", "layout"),
    [
        (("--ulysses_degree", "2", "--ring_degree", "2"), 4, (1, 2, 2)),
        (("--ulysses_degree", "3", "--ring_degree", "1", "--cfg_parallel"), 6, (2, 1, 3)),
    ],
)
def test_published_multi_gpu_commands(checkpoint, monkeypatch, degrees, ranks, layout):
    monkeypatch.setattr(environment, "visible_gpus", lambda: ranks)
    request = read("--model_dir", checkpoint, "--prompt", "prompt", "--use_xdit", *degrees)
    assert (request.layout.ranks, request.layout.degrees, request.runtime.device) == (ranks, layout, "cuda")
    assert any("--use-xdit" in remark for remark in request.remarks)


def test_degrees_fill_the_gpus_that_are_asked_for(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 8)
    common = ("--model-dir", checkpoint, "--prompt", "x", "--ulysses-degree", "2", "--ring-degree", "2")
    assert read(*common, "--gpus", "8").layout.degrees == (2, 2, 2)
    assert read(*common).layout.ranks == 4
    assert read("--model-dir", checkpoint, "--prompt", "x").layout.degrees == (2, 4, 1)
    assert read("--model-dir", checkpoint, "--prompt", "x", "--cfg-scale", "1").layout.degrees == (1, 8, 1)


def test_a_users_command_is_answered_in_full(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 8)
    found = problems(
        *("--model_dir", checkpoint, "--prompt", "x", "--use_xdit", "--gpus", "8", "--num_frames", "24"),
        *("--ulysses_degree", "4", "--ring_degree", "2", "--cfg_parallel"),
    )
    assert len(found) == 2
    assert "--num-frames 24" in found[0] and "19 or 25" in found[0]
    assert "16 ranks" in found[1] and "--ulysses-degree 4 --ring-degree 1 --cfg-parallel" in found[1]


def test_everything_wrong_is_reported_at_once(tmp_path):
    found = problems(
        *("--model-dir", "nowhere", "--width", "850", "--height", "-16", "--num-frames", "x", "--num-steps", "0"),
        *("--cfg-scale", "nan", "--seed", "-2", "--output", "no/such/a.mp4", "--fps", "0", "--timeout", "0"),
        *("--vae-chunk", "0", "--vae-tile", "3", "--promt", "hello", "--gpus", "0", "--threshold-noise", "2"),
    )
    told = "\n".join(found)
    for part in (
        "nowhere does not exist",
        "--width 850 is not a positive multiple of 16; nearest: 848 or 864",
        "--height -16 is not a positive multiple of 16; nearest: 16",
        "'--num-frames': 'x'",
        "--num-steps 0",
        "--cfg-scale nan",
        "--seed -2 is outside",
        "no/such does not exist",
        "--fps 0",
        "--timeout 0",
        "--vae-chunk 0",
        "'3' is no tile size",
        "no such option: --promt; did you mean --prompt?",
        "--prompt is missing",
        "--gpus 0",
        "--threshold-noise 2",
    ):
        assert part in told
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--model-dir is missing"),
        (("--demo", "--model-dir", "x"), "exclude each other"),
        (("--demo", "--prompt", "x", "--prompt-file", "p.txt"), "exclude each other"),
        (("--demo", "--prompt-file", "none.txt"), "none.txt cannot be read: no such file"),
        (("--demo", "--prompt-file", "empty.txt"), "empty.txt holds no prompt"),
        (("--demo", "--prompt-file", "latin.txt"), "is not UTF-8"),
        (("--demo", "--output", "a.avi"), "nothing is written as .avi"),
        (("--demo", "--output", "."), "is a directory"),
        (("--demo", "--output", "empty.txt/a.mp4"), "is not a folder"),
        (("--demo", "--output", "/proc/a.mp4"), "cannot be written"),
        (("--demo", "--from-latents", "none.safetensors"), "does not exist"),
        (("--demo", "--from-latents", "empty.txt", "--num-videos", "2"), "decodes one video"),
        (("--demo", "--device", "cuda"), "no GPU is visible"),
        (("--demo", "--attention", "flash2"), "needs an NVIDIA GPU"),
        (("--demo", "--vae", "exact", "--vae-tile", "64"), "leave --vae-tile out"),
        (("--demo", "--ulysses-degree", "5"), "more than the model's 4 attention heads"),
        (("--demo", "--ring-degree", "0"), "1 turns it off"),
        (("--demo", "--gpus", "3", "--cfg-parallel"), "--ring-degree 3"),
        (("--demo", "--linear-steps", "99"), "less than --num-steps 20"),
        (("--demo", "--seed", "1", "a", "prompt"), "unexpected argument 'a'"),
        (("--demo", "5b"), "'5b' is not 'default'"),
        (("--num-frames",), "requires an argument"),
        (("--model-dir", "."), "no Mochi checkpoint"),
    ],
)
def test_single_mistakes(tmp_path, arguments, part):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert any(part in line for line in problems(*arguments))


def test_more_ranks_than_gpus(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 2)
    common = ("--model-dir", checkpoint, "--prompt", "x")
    assert "2 GPUs are visible" in problems(*common, "--gpus", "4")[0]
    assert "4 ranks, but 2 GPUs are visible" in problems(*common, "--ring-degree", "4")[0]
    at = Process(rank=0, world_size=4, local_rank=0, local_world_size=4, launcher="torchrun")
    assert "4 ranks on this machine, but 2 GPUs" in problems(*common, at=at)[0]
    # Schedulers may show every rank one GPU, its own.
    monkeypatch.setattr(environment, "visible_gpus", lambda: 1)
    assert read(*common, at=at).layout.ranks == 4


@pytest.mark.parametrize(
    "asked", [("--gpus", "4"), ("--ring-degree", "4"), ("--ulysses-degree", "2", "--cfg-parallel")]
)
def test_ranks_that_count_on_gpus_do_not_end_up_on_the_cpu_unsaid(checkpoint, asked):
    common = ("--model-dir", checkpoint, "--prompt", "x", *asked)
    (line,) = problems(*common)
    assert line.startswith("4 ranks were asked for, but no GPU is visible") and "--device cpu" in line
    assert read(*common, "--device", "cpu").layout.ranks == 4 and not read(*common, "--device", "cpu").remarks
    assert read("--demo", *asked).remarks == ("no GPU is visible: 4 ranks run on the CPU",)
    planned = read("--dry-run", *asked)
    assert (planned.runtime.device, planned.layout.ranks) == ("cuda", 4) and "planned for GPUs" in planned.remarks[0]
    assert read("--dry-run", *asked, "--device", "cpu").on_cpu


def test_two_branches_are_not_shared_out_where_there_is_one(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 4)
    common = ("--model-dir", checkpoint, "--prompt", "x")
    for more in ((), ("--gpus", "2"), ("--ring-degree", "2"), ("--dry-run",)):
        (line,) = problems(*common, "--cfg-scale", "1", "--cfg-parallel", *more)
        assert "there is one" in line and "leave --cfg-parallel out" in line
    assert read(*common, "--cfg-scale", "1").layout.cfg == 1 and read(*common, "--cfg-parallel").layout.cfg == 2


def test_one_rank_shares_no_weights(checkpoint, monkeypatch):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 2)
    common = ("--model-dir", checkpoint, "--prompt", "x", "--shard-weights")
    alone = read(*common, "--gpus", "1")
    assert not alone.runtime.shard_weights and "nobody to share with" in alone.remarks[0]
    assert read(*common).runtime.shard_weights and not read(*common).remarks


def test_launchers_may_show_each_rank_one_gpu(checkpoint, monkeypatch):
    """As srun --gpus-per-task=1 does: eight ranks of a machine, each with a GPU that it calls the first."""
    monkeypatch.setattr(environment, "visible_gpus", lambda: 1)
    at = Process(rank=3, world_size=8, local_rank=3, local_world_size=8, launcher="torchrun")
    request = read("--model-dir", checkpoint, "--prompt", "x", at=at)
    assert request.layout.ranks == 8 and not request.on_cpu


def test_torchruns_world_decides(checkpoint):
    at = Process(rank=1, world_size=6, local_rank=1, local_world_size=6, launcher="torchrun")
    common = ("--model-dir", checkpoint, "--prompt", "x")
    assert read(*common, at=at).layout.degrees == (2, 3, 1)
    assert read(*common, "--ulysses-degree", "3", at=at).layout.degrees == (2, 1, 3)
    assert "6 are running" in problems(*common, "--ring-degree", "4", at=at)[0]
    assert "torchrun started 6" in problems(*common, "--gpus", "4", at=at)[0]


@pytest.mark.parametrize("spelling", ["--num-frames", "--num_frames"])
def test_hyphens_and_underscores(spelling):
    assert read("--demo", spelling, "7").videos[0].sampling.num_frames == 7


def test_a_gpu_that_pytorch_cannot_use_is_mentioned(monkeypatch):
    monkeypatch.setattr(environment, "driver_present", lambda: True)
    assert any("running on the CPU" in remark for remark in read("--demo").remarks)
    assert not read("--demo", "--device", "cpu").remarks


def test_weights_that_were_meant_for_it_do_not_end_up_on_the_cpu(monkeypatch, checkpoint):
    monkeypatch.setattr(environment, "driver_present", lambda: True)
    given = ("--model-dir", checkpoint, "--prompt", "a")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [said for said in problems(*given) if "PyTorch sees no GPU" in said and "--device cpu" in said]
    assert read(*given, "--device", "cpu").runtime.device == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read(*given).runtime.device == "cpu" and not read("--demo").remarks  # the user has hidden the GPUs


@pytest.mark.parametrize("kernel", ["cudnn", "flash2", "flash3"])
def test_half_precision_kernels_want_half_precision(monkeypatch, kernel):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 1)
    assert "bf16 or fp16" in problems("--demo", "--attention", kernel, "--dtype", "fp32")[0]
    assert read("--demo", "--attention", kernel, "--dtype", "bf16").runtime.attention == kernel


def test_prompt_file_and_numbered_videos(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffone\r\n\r\n two \n", encoding="utf-8")
    request = read("--demo", "--prompt-file", "prompts.txt", "--num-videos", "2", "--seed", "7", "--output", "a.mp4")
    made = [(v.prompt, v.seed, v.output.name) for v in request.videos]
    assert made == [("one", 7, "a-1.mp4"), ("one", 8, "a-2.mp4"), ("two", 7, "a-3.mp4"), ("two", 8, "a-4.mp4")]
    assert request.runtime.keep_loaded and not read("--demo").runtime.keep_loaded


def test_seeds_are_drawn_once_for_all():
    videos = read("--demo", "--num-videos", "3").videos
    first, second, third = (video.seed for video in draw_seeds(videos))
    assert (second, third) == (first + 1, first + 2)
    assert draw_seeds(read("--demo", "--seed", "5").videos)[0].seed == 5


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("--num_inference_steps", "7"), ("--num-steps", "7")),
        (("--guidance-scale", "2.5"), ("--cfg-scale", "2.5")),
        (("--seed", "-1"), ()),
        (("--use_cfg_parallel", "--gpus", "2"), ("--cfg-parallel", "--gpus", "2")),
    ],
)
def test_names_of_other_programs(theirs, ours):
    mine = ("--demo", "--output", "a.mp4", "--device", "cpu")
    assert read(*mine, *theirs) == read(*mine, *ours)


def test_a_checkpoint_is_named_as_in_xdit(checkpoint):
    assert read("--model", checkpoint, "--prompt", "x").source.model_dir == Path(checkpoint)


def test_settings_are_plain_values(checkpoint):
    import json

    request = read("--model-dir", checkpoint, "--prompt", "x", *cpu(6), "--vae-tile", "320x240", "--seed", "1")
    flat = json.loads(json.dumps(settings(request, request.videos[0])))
    assert flat["layout"] == {"cfg": 2, "ring": 3, "ulysses": 1, "ranks": 6}
    assert flat["model_dir"] == checkpoint and flat["vae_tile"] == [240, 320] and flat["seed"] == 1


@pytest.mark.parametrize("heads", [1, 4, 7, 24])
def test_choose_degrees_always_multiplies_to_the_ranks(heads):
    for ranks in range(1, 25):
        for guided in (True, False):
            cfg, ring, ulysses = choose_degrees(ranks, heads, guided).degrees
            assert cfg * ring * ulysses == ranks and ulysses <= heads
            assert cfg == (2 if guided and ranks % 2 == 0 else 1)


def test_layout_problems_agree_with_choose_degrees():
    for ranks in range(1, 13):
        for cfg in (None, 1, 2):
            for ring in (None, 1, 2, 3):
                for ulysses in (None, 1, 2, 5):
                    wrong = layout_problems(Ranks(ranks, "x"), 4, True, cfg, ring, ulysses)
                    if not wrong:
                        c, r, u = choose_degrees(ranks, 4, True, cfg, ring, ulysses).degrees
                        assert c * r * u == ranks and u <= 4
                        assert all(want in (None, have) for want, have in zip((cfg, ring, ulysses), (c, r, u)))


def test_nearest_and_rules():
    assert nearest(24, 6, (1,)) == "19 or 25" and nearest(0, 6, (1,)) == "1"
    assert nearest(50, 8, (0, 1)) == "49 or 56" and nearest(48, 8, (0, 1)) == "48 or 49"
    rules = Rules(24, 848, 480, 49, 64, 4.5, 30)
    assert all(not rules.problems(848, 480, 6 * k + 1) for k in range(30))
    assert len(rules.problems(8, 0, 2)) == 3


@pytest.mark.slow
def test_a_dry_run_whose_reader_has_left_says_nothing() -> None:
    command = [sys.executable, "-m", "mochi_xdit", "--dry-run", "--demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_wrong_use_exits_with_2_and_a_line_each():
    done = run(str(ROOT / "mochi_xdit" / "cli.py"), "--demo", "--width", "1", "--num-frames", "2")
    assert done.returncode == 2 and done.stdout == ""
    assert [line.split(" is ")[0] for line in done.stderr.splitlines()] == ["error: --width 1", "error: --num-frames 2"]


def test_help_and_version():
    shown = run("-X", "importtime", str(ROOT / "mochi_xdit" / "cli.py"), "--help")
    assert shown.returncode == 0 and "--ulysses-degree" in shown.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    version = run(str(ROOT / "mochi_xdit" / "cli.py"), "--version")
    assert version.returncode == 0 and version.stdout.startswith("mochi-xdit ")


class Distilled(Rules):
    """No scale guides it."""

    def guided(self, scale: float) -> bool:
        return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--negative-prompt", "blurred", "--cfg-scale", "1"), "at --cfg-scale 1 there is no guidance"),
        (("--negative-prompt", "blurred"), ""),
        (("--negative-prompt", "", "--cfg-scale", "1"), ""),
        (("--cfg-scale", "1"), ""),
    ],
)
def test_a_negative_prompt_that_nothing_reads_is_said(arguments, said):
    remarks = read("--demo", "--device", "cpu", *arguments).remarks
    assert remarks == ((f"--negative-prompt has no effect: {said}",) if said else ())


def test_a_negative_prompt_for_a_model_without_guidance_is_said():
    rules = Distilled(**vars(FAKE.demos["default"]))
    distilled = replace(FAKE, demos={"default": rules})
    request = parse(distilled, ["--demo", "--device", "cpu", "--gpus", "1", "--negative-prompt", "blurred"])
    assert request.remarks == ("--negative-prompt has no effect: this checkpoint has no guidance",)
    assert not parse(distilled, ["--demo", "--device", "cpu", "--gpus", "1"]).remarks
