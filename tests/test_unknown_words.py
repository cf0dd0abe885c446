"""What a command line says that no option takes, and options that have no effect. Nothing here imports torch."""

from __future__ import annotations

import pytest

from mochi_xdit.fork import FORK
from tests.helpers.programs import problems, read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--image", "x"), "no such option: --image; it is one of cogvideox-xdit, consisid-xdit, wan-xdit"),
        (("--lora", "x"), "no such option: --lora; LoRA weights are not loaded by this program"),
        (("--use_teacache",), "no such option: --use-teacache; caches that leave steps out"),
        (("--data_parallel_degree", "2"), "no such option: --data-parallel-degree; --replicas makes several videos"),
        (("--ring", "2"), "no such option: --ring; did you mean --ring-degree?"),
        (("--guidance", "2"), "no such option: --guidance; did you mean --guidance-scale?"),
        (("--gain", "2"), "no such option: --gain"),
    ],
)
def test_what_nobody_takes_is_answered_with_what_is_known_of_it(tmp_path, arguments, said):
    (problem,) = problems(FORK, "--demo", "--device", "cpu", "--output", tmp_path / "a.mp4", *arguments)
    assert problem.startswith(said) and ("mean" in said or "mean" not in problem)


def test_a_wrong_demo_is_one_mistake(tmp_path):
    (problem,) = problems(FORK, "--demo", "default2", "--device", "cpu", "--output", tmp_path / "a.mp4")
    assert "'default2'" in problem


def test_options_without_effect_name_the_one_that_has_it(tmp_path):
    given = ("--demo", "--use_fsdp", "--cpu_offload", "--device", "cpu", "--output", tmp_path / "a.mp4")
    remarks = " ".join(read(FORK, *given).remarks)
    assert "--shard-weights" in remarks and "--offload block" in remarks and "--use-xdit" not in remarks
