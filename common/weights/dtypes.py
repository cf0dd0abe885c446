"""Names of dtypes, and which one each model and the latents have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.registry.settings import Runtime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`bf16`, `fp16`, `fp32` or `fp64`, or the torch dtype itself. ValueError for anything else."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def latent_dtype(dtype: torch.dtype) -> torch.dtype:
    """Latents are summed over the steps in fp32, in fp64 when the model runs in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Precision:
    """What the weights of a generation are held in."""

    dtype: torch.dtype = torch.bfloat16
    """The dtype of transformer and decoder."""
    float8: bool = False
    """The matmul weights of the transformer's blocks are in eight bits."""
    text: torch.dtype = torch.bfloat16
    text_float8: bool = False
    """`text`, `text_float8`: the same of the text encoder."""

    @classmethod
    def of(cls, runtime: Runtime, own: str = "bf16") -> Precision:
        """What a runtime asks for. own: of the checkpoint, where the runtime says nothing. ValueError for a wrong name.

        The text encoder follows the transformer. Where weights lie in eight bits the rest is in bf16; the encoder's
        rest is in the transformer's dtype.
        """
        name = own if runtime.dtype is None else runtime.dtype
        dtype = parse_dtype("bf16" if name == "fp8" else name)
        text = dtype if runtime.text_dtype in (None, "fp8") else parse_dtype(runtime.text_dtype)
        return cls(dtype, name == "fp8", text, runtime.text_dtype == "fp8")
