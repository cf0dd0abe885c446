"""`python -m tools.demo.sheet OUTPUT.png`: six prompts through `mochi-xdit --demo`, their frames on one sheet."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from common.video import read_video

PROMPTS = (
    "A big red circle moves slowly to the right on a black background.",
    "A small yellow triangle glides upwards quickly on a gray background.",
    "A big blue square slides slowly down on a white background.",
    "A big green cross drifts quickly to the left over a black background.",
    "A small orange circle moves down slowly across a gray background.",
    "A big purple triangle slides to the left slowly against a white background.",
)
FRAMES = (0, 2, 5, 7, 10, 12)
GAP = 4


def tile(videos: list[np.ndarray], zoom: int) -> np.ndarray:
    """Videos (T, H, W, 3) as rows of FRAMES with their order running to the right."""
    rows = []
    for video in videos:
        frames = [video[i].repeat(zoom, 0).repeat(zoom, 1) for i in FRAMES]
        framed = [np.pad(f, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255) for f in frames]
        rows.append(np.concatenate(framed, 1))
    return np.concatenate(rows, 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.sheet", description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zoom", type=int, default=2)
    arguments = parser.parse_args()
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        command = [sys.executable, "-m", "mochi_xdit", "--demo", "--device", "cpu", "--gpus", "2"]
        command += ["--prompt-file", str(prompts), "--seed", str(arguments.seed)]
        subprocess.run([*command, "--output", str(Path(folder) / "video.mp4")], check=True)
        videos = [read_video(path)[0] for path in sorted(Path(folder).glob("*.mp4"))]
    Image.fromarray(tile(videos, arguments.zoom)).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
