"""`python -m tools.demo.sheet OUTPUT.png`: prompts through a program's `--demo`, their frames on one sheet."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from common.video.files import read_video

PROMPTS = (
    "A big red circle moves slowly to the right on a black background.",
    "A small yellow triangle glides upwards quickly on a gray background.",
    "A big blue square slides slowly down on a white background.",
    "A big green cross drifts quickly to the left over a black background.",
    "A small orange circle moves down slowly across a gray background.",
    "A big purple triangle slides to the left slowly against a white background.",
)
COLUMNS = 6
GAP = 4


def tile(videos: list[np.ndarray], zoom: int) -> np.ndarray:
    """Videos (T, H, W, 3) as rows of COLUMNS frames, first to last."""
    rows = []
    for video in videos:
        shown = [round(k * (len(video) - 1) / (COLUMNS - 1)) for k in range(COLUMNS)]
        frames = [video[i].repeat(zoom, 0).repeat(zoom, 1) for i in shown]
        framed = [np.pad(f, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255) for f in frames]
        rows.append(np.concatenate(framed, 1))
    return np.concatenate(rows, 0)


def arguments_of(model: str) -> list[list[str]]:
    """For each row of a model's sheet, what its demo command is given."""
    if model != "consisid":
        return [["--prompt", prompt] for prompt in PROMPTS]
    from consisid_xdit.demo import SHIPPED, SHOWN

    said = [PROMPTS[i].replace(*words) for i, words in ((0, ("red circle", "shape")), (2, ("blue square", "shape")))]
    return [["--prompt", text, "--id-embeddings", str(SHIPPED / name)] for text in said for name in SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.sheet", description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", choices=["mochi", "cogvideox", "consisid", "wan"], default="mochi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zoom", type=int, default=2)
    arguments = parser.parse_args()
    from PIL import Image

    videos = []
    with tempfile.TemporaryDirectory() as folder:
        for i, given in enumerate(arguments_of(arguments.model)):
            file = Path(folder) / f"{i}.mp4"
            command = [sys.executable, "-m", f"{arguments.model}_xdit", "--demo", "--device", "cpu", "--gpus", "2"]
            command += ["--seed", str(arguments.seed), "--output", str(file)]
            subprocess.run([*command, *given], check=True)
            videos.append(read_video(file)[0])
    Image.fromarray(tile(videos, arguments.zoom)).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
