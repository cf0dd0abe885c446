"""Where Mochi's weights lie: native and diffusers folders, and one rename table per part between the two.

Native (the layout of the authors): dit.safetensors, decoder.safetensors, encoder.safetensors in one folder.
diffusers: transformer/ and vae/ with config.json and (sharded) diffusion_pytorch_model.safetensors.

Our modules carry the native names, so a native load is the identity. The tables lead from native to diffusers names;
`load` reads through them and `save` writes through them. Two orders differ: diffusers splits the fused q, k, v, and it
keeps the two halves of the gated feed-forward's input and of the final modulation the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from common.parallel.mesh import Axis, Mesh
from common.parallel.usp import SequenceParallel
from common.registry.downloads import GOOGLE_T5
from common.registry.hub import cached, lacks
from common.run.quantize import TransformerFiles
from common.weights.load import (
    Checkpoint,
    CheckpointError,
    Concat,
    Progress,
    Rename,
    Swap,
    check,
    find_files,
    on_meta,
    open_checkpoint,
)
from common.weights.placement import Placement, place
from common.weights.schema import read_object
from mochi_xdit.config import NATIVE_TRANSFORMER, MochiConfig, MochiVAEConfig, read_config

if TYPE_CHECKING:
    from mochi_xdit.transformer import MochiTransformer

C = TypeVar("C", MochiConfig, MochiVAEConfig)

NATIVE_DECODER = "decoder.safetensors"
NATIVE_ENCODER = "encoder.safetensors"
DIFFUSERS_STEM = "diffusion_pytorch_model"
T5_REPO = GOOGLE_T5.repo
KEEP_FP32 = (
    "pos_frequencies",
    *(f"{layer}.{kind}" for layer in ("x_embedder.proj", "final_layer.linear") for kind in ("weight", "bias")),
    *(f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
)
"""Tensors that stay fp32 whatever the blocks run in: rotary angles reach hundreds of radians, and what the layers
around the blocks round is wrong in all of a prediction. They are 0.1 % of the weights and run once a step."""
_SINGLE_FILE_PREFIX = "model.diffusion_model."


def transformer_rename(config: MochiConfig) -> Rename:
    """Native to diffusers names of the transformer."""
    table: dict[str, str | Concat | Swap] = {
        "pos_frequencies": "pos_frequencies",
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.mod": Swap("norm_out.linear"),
        "final_layer.linear": "proj_out",
    }
    for name in ("to_kv", "to_q", "to_out"):
        table[f"t5_y_embedder.{name}"] = f"time_embed.pooler.{name}"
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        last = i == config.depth - 1
        table |= {
            f"{ours}.mod_x": f"{theirs}.norm1.linear",
            f"{ours}.mod_y": f"{theirs}.norm1_context.linear" + ("_1" if last else ""),
            f"{ours}.attn.qkv_x": Concat(tuple(f"{theirs}.attn1.to_{part}" for part in "qkv")),
            f"{ours}.attn.qkv_y": Concat(tuple(f"{theirs}.attn1.add_{part}_proj" for part in "qkv")),
            f"{ours}.attn.q_norm_x": f"{theirs}.attn1.norm_q",
            f"{ours}.attn.k_norm_x": f"{theirs}.attn1.norm_k",
            f"{ours}.attn.q_norm_y": f"{theirs}.attn1.norm_added_q",
            f"{ours}.attn.k_norm_y": f"{theirs}.attn1.norm_added_k",
            f"{ours}.attn.proj_x": f"{theirs}.attn1.to_out.0",
            f"{ours}.mlp_x.w1": Swap(f"{theirs}.ff.net.0.proj"),
            f"{ours}.mlp_x.w2": f"{theirs}.ff.net.2",
        }
        if not last:
            table |= {
                f"{ours}.attn.proj_y": f"{theirs}.attn1.to_add_out",
                f"{ours}.mlp_y.w1": Swap(f"{theirs}.ff_context.net.0.proj"),
                f"{ours}.mlp_y.w2": f"{theirs}.ff_context.net.2",
            }
    return table


def _residual(ours: str, theirs: str) -> dict[str, str | Concat | Swap]:
    parts = {0: "norm1.norm_layer", 2: "conv1.conv", 3: "norm2.norm_layer", 5: "conv2.conv"}
    return {f"{ours}.stack.{i}": f"{theirs}.{name}" for i, name in parts.items()}


def decoder_rename(config: MochiVAEConfig) -> Rename:
    """Native to diffusers names of the VAE decoder; the latter start with `decoder.` in the VAE's file."""
    table: dict[str, str | Concat | Swap] = {"blocks.0.0": "decoder.conv_in", "output_proj": "decoder.proj_out"}
    for j in range(config.layers[-1]):
        table |= _residual(f"blocks.0.{j + 1}", f"decoder.block_in.resnets.{j}")
    stages = config.layers[-2:0:-1]
    for i, count in enumerate(stages):
        for j in range(count):
            table |= _residual(f"blocks.{i + 1}.blocks.{j}", f"decoder.up_blocks.{i}.resnets.{j}")
        table[f"blocks.{i + 1}.proj"] = f"decoder.up_blocks.{i}.proj"
    for j in range(config.layers[0]):
        table |= _residual(f"blocks.{len(stages) + 1}.{j}", f"decoder.block_out.resnets.{j}")
    return table


def encoder_rename(config: MochiVAEConfig) -> Rename:
    """Native to diffusers names of the VAE encoder; the latter start with `encoder.` in the VAE's file."""
    table: dict[str, str | Concat | Swap] = {
        "layers.0": "encoder.proj_in",
        "output_norm": "encoder.norm_out.norm_layer",
        "output_proj": "encoder.proj_out",
    }

    def group(ours: list[str], theirs: str, attention: bool) -> None:
        for j, name in enumerate(ours):
            table.update(_residual(name, f"{theirs}.resnets.{j}"))
            if attention:
                other = f"{theirs}.attentions.{j}"
                table[f"{name}.attn_block.norm"] = f"{theirs}.norms.{j}.norm_layer"
                table[f"{name}.attn_block.attn.qkv"] = Concat(tuple(f"{other}.to_{part}" for part in "qkv"))
                table[f"{name}.attn_block.attn.out"] = f"{other}.to_out.0"

    first, *stages, last = config.layers
    group([f"layers.{j + 1}" for j in range(first)], "encoder.block_in", config.attention[0])
    at = first + 1
    for i, count in enumerate(stages):
        table[f"layers.{at + i}.layers.0"] = f"encoder.down_blocks.{i}.conv_in.conv"
        names = [f"layers.{at + i}.layers.{j + 1}" for j in range(count)]
        group(names, f"encoder.down_blocks.{i}", config.attention[i + 1])
    at += len(stages)
    group([f"layers.{at + j}" for j in range(last)], "encoder.block_out", config.attention[-1])
    return table


@dataclass(frozen=True)
class Part(Generic[C]):
    """One part of the model in a folder, found but not read."""

    file: Path
    """A safetensors file, or the index of its shards."""
    config: C
    rename: Rename | None
    """None for the native layout."""
    prefix: str = ""
    """What its names start with, where the file also holds another part."""
    strip: bool = False

    def open(self) -> Checkpoint:
        """Read the headers; CheckpointError if they are no good."""
        return open_checkpoint(self.file).select(self.prefix, self.strip)


def find_transformer(folder: str | Path, dtype: torch.dtype | None = None) -> Part[MochiConfig]:
    """The transformer in a native or diffusers folder, native first where both are there.

    `dtype` chooses between the fp32 and bf16 files where both are there. CheckpointError says what was looked for.
    """
    folder = _folder(folder)
    for name in NATIVE_TRANSFORMER:
        if (folder / name).is_file():
            return _native_transformer(folder / name)
    if not (folder / "transformer").is_dir():
        raise CheckpointError(
            f"{folder}: no Mochi checkpoint, neither {NATIVE_TRANSFORMER[0]} nor a folder transformer/"
        )
    file = find_files(folder / "transformer", DIFFUSERS_STEM, dtype)
    config = read_config(folder)
    return Part(file, config, transformer_rename(config))


def find_decoder(folder: str | Path, dtype: torch.dtype | None = None) -> Part[MochiVAEConfig]:
    """The VAE decoder, as `find_transformer` finds the transformer."""
    return _find_vae(folder, dtype, NATIVE_DECODER, "decoder.")


def find_encoder(folder: str | Path, dtype: torch.dtype | None = None) -> Part[MochiVAEConfig]:
    """The VAE encoder, as `find_transformer` finds the transformer."""
    return _find_vae(folder, dtype, NATIVE_ENCODER, "encoder.")


def load_transformer(
    folder: str | Path,
    sp: SequenceParallel | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    placement: Placement | None = None,
    world: Axis | None = None,
) -> MochiTransformer:
    """The transformer of a native or diffusers folder on `device`.

    See `common.weights.load.load` for memory and errors, and `common.weights.placement.place` for placement and world.
    """
    part = find_transformer(folder, dtype)
    module = _meta_transformer(part, sp)
    return place(module, part.open(), part.rename, device, dtype, KEEP_FP32, placement, world, progress)


def check_decoder(folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Compare the VAE decoder's names, shapes and dtypes with the model's, without reading a weight.

    CheckpointError as it would be raised when it is loaded.
    """
    from mochi_xdit.vae import MochiDecoder

    part = find_decoder(folder, dtype)
    check(on_meta(MochiDecoder, part.config), part.open(), part.rename)


def transformer_files(folder: str | Path, dtype: torch.dtype | None = torch.bfloat16) -> tuple[TransformerFiles, ...]:
    """What `quantize` and checks read: the folder's transformer, not loaded. CheckpointError as for loading."""
    part = find_transformer(folder, dtype)
    return (TransformerFiles(_meta_transformer(part), part.open(), part.rename, part.file, KEEP_FP32),)


def find_text_encoder(model_dir: Path, folder: str | Path | None = None) -> Path:
    """The T5 encoder's folder: the given one, else the checkpoint's own, else T5_REPO in the hub's local cache.

    The native layout has no text encoder in it. ValueError says where one was looked for.
    """
    if folder is not None:
        return Path(folder)
    if (model_dir / "text_encoder").is_dir():
        return model_dir
    folder = cached(T5_REPO)
    if folder is not None and not lacks(GOOGLE_T5, folder):
        return folder
    raise ValueError(
        f"{model_dir} has no folder text_encoder/, and {T5_REPO} is not in the hub's local cache; download it, or name "
        "a T5 encoder's folder with --text-encoder-dir"
    )


def _meta_transformer(part: Part[MochiConfig], sp: SequenceParallel | None = None) -> MochiTransformer:
    from mochi_xdit.transformer import MochiTransformer

    return on_meta(MochiTransformer, part.config, sp or SequenceParallel(Mesh()))


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    return folder


@contextmanager
def _read_as(what: str, file: Path) -> Iterator[None]:
    """Tensors that are missing, or are not shaped as those of what is expected, are the file's fault."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file}: not {what}, tensor {error.args[0]} is missing") from None
    except CheckpointError:
        raise
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: not {what} ({error})") from None


def _native_transformer(file: Path) -> Part[MochiConfig]:
    prefix, checkpoint = "", open_checkpoint(file)
    if any(name.startswith(_SINGLE_FILE_PREFIX) for name in checkpoint):
        prefix, checkpoint = _SINGLE_FILE_PREFIX, checkpoint.select(_SINGLE_FILE_PREFIX, strip=True)
    shapes = {name: entry.shape for name, entry in checkpoint.items()}
    with _read_as("a Mochi transformer", file):
        return Part(file, MochiConfig.from_native(shapes, str(file)), None, prefix, strip=True)


def _find_vae(folder: str | Path, dtype: torch.dtype | None, native: str, prefix: str) -> Part[MochiVAEConfig]:
    folder = _folder(folder)
    file = folder / native
    if file.is_file():
        shapes = {name: entry.shape for name, entry in open_checkpoint(file).items()}
        with _read_as("a Mochi VAE", file):
            return Part(file, MochiVAEConfig.from_native(shapes, str(file)), None)
    if not (folder / "vae").is_dir():
        raise CheckpointError(f"{folder}: no Mochi VAE, neither {native} nor a folder vae/")
    file = find_files(folder / "vae", DIFFUSERS_STEM, dtype)
    config_file = folder / "vae" / "config.json"
    config = MochiVAEConfig.from_diffusers(read_object(config_file), str(config_file))
    table = decoder_rename if prefix == "decoder." else encoder_rename
    return Part(file, config, table(config), prefix)
