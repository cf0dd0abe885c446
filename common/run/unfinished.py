"""Commands that were interrupted: how one is known again, and where it goes on. No torch here.

A command's state lies beside its output, in a file that names the command: its arguments, a digest of all that decides
its videos, the seed that was drawn, how many videos are whole, and the sampling of the next one. The same command line
goes on from it, with other GPUs, another layout or placement if wanted; so does `--resume FILE`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from common.registry.request import Request, Unfinished, Video, WrongUse, beside, draw_seeds, settings
from common.run.states import At, Saver, Slots, StateFile
from common.system.files import shown, size_of
from common.weights.headers import read_header
from common.weights.schema import CheckpointError

FORMAT = "xdit-state-1"
MOST_ARGUMENTS = 1 << 20
"""Characters of the arguments that a state file may hold."""


def digest(request: Request) -> str:
    """Of everything that decides the latents of a request's videos: equal for two commands that make the same ones."""
    runtime, source = request.runtime, request.source
    videos = [
        [video.prompt, video.negative_prompt, vars(video.sampling), video.seed, video.index] for video in request.videos
    ]
    weights = [source.demo, source.model_dir and _fingerprint(source.model_dir)]
    precision = [str(runtime.dtype), str(runtime.text_dtype), runtime.text_encoder_dir]
    identity = [request.program, weights, precision, vars(request.options), videos]
    return hashlib.sha256(json.dumps(identity, default=_plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        with suppress(OSError):
            status = value.stat()
            return [str(value.absolute()), status.st_size, status.st_mtime_ns]
    return str(value)


def _fingerprint(folder: Path) -> list[Any]:
    """Another checkpoint at the same place is not gone on with."""
    return [str(folder.absolute()), weights_of(folder)]


def weights_of(folder: Path) -> list[Any]:
    """Names and sizes of a checkpoint's files."""
    files = sorted(path for path in folder.glob("**/*") if path.suffix in (".safetensors", ".json", ".pth"))
    return [[str(path.relative_to(folder)), size_of(path)] for path in files]


def state_path(output: Path, folder: bool = False) -> Path:
    """Where the state of an interrupted command lies that writes `output`; folder: as of `Video`."""
    return beside(output, folder, ".state.safetensors")


def _state_path(request: Request) -> Path:
    return state_path(request.output, request.videos[0].folder)


def state_file(request: Request, arguments: Sequence[str]) -> StateFile:
    """Where the state of a request is kept, its seeds being drawn."""
    identity = {
        **{"format": FORMAT, "program": request.program, "digest": request.digest},
        **{"seed": str(request.videos[0].seed), "output": request.output.name + "/" * request.videos[0].folder},
        **{"cwd": os.getcwd(), "arguments": json.dumps(list(arguments))},
        **{"done": ",".join(map(str, sorted(request.unfinished.done))) if request.unfinished else ""},
    }
    return StateFile(_state_path(request), identity)


def taken_up(request: Request, fresh: bool = False) -> Request:
    """The request with its digest, its seeds, and where it goes on when a state of it is there.

    fresh: a state of another command is written over. Raises WrongUse for one otherwise.
    """
    request = replace(request, digest=digest(request))
    unfinished = None
    if request.sampled and os.path.lexists(_state_path(request)):
        unfinished = _read(request, fresh)
    if unfinished is None:
        return replace(request, videos=tuple(draw_seeds(request.videos)))
    videos = draw_seeds(request.videos, unfinished.seed)
    many = f"video {unfinished.video + 1} of {len(videos)}, " if len(videos) > 1 else ""
    remark = f"going on with an interrupted run: {many}step {unfinished.step} of {unfinished.steps} is done"
    if unfinished.done:
        remaining = len(unfinished.left(len(videos)))
        remark = f"going on with an interrupted run: {len(videos) - remaining} of {len(videos)} videos are whole"
    return replace(request, videos=tuple(videos), unfinished=unfinished, remarks=(*request.remarks, remark))


def with_whole(request: Request) -> Request:
    """The request without the videos that an interrupted run of it has finished, but had no time to say so.

    Whether one is such a video, the json beside it says.
    """
    unfinished = request.unfinished
    whole = (
        set() if unfinished is None else {index for index in request.left if _is_whole(request, request.videos[index])}
    )
    if unfinished is None or not whole:
        return request
    indices = unfinished.done | whole
    first = next((index for index in range(unfinished.video, len(request.videos)) if index not in indices), None)
    if first is not None and first != unfinished.video:
        unfinished = replace(unfinished, video=first, step=0)
    return replace(request, unfinished=replace(unfinished, done=frozenset(indices)))


def _is_whole(request: Request, video: Video) -> bool:
    if not video.output.exists():
        return False
    try:
        sidecar = json.loads(video.sidecar.read_text(encoding="utf-8"))
        theirs = sidecar["settings"] if sidecar["program"] == request.program else {}
        ours = settings(request, video)
        names = ("prompt", "negative_prompt", "seed", "demo", "model_dir", "dtype", "output")
        return all(theirs[name] == ours[name] for name in (*names, *(one.name for one in fields(video.sampling))))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(request: Request, fresh: bool) -> Unfinished | None:
    path = _state_path(request)
    try:
        header = metadata(path)
    except ValueError as error:
        if fresh:
            return None
        raise WrongUse([f"{error}; remove it, or write over it with --overwrite"]) from None
    if header["digest"] != request.digest:
        if fresh:
            return None
        raise WrongUse(
            [
                f"--output {shown(request.output)}: {shown(path)} is an interrupted run of other settings; go on with "
                f"it by --resume {shown(path)}, give another output, or drop it with --overwrite"
            ]
        )
    numbers = {name: int(header[name]) for name in ("video", "step", "steps", "seed")}
    indices = frozenset(int(index) for index in header.get("done", "").split(",") if _is_number(index))
    return Unfinished(path, **numbers, done=indices)


def metadata(path: Path) -> Mapping[str, str]:
    """What a state file says of its command. ValueError, with the name, for another file."""
    try:
        _, header = read_header(path)
    except (CheckpointError, OSError) as error:
        raise ValueError(f"{shown(path)} is no state of an interrupted run ({error})") from None
    numbers = [header.get(name, "") for name in ("video", "step", "steps", "seed")]
    if header.get("format") != FORMAT or "digest" not in header or not all(_is_number(n) for n in numbers):
        raise ValueError(f"{shown(path)} is no state of an interrupted run")
    return header


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def with_interrupted(arguments: Sequence[str], program: str) -> list[str]:
    """The arguments, where they have `--resume FILE` behind those of the command that left the file.

    That command's folder becomes the current one. Raises WrongUse for another file.
    """
    rest, path = _without_resume(arguments)
    if path is None:
        return rest
    path = path.absolute()
    return [*_command_of(path, program), *rest]


def _without_resume(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    rest, path, following = [], None, False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if following:
            path, following = Path(argument), False
        elif name == "--resume":
            path, following = Path(value), not equals
        else:
            rest.append(argument)
    return (list(arguments), None) if following else (rest, path)


def _command_of(path: Path, program: str) -> list[str]:
    try:
        header = metadata(path)
        arguments = json.loads(header["arguments"][:MOST_ARGUMENTS])
        if not isinstance(arguments, list) or not all(isinstance(part, str) for part in arguments):
            raise ValueError(f"{shown(path)} is no state of an interrupted run")
        if header["program"] != program:
            raise ValueError(f"{shown(path)} is of {shown(header['program'])}; go on with that program")
        output, folder = path.parent / Path(header["output"]).name, header["output"].endswith("/")
        if state_path(output, folder) != path:
            raise ValueError(f"{shown(path)} was renamed; its run writes {shown(output.name)}")
        os.chdir(header["cwd"])
    except (KeyError, ValueError) as error:
        raise WrongUse([f"--resume {error}"]) from None
    except OSError as error:
        raise WrongUse([f"--resume {shown(path)}: its folder {shown(header['cwd'])} is not there ({error})"]) from None
    where = ["--output", str(output) + "/" * folder]
    return arguments if arguments[-2:] == where else arguments + where


def remove_states(request: Request, file: StateFile) -> None:
    """The file of a command, and those of its videos where several were made at the same time."""
    file.remove()
    for video in request.videos if len(request.videos) > 1 else ():
        StateFile(state_path(video.output, video.folder), {}).remove()


@contextmanager
def states_saved(
    request: Request, arguments: Sequence[str], ranks: int
) -> Iterator[tuple[Request, Callable[[bool, bool], str]]]:
    """The request with slots for this many ranks' states, which are written to its file while they come.

    Also yields what ends that: called with whether all videos are made it removes the file, or writes what is newest
    and says so, as the end of an error line. Called once more it does nothing. Its second argument is whether the
    latents of a sampling that was finished are kept elsewhere: of one video there is then nothing else to keep.
    """
    if not request.sampled:
        yield request, lambda done, elsewhere: ""
        return
    slots = [Slots.create() for _ in range(ranks)]
    request = replace(request, slots=tuple(one.descriptors for one in slots))
    file = state_file(request, arguments)
    saver = Saver(slots, file.write, request.save_every)

    def close(done: bool, elsewhere: bool) -> str:
        if saver.closed:
            return ""
        state, unfinished, several = saver.close(done), request.unfinished, len(request.videos) > 1
        if state is None and unfinished is not None:
            state = At(unfinished.video, unfinished.step), unfinished.steps
        at, steps = state or (At(0, 0), 1)
        apart = unfinished is not None and bool(unfinished.done)
        if done or (at == (0, 0) and not apart) or (at.step == steps and elsewhere and not several):
            remove_states(request, file)
            return ""
        of_many = f" of video {at.video + 1}" if several else ""
        return f"; step {at.step}{of_many} is kept: the same command goes on from it, or --resume {shown(file.path)}"

    try:
        yield request, close
    finally:
        close(False, False)
        for one in slots:
            one.close()
