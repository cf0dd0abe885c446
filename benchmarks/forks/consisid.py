"""ConsisID in the benchmarks: CogVideoX with a face."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.forks import cogvideox
from benchmarks.forks.cogvideox import decoder, their_decoder
from benchmarks.step_models import STEM, Case, Size, latent_size, write
from benchmarks.true_size import Hollow, bf16
from cogvideox_xdit import demo
from common.parallel.usp import SequenceParallel
from common.registry import forks as registry
from common.registry.forks import Model
from common.weights.load import load, on_meta, open_checkpoint
from consisid_xdit.config import PREVIEW, ConsisIDConfig, consisid_config, consisid_json
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table

__all__ = ["decoder", "inputs", "step", "their_decoder", "true_size"]
FACE = {"vit_dim": 64, "extractor_heads": 1, "id_dim": 64}
"""Of 1024, 16 and 1280: the face extractor too runs in every forward in diffusers."""


def step(model: Model, heads: int, depth: int, words: int) -> Reduced:
    """For `benchmarks/step.py`. ValueError for a number of heads or blocks that cannot be."""
    if heads % 3 or depth % 2:
        raise ValueError(f"{heads} heads, {depth} blocks: ConsisID needs a multiple of 3 and a multiple of 2")
    return Reduced(heads, depth)


class Reduced(cogvideox.Reduced):
    """The published preview's but for its learned positions, which diffusers makes anew for any size but their own."""

    config: ConsisIDConfig

    def __init__(self, heads: int, depth: int) -> None:
        sizes = {"heads": heads, "layers": depth, "face_dim": heads * 128 // 3, **FACE}
        self.config = replace(PREVIEW, learned=False, sample_height=200, sample_width=200, **sizes)

    def write(self, folder: Path) -> None:
        write(folder, ConsisIDTransformer(self.config), rename_table(self.config), consisid_json(self.config))

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        config = consisid_config(json.loads((folder / "transformer" / "config.json").read_text()))
        checkpoint = open_checkpoint(folder / "transformer" / f"{STEM}.safetensors")
        return load(on_meta(ConsisIDTransformer, config, sp), checkpoint, rename_table(config), device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import ConsisIDTransformer3DModel

        return ConsisIDTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        return ReducedCase(self.config, latent_size(tokens, 1.5, self.config.patch, 4), device, dtype)


class ReducedCase(cogvideox.ReducedCase):
    def __init__(self, config: ConsisIDConfig, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, size, device, dtype)
        generator = torch.Generator().manual_seed(2)
        self.known = torch.randn(1, config.id_dim, generator=generator).to(device, dtype)
        self.seen = [torch.randn(1, 577, config.vit_dim, generator=generator).to(device, dtype)] * config.scales

    def prepare(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, ConsisIDTransformer)
        face = model.read_face(self.known, self.seen)
        return [model.prepare(self.text[i : i + 1], self.size, self.image, face=face) for i in range(2)]

    def their_extras(self) -> dict[str, Any]:
        seen = [hidden.expand(2, -1, -1) for hidden in self.seen]
        return {"id_cond": self.known.expand(2, -1), "id_vit_hidden": seen}


def inputs(model: Model, size: registry.Size) -> dict[str, Any]:
    """Random identity features."""
    from consisid_xdit.face import IdentityFeatures

    config, generator = model.config, torch.Generator().manual_seed(0)
    hidden = tuple(torch.randn(1, 577, config.vit_dim, generator=generator) for _ in range(config.scales))
    face = torch.full((512, 512, 3), 128, dtype=torch.uint8)
    known = torch.randn(1, config.id_dim, generator=generator)
    return {"identity": IdentityFeatures(known, hidden, face, torch.zeros(5, 2))}


def true_size(model: Model) -> Hollow:
    """A folder of the true sizes, in the diffusers layout, without face models."""
    config: ConsisIDConfig = model.config
    transformer, index = (
        bf16(on_meta(ConsisIDTransformer, config)),
        demo.model_index("ConsisIDPipeline", "ConsisIDTransformer3DModel"),
    )
    return cogvideox.folder_of(model, transformer, rename_table(config), consisid_json(config), "5b-i2v", index)
