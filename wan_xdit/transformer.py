"""The Wan transformer: self-attention over the video, cross-attention to text and image, for 2.1 and 2.2.

Only video tokens are split over the ranks; text and image tokens are few, the same on every rank, and attended to where
the queries are. Letters: W width, H heads, D head width, N tokens of all ranks, n of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.elementwise import add, add_gated, at_least_fp32, in_place, rms_norm
from common.model.linear import add_heads, heads_of, linear_gelu
from common.model.rope import rotate_pairs, rotation
from common.parallel.attention import attention
from common.parallel.usp import SequenceParallel
from common.weights.blocks import Blocks, streamed
from wan_xdit.config import TransformerConfig

Size = tuple[int, int, int]  # latent frames, rows, columns
KeysValues = tuple[Tensor, Tensor]
ROPE_BASE = 10000.0


def pack(z: Tensor, patch: Size) -> Tensor:
    """Latents b c (t p) (h q) (w r) -> tokens b (t h w) (c p q r). ValueError when the patch does not divide them."""
    size, (p, q, r) = tuple(z.shape[2:]), patch
    if any(n < 1 or n % step for n, step in zip(size, patch)):
        raise ValueError(f"latents of {size} frames, rows and columns are not whole patches of {patch}")
    z = z.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))  # b c t p h q w r
    return z.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpack(x: Tensor, size: Size, patch: Size) -> Tensor:
    """The reverse of `pack`, for latents of `size`."""
    p, q, r = patch
    x = x.unflatten(2, (-1, p, q, r)).unflatten(1, (size[0] // p, size[1] // q, size[2] // r))  # b t h w c p q r
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Condition:
    """What does not depend on the step, for one guidance branch."""

    size: Size
    beside: Tensor  # (1 or B, n or 1, W): what a token is besides its noise: bias, image latents
    text: Tensor  # (B, L, W) embedded text, padding included
    image: Tensor | None  # (B, M, W) embedded CLIP tokens
    rope: Tensor  # (2, n, 1, D / 2, 2), see `rotation`
    lengths: tuple[int, ...]  # tokens of every rank
    cross: tuple[tuple[KeysValues, ...], ...] | None = None  # by block: keys and values of text and image, where kept
    still: int = 0  # tokens of this rank's, its first ones, that stay as they are: they are at time 0


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift, computed in at least fp32: x (B, n, W); shift and scale (B, 1 or n, W)."""
    if shift.shape[0] == shift.shape[1] == 1:  # one affine map for all tokens: a single pass
        return F.layer_norm(x, x.shape[-1:], (1 + scale[0, 0]).to(x.dtype), shift[0, 0].to(x.dtype), eps)
    x = x.to(at_least_fp32(x.dtype))
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def norm_spans(x: Tensor, shift: Tensor, scale: Tensor, eps: float, still: int) -> Tensor:
    """`modulated_norm`; with `still` shift and scale have a row for so many tokens and one for the rest."""
    if not still:
        return modulated_norm(x, shift, scale, eps)
    spans = zip((x[:, :still], x[:, still:]), shift.split(1, dim=1), scale.split(1, dim=1))
    return torch.cat([modulated_norm(*span, eps) for span in spans], dim=1)


def gate_spans(x: Tensor, branch: Tensor, gate: Tensor, still: int) -> Tensor:
    """`add_gated`; with `still`, gates of two spans of tokens as for `norm_spans`."""
    if not still:
        return add_gated(x, branch, gate)
    spans = zip((slice(still), slice(still, None)), gate.split(1, dim=1))
    parts = [add_gated(x[:, at], branch[:, at], gate) for at, gate in spans]
    return x if in_place() else torch.cat(parts, dim=1)


class SelfAttention(nn.Module):
    """Over all video tokens. Queries and keys are normalised over the whole width, before it is cut into heads."""

    def __init__(self, config: TransformerConfig, sp: SequenceParallel) -> None:
        super().__init__()
        self.heads, self.eps, self.sp = config.heads, config.eps, sp
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = nn.RMSNorm(config.width, config.eps)
        self.k_norm = nn.RMSNorm(config.width, config.eps)
        self.out = nn.Linear(config.width, config.width)

    def project(self, h: Tensor, rope: Tensor, parts: str, heads: slice | None = None) -> tuple[Tensor, ...]:
        """(B, n, W) -> `parts` of q, k and v (B, n, H, D); heads: of v, where it is asked for alone; else all."""
        projections = []
        for part, x in zip(parts, heads_of(self.qkv, h, self.heads, heads or self.all, parts)):
            if part != "v":
                weight = (self.q_norm if part == "q" else self.k_norm).weight
                x = rotate_pairs(rms_norm(x.flatten(2), self.eps, weight).unflatten(-1, (self.heads, -1)), rope)
            projections.append(x)
        return tuple(projections)

    @property
    def all(self) -> slice:
        return slice(0, self.heads)


class Projection:
    """What makes q, k and v of one block's self-attention for `SequenceParallel.attend`.

    Queries and keys are normalised over all heads, so they are made whole before their first heads leave.
    """

    def __init__(self, project: Callable[..., tuple[Tensor, ...]], h: Tensor, rope: Tensor, heads: int) -> None:
        self.project, self.h, self.rope, self.heads = project, h, rope, heads
        self.whole: tuple[Tensor, ...] = ()

    def __call__(self, heads: slice, parts: str) -> tuple[Tensor, ...]:
        if heads.stop - heads.start == self.heads:
            return self.project(self.h, self.rope, parts)
        self.whole = self.whole or self.project(self.h, self.rope, parts.removesuffix("v"))
        return *(x[:, :, heads] for x in self.whole), *self.project(self.h, self.rope, "v", heads)


class CrossAttention(nn.Module):
    """To the text's tokens, and apart from them to the image's, where there are such."""

    def __init__(self, config: TransformerConfig, sp: SequenceParallel) -> None:
        super().__init__()
        self.heads, self.kernel = config.heads, sp.kernel
        self.q = nn.Linear(config.width, config.width)
        self.q_norm = nn.RMSNorm(config.width, config.eps)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.k_norm = nn.RMSNorm(config.width, config.eps)
        self.out = nn.Linear(config.width, config.width)
        self.image_kv = nn.Linear(config.width, 2 * config.width) if config.image_width else None
        self.image_k_norm = nn.RMSNorm(config.width, config.eps) if config.image_width else None

    def keys_values(self, cond: Condition) -> tuple[KeysValues, ...]:
        """Keys and values (B, L, H, D) of the text and of the image: no step changes them."""
        pairs = [self._split(self.kv(cond.text), self.k_norm)]
        if self.image_kv is not None:
            pairs.append(self._split(self.image_kv(cond.image), self.image_k_norm))
        return tuple(pairs)

    def _split(self, kv: Tensor, norm: nn.Module | None) -> KeysValues:
        assert norm is not None
        k, v = kv.chunk(2, dim=-1)
        return norm(k).unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def before(self, h: Tensor) -> Tensor:
        """(B, n, W) -> q (B, n, H, D)"""
        return self.q_norm(self.q(h)).unflatten(-1, (self.heads, -1))

    def attend(self, q: Tensor, keys_values: tuple[KeysValues, ...]) -> Tensor:
        """What the queries find in the text and, added to it, in the image: (B, n, H, D)."""
        first, *others = [attention(q, k, v, self.kernel) for k, v in keys_values]
        for other in others:
            first = first + other
        return first


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last between a modulated norm and a gate.

    The stream x keeps the dtype it comes with: fp32 as in the original, or the weights' own.
    """

    regions = ("before_attention", "project", "output", "before_cross", "after_cross")

    def __init__(self, config: TransformerConfig, sp: SequenceParallel) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.width) / config.width**0.5)
        self.attention = SelfAttention(config, sp)
        self.cross_norm = nn.LayerNorm(config.width, config.eps)
        self.cross = CrossAttention(config, sp)
        self.ff_in = nn.Linear(config.width, config.ffn)
        self.ff_out = nn.Linear(config.ffn, config.width)

    def forward(
        self, x: Tensor, c: Tensor, cond: Condition, keys_values: tuple[KeysValues, ...] | None = None
    ) -> Tensor:
        """x: (B, n, W). c: (B, 1 or n, 6, W) the projected time, with `cond.still` (B, 2, 6, W).

        keys_values: this block's entry of `cond.cross`.
        """
        h, modulation = self.before_attention(x, c, cond)
        project = Projection(self.project, h, cond.rope, self.attention.heads)
        del h
        branch = self.attention.sp.attend(project, self.output, self.attention.heads, cond.lengths)
        del project  # the feed-forward needs its memory
        x, q = self.before_cross(x, branch, modulation, cond)
        out = self.cross.attend(q, keys_values or self.cross.keys_values(cond))
        return self.after_cross(x, out, modulation, cond)

    def before_attention(self, x: Tensor, c: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """x as the self-attention reads it (B, n, W); and the time with the block's modulation, like c."""
        modulation = self.modulation[:, None] + c
        shift, scale, *_ = modulation.unbind(2)
        return norm_spans(x, shift, scale, self.eps, cond.still).to(self.dtype), modulation

    def project(self, h: Tensor, rope: Tensor, parts: str, heads: slice | None = None) -> tuple[Tensor, ...]:
        """See `SelfAttention.project`."""
        return self.attention.project(h, rope, parts, heads)

    def output(self, out: Tensor, heads: slice, so_far: Tensor | None) -> Tensor:
        """The self-attention's output projection of some heads (B, n, h, D), added to that of others: (B, n, W)."""
        return add_heads(self.attention.out, out, self.attention.heads, heads, so_far)

    def before_cross(self, x: Tensor, branch: Tensor, modulation: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """x after the self-attention, to which it adds `branch` (B, n, W); and the cross-attention's q (B, n, H, D)."""
        x = gate_spans(x, branch, modulation[:, :, 2], cond.still)
        h = self.cross_norm(x.to(self.cross_norm.weight.dtype))
        return x, self.cross.before(h.to(self.dtype))

    def after_cross(self, x: Tensor, out: Tensor, modulation: Tensor, cond: Condition) -> Tensor:
        """x after the cross-attention, whose heads give `out` (B, n, H, D), and after the feed-forward."""
        x = add(x, self.cross.out(out.flatten(2)))
        *_, shift, scale, gate = modulation.unbind(2)
        h = norm_spans(x, shift, scale, self.eps, cond.still).to(self.dtype)
        return gate_spans(x, self.ff_out(linear_gelu(self.ff_in, h)), gate, cond.still)

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes through the matmuls, whose weights may be in eight bits."""
        return self.attention.q_norm.weight.dtype


class PatchEmbed(nn.Module):
    """The patch convolution as a matrix on packed tokens: noise and what stands beside it have columns of their own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.noise = config.out_channels * config.patch_volume
        self.proj = nn.Conv3d(config.in_channels, config.width, config.patch, config.patch)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        """Tokens of the noise (B, n, C * patch volume) and what is added to each -> (B, n, W)."""
        return F.linear(x, self.proj.weight.flatten(1)[:, : self.noise]) + beside

    def beside(self, x: Tensor | None) -> Tensor:
        """What tokens of mask and image latents add to the embedding, bias included; None: the bias alone."""
        assert self.proj.bias is not None
        if x is None:
            return self.proj.bias[None, None]
        return F.linear(x, self.proj.weight.flatten(1)[:, self.noise :], self.proj.bias)


class ImageEmbed(nn.Module):
    """CLIP's tokens in the transformer's width."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(inputs)
        self.proj_in = nn.Linear(inputs, inputs)
        self.proj_out = nn.Linear(inputs, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, inputs) -> (B, M, W)"""
        return self.norm_out(self.proj_out(F.gelu(self.proj_in(self.norm_in(x)))))


class WanTransformer(nn.Module):
    """Predicts the flow (noise - video) from noisy latents, a time and text features.

    residual: dtype of the stream between the blocks, at least the weights'; None: the weights'.
    Raises ValueError when `sp` has more Ulysses ranks than the model has heads.
    """

    matmuls = (
        "attention.qkv",
        "attention.out",
        "cross.q",
        "cross.kv",
        "cross.image_kv",
        "cross.out",
        "ff_in",
        "ff_out",
    )

    def __init__(
        self, config: TransformerConfig, sp: SequenceParallel | None = None, residual: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config, self.sp, self.residual = config, sp or SequenceParallel(), residual
        self.sp.require_heads(config.heads)
        width = config.width
        self.patch = PatchEmbed(config)
        self.text_in, self.text_out = nn.Linear(config.text_dim, width), nn.Linear(width, width)
        self.image = ImageEmbed(config.image_width, width) if config.image_width else None
        self.time_in, self.time_out = nn.Linear(config.time_width, width), nn.Linear(width, width)
        self.time_proj = nn.Linear(width, 6 * width)
        self.blocks = Blocks(Block(config, self.sp) for _ in range(config.layers))
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.head = nn.Linear(width, config.out_channels * config.patch_volume)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch.proj.weight.device

    def prepare(
        self,
        text: Tensor,
        size: Size,
        beside: Tensor | None = None,
        image: Tensor | None = None,
        keep: bool = True,
        still: int = 0,
    ) -> Condition:
        """Everything that does not depend on the step; once per guidance branch.

        text: (B, L, text_dim) UMT5 features without padding, L <= text_length; zeros fill it up, as in training
        size: latent frames, rows, columns
        beside: (1 or B, C, *size) mask and image latents, for checkpoints with `image_channels`
        image: (B, M, image_width) CLIP tokens, for checkpoints with an `image_width`
        keep: keep the cross-attention's keys and values of every block: 2 (L + M) W numbers each
        still: how many of this rank's tokens, its first ones, stay as they are and are at time 0
        Raises ValueError when the checkpoint cannot take the size, the text or the (missing) image.
        """
        self._check(text, beside, image)
        config, sp = self.config, self.sp
        text = F.pad(text.to(self.device, self.dtype), (0, 0, 0, config.text_length - text.shape[1]))
        y = self.text_out(F.gelu(self.text_in(text), approximate="tanh"))
        tokens = None
        if beside is not None:
            tokens = sp.shard(pack(beside, config.patch)).to(self.device, self.dtype)
        grid = (size[0] // config.patch[0], size[1] // config.patch[1], size[2] // config.patch[2])
        clip_tokens = (
            self.image(image.to(self.device, self.dtype)) if image is not None and self.image is not None else None
        )
        lengths = sp.lengths(grid[0] * grid[1] * grid[2])
        rope = rope_table(grid, config.head_width, sp, self.device, self.dtype)
        cond = Condition(size, self.patch.beside(tokens), y, clip_tokens, rope, lengths, still=still)
        if not keep:
            return cond
        return replace(cond, cross=tuple(block.cross.keys_values(cond) for block in streamed(self.blocks)))  # type: ignore[operator]

    def _check(self, text: Tensor, beside: Tensor | None, image: Tensor | None) -> None:
        config = self.config
        if text.ndim != 3 or text.shape[2] != config.text_dim or text.shape[1] > config.text_length:
            expected = f"(batch, at most {config.text_length}, {config.text_dim})"
            raise ValueError(f"text features have shape {tuple(text.shape)}, expected {expected}")
        channels = 0 if beside is None else beside.shape[1]
        if channels != config.image_channels:
            raise ValueError(
                f"{channels} channels stand beside the noise; this checkpoint takes {config.image_channels}"
            )
        if (image is None) != (config.image_width is None):
            raise ValueError(f"this checkpoint {'takes no' if image is not None else 'needs'} CLIP tokens of an image")

    def forward(self, x: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """One prediction for this rank's tokens.

        x: (B, n, C * patch volume) packed noisy latents. t: the time, 0 to 1000: a number, (B,), or (B, n) for tokens
        with times of their own; with `cond.still` a number. Returns the shape of x, in the weights' dtype.
        """
        if cond.still:
            t = torch.full((1, 2), float(t), device=self.device)
            t[:, 0] = 0
        c = self.time_embedding(t)
        timestep_proj = self.time_proj(F.silu(c)).unflatten(-1, (6, -1))
        x = self.patch(x.to(self.dtype), cond.beside).to(self.residual or self.dtype)
        for i, block in enumerate(streamed(self.blocks)):
            x = block(x, timestep_proj, cond, cond.cross[i] if cond.cross is not None else None)
        shift, scale = (self.modulation[:, None] + c[:, :, None]).unbind(2)
        x = self.head(norm_spans(x, shift, scale, self.config.eps, cond.still).to(self.dtype))
        # The matrix puts out patch positions first, channels last; packed latents are the other way round.
        return x.unflatten(-1, (self.config.patch_volume, -1)).transpose(-1, -2).flatten(-2)

    def time_embedding(self, t: Tensor | float) -> Tensor:
        """(B, 1 or n, W), in the dtype of the time layers, which are held in fp32."""
        if not isinstance(t, Tensor):
            # A number is filled in on the device: a copy from the host would wait for everything before it.
            t = torch.full((1,), t, device=self.device)
        t = t.to(self.device).reshape(t.shape[0] if t.ndim else 1, -1)
        dtype = self.time_in.weight.dtype
        return self.time_out(F.silu(self.time_in(sinusoid(t, self.config.time_width).to(dtype))))


def sinusoid(t: Tensor, width: int) -> Tensor:
    """(..., width) in fp64: cosines, then sines, of t 10000^(-k / (width / 2))."""
    half = width // 2
    k = torch.arange(half, dtype=torch.float64, device=t.device)
    angle = t[..., None].double() * torch.exp(-math.log(10000) / half * k)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def rope_table(grid: Size, head_width: int, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The `rotation` (2, n, 1, D / 2, 2) of this rank's tokens: first the pairs that turn by frame, then row, column.

    Rows and columns have a third of the pairs each, rounded down, and frames the rest. Angles: position times
    10000^(-j / pairs of the axis), computed in fp64.
    """
    pairs = head_width // 2
    by_place = 2 * (head_width // 6) // 2
    counts = (pairs - 2 * by_place, by_place, by_place)
    tables = []
    for n, count in zip(grid, counts):
        frequencies = ROPE_BASE ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * frequencies
        tables.append(torch.stack((angle.cos(), angle.sin()), dim=-1))
    index = sp.shard(torch.arange(grid[0] * grid[1] * grid[2], device=device)[None])[0]
    frame, row, column = index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]
    rope = torch.cat([table[at] for table, at in zip(tables, (frame, row, column))], dim=1)[:, None]
    cos, sin = rope.to(at_least_fp32(dtype)).unbind(-1)
    return rotation(cos, sin, dtype)
