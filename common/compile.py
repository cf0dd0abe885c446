"""`--compile`: every transformer block through torch.compile, with its collectives inside the graph.

Blocks are compiled one by one (regional compilation): they share their code, so one graph serves all blocks of a
model, and the time it takes does not grow with their number. Nothing around them is compiled, which leaves the loop
over blocks free to bring their weights (`common.blocks`).

What makes a new graph: another dtype or layout, the last block where it has other parts, and a rank whose share of the
text is empty. With `dynamic` (the default) the number of tokens does not; without it every other video size, prompt
length (Mochi drops padding) and guidance branch of another length compiles again, up to torch's limit of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch.fx.experimental._config
from torch import nn

from common.blocks import Blocks
from common.checks import COMPILE_MODES
from common.decode import VideoDecoder


@dataclass(frozen=True)
class Compile:
    """blocks, vae: what is compiled. mode: of `torch.compile`. dynamic: one graph for all sizes. fullgraph: a graph
    break is an error. backend: torch.compile's, for tests.

    ValueError for an unknown mode.
    """

    blocks: bool = False
    vae: bool = False
    mode: str = "default"
    dynamic: bool = True
    fullgraph: bool = True
    backend: str | Callable[..., Any] = "inductor"

    def __post_init__(self) -> None:
        if self.mode not in COMPILE_MODES:
            raise ValueError(f"compile mode is {self.mode!r}; choose one of {', '.join(COMPILE_MODES)}")

    def apply(self, modules: Iterable[nn.Module]) -> None:
        """Compile these modules at their first call."""
        if self.dynamic:
            # Shares of the ranks that happen to be equally long would otherwise be taken for one number, and the
            # graph be made anew for every pattern of longer and shorter ones. Read when a graph is made, so it has to
            # stay set; in a process that compiles other things too it costs them a little generality-checking only.
            torch.fx.experimental._config.use_duck_shape = False
        for module in modules:
            options = {"mode": self.mode} if self.backend == "inductor" else {}
            module.compile(backend=self.backend, dynamic=self.dynamic, fullgraph=self.fullgraph, **options)

    def transformer(self, model: nn.Module) -> None:
        """Compile a transformer's blocks, if that was asked for."""
        if self.blocks:
            for part in model.modules():
                if isinstance(part, Blocks):
                    # Not by iterating, which would fetch the weights of streamed blocks.
                    self.apply(part.children())

    def decoder(self, decoder: VideoDecoder) -> None:
        """Compile the parts of a decoder that keep nothing between chunks, if that was asked for.

        Not whole residual blocks: their causal convolutions fetch frames from the chunk before, or from another rank,
        which a graph would have to be made anew for. One graph for each width and number of frames; beyond torch's
        limit the rest runs as it is.
        """
        if self.vae:
            parts = [part for part in decoder.modules() if isinstance(part, decoder.compiled_parts)]
            replace(self, fullgraph=False).apply(parts)
