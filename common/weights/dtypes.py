"""Names of dtypes, and which one latents have."""

from __future__ import annotations

import torch

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
