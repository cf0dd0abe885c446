"""First weights for the small Mochi autoencoder: its linear paths hold the principal components of the clips.

Both halves are linear but for the residual branches, the last norm and the activations around it. So they can start
as the best linear autoencoder of 6 x 8 x 8 pixel cells, with colours right from the first step, and training is left
with what is not linear: edges. A network of this size that starts at random spends most of its time on finding colours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.video.causal import CausalStream
from mochi_xdit.vae import fourier_features

if TYPE_CHECKING:
    from tools.demo.mochi_vae import Autoencoder

LEVEL = 4.0
"""The constant channels of the encoder's last groups, against components of variance 1."""


@torch.no_grad()
def start_linear(model: Autoencoder, video: Tensor) -> None:
    """Set the weights of `model` from the clips `video` (B, 3, T, H, W) in [-1, 1]."""
    encoder, decoder = model.encoder, model.decoder
    for block in [*encoder.modules(), *decoder.modules()]:
        if hasattr(block, "stack"):
            nn.init.zeros_(block.stack[5].weight)
            nn.init.zeros_(block.stack[5].bias)
        if hasattr(block, "attn"):
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.attn.out.bias)
    proj_in, first, second, third, *_ = encoder.layers
    _pick(proj_in, torch.arange(3), 3)
    # Space to channels: 2 x 2 pixels of 3 colours, then 2 x 2 x 2 of those 12.
    _gather(first.layers[0], 3)
    _gather(second.layers[0], 12)

    stream = CausalStream()
    x = proj_in(fourier_features(video, (6, 7)).movedim(1, -1)).movedim(-1, 1)
    x = second.layers[0](first.layers[0](x, stream), stream)
    conv = third.layers[0]
    cells = stream.extend(conv, x, 2).unfold(2, 3, 3).unfold(3, 2, 2).unfold(4, 2, 2)  # (B, 96, t, h, w, 3, 2, 2)
    cells = cells.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)  # (cells, 1152)
    mean = cells.mean(0)
    variance, basis = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    groups = encoder.config.groups
    variance, basis = variance.flip(0)[:groups].clamp(min=1e-6), basis.flip(1)[:, :groups]
    _encode(model, basis / variance.sqrt(), mean)
    _decode(model, (basis * variance.sqrt())[:, : encoder.config.latent_channels], mean)


def _pick(layer: nn.Module, sources: Tensor, count: int) -> None:
    layer.weight[:count] = 0
    layer.bias.zero_()
    layer.weight[torch.arange(count), sources] = 1


def _gather(conv: nn.Conv3d, channels: int) -> None:
    """Output (position, channel) is the input's channel at that position of the kernel, position by position."""
    positions = conv.weight[0, 0].numel()
    conv.bias.zero_()
    flat = conv.weight.flatten(2)
    flat[: positions * channels] = 0
    for p in range(positions):
        for c in range(channels):
            flat[p * channels + c, c, p] = 1
    conv.weight.copy_(flat.view_as(conv.weight))


def _encode(model: Autoencoder, basis: Tensor, mean: Tensor) -> None:
    """Component g in group g as (level + a, level - a, -2 level): the group's mean is 0 and its spread nearly constant.

    So the norm keeps a, its weights undo the rest, and silu(a) - silu(-a) = a gives the latent.
    """
    encoder = model.encoder
    conv, norm, out = encoder.layers[3].layers[0], encoder.output_norm, encoder.output_proj
    groups, latent = encoder.config.groups, encoder.config.latent_channels
    rows, shift = basis.T, -(mean @ basis)
    zero = torch.zeros_like(rows)
    conv.weight.copy_(torch.stack([rows, -rows, zero], 1).flatten(0, 1).view_as(conv.weight))
    level = torch.full((groups,), LEVEL)
    conv.bias.copy_(torch.stack([level + shift, level - shift, -2 * level], 1).flatten())
    norm.weight.copy_(torch.tensor([2**0.5 * LEVEL, 2**0.5 * LEVEL, 0.0]).repeat(groups))
    norm.bias.copy_(torch.tensor([-LEVEL, -LEVEL, 3.0]).repeat(groups))
    out.weight.zero_()
    for k in range(latent):
        out.weight[k, 3 * k], out.weight[k, 3 * k + 1] = 1, -1
    # The constant third channels, silu(3) = 2.86 each, set the log variance to -6.
    out.weight[latent:, 2::3] = -6 / (2.86 * groups)


def _decode(model: Autoencoder, basis: Tensor, mean: Tensor) -> None:
    """Latents to cells by the components, cells to pixels by the inverse of the encoder's gathering."""
    decoder = model.decoder
    conv_in = decoder.blocks[0][0]
    embed = torch.linalg.qr(torch.randn(conv_in.out_channels, conv_in.in_channels)).Q
    conv_in.weight.copy_(embed[..., None, None, None])
    conv_in.bias.zero_()
    first, second, third = (decoder.blocks[i].proj for i in (1, 2, 3))
    first.weight.copy_(basis @ embed.T)
    first.bias.copy_(mean)
    _scatter(second, 12, 8)
    _scatter(third, 3, 4)
    # Colours and their negatives, so that the activation cancels.
    rows = third.weight.view(-1, 4, third.in_features)
    rows[3:6] = -rows[:3]
    decoder.output_proj.bias.zero_()
    weight = decoder.output_proj.weight
    weight.mul_(0.1)
    weight[:, :6] = torch.cat([torch.eye(3), -torch.eye(3)], 1)


def _scatter(proj: nn.Linear, channels: int, positions: int) -> None:
    proj.bias.zero_()
    rows = proj.weight.view(-1, positions, proj.in_features)
    rows[:channels] = 0
    for p in range(positions):
        for c in range(channels):
            rows[c, p, p * channels + c] = 1
