"""Small checkpoints in the official layout: their files, the T5 part, and the place where they are kept."""

from __future__ import annotations

import json
import os
import shutil
import string
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor, nn

from common.text.t5 import T5, Member, new_t5
from common.weights.load import Rename, save

STEM = "diffusion_pytorch_model"
"""What the weights of a part of a diffusers folder are called."""
CAPTIONS = tuple(
    f"A {colour} {thing} moves slowly to the {side} on a black background."
    for colour in ("red", "green", "blue", "white")
    for thing in ("circle", "square", "boat", "bird")
    for side in ("left", "right")
)
"""Sentences whose words a demo's vocabulary is learned from."""


def write_part(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    rename: Rename | None,
    dtype: torch.dtype | None = None,
) -> None:
    """A part of a diffusers folder: its config.json and its weights, in `dtype` or as they are."""
    write_json(folder / "config.json", config)
    save(
        {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()},
        folder / f"{STEM}.safetensors",
        rename,
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def red_circle(size: tuple[int, int]) -> PIL.Image.Image:
    """A picture (height, width) to start from."""
    height, width = size
    image = PIL.Image.new("RGB", (width, height))
    radius = min(size) // 4
    box = (width // 2 - radius, height // 2 - radius, width // 2 + radius, height // 2 + radius)
    PIL.ImageDraw.Draw(image).ellipse(box, fill=(220, 30, 30))
    return image


def train_tokenizer(captions: Iterable[str], path: Path, vocab_size: int = 256, normalization: str = "nmt_nfkc") -> int:
    """A sentencepiece model with T5's special ids (pad 0, eos 1, unk 2); returns its size.

    Letters, digits and punctuation are always in it, so that any English prompt has ids.
    The same captions give the same bytes: one thread, no sampling. normalization: sentencepiece's name of a rule;
    T5's own is the default, with "identity" the file is a quarter of a megabyte smaller and knows no Unicode forms.
    """
    from sentencepiece import SentencePieceTrainer

    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=file,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name=normalization,
            required_chars=string.ascii_letters + string.digits + ".,!?'-",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path)).vocab_size()


def t5_config(vocab_size: int, member: Member = T5, d_model: int = 64, **sizes: int) -> dict:
    """config.json of a small encoder with the traits of t5-v1_1 (gated gelu, untied), or of UMT5.

    sizes: layers, heads, d_kv and d_ff; without them two layers of four heads that share the width, and twice the width
    within the MLP.
    """
    names = {"layers": 2, "heads": 4, "d_kv": max(d_model // 4, 1), "d_ff": 2 * d_model} | sizes
    return {
        "architectures": [member.classes[1]],
        "model_type": member.name.lower(),
        "d_model": d_model,
        "d_kv": names["d_kv"],
        "d_ff": names["d_ff"],
        "num_layers": names["layers"],
        "num_heads": names["heads"],
        "vocab_size": vocab_size,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def save_text_encoder(root: Path, model: nn.Module, config: dict, spiece: Path, limit: int) -> None:
    """Write `text_encoder/` and `tokenizer/` of a diffusers folder (weights in bf16)."""
    from safetensors.torch import save_file

    encoder, tokenizer = root / "text_encoder", root / "tokenizer"
    for folder in (encoder, tokenizer):
        folder.mkdir(parents=True, exist_ok=True)
    (encoder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(state, encoder / "model.safetensors", metadata={"format": "pt"})
    (encoder / "model.safetensors").chmod(0o644)
    shutil.copyfile(spiece, tokenizer / "spiece.model")
    settings = {"tokenizer_class": "T5Tokenizer", "legacy": False, "model_max_length": limit}
    settings |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_text_encoder(
    root: Path, captions: Iterable[str], seed: int, limit: int = 256, member: Member = T5, **sizes: int
) -> None:
    """An untrained T5 or UMT5 encoder, its vocabulary learned from `captions`, weights from `seed`."""
    with tempfile.TemporaryDirectory() as folder:
        spiece = Path(folder) / "spiece.model"
        config = t5_config(train_tokenizer(captions, spiece), member, **sizes)
        model = new_t5(config, "cpu", member)
        fill(model, seed)
        save_text_encoder(root, model, config, spiece, limit)


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Draw every parameter from one generator: weights ~ 1/sqrt(inputs), biases 0, gains 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim < 2:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(folder)` under another name and renamed when complete.

    Several processes may ask at once: each gets a complete folder, the first rename wins.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"cannot write the demo checkpoint to {target.parent} ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    try:
        make(work)
        work.chmod(0o755)
        os.replace(work, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
