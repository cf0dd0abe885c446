"""Mochi 1 on any number of ranks. Importing this touches no device; `MochiPipeline` loads when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mochi_xdit.pipeline import MochiPipeline

__all__ = ["MochiPipeline"]


def __getattr__(name: str) -> Any:
    if name == "MochiPipeline":
        from mochi_xdit.pipeline import MochiPipeline

        return MochiPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
