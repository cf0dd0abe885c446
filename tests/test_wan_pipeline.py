"""The whole of Wan: against diffusers' two pipelines, with one expert and with two, and against itself on other
layouts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.parallel.mesh import Layout, Mesh, distributed
from common.registry.checks import FITS
from common.video.inputs import image_frames
from common.video.pictures import seen_part
from common.weights.load import CheckpointError
from tests.helpers.ranks import RankPool
from tests.helpers.wan import KINDS, small, write_checkpoint
from wan_xdit import WanPipeline
from wan_xdit.checkpoint import NEGATIVE, SHAKING
from wan_xdit.sampling import turns
from wan_xdit.solver import new_solver

PROMPT, UNWANTED = "a red  boat moves to the left", "a blue bird"
SIZES = {kind: {"height": 48, "width": 32, "num_frames": 9} for kind in KINDS}
SIZES["ti2v-5b"] = {"height": 64, "width": 96, "num_frames": 9}
SEED = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_checkpoint(tmp_path_factory.mktemp("wan"), kind) for kind in KINDS}


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def generate(folder: Path, kind: str, mesh: Mesh | None = None, dtype: str = "fp32", **options: Any) -> Any:
    pipe = WanPipeline.from_pretrained(folder, mesh=mesh, dtype=dtype)
    given = {"negative_prompt": UNWANTED, "num_steps": 4, "seed": SEED} | SIZES[kind] | options
    if kind.startswith("i2v"):
        given = {"image": picture()} | given
    return pipe(PROMPT, **given)


# --- Oracle -----------------------------------------------------------------------------------------------------------


def reference(folder: Path, image: bool, solver: str, shift: float) -> Any:
    import diffusers
    from transformers import AutoTokenizer, UMT5EncoderModel

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    schedulers = {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    ours = WanPipeline.from_pretrained(folder, dtype="fp32").files
    experts = [diffusers.WanTransformer3DModel.from_pretrained(part) for part in ours.experts]
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "vae": diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae"),
        "scheduler": schedulers[solver](),
        "transformer": experts[0],
        "transformer_2": experts[1] if len(experts) > 1 else None,
        "boundary_ratio": ours.boundary,
        "expand_timesteps": ours.per_token,
    }
    if ours.image_encoder is not None:
        from transformers import CLIPImageProcessorPil, CLIPVisionModel

        side = {"height": 28, "width": 28}
        parts["image_encoder"] = CLIPVisionModel.from_pretrained(ours.image_encoder)
        parts["image_processor"] = CLIPImageProcessorPil(size=side, crop_size=side)
    pipe = (diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    # Its image pipeline cannot do without a package that repairs text; there is nothing to repair.
    sys.modules[type(pipe).__module__].ftfy = SimpleNamespace(fix_text=lambda text: text)  # type: ignore[attr-defined]
    return pipe


def reference_video(folder: Path, kind: str, output: str, solver: str, scales: tuple, shift: float, **more: Any) -> Any:
    """The reference's own draws from the same seed."""
    pipe = reference(folder, "image" in more, solver, shift)
    return pipe(
        prompt=PROMPT,
        negative_prompt=UNWANTED,
        num_inference_steps=4,
        max_sequence_length=small(kind).text_length,
        guidance_scale=scales[0],
        guidance_scale_2=scales[1] if pipe.config.boundary_ratio is not None else None,
        generator=torch.Generator().manual_seed(SEED),
        output_type=output,
        return_dict=False,
        **SIZES[kind],
        **more,
    )[0]


CASES = [
    ("t2v-1.3b", "unipc", False),
    ("t2v-1.3b", "dpm", False),
    ("t2v-1.3b", "euler", False),
    ("t2v-a14b", "unipc", False),
    ("i2v-a14b", "unipc", True),
    ("i2v-14b-480p", "unipc", True),
    ("ti2v-5b", "unipc", False),
    ("ti2v-5b", "unipc", True),
]


@pytest.mark.parametrize(("kind", "solver", "image"), CASES)
@pytest.mark.slow
def test_latents_are_the_references(folders: dict[str, Path], kind: str, solver: str, image: bool) -> None:
    # With a shift of 3 both experts have steps.
    # A square that the image tower takes as it is: there the reference resizes by another rule than the authors'.
    given = {"image": Image.fromarray(picture()[:28, :28])} if image else {}
    theirs = reference_video(folders[kind], kind, "latent", solver, (4.0, 3.0), 3.0, **given)
    own = {"image": picture()[:28, :28], "fit": "stretch"} if image else {}
    ours = generate(
        folders[kind], kind, output="latent", solver=solver, cfg_scale=4.0, cfg_scale_2=3.0, shift=3.0, **own
    )
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize(("kind", "image"), [("t2v-1.3b", False), ("ti2v-5b", True)])
@pytest.mark.slow
def test_frames_are_the_references(folders: dict[str, Path], kind: str, image: bool) -> None:
    given = {"image": Image.fromarray(picture())} if image else {}
    theirs = reference_video(folders[kind], kind, "np", "unipc", (5.0, 5.0), 5.0, **given)
    ours = generate(folders[kind], kind, **({"image": picture(), "fit": "stretch"} if image else {}))
    assert ours.shape == theirs[0].shape and ours.dtype == torch.uint8
    assert np.abs(ours.numpy() - theirs[0] * 255).max() <= 0.55


# --- Any layout, the same video ---------------------------------------------------------------------------------------

LAYOUTS = {
    Layout(cfg=2): ("t2v-a14b", "ti2v-5b"),
    Layout(ring=3): ("i2v-14b-480p", "i2v-a14b"),
    Layout(ring=2, ulysses=2): ("ti2v-5b", "t2v-a14b"),
    Layout(cfg=2, ulysses=3): ("i2v-a14b", "t2v-1.3b"),
    Layout(cfg=2, ring=2, ulysses=2): ("ti2v-5b", "t2v-1.3b"),
}


def latents_of(layout: Layout, folders: dict[str, Path]) -> dict[str, Tensor]:
    """As all ranks see the result; TI2V from a picture, whose tokens fill whole shards of some ranks."""
    mesh = distributed(layout)
    options: dict[str, Any] = {"num_steps": 3, "output": "latent", "shift": 3.0}
    return {
        kind: generate(
            folders[kind], kind, mesh, "fp64", **options, **({"image": picture()} if kind == "ti2v-5b" else {})
        )
        for kind in LAYOUTS.get(layout, KINDS)
    }


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Tensor]:
    return latents_of(Layout(), folders)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.slow
def test_every_layout_gives_the_same_latents(
    layout: Layout, folders: dict[str, Path], alone: dict[str, Tensor], run_ranks: RankPool
) -> None:
    for found in run_ranks(layout.ranks, latents_of, layout, folders):
        assert len(found) == 2
        for kind, latents in found.items():
            assert (latents - alone[kind]).abs().max() <= 1e-10, kind


def frames_on(layout: Layout, folder: Path) -> Tensor | None:
    return generate(folder, "i2v-a14b", distributed(layout), num_steps=2, num_frames=17)


@pytest.mark.slow
def test_frames_arrive_on_rank_0_alone(folders: dict[str, Path], run_ranks: RankPool) -> None:
    first, *others = run_ranks(3, frames_on, Layout(ring=3), folders["i2v-a14b"])
    assert others == [None, None]
    expected = frames_on(Layout(), folders["i2v-a14b"])
    assert expected is not None and (first.int() - expected.int()).abs().max() <= 1


# --- What a generation does with what it is given ---------------------------------------------------------------------


def test_experts_take_their_turns_at_the_boundary() -> None:
    times = new_solver("unipc", 10, 5.0).timesteps
    high, low = turns(times, 0.9, (3.5, 3.0))
    assert [times[i] >= 900 for i in (*high.steps, *low.steps)] == [i in high.steps for i in range(10)]
    assert (high.expert, high.scale, low.expert, low.scale) == (0, 3.5, 1, 3.0)
    assert turns(times, None, (5.0, 5.0)) == [high.__class__(0, range(10), 5.0)]
    # An expert that has no step is never loaded.
    assert [turn.expert for turn in turns([999.0, 950.0], 0.9, (1.0, 1.0))] == [0]


def test_one_expert_is_on_the_device_at_a_time(folders: dict[str, Path]) -> None:
    pipe = WanPipeline.from_pretrained(folders["t2v-a14b"], dtype="fp32")
    held = []
    load = pipe.load_transformer
    pipe.load_transformer = lambda expert: held.append(set(pipe.loaded)) or load(expert)  # type: ignore[method-assign,func-returns-value]
    pipe(PROMPT, **SIZES["t2v-a14b"], num_steps=4, shift=3.0, output="latent")
    assert held == [set(), set()] and pipe.loaded == {}
    names = [record.name for record in pipe.report.records]
    assert names.count("loading transformer") == 2 and names.count("sampling") == 2
    keeping = WanPipeline.from_pretrained(folders["t2v-a14b"], dtype="fp32", keep_loaded=True)
    keeping(PROMPT, **SIZES["t2v-a14b"], num_steps=4, shift=3.0, output="latent")
    assert {"transformer", "second transformer"} < set(keeping.loaded)


def test_the_next_experts_files_are_read_while_the_first_runs(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noted(files: Sequence[Path], room: int) -> AbstractContextManager[None]:
        asked.append([file.parent.name for file in files])
        return nullcontext()

    monkeypatch.setattr("wan_xdit.pipeline.read_ahead", noted)
    given = {**SIZES["t2v-a14b"], "num_steps": 4, "shift": 3.0, "output": "latent"}
    WanPipeline.from_pretrained(folders["t2v-a14b"], dtype="fp32")(PROMPT, **given)
    assert asked == [["transformer_2"]]
    # Not where both stay, nor where blocks stream; then the text's keys and values are made anew in each step.
    for options in ({"keep_loaded": True}, {"offload": "disk"}):
        WanPipeline.from_pretrained(folders["t2v-a14b"], dtype="fp32", **options)(PROMPT, **given)
    assert asked == [["transformer_2"]]


def test_a_given_first_frame_stays_as_it_is(folders: dict[str, Path]) -> None:
    pipe = WanPipeline.from_pretrained(folders["ti2v-5b"], dtype="fp32")
    given = {**SIZES["ti2v-5b"], "num_steps": 2, "output": "latent"}
    out = pipe(PROMPT, image=picture(), **given)
    first = pipe._latents_of(image_frames(picture(), 64, 96), 1)
    assert torch.equal(out[:, :, :1], first)
    assert not torch.equal(out[:, :, 1:], pipe(PROMPT, image=picture(1), **given)[:, :, 1:])
    assert not torch.equal(out[:, :, :1], pipe(PROMPT, **given)[:, :, :1])


def test_pictures_keep_their_shape(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame, and what the image tower sees of the picture."""
    pipe, told = WanPipeline.from_pretrained(folders["i2v-14b-480p"], dtype="fp32"), []
    monkeypatch.setattr(pipe.report, "note", told.append)
    starts, seen = [], []
    start, see = pipe._start, pipe._see
    monkeypatch.setattr(pipe, "_start", lambda *given: (starts.append(given[1]), start(*given))[1])
    monkeypatch.setattr(pipe, "_see", lambda *given: (seen.append(see(*given)), seen[-1])[1])
    size = SIZES["i2v-14b-480p"]["height"], SIZES["i2v-14b-480p"]["width"]
    for fit in ({}, *({"fit": one} for one in FITS)):
        pipe(PROMPT, image=picture(), **SIZES["i2v-14b-480p"], num_steps=1, output="latent", **fit)
        assert torch.equal(starts[-1], image_frames(picture(), *size, **fit))
    of_fit = [line.split()[3] for line in told if line.startswith("the image is")]
    assert of_fit == ["cropped", "cropped", "padded"]
    part = see(seen_part(picture(), *size), *size, "stretch")
    assert torch.equal(seen[0], part) and torch.equal(seen[1], part)
    assert torch.equal(seen[2], seen[3]) and not torch.equal(seen[2], part)


def test_what_is_not_wanted_is_the_authors_sentence_unless_it_is_said(folders: dict[str, Path]) -> None:
    pipe = WanPipeline.from_pretrained(folders["t2v-1.3b"], dtype="fp32")
    said = []
    encode = pipe.encode_text
    pipe.encode_text = lambda prompts, *rest, **more: said.append(prompts) or encode(prompts, *rest, **more)  # type: ignore[method-assign,func-returns-value]
    for negative in (None, "", "blurred &amp; dark"):
        pipe(PROMPT, negative, **SIZES["t2v-1.3b"], num_steps=1, output="latent")
    assert [one[1] for one in said] == [NEGATIVE.replace("，", ","), "", "blurred & dark"]  # noqa: RUF001
    assert {one[0] for one in said} == {"a red boat moves to the left"}
    assert NEGATIVE not in SHAKING and pipe.rules.negative_prompt == NEGATIVE


def test_a_residual_stream_in_bf16_is_near_that_in_fp32(folders: dict[str, Path]) -> None:
    given = {**SIZES["t2v-1.3b"], "num_steps": 2, "output": "latent", "seed": SEED}
    wide, narrow = (
        WanPipeline.from_pretrained(folders["t2v-1.3b"], dtype="bf16", residual=residual)(PROMPT, **given)
        for residual in ("fp32", "bf16")
    )
    exact = WanPipeline.from_pretrained(folders["t2v-1.3b"], dtype="fp32")(PROMPT, **given)
    errors = [float((latents - exact).norm() / exact.norm()) for latents in (wide, narrow)]
    assert 0 < errors[0] < 0.05 and not torch.equal(wide, narrow) and errors[1] < 0.1


@pytest.mark.slow
def test_stages_load_one_after_another(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(folders["i2v-a14b"], dtype="fp32")
    kept = tmp_path / "x.latents.safetensors"
    Image.fromarray(picture()).save(tmp_path / "image.png")
    given = {**SIZES["i2v-a14b"], "num_steps": 1, "seed": SEED}
    frames = pipe(PROMPT, image=tmp_path / "image.png", latents_file=kept, **given)
    names = ["loading text encoder", "encoding", "loading encoder", "encoding image", "loading transformer"]
    names += ["sampling", "loading decoder", "decoding"]
    assert [record.name for record in pipe.report.records] == names and pipe.loaded == {}
    assert kept.exists()
    assert torch.equal(frames, pipe(PROMPT, image=picture(), **given))


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bad", "said"),
    [
        ("t2v-1.3b", {"height": 40}, "height is 40; it must be a positive multiple of 16"),
        ("ti2v-5b", {"width": 48}, "width is 48; it must be a positive multiple of 32"),
        ("t2v-1.3b", {"num_frames": 10}, r"num_frames is 10; it must be 4k \+ 1"),
        ("t2v-1.3b", {"num_steps": 0}, "number of steps is 0; it must be 1 to 1000"),
        ("t2v-1.3b", {"shift": 0.0}, "shift is 0.0; it must be above 0"),
        ("t2v-1.3b", {"solver": "ddim"}, "solver is 'ddim'; choose one of unipc, dpm, euler"),
        ("t2v-1.3b", {"output": "gif"}, "output is 'gif'"),
        ("t2v-1.3b", {"latents": torch.zeros(1, 4, 3, 6, 6)}, r"latents have shape \(1, 4, 3, 6, 6\)"),
        ("t2v-1.3b", {"image": picture()}, "text to video checkpoint, which takes no image"),
        ("i2v-a14b", {"image": None}, "makes a video from an image"),
        ("i2v-a14b", {"image": "no-such.png"}, "no-such.png: no such image file"),
    ],
)
def test_bad_input_is_refused_at_the_door(folders: dict[str, Path], kind: str, bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate(folders[kind], kind, **bad)


def test_a_residual_that_is_none_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="residual is 'fp8'; choose one of fp32, bf16"):
        WanPipeline.from_pretrained(folders["t2v-1.3b"], residual="fp8")


def test_a_missing_tensor_of_the_second_expert_is_found_before_anything_runs(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "t2v-a14b")
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    (folder / "transformer" / file.name).replace(file.with_name("kept.safetensors"))
    file.with_name("kept.safetensors").replace(folder / "transformer" / file.name)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="transformer_2"):
        WanPipeline.from_pretrained(folder).check_weights()
