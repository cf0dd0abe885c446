"""The whole of CogVideoX: against the reference's three pipelines, and against itself on other layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideox_xdit import CogVideoXPipeline
from cogvideox_xdit.solver import SCHEDULERS
from common.parallel.mesh import Layout, Mesh, distributed
from common.video.inputs import image_frames, video_frames
from tests.helpers.cogvideox import write_checkpoint
from tests.helpers.ranks import RankPool

PROMPT, NEGATIVE = "a red boat moves to the left", "a blue bird"
SIZE = {"height": 48, "width": 32}
# The small image checkpoint has positions for this size only.
FIXED = {"height": 64, "width": 96}
SEED = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v")
    return {kind: write_checkpoint(tmp_path_factory.mktemp("cogvideox"), kind) for kind in kinds}


def picture(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(frames: int) -> np.ndarray:
    return np.stack([picture(seed=i) for i in range(frames)])


def generate(folder: Path, mesh: Mesh | None = None, dtype: str = "fp32", scheduler: str | None = None, **options: Any):
    pipe = CogVideoXPipeline.from_pretrained(folder, mesh=mesh, dtype=dtype, scheduler=scheduler)
    return pipe(PROMPT, **{"negative_prompt": NEGATIVE, "num_steps": 4, "seed": SEED} | options)


# --- Oracle -----------------------------------------------------------------------------------------------------------


def reference(folder: Path, task: str, scheduler: str) -> Any:
    import diffusers
    from transformers import AutoTokenizer, T5EncoderModel

    names = {"t2v": "CogVideoXPipeline", "i2v": "CogVideoXImageToVideoPipeline", "v2v": "CogVideoXVideoToVideoPipeline"}
    steps = getattr(diffusers, SCHEDULERS[scheduler])
    pipe = getattr(diffusers, names[task])(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae"),
        transformer=diffusers.CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer"),
        scheduler=steps.from_pretrained(folder, subfolder="scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_video(folder: Path, task: str, scheduler: str, output: str, **options: Any) -> Any:
    """The reference's own draws from the same seed."""
    return reference(folder, task, scheduler)(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=4,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(SEED),
        output_type=output,
        return_dict=False,
        **options,
    )[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    """Latents of the reference, (B, T, C, h, w), may have padding frames in front."""
    theirs = theirs.transpose(1, 2)[:, :, -ours.shape[2] :]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("kind", "frames", "dynamic"), [("2b", 9, False), ("2b", 8, True), ("5b", 9, True), ("1.5", 9, False)]
)
@pytest.mark.slow
def test_text_to_video_is_the_references(
    folders: dict[str, Path], kind: str, frames: int, dynamic: bool, scheduler: str
) -> None:
    theirs = reference_video(
        folders[kind],
        "t2v",
        scheduler,
        "latent",
        **SIZE,
        num_frames=frames,
        guidance_scale=6.0,
        use_dynamic_cfg=dynamic,
    )
    ours = generate(folders[kind], **SIZE, num_frames=frames, dynamic_cfg=dynamic, output="latent", scheduler=scheduler)
    close(ours, theirs)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("kind", "size"), [("5b-i2v", FIXED), ("1.5-i2v", SIZE)])
@pytest.mark.slow
def test_image_to_video_is_the_references(
    folders: dict[str, Path], kind: str, size: dict[str, int], scheduler: str
) -> None:
    image = picture()
    theirs = reference_video(
        folders[kind], "i2v", scheduler, "latent", image=Image.fromarray(image), **size, num_frames=9
    )
    given = {**size, "image": image, "fit": "stretch", "num_frames": 9}  # the reference's way
    close(generate(folders[kind], **given, output="latent", scheduler=scheduler), theirs)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("kind", "frames"), [("2b", 9), ("5b", 17), ("1.5", 16)])
@pytest.mark.slow
def test_video_to_video_is_the_references(folders: dict[str, Path], kind: str, frames: int, scheduler: str) -> None:
    video = clip(frames)
    pictures = [Image.fromarray(frame) for frame in video]
    theirs = reference_video(folders[kind], "v2v", scheduler, "latent", video=pictures, **SIZE, strength=0.8)
    ours = generate(
        folders[kind],
        **SIZE,
        num_frames=frames,
        video=video,
        fit="stretch",
        cfg_scale=6.0,
        strength=0.8,
        output="latent",
        scheduler=scheduler,
    )
    close(ours, theirs)


@pytest.mark.parametrize(("kind", "frames"), [("2b", 9), ("1.5", 17), ("5b", 16)])
@pytest.mark.slow
def test_frames_are_the_references(folders: dict[str, Path], kind: str, frames: int) -> None:
    """With 1.5, whose padding frame stands in front and is dropped, and an even number of latent frames."""
    theirs = reference_video(folders[kind], "t2v", "ddim", "np", **SIZE, num_frames=frames)
    ours = generate(folders[kind], **SIZE, num_frames=frames)
    assert ours.shape == (frames, 48, 32, 3) and ours.dtype == torch.uint8
    assert np.abs(ours.numpy() - theirs[0] * 255).max() <= 0.51


# --- Any layout, the same video ---------------------------------------------------------------------------------------

# The transformer alone is compared on more layouts, all kinds on each; here what lies around it.
LAYOUTS = {
    Layout(cfg=2): ("2b", "1.5-i2v"),
    Layout(ring=3): ("5b", "5b-i2v"),
    Layout(ring=2, ulysses=2): ("1.5", "2b"),
    Layout(cfg=2, ulysses=3): ("5b", "1.5-i2v"),
    Layout(cfg=2, ring=2, ulysses=2): ("1.5", "5b-i2v"),
}
CASES: dict[str, dict[str, Any]] = {
    "2b": {**SIZE, "num_frames": 9},
    "5b": {**SIZE, "video": clip(9), "num_frames": 9},
    "1.5": {**SIZE, "num_frames": 9, "dynamic_cfg": True},
    "5b-i2v": {**FIXED, "image": picture(), "num_frames": 9},
    "1.5-i2v": {**SIZE, "image": picture(), "num_frames": 9},
}


def latents_of(layout: Layout, folders: dict[str, Path]) -> dict[str, Tensor]:
    """With the solver that draws at every step, as all ranks see the result."""
    mesh = distributed(layout)
    options = {"num_steps": 2, "output": "latent"}
    kinds = LAYOUTS.get(layout, tuple(CASES))
    return {kind: generate(folders[kind], mesh, "fp64", "dpm", **options, **CASES[kind]) for kind in kinds}


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
    return generate(folder, distributed(layout), num_steps=2, num_frames=17, **SIZE)


@pytest.mark.slow
def test_frames_arrive_on_rank_0_alone(folders: dict[str, Path], run_ranks: RankPool) -> None:
    first, *others = run_ranks(3, frames_on, Layout(ring=3), folders["1.5"])
    assert others == [None, None]
    expected = frames_on(Layout(), folders["1.5"])
    assert expected is not None and (first.int() - expected.int()).abs().max() <= 1


# --- What a generation does with what it is given ---------------------------------------------------------------------


def test_1_5_drops_its_padding_in_front(folders: dict[str, Path]) -> None:
    """Latents to start from have the padding; what comes out does not, and it is the first frame that went."""
    pipe = CogVideoXPipeline.from_pretrained(folders["1.5"], dtype="fp32")
    size, padding = pipe.latent_size(48, 32, 17)
    assert (size, padding) == ((6, 6, 4), 1)
    noise = torch.randn(1, 4, 6, 6, 4, generator=torch.Generator().manual_seed(0))
    kept: list[Tensor] = []
    sample = pipe._sample
    pipe._sample = lambda *args: kept.append(sample(*args)) or kept[0]  # type: ignore[method-assign,func-returns-value]
    out = pipe(PROMPT, **SIZE, num_frames=17, num_steps=1, latents=noise, output="latent")
    assert torch.equal(out, kept[0][:, :, 1:])
    assert pipe.latent_size(48, 32, 16) == ((4, 6, 4), 0)


def test_video_to_video_of_1_5_takes_the_lengths_the_others_take(folders: dict[str, Path]) -> None:
    """The reference refuses an odd number of latent frames; here a copy of the first one pads it."""
    out = generate(folders["1.5"], **SIZE, num_frames=9, video=clip(9), num_steps=2, output="latent")
    assert out.shape == (1, 4, 3, 6, 4)


def test_image_latents_stand_in_the_first_frame_and_1_5_divides_by_the_factor(folders: dict[str, Path]) -> None:
    encoded = torch.randn(1, 4, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    for kind, factor in (("5b-i2v", 0.7), ("1.5-i2v", 1 / 0.7)):
        pipe = CogVideoXPipeline.from_pretrained(folders[kind], dtype="fp32")
        placed = pipe.image_latents(encoded, (4, 6, 4))
        assert torch.allclose(placed[:, :, :1], encoded * factor)
        assert not placed[:, :, 1:].any() and placed.shape == (1, 4, 4, 6, 4)


@pytest.mark.slow
def test_seed_text_image_and_strength_decide(folders: dict[str, Path]) -> None:
    given = {**FIXED, "num_frames": 9, "num_steps": 2, "output": "latent", "image": picture()}
    first = generate(folders["5b-i2v"], **given)
    assert torch.equal(first, generate(folders["5b-i2v"], **given))
    assert not torch.equal(first, generate(folders["5b-i2v"], **given | {"seed": 8}))
    assert not torch.equal(first, generate(folders["5b-i2v"], **given | {"image": picture(seed=1)}))
    assert not torch.equal(first, generate(folders["5b-i2v"], **given | {"negative_prompt": ""}))
    unguided = generate(folders["5b-i2v"], **given | {"cfg_scale": 1.0})
    assert torch.equal(unguided, generate(folders["5b-i2v"], **given | {"cfg_scale": 0.5, "negative_prompt": ""}))


class Encoded(Exception):
    """The frames that would be encoded."""


@pytest.mark.parametrize(("kind", "of", "size"), [("1.5-i2v", "image", (96, 64)), ("2b", "video", (64, 96))])
def test_pictures_keep_their_shape(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, of: str, size: tuple[int, int]
) -> None:
    def encode(self: CogVideoXPipeline, frames: Tensor, generator: torch.Generator) -> Tensor:
        raise Encoded(frames)

    monkeypatch.setattr(CogVideoXPipeline, "encode_frames", encode)
    pipe = CogVideoXPipeline.from_pretrained(folders[kind], dtype="fp32")
    given, frames_of = (picture(), image_frames) if of == "image" else (clip(9), partial(video_frames, num_frames=9))
    height, width = size
    for fit, said in (("crop", "cropped"), ("pad", "padded"), ("stretch", "")):
        told: list[str] = []
        monkeypatch.setattr(pipe.report, "note", told.append)
        with pytest.raises(Encoded) as seen:
            pipe(PROMPT, height=height, width=width, num_frames=9, num_steps=2, fit=fit, **{of: given})
        assert torch.equal(seen.value.args[0], frames_of(given, height=height, width=width, fit=fit))
        of_fit = [line for line in told if line.startswith(f"the {of} is")]
        assert len(of_fit) == bool(said)
        assert all(said in line and line.endswith("; with --width 80 --height 64: 0.0%") for line in of_fit)
    with pytest.raises(Encoded) as seen:
        pipe(PROMPT, height=height, width=width, num_frames=9, num_steps=2, **{of: given})
    assert torch.equal(seen.value.args[0], frames_of(given, height=height, width=width, fit="crop"))
    with pytest.raises(ValueError, match="fit is 'zoom'; choose one of crop, stretch, pad"):
        pipe(PROMPT, height=height, width=width, num_frames=9, num_steps=2, fit="zoom", **{of: given})


@pytest.mark.slow
def test_stages_load_one_after_another(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = CogVideoXPipeline.from_pretrained(folders["5b-i2v"], dtype="fp32")
    kept = tmp_path / "x.latents.safetensors"
    Image.fromarray(picture()).save(tmp_path / "image.png")
    frames = pipe(
        PROMPT, **FIXED, num_frames=9, num_steps=1, image=tmp_path / "image.png", latents_file=kept, seed=SEED
    )
    names = ["loading text encoder", "encoding", "loading encoder", "encoding video", "loading transformer"]
    names += ["sampling", "loading decoder", "decoding"]
    assert [record.name for record in pipe.report.records] == names and pipe.loaded == {}
    assert kept.exists()
    again = generate(folders["5b-i2v"], **FIXED, num_frames=9, num_steps=1, image=picture(), negative_prompt="")
    assert torch.equal(frames, again)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bad", "said"),
    [
        ("2b", {"height": 40}, "height is 40; it must be a positive multiple of 16"),
        ("2b", {"width": 0, "height": 8}, "height is 8"),
        ("2b", {"num_frames": 12}, r"num_frames is 12; it must be 8k \+ 1 or 8k"),
        ("2b", {"num_steps": 0}, "number of steps is 0"),
        ("2b", {"num_steps": 1001}, "number of steps is 1001; it must be 1 to 1000"),
        ("2b", {"output": "gif"}, "output is 'gif'"),
        ("2b", {"latents": torch.zeros(1, 4, 3, 6, 6)}, r"latents have shape \(1, 4, 3, 6, 6\)"),
        ("2b", {"image": picture()}, "text to video checkpoint, which takes no image"),
        ("2b", {"strength": 0.0}, "strength is 0.0; it must be above 0 and at most 1"),
        ("2b", {"strength": 1.5}, "strength is 1.5"),
        ("2b", {"video": clip(9), "strength": 0.2}, "strength 0.2 of 4 steps leaves no step"),
        ("2b", {"video": clip(5)}, "the video has 5 frames, fewer than the 9"),
        ("2b", {"video": clip(9)[..., :2]}, r"expected uint8 \(T, H, W, 3\)"),
        ("2b", {"video": clip(9), "latents": torch.zeros(1, 4, 3, 6, 4)}, "latents and video exclude each other"),
        ("5b-i2v", {}, "makes a video from an image"),
        ("5b-i2v", {"image": picture(), "video": clip(9)}, "starts from an image, not from a video"),
        ("5b-i2v", {"image": picture()}, r"learned positions for videos of 64 x 96 pixels .* not 48 x 32"),
        ("1.5-i2v", {"image": picture().astype(np.float32)}, r"image is float32 .* expected uint8 \(H, W, 3\)"),
        ("1.5-i2v", {"image": "no-such.png"}, "no-such.png: no such image file"),
    ],
)
def test_bad_input_is_refused_at_the_door(folders: dict[str, Path], kind: str, bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate(folders[kind], **SIZE | {"num_frames": 9} | bad)


def test_unreadable_pictures_and_videos_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"empty\.png is not a readable image"):
        generate(folders["1.5-i2v"], **SIZE, num_frames=9, image=tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"text\.mp4 is not a readable video"):
        generate(folders["2b"], **SIZE, num_frames=9, video=tmp_path / "text.mp4")


def image_missing_on(layout: Layout, folder: Path) -> str:
    with pytest.raises(ValueError, match="no such image file") as found:
        generate(folder, distributed(layout), **SIZE, num_frames=9, image="gone.png")
    return str(found.value)


@pytest.mark.slow
def test_every_rank_hears_of_a_bad_image(folders: dict[str, Path], run_ranks: RankPool) -> None:
    assert len(set(run_ranks(2, image_missing_on, Layout(ring=2), folders["1.5-i2v"]))) == 1
