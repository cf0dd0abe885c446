"""Wan's checkpoints in every layout: recognised from their files, loaded to equal tensors, refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.run.demo import fill
from common.weights.blocks import streamed
from common.weights.float8 import Float8Linear
from common.weights.load import CheckpointError, save
from common.weights.placement import Placement
from wan_xdit.checkpoint import find_checkpoint
from wan_xdit.config import VAE_2_1, VAE_2_2, TransformerConfig
from wan_xdit.demo import write_checkpoint
from wan_xdit.transformer import WanTransformer
from wan_xdit.vae import WanDecoder, WanEncoder
from wan_xdit.weights import (
    check_vae,
    decoder_table,
    encoder_table,
    load_decoder,
    load_encoder,
    load_transformer,
    rename_table,
    transformer_files,
)

SMALL = {"width": 8, "decoder_width": 8, "multiples": (1, 2, 2), "depth": 1, "temporal": (False, True)}
OLD, NEW = replace(VAE_2_1, **SMALL), replace(VAE_2_2, **SMALL)
SIZES = {"width": 128, "heads": 1, "layers": 2, "ffn": 48, "text_dim": 24, "time_width": 32}
CONFIGS = {
    "t2v": TransformerConfig(**SIZES),
    "i2v": TransformerConfig(**SIZES, in_channels=16 + 2 + 16, image_width=20),
    "ti2v": TransformerConfig(**SIZES, in_channels=48, out_channels=48),
}
VAES = {"t2v": OLD, "i2v": OLD, "ti2v": NEW}


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple]:
    """For each kind two transformers, an encoder and a decoder."""
    made = {}
    for kind, config in CONFIGS.items():
        models = WanTransformer(config), WanTransformer(config), WanEncoder(VAES[kind]), WanDecoder(VAES[kind])
        for seed, model in enumerate(models):
            fill(model, seed)
        made[kind] = models
    return made


def names_of(module: torch.nn.Module, table) -> dict[str, Tensor]:
    """The module's tensors under a layout's names, through the table that also reads them."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        (file,) = save(module.state_dict(), Path(folder) / "x.safetensors", table)
        return load_file(file)


def transformer(module: WanTransformer) -> dict[str, Tensor]:
    return names_of(module, rename_table(module.config, "original"))


def vae(models: tuple) -> dict[str, Tensor]:
    _, _, encoder, decoder = models
    config = encoder.config
    return names_of(encoder, encoder_table(config, "original")) | names_of(decoder, decoder_table(config, "original"))


def config_json(kind: str) -> dict:
    config = CONFIGS[kind]
    return {
        "_class_name": "WanModel",
        "model_type": kind,
        "dim": config.width,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "ffn_dim": config.ffn,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "text_dim": config.text_dim,
        "text_len": 512,
        "freq_dim": config.time_width,
        "eps": 1e-6,
    }


def authors(folder: Path, kind: str, models: tuple) -> None:
    (folder / "config.json").write_text(json.dumps(config_json(kind)))
    save_file(transformer(models[0]), folder / "diffusion_pytorch_model.safetensors")
    torch.save(vae(models), folder / f"Wan2.{1 + (kind == 'ti2v')}_VAE.pth")


def authors_sharded(folder: Path, kind: str, models: tuple) -> None:
    authors(folder, kind, models)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    save(transformer(models[0]), folder / "diffusion_pytorch_model.safetensors", shard_bytes=60_000)
    assert len(list(folder.glob("diffusion_pytorch_model-*"))) > 2


def authors_experts(folder: Path, kind: str, models: tuple) -> None:
    for name, model in zip(("high_noise_model", "low_noise_model"), models, strict=False):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_json(kind)))
        save_file(transformer(model), folder / name / "diffusion_pytorch_model.safetensors")
    torch.save(vae(models), folder / "Wan2.1_VAE.pth")


def diffusers(folder: Path, kind: str, models: tuple) -> None:
    published = "ti2v-5b" if kind == "ti2v" else "t2v-1.3b"
    write_checkpoint(folder, published, models[:1], VAES[kind], *models[2:], torch.float32)


def comfyui(folder: Path, kind: str, models: tuple, prefix: str = "", where: str = "split_files") -> None:
    for name in ("diffusion_models", "vae"):
        (folder / where / name).mkdir(parents=True)
    state = {prefix + name: tensor for name, tensor in transformer(models[0]).items()}
    save_file(state, folder / where / "diffusion_models" / "wan2.1_480p_14B_fp16.safetensors")
    save_file(vae(models), folder / where / "vae" / "wan_2.1_vae.safetensors")


def comfyui_prefixed(folder: Path, kind: str, models: tuple) -> None:
    comfyui(folder, kind, models, prefix="model.diffusion_model.", where=".")


def comfyui_flat(folder: Path, kind: str, models: tuple) -> None:
    save_file(transformer(models[0]), folder / "transformer.safetensors")
    save_file(vae(models), folder / "any.safetensors")
    save_file({"encoder.block.0.layer.0.layer_norm.weight": torch.ones(3)}, folder / "umt5.safetensors")


def comfyui_experts(folder: Path, kind: str, models: tuple) -> None:
    comfyui(folder, kind, models, where=".")
    (folder / "diffusion_models" / "wan2.1_480p_14B_fp16.safetensors").unlink()
    for noise, model in zip(("high", "low"), models, strict=False):
        save_file(transformer(model), folder / "diffusion_models" / f"wan2.2_t2v_{noise}_noise_14B.safetensors")


WRITERS: dict[str, Callable[[Path, str, tuple], None]] = {
    write.__name__: write
    for write in (
        authors,
        authors_sharded,
        authors_experts,
        diffusers,
        comfyui,
        comfyui_prefixed,
        comfyui_flat,
        comfyui_experts,
    )
}


def assert_same(got: torch.nn.Module, want: torch.nn.Module) -> None:
    state = got.state_dict()
    assert state.keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layout_is_recognised_and_loads_equal_tensors(parts, kind, layout, tmp_path):
    models = parts[kind]
    WRITERS[layout](tmp_path, kind, models)
    if layout == "diffusers" and kind == "i2v":
        index = tmp_path / "model_index.json"
        index.write_text(index.read_text().replace("WanPipeline", "WanImageToVideoPipeline"))
    files = find_checkpoint(tmp_path)
    assert files.config == CONFIGS[kind] and files.vae_config == VAES[kind]
    experts = 2 if layout.endswith("experts") else 1
    assert len(files.experts) == experts and files.per_token == (kind == "ti2v")
    assert (files.boundary is not None) == (experts == 2 and kind != "ti2v")
    for i in range(experts):
        assert_same(load_transformer(files, i), models[i])
    check_vae(files, encoder=True)
    assert_same(load_encoder(files), models[2])
    assert_same(load_decoder(files), models[3])
    assert all(one.file.exists() for one in transformer_files(tmp_path))


def test_the_kind_and_its_defaults_follow_from_the_files(parts, tmp_path):
    authors_experts(tmp_path, "t2v", parts["t2v"])
    files = find_checkpoint(tmp_path)
    assert (files.kind, files.boundary, files.rules.shift) == ("t2v-a14b", 0.875, 12.0)
    (tmp_path / "comfy").mkdir()
    comfyui(tmp_path / "comfy", "i2v", parts["i2v"])
    assert find_checkpoint(tmp_path / "comfy").kind == "i2v-14b-480p", "from the file's name"


def in_eight_bits(state: dict[str, Tensor], scaled: str | None) -> dict[str, Tensor]:
    """As ComfyUI's files: matrices in e4m3, with a scale for each or without."""
    made: dict[str, Tensor] = {} if scaled is None else {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if tensor.ndim != 2 or not name.endswith("weight"):
            made[name] = tensor.to(torch.float8_e4m3fn) if scaled is None and "norm" not in name else tensor
            continue
        scale = tensor.abs().max() / 448 if scaled else torch.tensor(1.0)
        made[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if scaled:
            made[name.removesuffix("weight") + scaled] = scale.reshape(1 if scaled == "scale_weight" else ())
            made[name.removesuffix("weight") + scaled.replace("weight", "input")] = torch.tensor(1.0)
    return made


def widened(stored: dict[str, Tensor], scaled: str | None) -> dict[str, Tensor]:
    wide = {}
    for name, tensor in stored.items():
        if name == "scaled_fp8" or "scale" in name.rpartition(".")[2]:
            continue
        scale = stored.get(name.removesuffix("weight") + (scaled or "none"), torch.tensor(1.0))
        wide[name] = tensor.float() * scale
    return wide


@pytest.mark.parametrize("scaled", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("offload", ["none", "block", "disk"])
def test_eight_bits_are_kept_as_they_are(parts, scaled, offload, tmp_path):
    """The blocks' matrices stay in eight bits to the last one, and everything computes with what the file says."""
    models = parts["t2v"]
    comfyui(tmp_path, "t2v", models, where=".")
    file = tmp_path / "diffusion_models" / "wan2.1_480p_14B_fp16.safetensors"
    stored = in_eight_bits(transformer(models[0]), scaled)
    save_file(stored, file)
    model = load_transformer(find_checkpoint(tmp_path), dtype=torch.float32, placement=Placement(offload))
    wide = widened(stored, scaled)
    seen = 0
    for i, block in enumerate(streamed(model.blocks)):
        for name, layer in block.named_modules():
            if isinstance(layer, Float8Linear):
                seen += 1
                if name == "ff_in":
                    theirs = f"blocks.{i}.ffn.0.weight"
                    assert torch.equal(layer.weight.view(torch.uint8), stored[theirs].view(torch.uint8))
                    assert torch.equal(layer.weight.float() * layer.weight_scale, wide[theirs])
    assert seen == 2 * 7
    save_file({name: tensor.contiguous() for name, tensor in wide.items()}, file)
    reference = load_transformer(find_checkpoint(tmp_path), dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 64, generator=draw), torch.randn(1, 3, 24, generator=draw)
    out, want = (m(x, 500.0, m.prepare(text, (1, 4, 4))) for m in (model, reference))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def spoiled_pickle(folder: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    torch.save({"encoder.conv1.weight": Code()}, folder / "Wan2.1_VAE.pth")


def cut_pickle(folder: Path) -> None:
    file = folder / "Wan2.1_VAE.pth"
    file.write_bytes(file.read_bytes()[:-2000])


def cut_file(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def change(folder: Path, act: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import load_file

    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    act(state)
    save_file(state, file)


def reshaped(state: dict[str, Tensor]) -> None:
    state["blocks.1.ffn.0.weight"] = torch.zeros(48, 4)


def another(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config_json("t2v") | {"model_type": kind}))

    return write


def hidden(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "weights.bin")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda f: change(f, lambda s: s.pop("blocks.1.ffn.0.weight")),
        "missing tensor blocks.1.ffn.0.weight",
    ),
    "wrong shape": (lambda f: change(f, reshaped), r"blocks.1.ffn.0.weight has shape \[48, 4\], expected \[48, 128\]"),
    "code": (spoiled_pickle, "it holds __builtin__.print, which may be code"),
    "cut pickle": (cut_pickle, "Wan2.1_VAE.pth is damaged or truncated"),
    "cut file": (cut_file, "truncated file"),
    "no vae": (lambda f: (f / "Wan2.1_VAE.pth").unlink(), "no Wan VAE of 16 latent channels; looked for Wan2.1_VAE"),
    "flf2v": (another("flf2v"), "first and last frame to video, which is not supported"),
    "vace": (another("vace"), "VACE, which is not supported"),
    "s2v": (another("s2v"), "speech to video, which is not supported"),
    "animate": (lambda f: change(f, lambda s: s.update({"face_adapter.x": torch.ones(1)})), "Wan model for Animate"),
    "nothing": (hidden, "no Wan checkpoint; looked for model_index.json"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_in_one_line(parts, wrong, tmp_path):
    authors(tmp_path, "t2v", parts["t2v"])
    spoil, said = WRONG[wrong]
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=said) as error:
        files = find_checkpoint(tmp_path)
        load_transformer(files)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_several_transformers_are_not_chosen_between(parts, tmp_path):
    comfyui_flat(tmp_path, "t2v", parts["t2v"])
    save_file(transformer(parts["t2v"][1]), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 transformers \(other.safetensors, transformer.safetensors\)"):
        find_checkpoint(tmp_path)


def test_one_expert_alone_is_refused(parts, tmp_path):
    authors_experts(tmp_path, "t2v", parts["t2v"])
    (tmp_path / "low_noise_model").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="low_noise_model/ is missing"):
        find_checkpoint(tmp_path)


def test_an_image_tower_that_is_not_there_is_asked_for(tmp_path, parts):
    authors(tmp_path, "i2v", parts["i2v"])
    with pytest.raises(ValueError, match=r"put beside the others models_clip_\S+ \(the authors'\), clip_vision/"):
        find_checkpoint(tmp_path).check_task(image=True)
    (tmp_path / "image_encoder").mkdir()
    find_checkpoint(tmp_path).check_task(image=True)
