"""Train the small Wan transformer: rectified flow over latents of a fixed pool of clips, from text and from pictures.

At noise level s the input is (1 - s) * data + s * noise, the time is 1000 * s and the answer is noise - data. In one
step of four the first latent frame is clean and its tokens are at time 0, as TI2V-5B starts from an image. One caption
in ten is the empty one, which trains the branch without a prompt. The network that is trained is the product's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.run.demo import fill, write_json
from common.text.encoder import TextEncoder
from common.text.t5 import EncoderFiles
from common.weights.schema import read_object
from tools.demo.cogvideox import trained
from tools.demo.mochi import features, noise_levels, pool_scenes
from tools.demo.mochi_vae import clips
from tools.demo.training import Losses, Plan, WrittenOut, in_bf16, train, write_atomically
from tools.demo.wan_vae import load_autoencoder
from wan_xdit.config import TransformerConfig
from wan_xdit.demo import TRAINED_VAE, trained_config, write_checkpoint
from wan_xdit.transformer import Size, WanTransformer, pack

LATENT: Size = (4, 8, 8)
CLIPS_PER_CHUNK = 250
IMAGE_EVERY = 4
"""Steps to one that starts from a picture."""


class Flow(nn.Module):
    """The product's transformer as one call, so that its weights can be handed in."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.model = WanTransformer(config, WrittenOut())

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x (B, N, patch) packed latents, t (B,) or (B, N) times of 1000, text (B, L, D), zeros after it: like x."""
        return self.model(x, t, self.model.prepare(text, LATENT)).float()


@torch.no_grad()
def start(model: WanTransformer, seed: int) -> None:
    """First weights: every gate shut and the output zero, so that the network starts as the identity.

    The rotation is all that tells a token where it is, and it acts on what tokens have in common. So they start with
    something in common (the embedding's bias), and in half of the heads with keys equal to queries: attention that
    falls off with the distance.
    """
    fill(model, seed)
    bias = model.patch.proj.bias
    assert bias is not None
    bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed)))
    for layer in (model.time_proj, model.head):
        layer.weight.zero_()
    model.modulation.zero_()
    for block in model.blocks:
        block.modulation.zero_()  # type: ignore[operator]
        block.cross.out.weight.zero_()  # type: ignore[union-attr,operator]
        q, k, _ = block.attention.qkv.weight.chunk(3)  # type: ignore[union-attr,operator]
        k[: len(k) // 2] = q[: len(q) // 2]


def pool(folder: Path, count: int, seed: int) -> Tensor:
    """`count` clips, those of `pool_scenes`, as white latents (count, C, 4, 8, 8)."""
    autoencoder = load_autoencoder(folder)
    chunks = []
    for i in range(count // CLIPS_PER_CHUNK):
        file = folder / "wan-latents" / f"{seed}-{i}.pt"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            video = clips(f"pool {seed} {i}", CLIPS_PER_CHUNK)
            with torch.no_grad():
                write_atomically(file, torch.cat([autoencoder.encode(x) for x in video.split(10)]))
        chunks.append(torch.load(file, weights_only=True))
    return torch.cat(chunks)


def padded_features(folder: Path, count: int, seed: int) -> Tensor:
    """T5 features (count + 1, 2, L, D) of two captions of each clip, zeros after them; the last are the empty one's."""
    length = trained_config().text_length
    rows = [row for pair in features(folder, pool_scenes(count, seed), seed) for row in pair]
    with TextEncoder(EncoderFiles.find(folder), dtype=torch.float32) as encoder:
        empty = encoder.encode([""], length, use_mask=True)
    rows += [empty.features[0, : empty.num_tokens[0]].to(torch.bfloat16)] * 2
    text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert text.shape[1] <= length
    return nn.functional.pad(text, (0, 0, 0, length - text.shape[1])).unflatten(0, (-1, 2))


def train_wan(folder: Path, steps: int = 9000, batch: int = 48, clip_count: int = 5000, seed: int = 0) -> None:
    """Train, or go on where it stopped, and write the whole checkpoint into `folder`/wan."""
    texts = padded_features(folder, clip_count, seed)
    tokens = pack(pool(folder, clip_count, seed), trained_config().patch)
    model = Flow(trained_config())
    start(model.model, seed)
    first = tokens.shape[1] // LATENT[0]

    def step(generator: torch.Generator, i: int) -> Losses:
        index = torch.randint(len(tokens), (batch,), generator=generator)
        wording = torch.randint(2, (batch,), generator=generator)
        empty = torch.rand(batch, generator=generator) < 0.1
        data, text = tokens[index], texts[torch.where(empty, len(texts) - 1, index), wording]
        noise = torch.randn(data.shape, generator=generator)
        s = noise_levels(batch, generator)[:, None].expand(-1, data.shape[1])
        given = first if i % IMAGE_EVERY == 0 else 0
        if given:
            s = torch.cat((torch.zeros(batch, given), s[:, given:]), dim=1)
        noisy = torch.lerp(data, noise, s[..., None])
        with sdpa_kernel(SDPBackend.MATH):  # backwards several times faster than a CPU's fused kernel at these sizes
            out = in_bf16(model, noisy, 1000 * (s if given else s[:, 0]), text)
        error = (out - (noise - data))[:, given:].square().mean((1, 2))
        high = s[:, -1] > 0.7
        return {"loss": error.mean(), "early": error[high].mean(), "late": error[~high].mean()}

    plan = Plan(steps, 2e-3, warmup=100, average=0.999, decay=0.01, muon=True, seed=seed)
    train(model, step, plan, folder / "wan.pt")
    export(folder)


def export(folder: Path) -> Path:
    """Write the checkpoint from the parts as far as they are trained, into `folder`/wan."""
    model, autoencoder = WanTransformer(trained_config()), load_autoencoder(folder)
    model.load_state_dict(trained(folder, "wan"))
    target = folder / "wan"
    write_checkpoint(target, "ti2v-5b", [model], TRAINED_VAE, autoencoder.encoder, autoencoder.decoder)
    write_umt5(folder, target)
    return target


def write_umt5(folder: Path, target: Path) -> None:
    """The T5 encoder of `folder` as the UMT5 that computes the same: every layer has the first one's table."""
    config = read_object(folder / "text_encoder" / "config.json")
    state = load_file(folder / "text_encoder" / "model.safetensors")
    table = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    for i in range(config["num_layers"]):
        state[f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"] = table.clone()
    shutil.copytree(folder / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    config |= {"model_type": "umt5", "architectures": ["UMT5EncoderModel"]}
    write_json(target / "text_encoder" / "config.json", config)
    save_file(state, target / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    (target / "text_encoder" / "model.safetensors").chmod(0o644)
