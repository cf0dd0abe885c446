"""Train the small CogVideoX transformer: v-prediction over latents of a fixed pool of clips.

With the checkpoint's own schedule (2b's, whose last step is pure noise): at step t the input is
sqrt(a) * data + sqrt(1 - a) * noise and the answer is sqrt(a) * noise - sqrt(1 - a) * data, a the schedule's cumulative
product. One caption in ten is the empty one, which trains the branch without a prompt. The network that is trained is
the product's own, batch and all.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_xdit.config import TransformerConfig, VAEConfig
from cogvideox_xdit.demo import TRAINED_VAE, scheduler_json, trained_config, write_checkpoint
from cogvideox_xdit.solver import Solver
from cogvideox_xdit.transformer import CogVideoXTransformer, Size, pack
from common.run.demo import fill
from common.text.encoder import TextEncoder
from common.text.t5 import EncoderFiles
from tools.demo.cogvideox_vae import FRAMES, load_autoencoder
from tools.demo.mochi_vae import clips
from tools.demo.training import Losses, Plan, WrittenOut, in_bf16, train, write_atomically
from tools.demo.world import Scene, caption, draw

LATENT: Size = (5, 8, 8)
CLIPS_PER_CHUNK = 250


class Velocity(nn.Module):
    """The product's transformer as one call, so that its weights can be handed in."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.model = CogVideoXTransformer(config, WrittenOut())

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x (B, N, patch) packed latents, t (B,) training steps, text (B, L, D): v like x."""
        return self.model(x, t, self.model.prepare(text, LATENT)).float()


@torch.no_grad()
def start(model: CogVideoXTransformer, seed: int) -> None:
    """First weights: every gate shut and the output zero, so that the network starts as the identity."""
    fill(model, seed)
    for block in model.blocks:
        for layer in (block.mod1, block.mod2):
            layer.weight.zero_()  # type: ignore[operator,union-attr]
            layer.bias.zero_()  # type: ignore[operator,union-attr]
    for layer in (model.mod_out, model.head):
        layer.weight.zero_()
        layer.bias.zero_()


def scenes(count: int, seed: int) -> list[Scene]:
    """What the clips of `pool` show."""
    found = []
    for i in range(count // CLIPS_PER_CHUNK):
        rng = random.Random(f"clips cog {seed} {i} False")
        found += [draw(rng, FRAMES) for _ in range(CLIPS_PER_CHUNK)]
    return found


def pool(folder: Path, count: int, seed: int) -> tuple[Tensor, float]:
    """`count` clips as latents (count, C, 5, 8, 8) of spread 1, and the scaling_factor that makes them so."""
    autoencoder = load_autoencoder(folder)
    chunks = []
    for i in range(count // CLIPS_PER_CHUNK):
        file = folder / "cogvideox-latents" / f"{seed}-{i}.pt"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            video = clips(f"cog {seed} {i}", CLIPS_PER_CHUNK, FRAMES)
            with torch.no_grad():
                write_atomically(file, torch.cat([autoencoder.encode(x)[0] for x in video.split(10)]))
        chunks.append(torch.load(file, weights_only=True))
    latents = torch.cat(chunks)
    factor = 1 / float(latents.std())
    return latents * factor, factor


def encoded(folder: Path, captions: Sequence[str]) -> Tensor:
    """T5 features (n, L, D) in bf16 of captions, padding attended to, as the product hands them to the model."""
    with TextEncoder(EncoderFiles.find(folder), dtype=torch.float32) as encoder:
        length = trained_config().text_length
        parts = [encoder.encode([text], length, use_mask=False).features.to(torch.bfloat16) for text in captions]
    return torch.cat(parts)


def features(folder: Path, count: int, seed: int, wordings: int = 2) -> Tensor:
    """Features (count, wordings, L, D) of captions of the pool's clips; the last entry is the empty caption's."""
    file = folder / f"cogvideox-features-{seed}-{count}-{wordings}.pt"
    if not file.exists():
        rng = random.Random(f"cogvideox captions {seed}")
        said = [caption(scene, rng) for scene in scenes(count, seed) for _ in range(wordings)]
        write_atomically(file, encoded(folder, [*said, *[""] * wordings]).unflatten(0, (-1, wordings)))
    return torch.load(file, weights_only=True)


def alphas() -> Tensor:
    """The cumulative products (1000,) of the trained checkpoint's schedule."""
    return Solver(scheduler_json("2b"), 50).scheduler.alphas_cumprod.double()


def noised(data: Tensor, noise: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees and what it has to say, at cumulative products a (B,)."""
    a = a.float()[:, None, None]
    return a.sqrt() * data + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * data


def train_cogvideox(folder: Path, steps: int = 12000, batch: int = 40, clip_count: int = 5000, seed: int = 0) -> None:
    """Train, or go on where it stopped, and write the whole checkpoint into `folder`/cogvideox."""
    texts = features(folder, clip_count, seed)
    latents, factor = pool(folder, clip_count, seed)
    tokens = pack(latents, trained_config().patch)
    vae = dataclasses.replace(TRAINED_VAE, scaling_factor=round(factor, 6))
    write_atomically(folder / "cogvideox_vae_config.pt", dataclasses.asdict(vae))
    model, table = Velocity(trained_config()), alphas()
    start(model.model, seed)

    def step(generator: torch.Generator, _: int) -> Losses:
        index = torch.randint(len(tokens), (batch,), generator=generator)
        wording = torch.randint(texts.shape[1], (batch,), generator=generator)
        empty = torch.rand(batch, generator=generator) < 0.1
        data, text = tokens[index], texts[torch.where(empty, len(texts) - 1, index), wording]
        t = torch.randint(1000, (batch,), generator=generator)
        noisy, v = noised(data, torch.randn(data.shape, generator=generator), table[t])
        return losses(in_bf16(model, noisy, t, text) - v, t)

    plan = Plan(steps, 2e-3, warmup=100, average=0.999, decay=0.01, muon=True, seed=seed)
    train(model, step, plan, folder / "cogvideox.pt")
    export(folder)


def losses(error: Tensor, t: Tensor) -> Losses:
    """The loss of errors (B, N, patch) in v at steps t (B,): squared, and weighted by what is usual at that step.

    Near pure noise nobody knows where the shape will be, and that error is twenty times the one among clear pictures.
    Unweighted it is nearly all of the gradient, and outlines are learned slowly. The curve is a trained model's.
    """
    squares = error.square().mean((1, 2))
    usual = (1 + 20 * (t / 1000) ** 6) / 2
    return {"loss": (squares / usual).mean(), "early": squares[t > 700].mean(), "late": squares[t <= 700].mean()}


def trained(folder: Path, name: str) -> dict[str, Any]:
    """The averaged weights of a transformer."""
    average = torch.load(folder / f"{name}.pt", weights_only=True)["average"]
    return {key.removeprefix("model."): p for key, p in average.items()}


def export(folder: Path) -> Path:
    """Write the checkpoint from the parts as far as they are trained, into `folder`/cogvideox."""
    vae = VAEConfig(**torch.load(folder / "cogvideox_vae_config.pt", weights_only=True))
    model, autoencoder = CogVideoXTransformer(trained_config()), load_autoencoder(folder)
    model.load_state_dict(trained(folder, "cogvideox"))
    target = folder / "cogvideox"
    write_checkpoint(target, "2b", model, vae, autoencoder.encoder, autoencoder.decoder)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, target / part, dirs_exist_ok=True)
    return target
