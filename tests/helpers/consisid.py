"""Small random ConsisID models, ours and the installed reference, with the same weights.

The reference is imported where it is used: the ranks of a layout test do without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from cogvideox_xdit.config import VAEConfig
from common.parallel.usp import SequenceParallel
from common.weights.load import load, on_meta, open_checkpoint
from consisid_xdit.config import PREVIEW, ConsisIDConfig, consisid_json
from consisid_xdit.demo import random_checkpoint
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table
from tests.helpers import cogvideox

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel

SIZE = (3, 8, 12)
TEXT = 7
VAE = VAEConfig(channels=(16, 16, 16, 16), latent_channels=4, layers=1, groups=4, sample_height=64, sample_width=96)


def small(**changes: object) -> ConsisIDConfig:
    """Three narrow heads and four blocks, so that the face is read twice."""
    numbers = {
        "heads": 3,
        "head_dim": 16,
        "layers": 4,
        "text_dim": 12,
        "text_length": TEXT,
        "time_dim": 8,
        "in_channels": 8,
        "out_channels": 4,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
        "cross_head_dim": 8,
        "cross_heads": 2,
        "id_dim": 10,
        "vit_dim": 6,
        "depth": 10,
        "extractor_head_dim": 4,
        "extractor_heads": 3,
        "id_tokens": 2,
        "queries": 5,
        "face_dim": 32,
        "ff_mult": 2,
    }
    return replace(PREVIEW, **(numbers | changes))


def reference(config: ConsisIDConfig, seed: int = 0) -> ConsisIDTransformer3DModel:
    """The installed model in fp64 with every weight random, modulation and norms included."""
    from diffusers import ConsisIDTransformer3DModel

    raw = {key: value for key, value in consisid_json(config).items() if not key.startswith("_")}
    model = ConsisIDTransformer3DModel(**raw).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            shift = "norm" in name and p.ndim == 1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale + shift)
        table = model.patch_embed.pos_embedding
        table.copy_(torch.randn(table.shape, generator=generator, dtype=table.dtype))
    return model


def stored(model: ConsisIDTransformer3DModel, folder: Path) -> Path:
    """The reference's weights as a file in its own layout."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def ours(config: ConsisIDConfig, path: Path, sp: SequenceParallel | None = None) -> ConsisIDTransformer:
    model = on_meta(ConsisIDTransformer, config, sp)
    return load(model, open_checkpoint(path), rename_table(config))


def inputs(config: ConsisIDConfig, size: tuple[int, int, int] = SIZE, batch: int = 1) -> dict[str, Tensor]:
    """Arguments of CogVideoX's `denoise` in fp64."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "latents": draw(batch, config.out_channels, *size),
        "text": draw(batch, config.text_length, config.text_dim),
        "t": torch.tensor([999, 41][:batch]),
        "image": draw(batch, config.image_channels, *size),
    }


def identity(config: ConsisIDConfig, seed: int = 2) -> dict[str, object]:
    """Random identity features in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = [draw(1, 9, config.vit_dim) for _ in range(config.scales)]
    return {"id_cond": draw(1, config.id_dim), "id_vit_hidden": hidden}


def denoise(
    model: ConsisIDTransformer,
    latents: Tensor,
    text: Tensor,
    t: Tensor | float,
    image: Tensor | None = None,
    id_cond: Tensor | None = None,
    id_vit_hidden: Sequence[Tensor] = (),
) -> Tensor:
    """As CogVideoX's, with the features of a face, if there is one."""
    face = None if id_cond is None else model.read_face(id_cond, id_vit_hidden)
    return cogvideox.denoise(model, latents, text, t, image, face=face)


def reference_output(
    model: ConsisIDTransformer3DModel, given: dict[str, Tensor], face: dict[str, object] | None
) -> Tensor:
    """What the installed model says to the same arguments, in our order of axes."""
    from diffusers import CogVideoXPipeline

    x = torch.cat((given["latents"], given["image"].expand_as(given["latents"])), dim=1)
    config = SimpleNamespace(**model.config, patch_size_t=None)
    pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    rope = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipe, x.shape[3] * 8, x.shape[4] * 8, x.shape[2], torch.device("cpu")
    )
    with torch.no_grad(), cogvideox.wide_rope(), wide_softmax():
        out = model(x.transpose(1, 2), given["text"], given["t"], image_rotary_emb=rope, **(face or {})).sample
    return out.transpose(1, 2)


@contextmanager
def wide_softmax() -> Iterator[None]:
    """The reference's face attention takes its softmax in fp32 whatever the dtype; here fp64 stays fp64."""
    to_float = Tensor.float
    with mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x)):
        yield


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """A whole fp32 checkpoint folder with random weights."""
    random_checkpoint(folder, small(text_dim=32, text_length=16, **changes), VAE, torch.float32)
    return folder
