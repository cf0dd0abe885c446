"""ConsisID on any number of ranks. Importing this touches no device; the pipeline is imported when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consisid_xdit.pipeline import ConsisIDPipeline

__all__ = ["ConsisIDPipeline"]


def __getattr__(name: str) -> Any:
    if name == "ConsisIDPipeline":
        from consisid_xdit.pipeline import ConsisIDPipeline

        return ConsisIDPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
