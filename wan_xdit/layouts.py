"""Folders of the authors' files and of ComfyUI's, recognised from names and shapes of tensors. No torch.

The authors': `diffusion_pytorch_model*.safetensors` with config.json at the root, or in high_noise_model/ and
low_noise_model/; Wan2.1_VAE.pth or Wan2.2_VAE.pth beside them. ComfyUI's: one file for each part, in its folders
diffusion_models/ (or unet/) and vae/, or all in one folder; there is no config.json, so the shapes say everything.
Names of tensors are the authors' in both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

from common.weights.schema import MAX_LAYERS, CheckpointError, build, read_object
from common.weights.tables import PICKLES, Shapes, read_shapes
from wan_xdit.config import VAE_2_1, VAE_2_2, TransformerConfig, VAEConfig, check_kind, read_transformer

STEM = "diffusion_pytorch_model"
PREFIX = "model.diffusion_model."
"""What some of ComfyUI's files put before every name of the transformer."""
LOOKED_FOR = (
    "model_index.json (diffusers), config.json or high_noise_model/ and low_noise_model/ with "
    f"{STEM}*.safetensors (the authors'), a Wan transformer in diffusion_models/ or here (ComfyUI)"
)
EXPERTS = ("high_noise_model", "low_noise_model")
HEAD_WIDTH = 128
"""Of all published transformers; no tensor's shape shows it."""
_FOLDERS = {
    "transformer": ("diffusion_models", "unet", "."),
    "vae": ("vae", "."),
    "clip": ("clip_vision", "."),
    "text": ("text_encoders", "clip", "."),
}
CLIP_FILES = ("models_clip_*.pth", "models_clip_*.safetensors")
CLIP_SIGNS = {"original": "visual.patch_embedding.weight", "transformers": "vision_model.embeddings.class_embedding"}
"""Tensors by whose names CLIP's image tower is known."""
_UMT5_SIGNS = tuple(f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in (0, 1))
"""A T5 has the first one alone."""
_SIGNS = {
    "vace_patch_embedding.": "vace",
    "vace_blocks.": "vace",
    "img_emb.emb_pos": "flf2v",
    "face_adapter.": "animate",
    "pose_patch_embedding.": "animate",
    "casual_audio_encoder.": "s2v",
    "audio_injector.": "s2v",
}
"""What the names of other models' tensors begin with."""


@dataclass(frozen=True)
class Parts:
    """What was found: the transformer's folders or files, of two experts the one for high noise first, and the VAE."""

    config: TransformerConfig
    vae_config: VAEConfig
    experts: tuple[Path, ...]
    vae: Path

    @property
    def per_token(self) -> bool:
        """Whether a first frame that is given is at a time of its own: so it is with 2.2's autoencoder."""
        return self.vae_config.shortcuts and not self.config.image_channels


def find_parts(folder: Path) -> Parts | None:
    """The parts of a checkpoint in the authors' or in ComfyUI's layout; None where there is neither.

    CheckpointError for a checkpoint that lacks a part, or is of a kind that cannot be run.
    """
    experts = _authors(folder) or _comfyui(folder)
    if not experts:
        return None
    configs = [_config(expert) for expert in experts]
    if any(config != configs[0] for config in configs):
        raise CheckpointError(f"{experts[-1]}: this expert's numbers are not those of {experts[0]}")
    vae, vae_config = _find_vae(folder, configs[0].out_channels)
    return Parts(configs[0], vae_config, experts, vae)


def roots(folder: Path) -> tuple[Path, ...]:
    """Where ComfyUI's folders may lie: here, or as its repackaged repositories have them."""
    return folder, folder / "split_files"


def weights_file(place: Path) -> Path:
    """The file, or the index of the shards, of a transformer's folder; a file is itself."""
    if place.is_file():
        return place
    for name in (f"{STEM}.safetensors.index.json", f"{STEM}.safetensors"):
        if (place / name).is_file():
            return place / name
    raise CheckpointError(f"{place}: no {STEM}.safetensors and no {STEM}.safetensors.index.json")


def find_clip(folder: Path) -> Path | None:
    """CLIP's image tower: diffusers' folder, the authors' file or ComfyUI's; None where there is none of them."""
    if (folder / "image_encoder").is_dir():
        return folder / "image_encoder"
    files = [file for pattern in CLIP_FILES for file in sorted(folder.glob(pattern))]
    signs = set(CLIP_SIGNS.values())
    return next(iter(files), None) or next(
        (file for file in _candidates(folder, "clip") if signs & _names(file, "clip_vision")), None
    )


def find_umt5(folder: Path) -> Path | None:
    """ComfyUI's file of the text encoder, by what is in it; None where there is none. Of several the first by name."""
    signs = set(_UMT5_SIGNS)
    return next((file for file in _candidates(folder, "text") if signs <= _names(file, "text_encoders")), None)


def _names(file: Path, place: str) -> set[str]:
    """The names of a file's tensors; none of a file that cannot be read, unless it lies in the part's own folder."""
    try:
        return set(read_shapes(file))
    except CheckpointError:
        if file.parent.name == place:
            raise
        return set()


def _authors(folder: Path) -> tuple[Path, ...]:
    if all((folder / name).is_dir() for name in EXPERTS):
        return tuple(folder / name for name in EXPERTS)
    if any((folder / name).is_dir() for name in EXPERTS):
        missing = next(name for name in EXPERTS if not (folder / name).is_dir())
        raise CheckpointError(f"{folder}: {missing}/ is missing beside the other expert's folder")
    has = (folder / "config.json").is_file() and any(folder.glob(f"{STEM}*.safetensors"))
    return (folder,) if has else ()


def _comfyui(folder: Path) -> tuple[Path, ...]:
    """The one transformer in a folder, or the pair of experts."""
    files = [file for file in _candidates(folder, "transformer") if _is_transformer(read_shapes(file))]
    high = [file for file in files if "high" in file.name.lower()]
    low = [file for file in files if "low" in file.name.lower()]
    if len(files) <= 1 and not (high or low):
        return tuple(files)
    if len(files) == 2 and len(high) == len(low) == 1:
        return high[0], low[0]
    names = ", ".join(file.name for file in files[:4])
    raise CheckpointError(
        f"{folder} holds {len(files)} transformers ({names}); a checkpoint is one of them, or a high and a low noise "
        "one: make a folder with links to its files"
    )


def _candidates(folder: Path, part: str) -> list[Path]:
    places = [root / name for root in roots(folder) for name in _FOLDERS[part]]
    kinds = (".safetensors", *PICKLES) if part == "vae" else (".safetensors",)
    return [file for place in places for file in _files(place, kinds)]


def _files(place: Path, kinds: Collection[str]) -> list[Path]:
    return sorted(file for file in place.iterdir() if file.suffix in kinds) if place.is_dir() else []


def _is_transformer(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return f"{_prefix(shapes)}head.modulation" in shapes and f"{_prefix(shapes)}patch_embedding.weight" in shapes


def _prefix(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""


def _config(expert: Path) -> TransformerConfig:
    """A transformer's numbers, from config.json where it is in the authors' layout, and from the tensors' shapes."""
    file = weights_file(expert)
    check_kind(expert.name, str(expert))
    file_shapes = read_shapes(file)
    shapes = {name.removeprefix(_prefix(file_shapes)): shape for name, shape in file_shapes.items()}
    for sign, kind in _SIGNS.items():
        if any(name.startswith(sign) for name in shapes):
            check_kind(kind, str(file))
    if expert.is_dir():
        config_file = expert / "config.json"
        config = read_transformer(read_object(config_file), str(config_file))
    else:
        config = _from_shapes(shapes, str(file))
    image = shapes.get("img_emb.proj.0.weight")
    return replace(config, image_width=image[0] if image else None)


def _from_shapes(shapes: Shapes, where: str) -> TransformerConfig:
    def size(name: str, dim: int) -> int:
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) <= dim:
            raise CheckpointError(f"{where}: not a Wan transformer, tensor {name}.weight is missing or flat")
        return shape[dim]

    width, layers = size("patch_embedding", 0), 0
    while f"blocks.{layers}.modulation" in shapes and layers <= MAX_LAYERS:
        layers += 1
    raw = {
        "width": width,
        "heads": width // HEAD_WIDTH,
        "layers": layers,
        "ffn": size("blocks.0.ffn.0", 0),
        "in_channels": size("patch_embedding", 1),
        "out_channels": size("head.head", 0) // 4,
        "text_dim": size("text_embedding.0", 1),
        "time_width": size("time_embedding.0", 1),
    }
    return build(TransformerConfig, {name: name for name in raw}, raw, where)


def _find_vae(folder: Path, channels: int) -> tuple[Path, VAEConfig]:
    """The autoencoder with so many latent channels."""
    files = []
    for file in _candidates(folder, "vae"):
        shapes = _vae_shapes(file)
        if shapes is not None:
            files.append((file, read_vae_shapes(shapes, str(file))))
    matches = [(file, config) for file, config in files if config.latent_channels == channels]
    if matches:
        return matches[0]
    others = ", ".join(f"{file.name} has {config.latent_channels}" for file, config in files)
    raise CheckpointError(
        f"{folder}: no Wan VAE of {channels} latent channels{f' ({others})' if others else ''}; looked for "
        "Wan2.1_VAE.pth, Wan2.2_VAE.pth and files in vae/"
    )


def _vae_shapes(file: Path) -> Shapes | None:
    """The shapes of an autoencoder's file; None of another part's, be it one that cannot be read."""
    try:
        shapes = read_shapes(file)
    except CheckpointError:
        if "vae" in file.name.lower() or file.parent.name == "vae":
            raise
        return None
    return shapes if "encoder.conv1.weight" in shapes and "decoder.head.2.weight" in shapes else None


def read_vae_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> VAEConfig:
    """An autoencoder's numbers by the shapes of its tensors, with the published statistics of its latents."""
    later = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
    stages = _stages(shapes, later)
    try:
        width, latents = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        out, last = shapes["decoder.head.2.weight"][:2]
        multiples = tuple(stage[-1][1] // width for stage in stages)
        raw = {
            "width": width,
            "decoder_width": last // multiples[0],
            "latent_channels": latents,
            "multiples": multiples,
            "depth": len(stages[0]),
            "temporal": tuple(stage[0][2] for stage in stages[:-1]),
            "fold": isqrt(out // 3),
            "shortcuts": later,
        }
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        raise CheckpointError(f"{where}: not a Wan VAE, its tensors are of another autoencoder") from None
    reference = next((vae for vae in (VAE_2_1, VAE_2_2) if vae.latent_channels == latents), None)
    if reference is None:
        raise CheckpointError(
            f"{where} has {latents} latent channels; without a config.json the statistics of 16 (2.1) and 48 (2.2) are "
            "known"
        )
    return build(VAEConfig, {name: name for name in raw}, raw, where, mean=reference.mean, std=reference.std)


def _stages(shapes: Mapping[str, tuple[int, ...]], later: bool) -> list[list[tuple[int, int, bool]]]:
    """The encoder's residual blocks by stage: channels in and out, and whether the stage ends in a halving of time."""
    stages: list[list[tuple[int, int, bool]]] = []
    blocks: list[tuple[int, int, bool]] = []
    at, inner = 0, 0
    while len(stages) <= MAX_LAYERS:
        name = f"encoder.downsamples.{at}" + (f".downsamples.{inner}" if later else "")
        conv = shapes.get(f"{name}.residual.2.weight")
        if conv is not None and len(conv) == 5:
            blocks.append((conv[1], conv[0], False))
        elif f"{name}.resample.1.weight" in shapes:
            halves = f"{name}.time_conv.weight" in shapes
            stages.append([(channels_in, channels_out, halves) for channels_in, channels_out, _ in blocks])
            blocks = []
        else:
            break
        at, inner = (at, inner + 1) if later and blocks else (at + 1, 0)
    return [*stages, blocks]
