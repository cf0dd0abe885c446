"""`<program> quantize --model-dir A --output B`: a copy of a checkpoint folder with the blocks' matmuls in float8.

B has A's layout and names; a weight in float8 has its scales beside it under `weight_scale`. All that is not a
transformer's weights, folders behind symbolic links included, is linked where the file system can (so it takes no
room), else copied. Every program loads B as it loads A.

B grows under a hidden name of its own beside its place and gets its name when it is complete, so two runs never touch
each other's files and one that is stopped leaves nothing.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.registry.forks import Fork
from common.registry.hub import checkpoint_folder
from common.system.failure import describe
from common.system.files import reason, writing_problem
from common.system.stopping import Asked, Stopped, stoppable
from common.system.units import gb

if TYPE_CHECKING:
    from torch import nn

    from common.weights.checkpoint import Checkpoint
    from common.weights.load import Progress, Rename

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TransformerFiles:
    """A fork's transformer in a checkpoint folder."""

    module: nn.Module
    """The transformer, on the meta device."""
    checkpoint: Checkpoint
    rename: Rename | None
    file: Path
    """What `open_checkpoint` got."""
    keep_fp32: tuple[str, ...] = ()


def run(fork: Fork, arguments: Sequence[str]) -> int:
    """The subcommand; returns its exit status: 0 done, 1 failed, 2 wrong use, 128 + signal when it was stopped."""
    command, signals = _command(fork), Asked()
    try:
        with stoppable() as signals:
            command.main(args=list(arguments), prog_name=f"{fork.program} quantize", standalone_mode=False)
    except click.UsageError as wrong:
        print(f"error: {wrong.format_message()}", file=sys.stderr)
        return 2
    except Exception as error:
        if signals.number is not None:  # what a library has made of the signal's exception
            return 128 + signals.number
        print(f"error: {describe(error, 0, 'quantize').message}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except Stopped as stopped:
        return stopped.status
    except (click.Abort, KeyboardInterrupt):
        return 130
    return 0


def _command(fork: Fork) -> click.Command:
    path = click.Path(path_type=Path)

    def body(model_dir: Path, output: Path) -> None:
        from rich.console import Console

        from common.system.progress import Report

        model_dir = _read_from(model_dir, fork)
        _check_folders(model_dir, output)
        files = fork.module("weights").transformer_files(model_dir)
        with Report(Console(stderr=True)).loading("rounding") as progress:
            before, after = quantize(files, model_dir, output, progress)
        what = "transformer" if len(files) == 1 else f"{len(files)} transformers"
        click.echo(f"{output}: {what} {gb(before)} -> {gb(after)}; use --model-dir {output}")

    names: dict[str, Any] = {"type": path, "required": True}
    return click.Command(
        "quantize",
        params=[
            click.Option(
                ["--model-dir"],
                help="Checkpoint to read: a folder, or the name of a repository in the hub's local cache.",
                **names,
            ),
            click.Option(["--output"], help="Folder to make; one that exists has to be empty.", **names),
        ],
        callback=body,
        help="Write a copy of a checkpoint with the transformer's matrices in 8 bits, as --dtype fp8 makes them.",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )


def _read_from(model_dir: Path, fork: Fork) -> Path:
    try:
        return checkpoint_folder(model_dir, fork, text=False)
    except ValueError as error:
        raise click.UsageError(f"--model-dir {error}") from None


def _check_folders(model_dir: Path, output: Path) -> None:
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise click.UsageError(f"--output {output} exists and is not an empty directory; name a new one")
        if output.resolve().is_relative_to(model_dir.resolve()):
            raise click.UsageError(f"--output {output} lies inside --model-dir; name a directory outside")
        if problem := writing_problem(_hidden(output)):
            raise click.UsageError(f"--output: {problem}")
    except OSError as error:
        raise click.UsageError(f"{error.filename}: {reason(error)}") from None


def quantize(
    transformers: Sequence[TransformerFiles], model_dir: Path, output: Path, progress: Progress | None = None
) -> tuple[int, int]:
    """Write `output`; returns the transformers' bytes before and after. What fails leaves no `output` behind.

    Other tensors are kept in bf16 (`keep_fp32` ones in fp32). The rounded weights pass through host memory, those of
    one transformer at a time: 6 to 8 GB at the official sizes, 14 of Wan 14B. ValueError for a checkpoint that is in
    eight bits already, or does not fit the model.
    """
    from common.weights.placement import check_model, has_float8

    for files in transformers:
        if has_float8(files.checkpoint):
            raise ValueError(f"{files.file} is in float8 already")
        check_model(files.module, files.checkpoint, files.rename)
    others = _others(transformers, model_dir)
    with _appearing(output) as folder:
        size = sum(_rounded(files, folder, model_dir, progress) for files in transformers)
        for path in others:
            _link(path, folder / path.relative_to(model_dir))
    return sum(files.checkpoint.nbytes for files in transformers), size


def _rounded(files: TransformerFiles, folder: Path, model_dir: Path, progress: Progress | None) -> int:
    """Write one transformer's part of the new checkpoint `folder`; returns its bytes."""
    import torch

    from common.weights.placement import Placement, place

    how = (torch.bfloat16, files.keep_fp32, Placement(float8=True))
    model = place(files.module, files.checkpoint, files.rename, "cpu", *how, progress=progress)
    size = _write(model, files, folder / files.file.parent.relative_to(model_dir), model_dir)
    model.to("meta")  # the next one's weights take its place
    return size


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A new folder to fill, which is `output` when the block ends and gone when it fails."""
    hidden = _hidden(output)
    try:
        hidden.mkdir()
        yield hidden
        try:
            hidden.rename(output.resolve())  # takes the place of an empty folder, and of nothing else
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise FileExistsError(error.errno, "another run has made it meanwhile", str(output)) from None
            raise
    except BaseException:
        try:
            shutil.rmtree(hidden, ignore_errors=True)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)  # again, should a second signal have come into the first
        raise


def _hidden(output: Path) -> Path:
    """Where `output` grows: beside it, under a name that no other run has."""
    place = output.resolve()
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")


def _write(model: nn.Module, files: TransformerFiles, folder: Path, model_dir: Path) -> int:
    """The transformer's weights, under names that `find_files` finds in any dtype; returns their bytes."""
    from common.weights.checkpoint import plain_stem
    from common.weights.load import save

    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values())
    shards = SHARD_BYTES if total > SHARD_BYTES and files.file.parent != model_dir else None
    save(state, folder / f"{plain_stem(files.file)}.safetensors", files.rename, shards)
    return total


def _others(transformers: Sequence[TransformerFiles], model_dir: Path) -> list[Path]:
    """All files of the checkpoint but the transformers' weights. ValueError for a link that leads nowhere."""
    replaced = {entry.file for files in transformers for entry in files.checkpoint.values()}
    replaced |= {files.file for files in transformers}
    folders = {files.file.parent for files in transformers} - {model_dir}
    paths = []
    for path in _files(model_dir, ()):
        sibling = path.parent in folders and ".safetensors" in path.name
        if path in replaced or sibling:
            continue
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist; mend or remove it")
        if path.is_file():
            paths.append(path)
    return paths


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Everything in a folder that is no folder, symbolic links followed; one that leads back up is left out."""
    real = folder.resolve()
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, (*above, real))
        else:
            yield path


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a hub cache is a folder of links
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
