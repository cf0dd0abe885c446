"""ConsisID's face modules: the local facial extractor and the cross attention to its tokens.

Names are the checkpoint's (`local_facial_extractor.*`, `perceiver_cross_attention.*`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.parallel.attention import attention


class FaceAttention(nn.Module):
    """Cross attention of `dim` wide queries to `context_dim` wide tokens, both layer-normed first.

    Keys and values can be had apart (`keys`), because for the video they never change during a
    generation. The scale head_dim^-1/2 is the reference's head_dim^-1/4 on either side.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(context_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _keys(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.to_kv(normed).chunk(2, dim=-1)
        return self._split(k), self._split(v)

    def _attend(self, normed: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(self._split(self.to_q(normed)), k, v).flatten(-2)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, m, heads, head_dim) of context tokens (B, m, context_dim), in memory head by head."""
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in self._keys(self.norm1(context)))
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What queries (B, n, dim) read from `k`, `v`: (B, n, heads * head_dim), of which `to_out` is added to them."""
        return self._attend(self.norm2(x), k, v)


class ResamplerAttention(FaceAttention):
    """The extractor's attention: queries see the context and themselves."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__(dim, dim, heads, head_dim)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        normed = self.norm2(x)
        k, v = self._keys(torch.cat([self.norm1(context), normed], dim=1))
        return self.to_out(self._attend(normed, k, v))


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


def _mapping(inputs: int, dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, dim),
        nn.LayerNorm(dim),
        nn.LeakyReLU(0.01),
        nn.Linear(dim, dim),
        nn.LayerNorm(dim),
        nn.LeakyReLU(0.01),
        nn.Linear(dim, outputs),
    )


class LocalFacialExtractor(nn.Module):
    """Identity vector and hidden states of the image tower -> the face tokens the video reads.

    The result depends on nothing else, so it is computed once per generation.
    """

    def __init__(
        self,
        id_dim: int = 1280,
        vit_dim: int = 1024,
        depth: int = 10,
        head_dim: int = 64,
        heads: int = 16,
        id_tokens: int = 5,
        queries: int = 32,
        output_dim: int = 2048,
        ff_mult: int = 4,
        scales: int = 5,
    ):
        super().__init__()
        if depth % scales:
            raise ValueError(f"LFE_depth {depth} must be a multiple of LFE_num_scale {scales}")
        self.id_tokens, self.queries, self.scales = id_tokens, queries, scales
        self.latents = nn.Parameter(torch.randn(1, queries, vit_dim) * vit_dim**-0.5)
        self.proj_out = nn.Parameter(torch.randn(vit_dim, output_dim) * vit_dim**-0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(vit_dim, heads, head_dim), _feed_forward(vit_dim, ff_mult)])
            for _ in range(depth)
        )
        for i in range(scales):
            self.add_module(f"mapping_{i}", _mapping(vit_dim, vit_dim, vit_dim))
        self.id_embedding_mapping = _mapping(id_dim, vit_dim, vit_dim * id_tokens)

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """`id_cond` (B, id_dim), `hidden` one (B, m, vit_dim) per scale -> (B, queries, output_dim)."""
        identity = self.id_embedding_mapping(id_cond).unflatten(-1, (self.id_tokens, -1))
        x = torch.cat([self.latents.expand(id_cond.shape[0], -1, -1), identity], dim=1)
        per_scale = len(self.layers) // self.scales
        for i in range(self.scales):
            context = torch.cat([identity, self.get_submodule(f"mapping_{i}")(hidden[i])], dim=1)
            for j in range(i * per_scale, (i + 1) * per_scale):
                x = x + self.get_submodule(f"layers.{j}.0")(context, x)
                x = x + self.get_submodule(f"layers.{j}.1")(x)
        return x[:, : self.queries] @ self.proj_out
