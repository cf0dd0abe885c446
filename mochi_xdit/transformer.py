"""Mochi's asymmetric joint transformer: a wide stream of video tokens and a narrow one of text tokens share attention.

Parameter names are those of the native checkpoint. N, L are token counts of all ranks, n, m those of this rank; both
streams are split over the ranks alike. Blocks run in the parameters' dtype, with norms and rotations computed in at
least fp32; so is what comes before the first block and after the last one, since what is rounded there, all blocks see.

    cond = model.prepare((T, H, W), text, mask)        # once per prompt and size
    v = model(x, t, cond)                              # every step, on this rank's packed tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.elementwise import add_gated, at_least_fp32, rms_norm, swiglu
from common.model.linear import add_heads, heads_of
from common.model.rope import rotate_pairs, rotation
from common.parallel.usp import SequenceParallel
from common.weights.blocks import Blocks, streamed
from mochi_xdit.config import MochiConfig

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5
Mod = tuple[Tensor, ...]
Branches = tuple[Tensor, Tensor | None]
"""What attention adds to video and to text, which the last block drops."""
BASE_AREA = 192 * 192
"""Positions are scaled as if every frame had this many patches."""


@dataclass(frozen=True)
class MochiCondition:
    """What a generation's steps have in common, for one guidance branch, on this rank."""

    y: Tensor
    """Text tokens (B, m, hidden_y), padding dropped; may be empty."""
    pooled: Tensor
    """Attention pool over the text (B, hidden_x)."""
    rope: Tensor
    """(2, n, heads, head_dim / 2, 2), see `rotation`."""
    lengths: tuple[int, ...]
    """Tokens of both streams on every rank."""
    frequencies: Tensor
    """Of the timestep's embedding (time_dim / 2,), in fp32 at least."""


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """Latents (B, C, T, H, W) as tokens (B, T * H/p * W/p, p * p * C): frame, row, column; inside, row, column,
    channel.

    Raises ValueError when H or W is no multiple of the patch.
    """
    B, C, T, H, W = latents.shape
    if H % patch or W % patch:
        raise ValueError(f"latents of {H} x {W} do not split into patches of {patch} x {patch}")
    z = latents.reshape(B, C, T, H // patch, patch, W // patch, patch)
    return z.permute(0, 2, 3, 5, 4, 6, 1).reshape(B, -1, patch * patch * C)


def unpack(tokens: Tensor, size: tuple[int, int, int], patch: int = 2) -> Tensor:
    """The inverse of `pack`; `size` is the latents' (T, H, W)."""
    T, H, W = size
    B, _, width = tokens.shape
    C = width // patch**2
    z = tokens.reshape(B, T, H // patch, W // patch, patch, patch, C)
    return z.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, C, T, H, W)


class FeedForward(nn.Module):
    """Gated feed-forward: w2(silu(a) * b) with (a, b) the halves of w1(x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x)))


class JointAttention(nn.Module):
    """The parameters of attention of both streams over both streams: what makes its heads, and what joins them."""

    def __init__(self, config: MochiConfig, last: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_x = nn.Linear(config.hidden_x, 3 * config.hidden_x, bias=False)
        self.qkv_y = nn.Linear(config.hidden_y, 3 * config.hidden_x, bias=False)
        self.q_norm_x = nn.RMSNorm(config.head_dim, QK_NORM_EPS)
        self.k_norm_x = nn.RMSNorm(config.head_dim, QK_NORM_EPS)
        self.q_norm_y = nn.RMSNorm(config.head_dim, QK_NORM_EPS)
        self.k_norm_y = nn.RMSNorm(config.head_dim, QK_NORM_EPS)
        self.proj_x = nn.Linear(config.hidden_x, config.hidden_x)
        self.proj_y = None if last else nn.Linear(config.hidden_x, config.hidden_y)

    def project(self, x: Tensor, y: Tensor, rope: Tensor, heads: slice, parts: str) -> tuple[Tensor, ...]:
        """x (B, n, hidden_x), y (B, m, hidden_y), both normalised, to `parts` of q, k, v of both (B, n + m, h, D)."""
        # The text's tokens are few: less is copied than launched.
        of_y = heads_of(self.qkv_y, y, self.heads, heads, parts, apart=False)
        of_x = heads_of(self.qkv_x, x, self.heads, heads, parts, rest=of_y[-1] if "v" in parts else None)
        norms = {"q": (self.q_norm_x, self.q_norm_y), "k": (self.k_norm_x, self.k_norm_y)}
        projections = []
        for part, video, text in zip(parts, of_x, of_y):
            if part in norms:
                norm_x, norm_y = norms[part]
                joint = rotate_pairs(self._normed(video, norm_x), rope[:, :, heads], self._normed(text, norm_y))
                projections.append(joint)
            else:
                projections.append(video)  # the text behind it
        return tuple(projections)

    @staticmethod
    def _normed(heads: Tensor, norm: nn.RMSNorm) -> Tensor:
        return rms_norm(heads, QK_NORM_EPS, norm.weight)

    def output(self, n: int, out: Tensor, heads: slice, so_far: Branches | None) -> Branches:
        """Some heads of what was attended to (B, n + m, h, D), back to the widths of x and y, added to other heads'."""
        x, y = out.split((n, out.shape[1] - n), dim=1)
        dx, dy = so_far or (None, None)
        dx = add_heads(self.proj_x, x, self.heads, heads, dx)
        return dx, None if self.proj_y is None else add_heads(self.proj_y, y, self.heads, heads, dy)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and after, and gated. The last one drops the text."""

    regions = ("before_attention", "project", "output", "after_attention")

    def __init__(self, config: MochiConfig, sp: SequenceParallel, last: bool) -> None:
        super().__init__()
        self.sp = sp
        self.widths = [config.hidden_x] * 4 + [config.hidden_y] * (1 if last else 4)
        self.mod_x = nn.Linear(config.hidden_x, 4 * config.hidden_x)
        self.mod_y = nn.Linear(config.hidden_x, config.hidden_y if last else 4 * config.hidden_y)
        self.attn = JointAttention(config, last)
        self.mlp_x = FeedForward(config.hidden_x, config.mlp_x)
        self.mlp_y = None if last else FeedForward(config.hidden_y, config.mlp_y)

    def forward(self, x: Tensor, y: Tensor, c: Tensor, cond: MochiCondition) -> tuple[Tensor, Tensor]:
        """x (B, n, hidden_x), y (B, m, hidden_y), c (B, hidden_x) activated conditioning. Returns x and y."""
        x_in, y_in, mod = self.before_attention(x, y, c)
        project, output = partial(self.project, x_in, y_in, cond.rope), partial(self.output, x.shape[1])
        del x_in, y_in
        dx, dy = self.sp.attend(project, output, self.attn.heads, cond.lengths)
        del project  # the feed-forward needs its memory
        return self.after_attention(x, y, dx, dy, mod)

    def before_attention(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Mod]:
        """x and y as attention reads them, and what modulates the block."""
        mod = self.modulation(c)
        return rms_norm(x, NORM_EPS, mod[0]), rms_norm(y, NORM_EPS, mod[4]), mod

    def project(self, x: Tensor, y: Tensor, rope: Tensor, heads: slice, parts: str) -> tuple[Tensor, ...]:
        """See `JointAttention.project`."""
        return self.attn.project(x, y, rope, heads, parts)

    def output(self, n: int, out: Tensor, heads: slice, so_far: Branches | None) -> Branches:
        """See `JointAttention.output`."""
        return self.attn.output(n, out, heads, so_far)

    def after_attention(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor | None, mod: Mod) -> tuple[Tensor, Tensor]:
        """x and y after both residual branches, of which attention's are dx and dy."""
        x = self._residual(x, dx, self.mlp_x, *mod[1:4])
        return x, y if self.mlp_y is None or dy is None else self._residual(y, dy, self.mlp_y, *mod[5:8])

    @staticmethod
    def _residual(x: Tensor, dx: Tensor, mlp: nn.Module, gate: Tensor, mlp_weight: Tensor, mlp_gate: Tensor) -> Tensor:
        x = add_gated(x, rms_norm(dx, NORM_EPS), gate)
        return add_gated(x, rms_norm(mlp(rms_norm(x, NORM_EPS, mlp_weight)), NORM_EPS), mlp_gate)

    def modulation(self, c: Tensor) -> Mod:
        """Of attention and feed-forward of x, then of y: what is the weight of the norm, and the gate (B, 1, D).

        Weights are 1 + m of the layers' outputs m, gates tanh(m) in at least fp32.
        """
        mod = torch.cat((self.mod_x(c), self.mod_y(c)), dim=-1)[:, None]
        # Both of all numbers, each of which is used in one way: few kernels.
        weights, gates = 1 + mod, torch.tanh(mod.to(at_least_fp32(mod.dtype)))
        return tuple(
            both[i % 2] for i, both in enumerate(zip(weights.split(self.widths, -1), gates.split(self.widths, -1)))
        )


class PatchEmbed(nn.Module):
    """The patch convolution on packed tokens: its stride is its kernel, so it is a matrix product."""

    def __init__(self, config: MochiConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.hidden_x, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, patch * patch * C) to (B, n, hidden_x), in the dtype of these weights."""
        # Tokens have their channels last, the weights before rows and columns.
        x = x.unflatten(-1, (-1, self.proj.in_channels)).transpose(-1, -2).flatten(-2)
        return F.linear(x.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbed(nn.Module):
    """Sinusoidal embedding of the timestep through two layers."""

    def __init__(self, config: MochiConfig) -> None:
        super().__init__()
        D = config.hidden_x
        self.mlp = nn.Sequential(nn.Linear(config.time_dim, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t: Tensor, frequencies: Tensor) -> Tensor:
        """t (B,), frequencies (time_dim / 2,) in fp32 at least, to (B, hidden_x), in the dtype of these weights."""
        angles = t.to(frequencies.dtype)[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """A modulated norm, and back to the numbers of a patch."""

    def __init__(self, config: MochiConfig) -> None:
        super().__init__()
        self.mod = nn.Linear(config.hidden_x, 2 * config.hidden_x)
        self.linear = nn.Linear(config.hidden_x, config.patch_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, n, hidden_x), c (B, hidden_x), to (B, n, patch_dim) in at least fp32."""
        compute_dtype = at_least_fp32(x.dtype)
        shift, scale = self.mod(c)[:, None].to(compute_dtype).chunk(2, dim=-1)
        normed = F.layer_norm(x.to(compute_dtype), x.shape[-1:], eps=NORM_EPS)
        return self.linear((normed * (1 + scale) + shift).to(self.linear.weight.dtype)).to(compute_dtype)


class AttentionPool(nn.Module):
    """One vector for a text: attention of the tokens' mean over the mean and the tokens."""

    def __init__(self, config: MochiConfig) -> None:
        super().__init__()
        self.heads = config.text_heads
        self.to_kv = nn.Linear(config.text_dim, 2 * config.text_dim)
        self.to_q = nn.Linear(config.text_dim, config.text_dim)
        self.to_out = nn.Linear(config.text_dim, config.hidden_x)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, text_dim) valid tokens, L may be 0, to (B, hidden_x)."""
        mean = text.sum(1, keepdim=True) / max(text.shape[1], 1)
        tokens = torch.cat((mean, text), dim=1)
        kv = self.to_kv(tokens).unflatten(-1, (2, self.heads, -1)).transpose(1, 3)  # (B, H, 2, 1 + L, D)
        q = self.to_q(mean).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, 1, D)
        out = F.scaled_dot_product_attention(q, kv[:, :, 0], kv[:, :, 1])
        return self.to_out(out.transpose(1, 2).flatten(2)).squeeze(1)


class MochiTransformer(nn.Module):
    """Predicts the direction from noise to video (video minus noise) for latents at one time.

    config: the model's numbers. sp: the ranks that share the tokens; ValueError when it has more Ulysses ranks than
    heads.
    """

    matmuls = ("attn.qkv_x", "attn.qkv_y", "attn.proj_x", "attn.proj_y", "mlp_x.w1", "mlp_x.w2", "mlp_y.w1", "mlp_y.w2")

    def __init__(self, config: MochiConfig | None = None, sp: SequenceParallel | None = None) -> None:
        super().__init__()
        self.config = config = config or MochiConfig()
        self.sp = sp = sp or SequenceParallel()
        sp.require_heads(config.heads)
        self.pos_frequencies = nn.Parameter(torch.zeros(3, config.heads, config.head_dim // 2))
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimeEmbed(config)
        self.t5_y_embedder = AttentionPool(config)
        self.t5_yproj = nn.Linear(config.text_dim, config.hidden_y)
        self.blocks = Blocks(Block(config, sp, i == config.depth - 1) for i in range(config.depth))
        self.final_layer = FinalLayer(config)

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks run in."""
        return self.t5_yproj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.t5_yproj.weight.device

    def prepare(
        self, size: tuple[int, int, int], text: Tensor | None = None, mask: Tensor | None = None, batch: int = 1
    ) -> MochiCondition:
        """Everything that does not depend on the step, for latents of `size` (T, H, W).

        text  (B, L, text_dim) features of all ranks' tokens; None for an empty prompt, which needs none
        mask  (B, L), true where a token is no padding; None when all are
        batch B when there is no text

        Padding is dropped after pooling, so the prompts of a batch must be equally long: ValueError otherwise.
        """
        if text is None:
            text = torch.zeros(batch, 0, self.config.text_dim)
        text = _valid(text, mask, self.config.text_dim).to(self.device)
        pooled = self.t5_y_embedder(text.to(self.dtype))
        y = self.t5_yproj(self.sp.shard(text).to(self.dtype))
        rope = self._rope(size)
        n_video, n_text = math.prod(size) // self.config.patch**2, text.shape[1]
        lengths = tuple(a + b for a, b in zip(self.sp.lengths(n_video), self.sp.lengths(n_text)))
        return MochiCondition(y, pooled, rope, lengths, self._time_frequencies())

    def _rope(self, size: tuple[int, int, int]) -> Tensor:
        """Of this rank's tokens, (2, n, H, D / 2, 2); each head has its own learned frequencies."""
        T, h, w = size[0], size[1] // self.config.patch, size[2] // self.config.patch
        dtype, device = at_least_fp32(self.dtype), self.device
        scale = math.sqrt(BASE_AREA / (h * w))
        axes = [torch.arange(T, dtype=dtype, device=device)]
        for count in (h, w):
            edges = torch.linspace(-count * scale / 2, count * scale / 2, count + 1, dtype=dtype, device=device)
            axes.append((edges[:-1] + edges[1:]) / 2)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (N, 3)
        frequencies = self.pos_frequencies.to(dtype)
        # A sum of products rather than a matmul, which a GPU may be told to round to ten bits.
        positions = self.sp.shard(grid, dim=0)[..., None, None]  # (n, 3, 1, 1)
        angles = torch.zeros((), dtype=dtype, device=device)
        for axis in range(3):
            angles = angles + positions[:, axis] * frequencies[axis]  # (n, H, D / 2)
        return rotation(angles.cos(), angles.sin(), self.dtype)

    def _time_frequencies(self) -> Tensor:
        half = self.config.time_dim // 2
        k = torch.arange(half, dtype=at_least_fp32(self.dtype), device=self.device)
        return torch.exp(k * -math.log(10000) / half)

    def forward(self, x: Tensor, t: Tensor, cond: MochiCondition) -> Tensor:
        """Predict video minus noise for this rank's tokens.

        x (B, n, patch_dim) fp32, from `pack`; t (B,) or () = 1000 * (1 - sigma), 0 at pure noise. Returns the shape of
        x, fp32 (fp64 for fp64 parameters).
        """
        t = t.to(x.device).expand(x.shape[0])
        c = F.silu(self.t_embedder(t, cond.frequencies) + cond.pooled).to(self.dtype)
        x, y = self.x_embedder(x).to(self.dtype), cond.y.clone()  # blocks write over both
        for block in streamed(self.blocks):
            x, y = block(x, y, c, cond)
        return self.final_layer(x, c)


def _valid(text: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """The tokens of `text` where `mask` is true."""
    if text.ndim != 3 or text.shape[2] != width:
        raise ValueError(f"text features have shape {list(text.shape)}, expected [batch, tokens, {width}]")
    if mask is None:
        return text
    if mask.shape != text.shape[:2]:
        raise ValueError(f"the text mask has shape {list(mask.shape)}, expected {list(text.shape[:2])}")
    mask = mask.to(text.device).bool()
    counts = mask.sum(1)
    if bool((counts != counts[0]).any()):
        raise ValueError(f"a batch has prompts of {counts.tolist()} tokens; give them one at a time")
    return text[mask].view(text.shape[0], int(counts[0]), width)
