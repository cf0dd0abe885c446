"""The whole of ConsisID after the face: against the reference pipeline, and against itself on other layouts."""

from __future__ import annotations

import importlib.util
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from common.parallel.mesh import Layout, Mesh, distributed
from common.video.latents import load_latents
from consisid_xdit import ConsisIDPipeline
from consisid_xdit.face import IdentityFeatures, save_identity
from consisid_xdit.facial import LocalFacialExtractor
from consisid_xdit.pipeline import as_picture
from tests.helpers.consisid import small, write_checkpoint
from tests.helpers.ranks import RankPool

PROMPT, NEGATIVE = "a red boat moves to the left", "a blue bird"
SIZE = {"height": 64, "width": 96, "num_frames": 9}
SEED = 7
needs_cv2 = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None,
    reason="the reference pipeline and drawn landmarks need opencv (extra face)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("consisid"))


def person(seed: int = 0) -> IdentityFeatures:
    generator = torch.Generator().manual_seed(seed)
    config = small()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = tuple(draw(1, 9, config.vit_dim) for _ in range(config.scales))
    image = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
    points = torch.tensor([[15.0, 12.0], [34.0, 13.0], [25.0, 21.0], [17.0, 30.0], [33.0, 31.0]])
    return IdentityFeatures(draw(1, config.id_dim), hidden, image, points)


def generate(folder: Path, mesh: Mesh | None = None, scheduler: str | None = None, **options: Any) -> Tensor | None:
    pipe = ConsisIDPipeline.from_pretrained(folder, mesh=mesh, dtype="fp32", scheduler=scheduler)
    given = {"negative_prompt": NEGATIVE, "identity": person(), "num_steps": 4, "seed": SEED, "output": "latent"}
    return pipe(PROMPT, **given | SIZE | options)


def reference(folder: Path, scheduler: str, output: str = "latent", **options: Any) -> Any:
    import diffusers
    from PIL import Image
    from transformers import AutoTokenizer, T5EncoderModel

    steps = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}[scheduler]
    pipe = diffusers.ConsisIDPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae"),
        transformer=diffusers.ConsisIDTransformer3DModel.from_pretrained(folder, subfolder="transformer"),
        scheduler=steps.from_pretrained(folder, subfolder="scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    who = person()
    return pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=Image.fromarray(who.image.numpy()),
        id_cond=who.id_cond,
        id_vit_hidden=list(who.id_vit_hidden),
        kps_cond=who.face_kps.numpy(),
        num_inference_steps=4,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(SEED),
        output_type=output,
        return_dict=False,
        **SIZE | options,
    )[0]


def close(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None and ours.shape == theirs.transpose(1, 2).shape
    assert (ours - theirs.transpose(1, 2)).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1)


@needs_cv2
@pytest.mark.parametrize(("scheduler", "dynamic"), [("ddim", False), ("ddim", True), ("dpm", True)])
@pytest.mark.slow
def test_latents_are_the_references(folder: Path, scheduler: str, dynamic: bool) -> None:
    theirs = reference(folder, scheduler, use_dynamic_cfg=dynamic)
    close(generate(folder, scheduler=scheduler, dynamic_cfg=dynamic), theirs)


@needs_cv2
@pytest.mark.parametrize("changes", [{"kps": True}, {"face": False}], ids=["drawn landmarks", "no face modules"])
@pytest.mark.slow
def test_latents_of_other_checkpoints_are_the_references(changes: dict[str, bool], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, **changes)
    close(generate(folder), reference(folder, "ddim"))


@needs_cv2
@pytest.mark.slow
def test_frames_are_the_references(folder: Path) -> None:
    frames = generate(folder, output="frames")
    theirs = (reference(folder, "ddim", output="np")[0] * 255).round().astype(np.uint8)
    assert frames is not None and frames.dtype == torch.uint8
    assert np.abs(frames.numpy().astype(int) - theirs.astype(int)).max() <= 1


def on_rank(layout: Layout, folder: str) -> Tensor:
    latents = generate(Path(folder), distributed(layout))
    assert latents is not None
    return latents


@pytest.mark.parametrize("layout", [Layout(1, 3, 1), Layout(2, 1, 2)], ids=str)
@pytest.mark.slow
def test_any_layout_gives_the_same(folder: Path, layout: Layout, run_ranks: RankPool) -> None:
    alone = on_rank(Layout(), str(folder))
    for latents in run_ranks(layout.ranks, on_rank, layout, str(folder)):
        assert (latents - alone).abs().max() < 1e-4


@pytest.mark.slow
def test_the_person_matters_and_the_extractor_runs_once(folder: Path) -> None:
    forward, calls = LocalFacialExtractor.forward, []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return forward(*args)

    with mock.patch.object(LocalFacialExtractor, "forward", counted):
        one = generate(folder)
    assert len(calls) == 1, "once per generation: not per step, not per branch"
    other = generate(folder, identity=replace(person(), id_cond=person(1).id_cond))
    assert one is not None and other is not None and (one - other).abs().max() > 1e-3


@pytest.mark.slow
def test_identity_from_a_file(folder: Path, tmp_path: Path) -> None:
    save_identity(tmp_path / "who.safetensors", person())
    assert torch.equal(generate(folder, identity=tmp_path / "who.safetensors"), generate(folder))


def test_final_latents_are_kept_where_asked(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "x.latents.safetensors"
    latents = generate(folder, num_steps=1, latents_file=kept)
    assert latents is not None and torch.equal(load_latents(kept, latents.shape[1]), latents)


def test_face_models_leave_before_anything_else_is_loaded(folder: Path) -> None:
    class Reader:
        def read(self, picture: np.ndarray) -> tuple[IdentityFeatures, list[str]]:
            assert picture.shape == (5, 6, 3)
            return person(), ["two faces"]

    readers: list[weakref.ref[Reader]] = []

    def load() -> Reader:
        reader = Reader()
        readers.append(weakref.ref(reader))
        return reader

    pipe = ConsisIDPipeline.from_pretrained(folder, dtype="fp32", keep_loaded=True)
    with mock.patch.object(pipe, "_load_face_models", load):
        identity = pipe.identify(np.zeros((5, 6, 3), np.uint8))
    assert torch.equal(identity.id_cond, person().id_cond)
    assert len(readers) == 1 and readers[0]() is None and not pipe.loaded


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = ConsisIDPipeline.from_pretrained(folder, dtype="fp32")
    with pytest.raises(ValueError, match="either a photograph"):
        pipe(PROMPT)
    with pytest.raises(ValueError, match="no such image file"):
        pipe(PROMPT, image=tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="not a readable image"):
        pipe(PROMPT, image=tmp_path / "text.png")
    with pytest.raises(ValueError, match="expected uint8"):
        as_picture(np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="identity features do not fit"):
        pipe(PROMPT, identity=replace(person(), id_cond=torch.ones(1, 3)), **SIZE, num_steps=1)
    with pytest.raises(ValueError, match="64 x 96 pixels"):
        pipe(PROMPT, identity=person(), height=64, width=64)
    (folder.parent / "cog").mkdir(exist_ok=True)
    (folder.parent / "cog" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    with pytest.raises(ValueError, match="known: ConsisIDPipeline"):
        ConsisIDPipeline.from_pretrained(folder.parent / "cog")
