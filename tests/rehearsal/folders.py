"""Checkpoint folders of the published models as sparse files: every name, shape and dtype, and no bytes on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from cogvideox_xdit import demo as cogvideox
from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder
from common.run.demo import write_json, write_part
from common.weights.checkpoint import stored_as
from common.weights.headers import header_of
from common.weights.load import on_meta, save
from consisid_xdit.config import consisid_json
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.vae import MochiDecoder
from tests.rehearsal.models import MODELS
from wan_xdit import config as wan
from wan_xdit import demo as wan_demo
from wan_xdit.clip import ImageConfig, ImageEncoder
from wan_xdit.transformer import WanTransformer
from wan_xdit.vae import WanDecoder, WanEncoder

BF16 = torch.bfloat16
WAN_KINDS = {
    "wan-1.3b": "t2v-1.3b",
    "wan-14b": "t2v-14b",
    "wan-i2v-14b": "i2v-14b-720p",
    "wan-a14b": "t2v-a14b",
    "wan-i2v-a14b": "i2v-a14b",
    "wan-ti2v-5b": "ti2v-5b",
}
"""Published kinds by the names of `MODELS`."""


def write_folder(folder: Path, model: str, layers: int | None = None) -> Path:
    """A checkpoint of a model of `MODELS` with so many blocks; default: all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    published = MODELS[model]
    config = (published if layers is None else published.shallow(layers)).config
    with sparse():
        if model.startswith("wan"):
            _write_wan(folder, model, config)
            return folder
        if model.startswith("mochi"):
            for name, module in (("dit", on_meta(MochiTransformer, config)), ("decoder", on_meta(MochiDecoder))):
                save(
                    {name: tensor.to(BF16) for name, tensor in module.state_dict().items()},
                    folder / f"{name}.safetensors",
                )
            return folder
        kind = "5b-i2v" if model == "consisid" else model.removeprefix("cogvideox-")
        vae = replace(VAEConfig(), **cogvideox.scaling(kind))
        parts = on_meta(CogVideoXEncoder, vae), on_meta(CogVideoXDecoder, vae)
        transformer = on_meta(ConsisIDTransformer if model == "consisid" else CogVideoXTransformer, config)
        if model == "consisid":
            cogvideox.write_vae(folder / "vae", vae, *parts, BF16)
            state, table = transformer.state_dict(), rename_table(config)
            write_part(folder / "transformer", consisid_json(config), state, table, BF16)
            scheduler = cogvideox.scheduler_json(kind)
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            index = cogvideox.model_index("ConsisIDPipeline", "ConsisIDTransformer3DModel")
            write_json(folder / "model_index.json", index)
        else:
            cogvideox.write_checkpoint(folder, kind, transformer, vae, *parts, BF16)
    return folder


def _write_wan(folder: Path, model: str, config: wan.TransformerConfig) -> None:
    kind = WAN_KINDS[model]
    vae = wan.vae_of(config)
    zeros, ones = (0.0,) * vae.latent_channels, (1.0,) * vae.latent_channels
    vae = wan.with_stats(vae, zeros, ones)
    experts = [on_meta(WanTransformer, config) for _ in range(2 if kind.endswith("a14b") else 1)]
    wan_demo.write_checkpoint(folder, kind, experts, vae, on_meta(WanEncoder, vae), on_meta(WanDecoder, vae), BF16)
    if config.image_width:
        tower = on_meta(ImageEncoder, ImageConfig())
        wan_demo.save_image_encoder(folder / "image_encoder", tower, BF16)


def sparse() -> AbstractContextManager[object]:
    """Within it `common.weights.load.save` writes headers alone, and files as long as they would be."""
    return mock.patch("common.weights.load.write_file", _write_header)


def _write_header(path: Path, views: Mapping[str, list[Tensor]], metadata: Mapping[str, str]) -> None:
    tensors = {name: stored_as(group) for name, group in views.items()}
    header = header_of(tensors, metadata)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size for _, _, size in tensors.values()))
