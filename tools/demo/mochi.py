"""Train the small Mochi transformer: rectified flow over latents of a fixed pool of clips.

As its sampler expects: at noise level s the input is (1 - s) * data + s * noise, the time is 1000 * (1 - s) and the
answer is data - noise. One caption in ten is left out, which trains the branch without a prompt.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from common.run.demo import fill
from common.text.encoder import TextEncoder
from common.text.t5 import EncoderFiles
from mochi_xdit.config import MochiConfig, MochiVAEConfig
from mochi_xdit.demo import demo_config, write_checkpoint
from mochi_xdit.transformer import MochiTransformer, pack
from tools.demo.mochi_vae import CONFIG as VAE
from tools.demo.mochi_vae import FRAMES, clips, encode, load_autoencoder
from tools.demo.training import Losses, Plan, WrittenOut, in_bf16, train, write_atomically
from tools.demo.world import Scene, caption, draw

LATENT = (3, 8, 8)
CLIPS_PER_CHUNK = 250


class Velocity(nn.Module):
    """The product's transformer as one call, so that its weights can be handed in."""

    def __init__(self, config: MochiConfig) -> None:
        super().__init__()
        self.model = MochiTransformer(config, WrittenOut())

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, patch_dim) packed latents, t (B,) as the model's, text (B, L, D), mask (B, L): -> like x.

        The model drops padding, so prompts of one length go through together.
        """
        order, parts = [], []
        for length in (lengths := mask.sum(1)).unique():
            rows = (lengths == length).nonzero()[:, 0]
            parts.append(self.model(x[rows], t[rows], self.model.prepare(LATENT, text[rows, :length])))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]


@torch.no_grad()
def start(model: MochiTransformer, seed: int) -> None:
    """First weights: every gate shut and the output zero, so that the network starts as the identity.

    The rotation is all that tells a token where it is, and it acts on what tokens have in common. So they start with
    something in common (the embedding's bias), and in half of the heads with keys equal to queries: attention that
    falls off with the distance. Without it the tokens took a thousand steps to notice each other.
    """
    fill(model, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = model.x_embedder.proj.bias
    bias.copy_(torch.randn(bias.shape, generator=generator))
    for block in model.blocks:
        q, k, _ = block.attn.qkv_x.weight.chunk(3)
        k[: len(k) // 2] = q[: len(q) // 2]
        for layer in (block.mod_x, block.mod_y):
            layer.weight.zero_()
    for layer in model.final_layer.children():
        layer.weight.zero_()
    # Each pair of channels turns with one axis: frames are 1 apart, patches of an 8 x 8 latent 48.
    frequencies = model.pos_frequencies.zero_()
    _, heads, count = frequencies.shape
    for k in range(count):
        axis = (k % 4 + 1) // 2 if k % 4 < 3 else 2 - (k // 4) % 2
        level = (k // 4) / max(count // 4 - 1, 1)
        frequencies[axis, :, k] = (1.2 if axis == 0 else 0.03) * 0.12**level
    spread = torch.linspace(0.8, 1.25, heads)
    frequencies.mul_(spread[:, None])
    model.pos_frequencies.requires_grad_(False)


def pool(folder: Path, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` clips as normalised latents (count, 12, 3, 8, 8), and the latents' mean and std by channel."""
    encoder = load_autoencoder(folder).encoder
    chunks = []
    for i in range(count // CLIPS_PER_CHUNK):
        file = folder / "latents" / f"{seed}-{i}.pt"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            video = clips(f"pool {seed} {i}", CLIPS_PER_CHUNK)
            with torch.no_grad():
                parts = [encode(encoder, x) for x in video.split(10)]
            write_atomically(file, torch.cat(parts))
        chunks.append(torch.load(file, weights_only=True))
    latents = torch.cat(chunks)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)) / spread(encoder.config.latent_channels)
    latents = (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    return latents, mean, std


def spread(channels: int) -> Tensor:
    """The standard deviation that each latent channel is given for the transformer.

    The channels are principal components, which fall off steeply. With all at 1, half of what the transformer learns
    first is detail that hardly shows; falling gently, the noise hides detail until place and colour are decided.
    """
    return torch.cat([torch.tensor([1.4]), torch.arange(1, channels).float() ** -0.35])


def pool_scenes(count: int, seed: int) -> list[Scene]:
    """What the clips of `pool` show."""
    scenes = []
    for i in range(count // CLIPS_PER_CHUNK):
        rng = random.Random(f"clips pool {seed} {i} False")
        scenes += [draw(rng, FRAMES) for _ in range(CLIPS_PER_CHUNK)]
    return scenes


def features(folder: Path, scenes: list[Scene], seed: int, wordings: int = 2) -> list[Tensor]:
    """For every scene the T5 features (L, D) of `wordings` captions."""
    file = folder / f"features-{seed}-{len(scenes)}-{wordings}.pt"
    if not file.exists():
        rng = random.Random(f"captions {seed}")
        found = []
        with TextEncoder(EncoderFiles.find(folder), dtype=torch.float32) as encoder:
            for scene in scenes:
                out = encoder.encode([caption(scene, rng) for _ in range(wordings)], 64, use_mask=True)
                found.append([out.features[b, : out.num_tokens[b]].to(torch.bfloat16) for b in range(wordings)])
        write_atomically(file, found)
    return torch.load(file, weights_only=True)


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Mostly in the middle, where shape and place are decided, with a fifth spread evenly."""
    normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.3)
    even = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, even, normal)


def train_mochi(folder: Path, steps: int = 6000, batch: int = 48, clip_count: int = 5000, seed: int = 0) -> None:
    """Train, or go on where it stopped, and write the whole checkpoint into `folder`/mochi."""
    texts = features(folder, pool_scenes(clip_count, seed), seed)
    latents, mean, std = pool(folder, clip_count, seed)
    tokens = pack(latents)
    vae = dataclasses.replace(VAE, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    write_atomically(folder / "mochi_vae_config.pt", dataclasses.asdict(vae))
    model = Velocity(demo_config(vae))
    start(model.model, seed)

    def step(generator: torch.Generator, _: int) -> Losses:
        index = torch.randint(len(tokens), (batch,), generator=generator).tolist()
        words = [texts[i][int(torch.randint(2, (), generator=generator))] for i in index]
        keep = torch.rand(batch, generator=generator) > 0.1
        text = nn.utils.rnn.pad_sequence(words, batch_first=True)
        lengths = torch.tensor([len(w) for w in words]) * keep
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        data = tokens[index]
        noise = torch.randn(data.shape, generator=generator)
        s = noise_levels(batch, generator)
        noisy = torch.lerp(data, noise, s[:, None, None])
        error = (in_bf16(model, noisy, 1000 * (1 - s), text, mask) - (data - noise)).square().mean((1, 2))
        high = s > 0.7
        return {"loss": error.mean(), "early": error[high].mean(), "late": error[~high].mean()}

    plan = Plan(steps, 2e-3, warmup=100, average=0.999, decay=0.01, muon=True, seed=seed)
    train(model, step, plan, folder / "mochi.pt")
    export(folder)


def export(folder: Path) -> Path:
    """Write the checkpoint from the parts as far as they are trained, into `folder`/mochi."""
    vae = MochiVAEConfig(**torch.load(folder / "mochi_vae_config.pt", weights_only=True))
    autoencoder = load_autoencoder(folder)
    trained = folder / "mochi_vae.pt"
    if trained.exists():
        autoencoder.decoder.load_state_dict(torch.load(trained, weights_only=True)["average"])
    average = torch.load(folder / "mochi.pt", weights_only=True)["average"]
    transformer = {name.removeprefix("model."): p for name, p in average.items()}
    target = folder / "mochi"
    write_checkpoint(target, demo_config(vae), transformer, autoencoder.encoder, autoencoder.decoder)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, target / part, dirs_exist_ok=True)
    return target
