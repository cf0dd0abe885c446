"""CLIP's image tower against transformers', and its faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.weights.load import CheckpointError
from wan_xdit.clip import ImageConfig, check_image_encoder, load_image_encoder
from wan_xdit.demo import IMAGE_ENCODER, write_image_encoder


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
