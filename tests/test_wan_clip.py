"""CLIP's image tower against transformers', and its faults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.weights.load import CheckpointError, save
from wan_xdit.clip import ImageConfig, check_image_encoder, load_image_encoder, rename_table
from wan_xdit.demo import IMAGE_ENCODER, write_image_encoder
from wan_xdit.layouts import find_clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_image_encoder(tmp_path / "image_encoder", IMAGE_ENCODER, torch.float32)
    return tmp_path / "image_encoder"


@torch.no_grad()
def test_tokens_are_transformers_before_the_last_block(folder: Path) -> None:
    from transformers import CLIPVisionModel

    ours = load_image_encoder(folder, dtype=torch.float64)
    theirs = CLIPVisionModel.from_pretrained(folder).double()
    picture = torch.randint(0, 256, (40, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = ours(picture)
    expected = theirs(ours.pixels(picture), output_hidden_states=True).hidden_states[-2]
    assert tokens.shape == (1, IMAGE_ENCODER.tokens, IMAGE_ENCODER.hidden_size)
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=1e-10)


def test_pixels_fill_the_square_and_are_normalised(folder: Path) -> None:
    encoder = load_image_encoder(folder)
    white = encoder.pixels(torch.full((9, 50, 3), 255, dtype=torch.uint8))
    assert white.shape == (1, 3, 28, 28)
    assert white[0, :, 0, 0].tolist() == pytest.approx([1.93034, 2.07488, 2.14590], abs=1e-4)


def test_the_published_tower_gives_257_tokens() -> None:
    assert ImageConfig().tokens == 257


WIDE = replace(IMAGE_ENCODER, hidden_size=160, num_attention_heads=2)
"""Heads of 80 channels, as the published tower's."""


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the authors' module names and shapes them, the last block and the tower of text included."""
    made = {
        "visual.cls_embedding": state["vision_model.embeddings.class_embedding"][None, None],
        "visual.pos_embedding": state["vision_model.embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.head": torch.ones(160, 3),
        "log_scale": torch.tensor(2.0),
        "textual.token_embedding.weight": torch.ones(5, 4),
    }
    for part in ("weight", "bias"):
        made[f"visual.pre_norm.{part}"] = state[f"vision_model.pre_layrnorm.{part}"]
        made[f"visual.post_norm.{part}"] = torch.ones(160)
        for i in range(WIDE.num_hidden_layers):
            # The last block, which nobody reads, may be any.
            ours, theirs = f"vision_model.encoder.layers.{min(i, 1)}", f"visual.transformer.{i}"
            qkv = [state[f"{ours}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            made[f"{theirs}.attn.to_qkv.{part}"] = torch.cat(qkv)
            made[f"{theirs}.attn.proj.{part}"] = state[f"{ours}.self_attn.out_proj.{part}"]
            for a, b in {
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "mlp.0": "mlp.fc1",
                "mlp.2": "mlp.fc2",
            }.items():
                made[f"{theirs}.{a}.{part}"] = state[f"{ours}.{b}.{part}"]
    return made


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    write_image_encoder(tmp_path / "image_encoder", WIDE, torch.float32)
    return tmp_path / "image_encoder", load_file(tmp_path / "image_encoder" / "model.safetensors")


def assert_same_tower(place: Path, folder: Path) -> None:
    found, known = load_image_encoder(place), load_image_encoder(folder)
    assert found.config == known.config == WIDE
    check_image_encoder(place, 160)
    state = known.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


def test_the_authors_file_is_found_and_read(wide: tuple, tmp_path: Path) -> None:
    folder, state = wide
    root = tmp_path / "authors"
    root.mkdir()
    path = root / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(original_names(state), path)
    assert find_clip(root) == path
    assert_same_tower(path, folder)
    written = root / "written.safetensors"
    save(load_image_encoder(path).state_dict(), written, rename_table(WIDE, "original"))
    kept = original_names(state)
    assert all(torch.equal(tensor, kept[name].view_as(tensor)) for name, tensor in load_file(written).items())
    torch.save({name: t for name, t in kept.items() if "pos_embedding" not in name}, path)
    with pytest.raises(
        CheckpointError, match=r"models_clip_\S+\.pth: no image tower of CLIP; tensors of it are missing"
    ):
        check_image_encoder(path, 160)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"it has no tensor visual\.patch_embedding\.weight or vision_model"):
        check_image_encoder(path, 160)


@pytest.mark.parametrize("place", ["clip_vision", "split_files/clip_vision", "."])
def test_comfyuis_file_is_found_and_read(wide: tuple, tmp_path: Path, place: str) -> None:
    folder, state = wide
    path = tmp_path / "comfyui" / place / "clip_vision_h.safetensors"
    path.parent.mkdir(parents=True)
    last = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in state.items()}
    more = {"visual_projection.weight": torch.ones(3, 160), "vision_model.post_layernorm.bias": torch.ones(160)}
    save_file(last | state | more, path)
    save_file({"x": torch.ones(1)}, path.with_name("another.safetensors"))
    assert find_clip(tmp_path / "comfyui") == path
    assert_same_tower(path, folder)


def test_faults_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tokens of 32 channels, the transformer takes 1280"):
        check_image_encoder(folder, 1280)
    check_image_encoder(folder, 32)
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if "layers.1.mlp.fc2.bias" not in name}, file)
    with pytest.raises(CheckpointError, match=r"missing tensor vision_model\.encoder\.layers\.1\.mlp\.fc2\.bias"):
        check_image_encoder(folder, 32)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"hidden_act": "quick_gelu"}))
    with pytest.raises(CheckpointError, match="hidden_act='quick_gelu'; supported is 'gelu'"):
        check_image_encoder(folder, 32)
