"""The ConsisID transformer: CogVideoX's with a face that the video tokens read after every second block.

Everything but the face is inherited. The face tokens are few (32) and every rank has them all, so a rank's video
tokens read them with plain attention: no communication, whatever the layout. Extractor and keys depend on the
identity alone and are computed once per generation, for both guidance branches and all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogvideox_xdit.transformer import OFS, CogVideoXTransformer, Condition, Size
from common.model.elementwise import in_place
from common.model.linear import add_product
from common.parallel.usp import SequenceParallel
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.facial import FaceAttention, LocalFacialExtractor

Face = tuple[tuple[Tensor, Tensor], ...]  # keys and values (1, queries, heads, head dim) of every cross attention


@dataclass(frozen=True)
class FaceCondition(Condition):
    """`face` is what the video tokens read; None leaves the face out."""

    face: Face | None = None


def face_modules(config: ConsisIDConfig) -> dict[str, nn.Module]:
    """What ConsisID adds to CogVideoX, under the checkpoint's names; nothing for a checkpoint without a face."""
    if not config.face:
        return {}
    extractor = LocalFacialExtractor(
        id_dim=config.id_dim,
        vit_dim=config.vit_dim,
        depth=config.depth,
        head_dim=config.extractor_head_dim,
        heads=config.extractor_heads,
        id_tokens=config.id_tokens,
        queries=config.queries,
        output_dim=config.face_dim,
        ff_mult=config.ff_mult,
        scales=config.scales,
    )
    sizes = (config.width, config.face_dim, config.cross_heads, config.cross_head_dim)
    crossings = nn.ModuleList(FaceAttention(*sizes) for _ in range(config.crossings))
    return {"local_facial_extractor": extractor, "perceiver_cross_attention": crossings}


class ConsisIDTransformer(CogVideoXTransformer):
    """Predicts v from noisy latents, a step, text features and a face.

    Raises ValueError when `sp` has more Ulysses ranks than the model has heads.
    """

    config: ConsisIDConfig
    local_facial_extractor: LocalFacialExtractor
    perceiver_cross_attention: nn.ModuleList

    def __init__(self, config: ConsisIDConfig, sp: SequenceParallel | None = None) -> None:
        super().__init__(config, sp)
        for name, module in face_modules(config).items():
            self.add_module(name, module)

    def read_face(self, id_cond: Tensor, id_vit_hidden: Sequence[Tensor]) -> Face:
        """Keys and values of every cross attention; once per generation.

        id_cond: (1, id_dim); id_vit_hidden: `scales` tensors (1, m, vit_dim). Raises ValueError for other shapes and
        for a checkpoint without face modules.
        """
        config = self.config
        if not config.face:
            raise ValueError("this checkpoint has no face modules (is_train_face is false); pass no identity")
        shapes = [tuple(h.shape[2:]) for h in id_vit_hidden]
        if id_cond.shape[1:] != (config.id_dim,) or shapes != [(config.vit_dim,)] * config.scales:
            raise ValueError(
                f"identity features do not fit this checkpoint: it takes (1, {config.id_dim}) and {config.scales} "
                f"hidden states {config.vit_dim} wide, not {tuple(id_cond.shape)} and "
                f"{[tuple(h.shape) for h in id_vit_hidden]}"
            )
        hidden = [h.to(self.device, self.dtype) for h in id_vit_hidden]
        tokens = self.local_facial_extractor(id_cond.to(self.device, self.dtype), hidden)
        return tuple(cross.keys(tokens) for cross in self.perceiver_cross_attention)  # type: ignore[operator,misc]

    def prepare(  # type: ignore[override]
        self, text: Tensor, size: Size, image: Tensor | None = None, ofs: float = OFS, face: Face | None = None
    ) -> FaceCondition:
        """As CogVideoX's, with what `read_face` gave; once per guidance branch."""
        return FaceCondition(**vars(super().prepare(text, size, image, ofs)), face=face)

    def after_block(self, index: int, h: Tensor, cond: FaceCondition) -> Tensor:  # type: ignore[override]
        """Video tokens of h (B, n, W) read the face after blocks 0, interval, 2 interval, ...; text tokens do not."""
        if cond.face is None or index % self.config.interval:
            return h
        crossing = index // self.config.interval
        k, v = (t.expand(h.shape[0], -1, -1, -1) for t in cond.face[crossing])
        cross, video = self.perceiver_cross_attention[crossing], h[:, cond.n_text :]
        video = add_product(video, cross.to_out, cross(video, k, v), self.config.face_scale)  # type: ignore[arg-type]
        return h if in_place() else torch.cat((h[:, : cond.n_text], video), dim=1)
