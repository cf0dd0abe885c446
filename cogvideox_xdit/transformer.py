"""The CogVideoX transformer: joint attention over [text, video] tokens, for the five published checkpoints.

Text and video share every weight but the modulation, so a rank holds one tensor h (B, n, W): its text tokens, then
its video tokens. Both streams are split over the ranks the same way. Letters: L layers, W width, H heads, D head_dim,
N tokens of all ranks, n of this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_xdit import positions
from cogvideox_xdit.config import TransformerConfig
from common.model.elementwise import add_gated, in_place
from common.model.linear import add_heads, heads_of, linear_gelu
from common.model.rope import rotate_pairs, rotation
from common.parallel.usp import SequenceParallel
from common.weights.blocks import Blocks, streamed

Size = tuple[int, int, int]  # latent frames, rows, columns
OFS = 2.0  # the one value the 1.5 image checkpoint was trained with


def pack(z: Tensor, patch: Size) -> Tensor:
    """Latents (B, C, T, H, W) -> tokens (B, N, C * patch volume); frames, rows, columns; channels slowest inside.

    Raises ValueError when the patch does not divide the latents.
    """
    pt, ph, pw = patch
    batch, channels, frames, rows, columns = z.shape
    check_size((frames, rows, columns), patch)
    z = z.reshape(batch, channels, frames // pt, pt, rows // ph, ph, columns // pw, pw)
    return z.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpack(x: Tensor, size: Size, patch: Size) -> Tensor:
    """The reverse of `pack`: (B, N, C * patch volume) -> (B, C, *size)."""
    (frames, rows, columns), (pt, ph, pw) = size, patch
    x = x.reshape(x.shape[0], frames // pt, rows // ph, columns // pw, -1, pt, ph, pw)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def check_size(size: Size, patch: Size) -> None:
    """Raise ValueError unless whole patches fill the latents."""
    if any(n < 1 or n % p for n, p in zip(size, patch)):
        raise ValueError(
            f"latents of {size[0]} frames, {size[1]} rows and {size[2]} columns are not whole patches of "
            f"{patch[0]} x {patch[1]} x {patch[2]}"
        )


@dataclass(frozen=True)
class Condition:
    """What does not depend on the step, for one guidance branch."""

    size: Size
    y: Tensor
    """(B, ny, W) this rank's text tokens, projected, positions added."""
    video: Tensor
    """(B or 1, nx, W) what each video token is besides its noise: bias, position, image latents."""
    rope: Tensor | None
    """A `rotation` (2, ny + nx, 1, D/2, 2), by nothing on text; None where positions are added."""
    ofs: Tensor | None
    """(1, time_dim) added to the time embedding, None but for the 1.5 image checkpoint."""
    lengths: tuple[int, ...]
    """Tokens of every rank, both streams together."""
    frequencies: Tensor
    """(W / 2,) of the timestep's embedding."""

    @property
    def n_text(self) -> int:
        """Text tokens of this rank; they are the first rows of h."""
        return self.y.shape[1]


def modulated_norm(norm: nn.LayerNorm, h: Tensor, shift: Tensor, scale: Tensor, n_text: int) -> Tensor:
    """norm(h) (1 + scale) + shift, h (B, n, W); shift and scale (B, 2, W) are for video and for text.

    Both are affine, so that they are one norm where one affine map serves a whole stream.
    """
    weight, bias = torch.addcmul(norm.weight, norm.weight, scale), torch.addcmul(shift + norm.bias, norm.bias, scale)
    if h.shape[0] > 1:
        return _multiply_add(
            F.layer_norm(h, norm.normalized_shape, eps=norm.eps), weight, bias[:, :1], bias[:, 1:], n_text
        )
    # All rows as video, then the few text rows again: cheaper than splitting and joining the whole tensor.
    out = F.layer_norm(h, norm.normalized_shape, weight[0, 0], bias[0, 0], norm.eps)
    if n_text:
        out[:, :n_text] = F.layer_norm(h[:, :n_text], norm.normalized_shape, weight[0, 1], bias[0, 1], norm.eps)
    return out


def add_gated_streams(h: Tensor, branch: Tensor, gate: Tensor, n_text: int) -> Tensor:
    """h + gate * branch, h and branch (B, n, W); gate (B, 2, W) is for video and for text. h may be overwritten."""
    if not in_place():
        return _multiply_add(branch, gate, h, h[:, :n_text], n_text)
    add_gated(h[:, n_text:], branch[:, n_text:], gate[:, :1])
    if n_text:
        add_gated(h[:, :n_text], branch[:, :n_text], gate[:, 1:])
    return h


def _multiply_add(x: Tensor, factor: Tensor, video: Tensor, text: Tensor, n_text: int) -> Tensor:
    out = torch.addcmul(video, x, factor[:, :1])
    if n_text:
        out[:, :n_text] = torch.addcmul(text, x[:, :n_text], factor[:, 1:])
    return out


class Block(nn.Module):
    """Attention over all tokens, then a feed-forward, each between a modulated norm and a gate."""

    regions = ("before_attention", "project", "output", "after_attention")

    def __init__(self, config: TransformerConfig, sp: SequenceParallel) -> None:
        super().__init__()
        width = config.width
        self.heads, self.sp = config.heads, sp
        self.norm1 = nn.LayerNorm(width, config.norm_eps)
        self.mod1 = nn.Linear(config.time_dim, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(config.head_dim, 1e-6)
        self.k_norm = nn.LayerNorm(config.head_dim, 1e-6)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        self.mod2 = nn.Linear(config.time_dim, 6 * width)
        self.ff_in = nn.Linear(width, 4 * width)
        self.ff_out = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, c: Tensor, cond: Condition) -> Tensor:
        """h: (B, n, W) this rank's text and video tokens; c: (B or 1, time_dim), the activated time embedding."""
        normed, gate = self.before_attention(h, c, cond)
        project = partial(self.project, normed, cond.rope)
        del normed
        branch = self.sp.attend(project, self.output, self.heads, cond.lengths)
        del project  # the feed-forward needs its memory
        return self.after_attention(h, branch, gate, c, cond)

    def before_attention(self, h: Tensor, c: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """h as attention reads it (B, n, W), and the gate of what comes of it (B, 2, W)."""
        shift, scale, gate = self._modulation(self.mod1, c)
        return modulated_norm(self.norm1, h, shift, scale, cond.n_text), gate

    def project(self, h: Tensor, rope: Tensor | None, heads: slice, parts: str) -> tuple[Tensor, ...]:
        """`parts` of q, k and v of some heads, (B, n, h, D) each."""
        norms = {"q": self.q_norm, "k": self.k_norm}
        projections = []
        for part, x in zip(parts, heads_of(self.qkv, h, self.heads, heads, parts)):
            if part in norms:
                x = norms[part](x)
                x = x if rope is None else rotate_pairs(x, rope)
            projections.append(x)
        return tuple(projections)

    def output(self, out: Tensor, heads: slice, so_far: Tensor | None) -> Tensor:
        """The output projection of some heads (B, n, h, D), added to that of others: (B, n, W)."""
        return add_heads(self.out, out, self.heads, heads, so_far)

    def after_attention(self, h: Tensor, branch: Tensor, gate: Tensor, c: Tensor, cond: Condition) -> Tensor:
        """h after both residual branches; branch (B, n, W) is attention's."""
        h = add_gated_streams(h, branch, gate, cond.n_text)
        shift, scale, gate = self._modulation(self.mod2, c)
        hidden = linear_gelu(self.ff_in, modulated_norm(self.norm2, h, shift, scale, cond.n_text))
        return add_gated_streams(h, self.ff_out(hidden), gate, cond.n_text)

    @staticmethod
    def _modulation(linear: nn.Module, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate, each (B, 2, W): for video and for text."""
        shift, scale, gate = linear(c).unflatten(-1, (2, 3, -1)).unbind(-2)
        return shift, scale, gate


class PatchEmbed(nn.Module):
    """The patch convolution (1.0) or linear layer (1.5) as a matrix on packed tokens, weights in the stored shape.

    Noise and image latents stand side by side on the channels, so each has its own columns of the matrix.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        inputs = config.in_channels * config.patch_volume
        kernel = (config.patch_size, config.patch_size) if config.patch_time is None else ()
        shape = (config.width, config.in_channels, *kernel) if kernel else (config.width, inputs)
        self.noise = config.out_channels * config.patch_volume
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.weight, std=inputs**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, rest: Tensor) -> Tensor:
        """Tokens of the noise (B, n, C * patch volume) and what is added to each -> (B, n, W)."""
        return F.linear(x, self.weight.flatten(1)[:, : self.noise]) + rest

    def image(self, x: Tensor) -> Tensor:
        """Tokens of the image latents -> their part of the embedding, bias included."""
        return F.linear(x, self.weight.flatten(1)[:, self.noise :], self.bias)


class CogVideoXTransformer(nn.Module):
    """Predicts v from noisy latents, a step and text features.

    Raises ValueError when `sp` has more Ulysses ranks than the model has heads.
    """

    matmuls = ("qkv", "out", "ff_in", "ff_out")

    def __init__(self, config: TransformerConfig, sp: SequenceParallel | None = None) -> None:
        super().__init__()
        self.config, self.sp = config, sp or SequenceParallel()
        self.sp.require_heads(config.heads)
        width, time = config.width, config.time_dim
        self.patch = PatchEmbed(config)
        self.text_in = nn.Linear(config.text_dim, width)
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.ofs: nn.Module | None = None
        if config.ofs_dim:
            self.ofs = nn.Sequential(nn.Linear(config.ofs_dim, time), nn.SiLU(), nn.Linear(time, time))
        if config.learned:
            video = config.latent_frames * config.sample_height * config.sample_width // config.patch_size**2
            self.positions = nn.Parameter(torch.zeros(1, config.text_length + video, width))
        self.blocks = Blocks(Block(config, self.sp) for _ in range(config.layers))
        self.norm_final = nn.LayerNorm(width, config.norm_eps)
        self.norm_out = nn.LayerNorm(width, config.norm_eps)
        self.mod_out = nn.Linear(time, 2 * width)
        self.head = nn.Linear(width, config.out_channels * config.patch_volume)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch.weight.device

    def prepare(self, text: Tensor, size: Size, image: Tensor | None = None, ofs: float = OFS) -> Condition:
        """Everything that does not depend on the step; once per guidance branch.

        text: (B, L, text_dim) T5 features, the same on every rank; padding is attended to, as in training
        size: latent frames, rows, columns
        image: (B or 1, C, *size) latents beside the noise, for checkpoints with `image_channels`
        Raises ValueError when the checkpoint cannot take the size, the text length or the (missing) image.
        """
        config, sp = self.config, self.sp
        check_size(size, config.patch)
        self._check(text.shape[1], size, image)
        grid = (size[0] // config.patch[0], size[1] // config.patch[1], size[2] // config.patch[2])
        y = self.text_in(sp.shard(text.to(self.device, self.dtype)))
        video = self.patch.bias[None, None]
        if image is not None:
            video = self.patch.image(sp.shard(pack(image.to(self.device, self.dtype), config.patch)))
        text_positions, video_positions = self._added_positions(text.shape[1], grid)
        if text_positions is not None:
            y = y + text_positions
        if video_positions is not None:
            video = video + video_positions
        tokens = grid[0] * grid[1] * grid[2]
        lengths = tuple(a + b for a, b in zip(sp.lengths(text.shape[1]), sp.lengths(tokens)))
        rope = self._rope(y.shape[1], grid) if config.rotary else None
        return Condition(size, y, video, rope, self._ofs(ofs), lengths, frequencies(config.width, self.device))

    def _check(self, text_length: int, size: Size, image: Tensor | None) -> None:
        config = self.config
        config.check_task(image is not None, video=False)
        config.check_area(*size[1:])
        if config.learned and text_length > config.text_length:
            raise ValueError(f"this checkpoint has positions for {config.text_length} text tokens, not {text_length}")

    def _added_positions(self, text_length: int, grid: Size) -> tuple[Tensor | None, Tensor | None]:
        """What is added to this rank's text and video tokens: (1, ny, W) and (1, nx, W)."""
        config, sp = self.config, self.sp
        if config.learned and grid[0] == config.latent_frames:
            embeddings = self.positions
            return sp.shard(embeddings[:, :text_length]), sp.shard(embeddings[:, config.text_length :])
        if config.rotary and not config.learned:
            return None, None
        # Also what the reference gives a checkpoint with learned positions for another number of frames.
        table = positions.sine_cosine(config, grid, sp, self.device)
        return None, table.to(self.dtype)[None]

    def _rope(self, n_text: int, grid: Size) -> Tensor:
        cos, sin = positions.rope(self.config, grid, self.sp, self.device)
        cos, sin = F.pad(cos, (0, 0, n_text, 0), value=1.0), F.pad(sin, (0, 0, n_text, 0))
        return rotation(cos[:, None], sin[:, None], self.dtype)

    def _ofs(self, value: float) -> Tensor | None:
        if self.ofs is None:
            return None
        assert self.config.ofs_dim is not None
        values = torch.full((1,), value, device=self.device)
        return self.ofs(sinusoid(values, frequencies(self.config.ofs_dim, self.device)).to(self.dtype))

    def forward(self, x: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """One prediction for this rank's tokens.

        x: (B, nx, C * patch volume) packed noisy latents; t: the training timestep (0 to 999), a number or (B,).
        Returns the shape of x, in the weights' dtype.
        """
        c = self.time_embedding(t, cond)
        h = self.embed(x, cond)
        for i, block in enumerate(streamed(self.blocks)):
            h = self.after_block(i, block(h, c, cond), cond)
        return self.predict(h, c, cond)

    def after_block(self, index: int, h: Tensor, cond: Condition) -> Tensor:
        """Called with the output of every block; models that add something between blocks override it."""
        return h

    def time_embedding(self, t: Tensor | float, cond: Condition) -> Tensor:
        """The activated embedding that every block's modulation reads: (B or 1, time_dim)."""
        # A number is filled in on the device: a copy from the host would wait for everything before it.
        timesteps = t.to(self.device).reshape(-1) if isinstance(t, Tensor) else torch.full((1,), t, device=self.device)
        c = self.time(sinusoid(timesteps, cond.frequencies).to(self.dtype))
        return F.silu(c if cond.ofs is None else c + cond.ofs)

    def embed(self, x: Tensor, cond: Condition) -> Tensor:
        """Packed latents -> h (B, ny + nx, W)."""
        video = self.patch(x.to(self.dtype), cond.video)
        return torch.cat((cond.y.expand(video.shape[0], -1, -1), video), dim=1)

    def predict(self, h: Tensor, c: Tensor, cond: Condition) -> Tensor:
        """h after the last block -> this rank's predicted tokens (B, nx, C * patch volume)."""
        x = self.norm_final(h[:, cond.n_text :])
        shift, scale = self.mod_out(c)[:, None].chunk(2, dim=-1)
        return self.head(torch.addcmul(shift, self.norm_out(x), 1 + scale))


def frequencies(width: int, device: torch.device) -> Tensor:
    """10000^(-k / (width / 2)) for k below width / 2, fp32."""
    k = torch.arange(width // 2, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10000) * k / (width // 2))


def sinusoid(value: Tensor, frequencies: Tensor) -> Tensor:
    """(B,) numbers -> (B, 2 * frequencies) fp32: cosines, then sines."""
    angle = value[:, None].float() * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
