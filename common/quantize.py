"""`<program> quantize --model-dir A --output B`: a copy of a checkpoint folder with the blocks' matmuls in float8.

B has A's layout and names; a weight in float8 has its scales beside it under `weight_scale`. All that is not the
transformer's weights is linked where the file system can (so it takes no room), else copied. Every program loads B as
it loads A.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.checks import folder_problem
from common.request import Program

if TYPE_CHECKING:
    from torch import nn

    from common.checkpoint import Checkpoint
    from common.weights import Progress, Rename

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TransformerFiles:
    """A fork's transformer in a checkpoint folder. module: on the meta device. file: what `open_checkpoint` got."""

    module: nn.Module
    checkpoint: Checkpoint
    rename: Rename | None
    file: Path
    exact: tuple[str, ...] = ()


def run(program: Program, arguments: Sequence[str]) -> int:
    """The subcommand; returns its exit status: 0 done, 1 failed, 2 wrong use."""
    command = _command(program)
    try:
        command.main(args=list(arguments), prog_name=f"{program.name} quantize", standalone_mode=False)
    except click.UsageError as wrong:
        print(f"error: {wrong.format_message()}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    return 0


def _command(program: Program) -> click.Command:
    path = click.Path(path_type=Path)

    def body(model_dir: Path, output: Path) -> None:
        from rich.console import Console

        from common.progress import Stages

        _check_folders(model_dir, output)
        stages = Stages(Console(stderr=True))
        with stages.loading("rounding") as progress:
            before, after = quantize(program.transformer(model_dir), model_dir, output, progress)
        click.echo(f"{output}: transformer {before / 1e9:.2f} GB -> {after / 1e9:.2f} GB; use --model-dir {output}")

    names: dict[str, Any] = {"type": path, "required": True}
    return click.Command(
        "quantize",
        params=[
            click.Option(["--model-dir"], help="Checkpoint directory to read.", **names),
            click.Option(["--output"], help="Directory to make; it must not exist or be empty.", **names),
        ],
        callback=body,
        help="Write a copy of a checkpoint whose matmul weights are held in eight bits.",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )


def _check_folders(model_dir: Path, output: Path) -> None:
    if not model_dir.is_dir():
        raise click.UsageError(f"--model-dir {model_dir} is not a directory")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise click.UsageError(f"--output {output} exists and is not an empty directory; name a new one")
    if output.resolve().is_relative_to(model_dir.resolve()):
        raise click.UsageError(f"--output {output} lies inside --model-dir; name a directory outside")
    if problem := folder_problem(output):
        raise click.UsageError(f"--output: {problem}")


def quantize(
    files: TransformerFiles, model_dir: Path, output: Path, progress: Progress | None = None
) -> tuple[int, int]:
    """Write `output`; returns the transformer's bytes before and after. What fails leaves no `output` behind.

    Other tensors are kept in bf16 (`exact` ones in fp32). The rounded weights pass through host memory, 6 to 8 GB at
    the official sizes. ValueError for a checkpoint that is in eight bits already, or does not fit the model.
    """
    import torch

    from common.placement import Placement, has_float8, place

    if has_float8(files.checkpoint):
        raise ValueError(f"{files.file} is in float8 already")
    kinds = (torch.bfloat16, files.exact, Placement(float8=True))
    model = place(files.module, files.checkpoint, files.rename, "cpu", *kinds, progress=progress)
    try:
        written = _write(model, files, model_dir, output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return files.checkpoint.nbytes, written


def _write(model: nn.Module, files: TransformerFiles, model_dir: Path, output: Path) -> int:
    from common.weights import save

    stem = files.file.name.split(".safetensors")[0]
    target = output / files.file.relative_to(model_dir).with_name(f"{stem}.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values())
    shards = SHARD_BYTES if total > SHARD_BYTES and target.parent != output else None
    save(state, target, files.rename, shards)
    replaced = {stored.file for stored in files.checkpoint.values()} | {files.file}
    for path in sorted(model_dir.rglob("*")):
        sibling = path.parent == files.file.parent != model_dir and ".safetensors" in path.name
        if path.is_file() and path not in replaced and not sibling:
            _link(path, output / path.relative_to(model_dir))
    return total


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a hub cache is a folder of links
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
