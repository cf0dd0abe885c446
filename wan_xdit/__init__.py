"""Wan 2.1 and 2.2 on any number of ranks. Importing this touches no device; `WanPipeline` loads when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan_xdit.pipeline import WanPipeline

__all__ = ["WanPipeline"]


def __getattr__(name: str) -> Any:
    if name == "WanPipeline":
        from wan_xdit.pipeline import WanPipeline

        return WanPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
