"""The models of `benchmarks/step.py`: reduced checkpoints, and forwards of ours and diffusers' on the same inputs.

Heads and blocks are fewer than the published ones; all else that decides the time of a block is as published.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogvideox_xdit.config import CONFIGS, TransformerConfig, transformer_config, transformer_json
from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.transformer import pack as cogvideox_pack
from cogvideox_xdit.transformer import unpack as cogvideox_unpack
from cogvideox_xdit.weights import STEM, load_transformer, rename_table
from common.demo import fill
from common.usp import SequenceParallel
from common.weights import load, on_meta, open_checkpoint, save
from consisid_xdit.config import PREVIEW, ConsisIDConfig, consisid_config, consisid_json
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table as consisid_table
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.transformer import pack as mochi_pack
from mochi_xdit.transformer import unpack as mochi_unpack
from mochi_xdit.weights import load_transformer as load_mochi
from mochi_xdit.weights import transformer_rename as mochi_table

Size = tuple[int, int, int]
MOCHI_TEXT_DIM = 512
"""Of 4096: the pool over the text runs once a forward in diffusers, and with few blocks it would weigh too much."""

FACE = {"vit_dim": 64, "extractor_heads": 1, "id_dim": 64}
"""Of 1024, 16 and 1280: the face extractor too runs in every forward in diffusers."""


class Model(Protocol):
    """One model. Its two guidance branches are 0 and 1."""

    def write(self, folder: Path) -> None:
        """A transformer folder in diffusers' layout with random weights in fp32."""

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module: ...

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        """Inputs of about so many video tokens."""


class Case(Protocol):
    """Inputs of one size."""

    latents: Tensor
    size: Size

    def pack(self, latents: Tensor) -> Tensor: ...

    def unpack(self, tokens: Tensor) -> Tensor: ...

    def prepare(self, model: nn.Module) -> list[Any]:
        """Both branches' conditions, once for a generation."""

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        """Ours on packed tokens of this rank."""

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Diffusers' predictions for both branches on full latents, batched where its pipeline does so."""


def latent_size(tokens: int, ratio: float, patch: Size, divisor: int) -> Size:
    """Latent (T, H, W) of about so many tokens, W / H about `ratio`, the patches in W a multiple of `divisor`."""
    h = max(2, round(math.sqrt(tokens / 4 / ratio)))
    w = max(divisor, round(h * ratio / divisor) * divisor)
    return max(1, round(tokens / (h * w))) * patch[0], h * patch[1], w * patch[2]


@torch.no_grad()
def _write(folder: Path, model: nn.Module, table: Any, numbers: dict[str, Any]) -> None:
    target = folder / "transformer"
    target.mkdir(parents=True)
    fill(model, 0)
    save(model.state_dict(), target / f"{STEM}.safetensors", table)
    (target / "config.json").write_text(json.dumps(numbers))


class Mochi:
    """words: text tokens of 256 that are no padding; the negative prompt is empty."""

    def __init__(self, heads: int, depth: int, words: int) -> None:
        self.words, width = words, 128 * heads
        sizes = {"hidden_y": width // 2, "mlp_x": 8 * width // 3, "mlp_y": 4 * width // 3, "text_dim": MOCHI_TEXT_DIM}
        self.config = MochiConfig(depth=depth, heads=heads, **sizes)

    def write(self, folder: Path) -> None:
        config = self.config
        numbers = {"num_layers": config.depth, "num_attention_heads": config.heads, "text_embed_dim": config.text_dim}
        numbers |= {"pooled_projection_dim": config.hidden_y, "_class_name": "MochiTransformer3DModel"}
        _write(folder, MochiTransformer(config), mochi_table(config), numbers)

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_mochi(folder, sp, device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import MochiTransformer3DModel

        return MochiTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        return MochiCase(latent_size(tokens, 53 / 30, (1, 2, 2), 1), self.words, device, dtype)


class MochiCase:
    def __init__(self, size: Size, words: int, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 12, *size, generator=generator).to(device)
        self.text = torch.randn(1, 256, MOCHI_TEXT_DIM, generator=generator).to(device)
        self.mask = (torch.arange(256) < words)[None].to(device)
        self.t = torch.full((1,), 250.0, device=device)

    def pack(self, latents: Tensor) -> Tensor:
        return mochi_pack(latents)

    def unpack(self, tokens: Tensor) -> Tensor:
        return mochi_unpack(tokens, self.size)

    def prepare(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, MochiTransformer)
        return [model.prepare(self.size, self.text, self.mask), model.prepare(self.size)]

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        return model(x, self.t, cond)

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        # Its attention cannot take prompts of two lengths at once, so the branches go one by one.
        x, text = self.latents.to(self.dtype), self.text.to(self.dtype)
        masks = (self.mask, torch.zeros_like(self.mask))
        good, bad = (model(x, text, self.t, mask, return_dict=False)[0] for mask in masks)
        return good, bad


class CogVideoX:
    """kind: a published checkpoint's, text to video."""

    def __init__(self, kind: str, heads: int, depth: int) -> None:
        self.config: TransformerConfig = replace(
            CONFIGS[kind], heads=heads, layers=depth, sample_height=200, sample_width=200
        )

    def write(self, folder: Path) -> None:
        _write(folder, CogVideoXTransformer(self.config), rename_table(self.config), transformer_json(self.config))

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        config = transformer_config(json.loads((folder / "transformer" / "config.json").read_text()))
        return load_transformer(folder, config, sp, device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        # A number of columns that peers can divide over ranks.
        return CogVideoXCase(self.config, latent_size(tokens, 1.5, self.config.patch, 4), device, dtype)


class CogVideoXCase:
    def __init__(self, config: TransformerConfig, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.size, self.dtype, self.device = config, size, dtype, device
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, config.out_channels, *size, generator=generator).to(device)
        self.text = torch.randn(2, config.text_length, config.text_dim, generator=generator).to(device)
        self.t = torch.full((1,), 499, device=device)
        self.image: Tensor | None = None
        if config.image_channels:
            self.image = torch.randn(1, config.image_channels, *size, generator=generator).to(device)
        self.rope = self._their_rope() if config.rotary else None

    def _their_rope(self) -> Any:
        """Made once for a generation there too."""
        from diffusers import CogVideoXPipeline

        raw = transformer_json(self.config)
        config = SimpleNamespace(**{name: raw.get(name) for name in (*raw, "patch_size_t")})
        pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
        frames, rows, columns = self.size
        make = CogVideoXPipeline._prepare_rotary_positional_embeddings
        return make(pipe, rows * 8, columns * 8, frames, self.device)  # type: ignore[arg-type]

    def pack(self, latents: Tensor) -> Tensor:
        return cogvideox_pack(latents, self.config.patch)

    def unpack(self, tokens: Tensor) -> Tensor:
        return cogvideox_unpack(tokens, self.size, self.config.patch)

    def prepare(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, CogVideoXTransformer)
        return [model.prepare(self.text[i : i + 1], self.size, self.image) for i in range(2)]

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        return model(x, self.t, cond)

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        z = self.latents if self.image is None else torch.cat((self.latents, self.image), dim=1)
        x = z.transpose(1, 2).to(self.dtype).expand(2, -1, -1, -1, -1)
        text, t = self.text.to(self.dtype), self.t.expand(2)
        given = {"image_rotary_emb": self.rope, "return_dict": False} | self.their_extras()
        good, bad = model(x, text, t, **given)[0].transpose(1, 2).chunk(2)
        return good, bad

    def their_extras(self) -> dict[str, Any]:
        return {}


class ConsisID(CogVideoX):
    """The published preview's but for its learned positions, which diffusers makes anew for any size but their own."""

    config: ConsisIDConfig

    def __init__(self, heads: int, depth: int) -> None:
        sizes = {"heads": heads, "layers": depth, "face_dim": heads * 128 // 3, **FACE}
        self.config = replace(PREVIEW, learned=False, sample_height=200, sample_width=200, **sizes)

    def write(self, folder: Path) -> None:
        _write(folder, ConsisIDTransformer(self.config), consisid_table(self.config), consisid_json(self.config))

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        config = consisid_config(json.loads((folder / "transformer" / "config.json").read_text()))
        checkpoint = open_checkpoint(folder / "transformer" / f"{STEM}.safetensors")
        return load(on_meta(ConsisIDTransformer, config, sp), checkpoint, consisid_table(config), device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import ConsisIDTransformer3DModel

        return ConsisIDTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        return ConsisIDCase(self.config, latent_size(tokens, 1.5, self.config.patch, 4), device, dtype)


class ConsisIDCase(CogVideoXCase):
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


def make(name: str, heads: int, depth: int, words: int) -> Model:
    """`mochi`, `cogvideox-2b`, `cogvideox-5b`, `cogvideox-1.5` or `consisid`. ValueError for a number of heads that
    cannot be."""
    if name == "mochi":
        if heads % 3:
            raise ValueError(f"{heads} heads: Mochi's feed-forward is 8/3 of its width; give a multiple of 3")
        return Mochi(heads, depth, words)
    if name == "consisid":
        if heads % 3 or depth % 2:
            raise ValueError(f"{heads} heads, {depth} blocks: ConsisID needs a multiple of 3 and a multiple of 2")
        return ConsisID(heads, depth)
    return CogVideoX(name.removeprefix("cogvideox-"), heads, depth)


NAMES = ("mochi", "cogvideox-2b", "cogvideox-5b", "cogvideox-1.5", "consisid")
