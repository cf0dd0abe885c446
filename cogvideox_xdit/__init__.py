"""CogVideoX on any number of ranks. Importing this touches no device; the pipeline is imported when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvideox_xdit.pipeline import CogVideoXPipeline

__all__ = ["CogVideoXPipeline"]


def __getattr__(name: str) -> Any:
    if name == "CogVideoXPipeline":
        from cogvideox_xdit.pipeline import CogVideoXPipeline

        return CogVideoXPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
