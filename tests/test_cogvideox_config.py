"""Reading what a checkpoint says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogvideox_xdit.config import (
    CONFIGS,
    VAEConfig,
    read_checkpoint,
    transformer_config,
    transformer_json,
    vae_config,
    vae_json,
)
from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.weights import rename_table
from common.weights.load import load, on_meta, open_checkpoint, save

SHAPES = Path(__file__).parent / "data" / "cogvideox_transformer_shapes.json"
NAMES = {
    "2b": "CogVideoX-2b",
    "5b": "CogVideoX-5b",
    "5b-i2v": "CogVideoX-5b-I2V",
    "1.5": "CogVideoX1.5-5B",
    "1.5-i2v": "CogVideoX1.5-5B-I2V",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_survive_their_json(kind: str) -> None:
    raw = json.loads(json.dumps(transformer_json(CONFIGS[kind])))
    assert transformer_config(raw) == CONFIGS[kind]
    assert vae_config(json.loads(json.dumps(vae_json(VAEConfig())))) == VAEConfig()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_fn", "geglu", r"activation_fn='geglu'; supported is 'gelu-approximate'"),
        ("attention_bias", False, "attention_bias=False"),
        ("num_layers", "thirty", r"num_layers='thirty'; it must be a whole number"),
        ("num_layers", 0, "num_layers=0"),
        ("norm_eps", True, "norm_eps=True"),
        ("use_rotary_positional_embeddings", 1, r"=1; it must be true or false"),
        ("camera_control", "v2", "camera_control='v2', which is unknown"),
        ("attention_head_dim", 20, "attention_head_dim is 20"),
        ("in_channels", 48, "in_channels is 48"),
    ],
)
def test_what_cannot_be_run_is_named_with_its_value(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer_config(transformer_json(CONFIGS["2b"]) | {key: value})


def test_switched_off_extras_and_notes_are_no_obstacle() -> None:
    raw = transformer_json(CONFIGS["5b"]) | {"_diffusers_version": "0.99", "camera_control": None, "extra": False}
    assert transformer_config(raw) == CONFIGS["5b"]
    assert vae_config(vae_json(VAEConfig()) | {"temporal_compression_ratio": 4.0}) == VAEConfig()


def test_patch_bias_false_of_the_1_5_checkpoints_is_not_believed() -> None:
    """Their config says false and their file has the bias; the reference ignores the key too."""
    config = transformer_config(transformer_json(CONFIGS["1.5"]) | {"patch_bias": False})
    assert "patch.bias" in on_meta(CogVideoXTransformer, config).state_dict()


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_shapes_are_those_of_the_published_files(kind: str, tmp_path: Path) -> None:
    published = json.loads(SHAPES.read_text())[NAMES[kind]]
    expected = {name: tuple(shape) for name, shape in published["top"].items()}
    for i in range(2):
        expected |= {f"transformer_blocks.{i}.{name}": tuple(shape) for name, shape in published["block"].items()}
    config = transformer_config(transformer_json(CONFIGS[kind]) | {"num_layers": 2})
    ours = on_meta(CogVideoXTransformer, config)
    table = rename_table(config)
    theirs: dict[str, tuple[int, ...]] = {}
    for name, tensor in ours.state_dict().items():
        module, _, leaf = name.rpartition(".")
        source = table.get(name) or table[module]
        names = getattr(source, "names", (source,))
        for other in names:
            full = other if name in table else f"{other}.{leaf}"
            theirs[full] = (tensor.shape[0] // len(names), *tensor.shape[1:])
    assert theirs == expected
    assert published["layers"] == CONFIGS[kind].layers


def test_weights_go_out_and_come_back(tmp_path: Path) -> None:
    from tests.helpers.cogvideox import small

    config = small("1.5-i2v")
    model = CogVideoXTransformer(config)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save(model.state_dict(), path, rename=rename_table(config))
    again = load(on_meta(CogVideoXTransformer, config), open_checkpoint(path), rename_table(config))
    assert all((again.state_dict()[name] == tensor).all() for name, tensor in model.state_dict().items())


def write_checkpoint(folder: Path, index: dict[str, Any], scheduler: dict[str, Any]) -> None:
    files = {
        "model_index.json": index,
        "transformer/config.json": transformer_json(CONFIGS["5b"]),
        "vae/config.json": vae_json(VAEConfig(scaling_factor=0.7)),
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def test_a_folder_is_read_and_its_index_chooses_the_scheduler(tmp_path: Path) -> None:
    index = {"_class_name": "CogVideoXPipeline", "scheduler": ["diffusers", "CogVideoXDPMScheduler"]}
    write_checkpoint(tmp_path, index, {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 1.0})
    found = read_checkpoint(tmp_path)
    assert found.transformer == CONFIGS["5b"]
    assert found.vae.scaling_factor == 0.7
    assert found.scheduler == {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0}


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json is missing"):
        read_checkpoint(tmp_path)
    write_checkpoint(tmp_path, {"_class_name": "MochiPipeline"}, {})
    with pytest.raises(ValueError, match="_class_name='MochiPipeline'"):
        read_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        read_checkpoint(tmp_path)
