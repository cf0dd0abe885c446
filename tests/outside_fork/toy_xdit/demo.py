"""A checkpoint with random weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common.run.demo import fill, made_once
from common.system.files import cache_home
from common.weights.load import save
from toy_xdit.config import Config
from toy_xdit.sampling import LLAMA
from toy_xdit.text import new_llama
from toy_xdit.transformer import ToyTransformer
from toy_xdit.vae import SoundDecoder, ToyDecoder
from toy_xdit.weights import FOLDERS


def demo_checkpoint(name: str = "default") -> Path:
    return made_once(cache_home() / "toy-demo-1", write_checkpoint)


def write_checkpoint(folder: Path) -> None:
    config = Config()
    parts: dict[str, nn.Module] = {name: ToyTransformer(config) for name in FOLDERS}
    parts |= {"vae": ToyDecoder(config), "sound": SoundDecoder(config), "text_encoder": new_llama(LLAMA)}
    for seed, (name, module) in enumerate(parts.items()):
        fill(module, seed)
        (folder / name).mkdir()
        numbers = LLAMA | {"model_type": "llama"} if name == "text_encoder" else asdict(config)
        (folder / name / "config.json").write_text(json.dumps(numbers))
        state = {key: value.to(torch.bfloat16) for key, value in module.state_dict().items()}
        save(state, folder / name / "model.safetensors")
    write_tokenizer(folder / "text_encoder" / "tokenizer.json")


def write_tokenizer(path: Path) -> None:
    """Bytes, each a token; id 0 is padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<pad>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path))
