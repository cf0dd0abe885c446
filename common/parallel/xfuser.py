"""xfuser's attention and process groups behind the verbs of SequenceParallel: `--engine xfuser`, the extra `xfuser`.

For comparing the two engines under the same models on one machine. xfuser (xDiT's package) exchanges tensors of one
size per rank, so its ranks must hold equally many tokens and heads; what does not divide is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.parallel.mesh import Mesh
from common.parallel.usp import Output, Project, SequenceParallel, T
from common.registry.checks import ENGINES, xfuser_problems
from common.system.extras import install

# Names in yunchang's AttnType. Its cuDNN kernel returns zeros as log-sum-exp, so a ring over it would be wrong.
_KERNELS = {"auto": "TORCH_FLASH", "sdpa": "TORCH_FLASH", "flash2": "FA", "flash3": "FA3"}


def sequence_parallel(
    mesh: Mesh, kernel: str = "auto", engine: str = "native", groups: int = 1, dtype: torch.dtype | None = None
) -> SequenceParallel:
    """The engine called `engine`, one of `common.registry.checks.ENGINES`. ValueError when it cannot run here.

    groups, dtype: see `SequenceParallel`; xfuser has no groups.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    if engine == "xfuser":
        return XFuserSequenceParallel(mesh, kernel, dtype)
    return SequenceParallel(mesh, kernel, groups, dtype)


class XFuserSequenceParallel(SequenceParallel):
    """The same verbs; `attention` is xfuser's over xfuser's groups. On a sequence axis of one rank nothing differs.

    Collective over the world: process groups are created. ValueError for a CPU, a kernel that xfuser cannot use, a
    missing package, and groups that this process already made for another layout.
    """

    def __init__(self, mesh: Mesh, kernel: str = "auto", dtype: torch.dtype | None = None) -> None:
        if problems := xfuser_problems(mesh.device.type, kernel):
            raise ValueError("; ".join(problems))
        super().__init__(mesh, kernel, dtype=dtype)
        self._layer = _make_layer(mesh, kernel) if mesh.sequence.size > 1 else None

    def require_heads(self, heads: int, head_dim: int | None = None) -> None:
        """Raise ValueError unless every Ulysses rank gets equally many heads."""
        super().require_heads(heads, head_dim)
        if problems := xfuser_problems("cuda", heads=heads, ulysses=self.ulysses.size):
            raise ValueError("; ".join(problems))

    def lengths(self, n: int) -> tuple[int, ...]:
        """As of SequenceParallel; ValueError when `n` does not divide by the number of ranks."""
        if n % self.size:
            raise ValueError(
                f"xfuser needs equally many tokens on every rank, but a stream of {n} does not divide by "
                f"{self.size} ranks; use --engine native, or a size, length or prompt that divides"
            )
        return super().lengths(n)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """As of SequenceParallel. All lengths are equal; half precision on a GPU, as xfuser's kernels need."""
        if self._layer is None:
            return super().attention(q, k, v, lengths)
        assert lengths is not None and set(lengths) == {q.shape[1]}, "lengths() was not asked"
        return self._layer(None, q, k, v)

    def attend(self, project: Project, output: Output[T], heads: int, lengths: Sequence[int] | None = None) -> T:
        """As of SequenceParallel, all heads at once: xfuser's exchanges begin and end inside its attention."""
        whole = slice(0, heads)
        q, k, v = project(whole, "qkv")
        return output(self.attention(q, k, v, lengths), whole, None)


def _make_layer(mesh: Mesh, kernel: str) -> Any:
    try:
        import xfuser.core.long_ctx_attention.ring  # noqa: F401 (what the class's constructor will import)
        from xfuser.core import distributed as xdist
        from xfuser.core.long_ctx_attention import xFuserLongContextAttention
        from yunchang.kernels import AttnType
    except ImportError as error:
        # xfuser 0.5 to 0.7 ask yunchang for a name that no release of it (up to 0.6.4) has.
        raise ValueError(
            f"the installed xfuser cannot be imported ({error}); 0.4.5 with yunchang 0.6 works: "
            f"{install('xfuser')}; or use --engine native"
        ) from None

    layout, backend = mesh.layout, "nccl" if mesh.device.type == "cuda" else "gloo"
    local_rank = mesh.device.index or 0
    xdist.init_distributed_environment(mesh.world.size, mesh.world.rank, local_rank=local_rank, backend=backend)
    if not xdist.model_parallel_is_initialized():
        xdist.initialize_model_parallel(
            classifier_free_guidance_degree=layout.cfg,
            sequence_parallel_degree=layout.sequence,
            ulysses_degree=layout.ulysses,
            ring_degree=layout.ring,
            backend=backend,
        )
    group = xdist.get_sp_group()
    theirs = (group.world_size, group.rank_in_group, group.ring_world_size, group.ulysses_world_size)
    ours = (mesh.sequence.size, mesh.sequence.rank, mesh.ring.size, mesh.ulysses.size)
    if theirs != ours:
        raise ValueError(
            f"xfuser's groups in this process are for ring {theirs[2]} x ulysses {theirs[3]}, asked is "
            f"ring {ours[2]} x ulysses {ours[3]}; xfuser keeps one layout per process, so start another"
        )
    # Both orders have ulysses innermost: shards lie where the native engine has them.
    assert (group.ring_rank, group.ulysses_rank) == (mesh.ring.rank, mesh.ulysses.rank), "another order of ranks"
    return xFuserLongContextAttention(attn_type=AttnType[_KERNELS[kernel]])
