"""The whole of Mochi: against diffusers' pipeline, and against itself on other layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.parallel.mesh import Layout, Mesh, ModelCache, distributed
from common.run import pipeline as pipelines
from common.run.command_line import parse
from common.video import decode_planning
from common.video.decode import DecodePlan, decode_frames
from common.video.latents import draw_noise, load_latents
from mochi_xdit import MochiPipeline
from mochi_xdit.config import FAST, OFFICIAL
from mochi_xdit.fork import FORK
from mochi_xdit.sampling import linear_quadratic_sigmas
from tests.helpers.mochi import TINY, write_checkpoint
from tests.helpers.programs import frames_of

PROMPT = "a red ball moves to the left"
SIZE = {"height": 48, "width": 80, "num_frames": 19}
LATENTS = (1, 12, 4, 6, 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mochi"), "diffusers")


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("native"))


def generate(folder: Path, dtype: str = "fp32", mesh: Mesh | None = None, **options) -> Tensor | None:
    pipe = MochiPipeline.from_pretrained(folder, mesh=mesh, dtype=dtype)
    return pipe(PROMPT, **{**SIZE, "num_steps": 4, "seed": 7, **options})


# --- Oracle -----------------------------------------------------------------------------------------------------------


def reference_pipeline(folder: Path, zero_empty: bool):
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
    from transformers import AutoTokenizer, T5EncoderModel

    transformer = MochiTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    vae = AutoencoderKLMochi.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=transformer,
        force_zeros_for_empty_prompt=zero_empty,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("negative, scale", [("a blue box", 4.5), ("", 3.0), ("", 1.0)])
@pytest.mark.slow
def test_latents_are_those_of_the_reference_pipeline(checkpoint, negative, scale):
    noise = draw_noise(LATENTS, 11)
    theirs = reference_pipeline(checkpoint, zero_empty=True)(
        PROMPT,
        negative_prompt=negative,
        **SIZE,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=noise.clone(),
        max_sequence_length=TINY.text_tokens,
        output_type="latent",
        return_dict=False,
    )[0]
    ours = generate(checkpoint, negative_prompt=negative, cfg_scale=scale, latents=noise, output="latent")
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1)
    assert (theirs - noise).abs().max() > 0.1, "the comparison would pass without a model"


def test_both_layouts_give_the_same_latents(checkpoint, native):
    assert torch.equal(generate(checkpoint, output="latent"), generate(native, output="latent"))


def test_schedule_of_the_reference():
    """Values of the native sampler for 64 steps, and of its fast model (8 steps, threshold 0.1, 6 linear steps)."""
    sigmas = linear_quadratic_sigmas(64)
    assert len(sigmas) == 65 and sigmas[0] == 1 and sigmas[-1] == 0
    for i, value in {1: 0.99921875, 31: 0.97578125, 32: 0.975, 62: 0.1166015625, 63: 0.05922851}.items():
        assert sigmas[i] == pytest.approx(value, abs=1e-8)
    fast = [1, 0.98333, 0.96667, 0.95, 0.93333, 0.91667, 0.9, 0.66667, 0]
    assert linear_quadratic_sigmas(8, 0.1, 6) == pytest.approx(fast, abs=1e-5)
    assert linear_quadratic_sigmas(1) == [1.0, 0.0]


# --- The checkpoint's own settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.slow
def test_python_and_the_command_line_make_the_same_video(native, tmp_path, fast):
    """With what nobody said: steps, guidance, schedule and dtype are the checkpoint's, FastMochi's by its file."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in native.iterdir():
        fits = path.name == "dit.safetensors" and fast
        (folder / ("dit.fast.safetensors" if fits else path.name)).symlink_to(path)
    size = {"height": 16, "width": 32, "num_frames": 7, "seed": 3}
    given = [part for name, value in size.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    where = ["--model-dir", str(folder), "--device", "cpu", "--gpus", "1", "--output", str(tmp_path / "x.mp4")]
    request = parse(FORK, [*where, "--prompt", PROMPT, *given])
    (made,) = frames_of(FORK, request)
    pipe = MochiPipeline.from_pretrained(folder)
    assert torch.equal(pipe(PROMPT, **size), made)
    own = (8, 1.5, 0.1, 6) if fast else (64, 4.5, 0.025, 32)
    names = ("num_steps", "cfg_scale", "threshold_noise", "linear_steps")
    latents = pipe(PROMPT, **size, output="latent")
    assert torch.equal(pipe(PROMPT, **size, output="latent", **dict(zip(names, own))), latents)
    assert not torch.equal(pipe(PROMPT, **size, output="latent", num_steps=own[0], threshold_noise=0.05), latents)


def test_few_steps_of_the_fast_model_have_the_usual_schedule():
    assert FAST.schedule(8, None, None) == (0.1, 6) and FAST.schedule(6, None, None) == (0.025, None)
    assert FAST.schedule(8, 0.2, None) == (0.2, 6) and FAST.schedule(8, None, 3) == (0.1, 3)
    assert OFFICIAL.schedule(64, None, None) == (0.025, None)


# --- Any layout, the same video ---------------------------------------------------------------------------------------

LAYOUTS = [
    Layout(cfg=2),
    Layout(ring=3),
    Layout(ring=2, ulysses=2),
    Layout(cfg=2, ulysses=2),
    Layout(ulysses=5),
    Layout(cfg=2, ring=3),
    Layout(ring=3, ulysses=2),
    Layout(cfg=2, ring=2, ulysses=2),
    Layout(ring=8),
]


def both(folder: Path, layout: Layout, negative: str) -> tuple[Tensor, Tensor | None]:
    mesh = distributed(layout)
    pipe = MochiPipeline.from_pretrained(folder, mesh=mesh, dtype="fp64")
    latent = pipe(PROMPT, negative, **SIZE, num_steps=4, seed=7, output="latent")
    return latent, pipe.decode(latent)


@pytest.fixture(scope="module")
def alone(native) -> dict[str, tuple[Tensor, Tensor]]:
    return {negative: both(native, Layout(), negative) for negative in ("", "a blue box")}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.slow
def test_every_layout_gives_the_same_video(run_ranks, native, alone, layout):
    negative = "a blue box" if layout.ring == 2 else ""
    latent, frames = alone[negative]
    results = run_ranks(layout.ranks, both, native, layout, negative)
    for rank, (theirs, video) in enumerate(results):
        assert (theirs - latent).abs().max() <= 1e-10
        assert (video is None) == (rank != 0)
    assert (results[0][1].int() - frames.int()).abs().max() <= 1
    assert frames.shape == (19, 48, 80, 3) and frames.dtype == torch.uint8


@pytest.mark.slow
def test_seed_and_inputs_decide(native):
    first = generate(native, output="latent")
    assert torch.equal(first, generate(native, output="latent"))
    assert not torch.equal(first, generate(native, output="latent", seed=8))
    assert not torch.equal(first, generate(native, output="latent", cfg_scale=2.0))
    flat = generate(native, output="latent", cfg_scale=[4.5] * 4)
    assert torch.equal(first, flat)
    assert not torch.equal(first, generate(native, output="latent", cfg_scale=[4.5, 4.5, 1.0, 1.0]))


# --- Stages -----------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_never_loads_the_text_encoder(native, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("dit.safetensors", "decoder.safetensors"):
        (bare / name).symlink_to(native / name)
    pipe = MochiPipeline.from_pretrained(bare, dtype="fp32")
    assert pipe("", **SIZE, num_steps=1, output="latent").shape == LATENTS
    with pytest.raises(ValueError, match=r"no folder text_encoder/, and google/t5-v1_1-xxl .* --text-encoder-dir"):
        pipe(PROMPT, **SIZE, num_steps=1, output="latent")


@pytest.mark.slow
def test_stages_load_one_after_another_or_stay(native):
    pipe = MochiPipeline.from_pretrained(native, dtype="fp32")
    pipe(PROMPT, **SIZE, num_steps=1)
    names = [record.name for record in pipe.report.records]
    order = ["loading text encoder", "encoding", "loading transformer", "sampling", "loading decoder", "decoding"]
    assert names == order and pipe.loaded == {}
    kept = MochiPipeline.from_pretrained(native, dtype="fp32", keep_loaded=True)
    first = kept(PROMPT, **SIZE, num_steps=1)
    assert torch.equal(first, kept(PROMPT, **SIZE, num_steps=1))
    assert [r.name for r in kept.report.records].count("loading transformer") == 1
    assert set(kept.loaded) == {"text encoder", "transformer", "decoder"}


@pytest.mark.slow
def test_what_was_found_out_with_models_that_stay_is_not_found_out_again(native, monkeypatch):
    mesh, work = Mesh(cache=ModelCache()), []
    for where, name in ((pipelines, "check_model"), (decode_planning, "decode_memory")):
        real = getattr(where, name)
        noted = lambda *args, real=real, name=name, **how: work.append(name) or real(*args, **how)  # noqa: E731
        monkeypatch.setattr(where, name, noted)
    for expected in ({"check_model", "decode_memory"}, {"check_model"}, set(), set()):
        work.clear()
        pipe = MochiPipeline.from_pretrained(native, mesh, dtype="fp32", keep_loaded=True)
        pipe.check_weights()
        pipe(PROMPT, **SIZE, num_steps=1)
        assert set(work) == expected
    MochiPipeline.from_pretrained(native, mesh, dtype="fp32").check_weights()
    assert work == ["check_model"] and mesh.cache.loadings == 3


@pytest.mark.slow
def test_latents_lie_on_disk_before_the_decode(native, tmp_path):
    kept = tmp_path / "x.latents.safetensors"
    pipe = MochiPipeline.from_pretrained(native, dtype="fp32")
    seen = []
    decode = pipe.decode
    pipe.decode = lambda latents, *args: seen.append(kept.exists()) or decode(latents, *args)  # type: ignore[method-assign]
    frames = pipe(PROMPT, **SIZE, num_steps=2, latents_file=kept)
    assert seen == [True]
    assert torch.equal(decode(load_latents(kept, TINY.channels)), frames)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("GET was unable to find an engine to execute this")],
    ids=["allocator", "cuDNN"],
)
@pytest.mark.slow
def test_decode_falls_back_to_a_smaller_plan(native, monkeypatch, error):
    pipe = MochiPipeline.from_pretrained(native, dtype="fp32")
    latents = draw_noise((1, 12, 3, 4, 4), 0)
    expected = pipe.decode(latents)
    plans: list[DecodePlan] = []

    def short_of_memory(decoder, z, plan, split, pause):
        plans.append(plan)
        if plan.chunk > 1:
            raise error
        return decode_frames(decoder, z, plan, split, pause)

    monkeypatch.setattr("common.video.decode_video.decode_frames", short_of_memory)
    assert (pipe.decode(latents).int() - expected.int()).abs().max() <= 1
    assert len(plans) > 1 and plans[-1].mode == "exact"


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"height": 50}, "height is 50; it must be a positive multiple of 16"),
        ({"width": 0}, "width is 0"),
        ({"num_frames": 24}, r"num_frames is 24; it must be 6k \+ 1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_scale": [1.0, 2.0]}, "2 values for 4 steps"),
        ({"threshold_noise": 1.5}, "threshold_noise is 1.5"),
        ({"linear_steps": 9}, "linear_steps is 9"),
        ({"output": "gif"}, "output is 'gif'"),
        ({"latents": torch.zeros(1, 12, 4, 6, 6)}, r"latents have shape \(1, 12, 4, 6, 6\)"),
    ],
)
def test_bad_input_is_refused_at_the_door(native, bad, said):
    with pytest.raises(ValueError, match=said):
        generate(native, **bad)


def test_diffusers_names_of_steps_and_guidance(native):
    pipe = MochiPipeline.from_pretrained(native, dtype="fp32")
    here = pipe(PROMPT, **SIZE, num_steps=2, cfg_scale=3.0, output="latent")
    theirs = pipe(PROMPT, **SIZE, num_inference_steps=2, guidance_scale=3.0, output="latent")
    assert torch.equal(here, theirs)
    with pytest.raises(ValueError, match="num_steps is 3 and num_inference_steps is 2"):
        pipe(PROMPT, **SIZE, num_steps=3, num_inference_steps=2)
    with pytest.raises(ValueError, match="cfg_scale is 3 and guidance_scale is 2"):
        pipe(PROMPT, **SIZE, num_steps=1, cfg_scale=3, guidance_scale=2)


def test_nan_stops_the_run_with_its_step(native):
    noise = draw_noise(LATENTS, 0)
    noise[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="sampling step 1 of 4"):
        generate(native, latents=noise)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no Mochi checkpoint"):
        MochiPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        MochiPipeline.from_pretrained(tmp_path, dtype="int8")
