"""A training loop that resumes where it stopped, logs what it does and repeats itself given the seed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.parallel.usp import SequenceParallel

MAX_LOST = 3
"""Steps in a row that may be left out because a gradient is no number: bf16 now and then divides by nothing."""
Losses = dict[str, Tensor]
"""`loss` is minimised, the others are logged."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast: the learning rate rises over `warmup` steps and falls as a cosine to zero."""

    steps: int
    rate: float
    warmup: int = 50
    decay: float = 0.0
    """Weight decay."""
    average: float = 0.0
    """Decay of the running average of the weights that is kept beside them; 0 keeps none."""
    muon: bool = False
    """Muon for the matrices of `blocks`, AdamW for the rest, instead of AdamW for all."""
    save_seconds: float = 120.0
    seed: int = 0

    def at(self, step: int) -> float:
        ramp = min((step + 1) / self.warmup, 1.0)
        return self.rate * ramp * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class WrittenOut(SequenceParallel):
    """One rank's attention by its formula: on a CPU, at these sizes, several times faster backwards than a kernel."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def in_bf16(module: nn.Module, *args: Tensor) -> Any:
    """Call `module` with bf16 copies of its fp32 weights, through which gradients reach the originals."""
    weights = {}
    for name, p in module.named_parameters():
        q = p.to(torch.bfloat16)
        weights[name] = q.to(memory_format=torch.channels_last_3d) if q.ndim == 5 else q
    return functional_call(module, weights, args)


def write_atomically(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".part")
    torch.save(value, temporary)
    os.replace(temporary, path)


def _optimizers(module: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if plan.muon and p.ndim == 2 and "blocks." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.98), weight_decay=plan.decay)
    ]
    if matrices:
        kind = {"lr": plan.rate, "weight_decay": plan.decay, "adjust_lr_fn": "match_rms_adamw"}
        found.append(torch.optim.Muon(matrices, **kind))
    return found


def train(
    module: nn.Module, step: Callable[[torch.Generator, int], Losses], plan: Plan, state_file: Path
) -> dict[str, Tensor]:
    """Train `module` in place and return the weights to use (the average, if the plan keeps one).

    step(generator, i) computes the losses of step i; the generator depends on seed and i alone, so an interrupted
    run that resumes from `state_file` sees the batches it would have seen. Losses go to `state_file` with .jsonl.
    """
    optimizers = _optimizers(module, plan)
    state_file.parent.mkdir(parents=True, exist_ok=True)
    average, start = _resumed(module, optimizers, state_file, plan)
    saved = logged = time.monotonic()
    logged_step, lost = start, 0
    for i in range(start, plan.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.at(i)
        losses = step(torch.Generator().manual_seed(plan.seed * 1_000_003 + i), i)
        module.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        lost = 0 if torch.isfinite(norm) else lost + 1
        if lost > MAX_LOST:
            raise RuntimeError(f"step {i}: the gradient is {norm}; lower the rate and resume from {state_file}")
        for optimizer in optimizers if not lost else ():
            optimizer.step()
        # Early weights are forgotten fast: the average of the first n steps has a horizon of n / 10.
        keep = min(plan.average, (1 + i) / (10 + i))
        for name, p in module.named_parameters() if average else ():
            average[name].lerp_(p.detach(), 1 - keep)
        now = time.monotonic()
        if now - logged > 10 or i + 1 == plan.steps:
            pace = (now - logged) / (i + 1 - logged_step)
            _log(state_file, losses, step=i + 1, rate=plan.at(i), norm=float(norm), seconds_per_step=pace)
            logged, logged_step = now, i + 1
        if now - saved > plan.save_seconds or i + 1 == plan.steps:
            kept = {"module": module.state_dict(), "average": average, "step": i + 1}
            write_atomically(state_file, kept | {"optimizers": [o.state_dict() for o in optimizers]})
            saved = now
    return average or {n: p.detach() for n, p in module.named_parameters()}


def _resumed(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state_file: Path, plan: Plan
) -> tuple[dict[str, Tensor], int]:
    """The average of the weights and how many steps are done, with module and optimizers as they were then."""
    if not state_file.exists():
        return {n: p.detach().clone() for n, p in module.named_parameters()} if plan.average else {}, 0
    state = torch.load(state_file, weights_only=True)
    module.load_state_dict(state["module"])
    if state["optimizers"]:  # a state made from shipped weights has none
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    print(f"{state_file.name}: resumed at step {state['step']}", flush=True)
    return state["average"], state["step"]


def _log(state_file: Path, losses: Losses, **numbers: float) -> None:
    entry = numbers | {name: float(value.detach()) for name, value in losses.items()}
    with state_file.with_suffix(".jsonl").open("a") as log:
        log.write(json.dumps({k: float(f"{v:.5g}") for k, v in entry.items()}) + "\n")
