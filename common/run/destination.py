"""Where a command's videos go, looked at before anything is loaded: names, what their formats hold, what is there."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.registry.request import Request, Video
from common.system.files import kind_of, replacing_problem, resolved, shown, taken_problem, writing_problem
from common.video.formats import FOLDER, FRAME_NAMES, destination_problem, output_problem, suffix_of

MOST_TOLD = 5


def named(output: str) -> tuple[Path, bool]:
    """The path that --output names, and whether it is a folder of PNGs. ValueError for what names nothing."""
    path = Path(output)
    if path.name in ("", ".."):
        raise ValueError(f"{shown(path)} is a directory; name a file, such as {shown(path / 'video.mp4')}")
    folder = output.endswith(("/", os.sep))
    path = resolved(path)
    return path, folder or suffix_of(path) == FOLDER


def own_name(program: str) -> Path:
    """A name of this run's own: several may begin within one second."""
    return Path("outputs", f"{program.split('-')[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.mp4")


def format_problem(video: Video) -> str | None:
    """Why the format cannot hold the video, in words that follow the option's name."""
    sampling, known = video.sampling, video.latents is None  # of latents in a file the file says how large they are
    frames, size = (sampling.num_frames, (sampling.height, sampling.width)) if known else (None, None)
    return output_problem(video.target, frames, size, video.fps, video.crf)


def place_problems(videos: Sequence[Video]) -> list[str]:
    """Why files of these videos cannot be written where they go; by the longest name it is tried out."""
    longest = max(videos, key=lambda video: len(str(video.output)))
    problems = [destination_problem(longest.target), *(writing_problem(path) for path in longest.beside)]
    for video in videos:
        if video is not longest:
            folder = video.folder
            problems.append(replacing_problem(video.output, FRAME_NAMES) if folder else taken_problem(video.output))
            problems += [taken_problem(path) for path in video.beside]
    return [problem for problem in dict.fromkeys(problems) if problem][:MOST_TOLD]


def existing_problems(request: Request) -> list[str]:
    """One line for each output that is there already; none for latents, which an unfinished run leaves.

    An empty folder is no output, and what an interrupted run has made is not made again.
    """
    if request.overwrite:
        return []
    problems = []
    if request.unfinished is None:
        for option, path in request.options.written.items():
            if kind_of(path):
                problems.append(f"{option}: {shown(path)} exists; add --overwrite to replace it, or give another name")
    for video in (request.videos[index] for index in request.left):
        there = [path for path in (video.output, video.sidecar) if kind_of(path) and not _empty(path)]
        if there:
            names = " and ".join(map(shown, there))
            verb = "exists" if len(there) == 1 else "exist"
            problems.append(f"--output: {names} {verb}; add --overwrite to replace what is there, or give another name")
    more = len(problems) - MOST_TOLD
    return problems[:MOST_TOLD] + ([f"--output: {more} more of these videos exist"] if more > 0 else [])


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def numbered(base: Video, prompts: Sequence[str], count: int) -> list[Video]:
    """Every prompt `count` times; the k-th of each prompt has the k-th seed. Several get numbers in their names."""
    total = len(prompts) * count
    videos = []
    for index in range(total):
        seed = None if base.seed is None else base.seed + index % count
        output = base.output
        if total > 1:
            output = output.with_stem(f"{output.stem}-{index + 1:0{len(str(total))}}")
        videos.append(replace(base, prompt=prompts[index // count], seed=seed, index=index % count, output=output))
    return videos
