"""`--compile`: every transformer block through torch.compile, its attention and the exchanges of it left as they are.

Blocks are compiled one by one (regional compilation): they share their code, so one graph serves all blocks of a
model, and the time it takes does not grow with their number. Nothing around them is compiled, which leaves the loop
over blocks free to bring their weights (`common.weights.blocks`).

A block names methods of its own as its `regions`: what it does before attention, what makes heads and what projects
them, and what it does after. Each is compiled whole. Attention between them runs as it always does: a compiler that had
the exchanges in its graph would wait for each where it is posted, and nothing would travel behind the work that is
there to hide it.

What makes a new graph: another dtype or layout, the last block where it has other parts, a rank whose share of the
text is empty, and the first group of heads of several. With `dynamic` (the default) the number of tokens does not;
without it every other video size, prompt length (Mochi drops padding) and guidance branch of another length compiles
again, up to `_GRAPHS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.fx.experimental._config
from torch import nn

from common.registry.settings import CompileOptions
from common.video.decode import VideoDecoder
from common.weights.blocks import Blocks

_GRAPHS = 16
"""Of one region. Sizes of no and of one token, as a rank's share of the text may be, are graphs of their own, for
Mochi's last block again, and for the first group of heads again: 12 of torch's usual 8."""


def compile_transformer(model: nn.Module, options: CompileOptions) -> None:
    """Compile the regions of a transformer's blocks, if that was asked for."""
    if options.compile:
        for part in model.modules():
            for block in part if isinstance(part, Blocks) else ():
                for name in block.regions:  # type: ignore[union-attr]
                    # As `nn.Module.compile` puts the compiled call beside the module's own.
                    setattr(block, name, torch.compile(getattr(block, name), **_arguments(options)))


def compile_decoder(decoder: VideoDecoder, options: CompileOptions) -> None:
    """Compile the parts of a decoder that keep nothing between chunks, if that was asked for.

    Not whole residual blocks: their causal convolutions fetch frames from the chunk before, or from another rank,
    which a graph would have to be made anew for. One graph for each width and number of frames; beyond torch's
    limit the rest runs as it is.
    """
    if options.compile_vae:
        arguments = _arguments(replace(options, compile_fullgraph=False))
        for part in decoder.modules():
            if isinstance(part, decoder.compiled_parts):
                part.compile(**arguments)


def _arguments(options: CompileOptions) -> dict[str, Any]:
    """What `torch.compile` is given."""
    if options.compile_dynamic:
        # Shares of the ranks that happen to be equally long would otherwise be taken for one number, and the
        # graph be made anew for every pattern of longer and shorter ones. Read when a graph is made, so it has to
        # stay set; in a process that compiles other things too it costs them a little generality-checking only.
        torch.fx.experimental._config.use_duck_shape = False
    mode: dict[str, Any] = {"mode": options.compile_mode} if options.backend == "inductor" else {}
    how = {"dynamic": options.compile_dynamic, "fullgraph": options.compile_fullgraph}
    return {"backend": options.backend, "recompile_limit": _GRAPHS, **mode, **how}
