"""Train the small T5: its features must say which attributes a caption names.

The encoder learns with one linear head per attribute over the mean of its features, "not named" being an answer
too. Half of the batches attend to padding (as CogVideoX runs T5), half do not (as Mochi does), so both can share it.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.run.demo import fill, save_text_encoder, t5_config, train_tokenizer
from common.text.t5 import new_t5
from common.text.tokenizer import PAD, Tokenizer
from tools.demo.training import Losses, Plan, train
from tools.demo.world import FIELDS, VALUES, Scene, caption, draw

LIMIT = 64
SIZES = {"d_model": 64, "layers": 2, "heads": 4, "d_kv": 16, "d_ff": 128}
PADDED = 32
"""Tokens of a batch that attends to its padding."""


def named(scene: Scene, text: str) -> list[int]:
    """For every attribute the index of its value, or the number of values where the caption does not name it."""
    words = text.lower().strip(".").split()
    always = ("shape", "colour", "direction")
    spoken = [field in always or value in words for field, value in zip(FIELDS, scene.attributes, strict=True)]
    return [
        VALUES[field].index(value) if said else len(VALUES[field])
        for field, value, said in zip(FIELDS, scene.attributes, spoken, strict=True)
    ]


class Reader(nn.Module):
    """The encoder with the heads that teach it; the heads are thrown away."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.t5 = new_t5(config, "cpu").requires_grad_()
        self.heads = nn.ModuleList(nn.Linear(config["d_model"], len(VALUES[f]) + 1) for f in FIELDS)

    def forward(self, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        out = self.t5(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = (torch.ones_like(ids) if mask is None else mask)[..., None].float()
        pooled = (out * weight).sum(1) / weight.sum(1)
        return [head(pooled) for head in self.heads]


def batch_ids(tokenizer: Tokenizer, captions: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids (B, L) padded to the longest or to `length`, and their mask."""
    rows = [tokenizer(text, LIMIT)[0] for text in captions]
    length = max(length or 0, *map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def train_text(folder: Path, steps: int = 600, batch: int = 64, seed: int = 0) -> None:
    """Train, or go on; write `text_encoder/` and `tokenizer/` into `folder`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        spiece = Path(temporary) / "spiece.model"
        size = train_tokenizer([caption(draw(rng, 13), rng) for _ in range(4000)], spiece, 192, "identity")
        config = t5_config(size, **SIZES)
        reader = Reader(config)
        fill(reader.t5, seed)
        tokenizer = Tokenizer(spiece)

        def step(generator: torch.Generator, i: int) -> Losses:
            rng = random.Random(f"text {generator.initial_seed()}")
            scenes = [draw(rng, 13) for _ in range(batch)]
            captions = [caption(scene, rng) for scene in scenes]
            ids, mask = batch_ids(tokenizer, captions, PADDED if i % 2 else None)
            logits = reader(ids, None if i % 2 else mask)
            targets = torch.tensor([named(s, c) for s, c in zip(scenes, captions, strict=True)])
            loss = sum(F.cross_entropy(logit, targets[:, k]) for k, logit in enumerate(logits))
            right = torch.stack([logit.argmax(-1) == targets[:, k] for k, logit in enumerate(logits)])
            return {"loss": loss, "right": right.float().mean()}

        train(reader, step, Plan(steps, 3e-3, seed=seed), folder / "text.pt")
        save_text_encoder(folder, reader.t5, config, spiece, LIMIT)
