"""`python -m tools.demo FOLDER [PART ...]`: train the demo checkpoints, each part from where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("folder", type=Path, help="where states, logs and intermediate results lie")
    parser.add_argument("parts", nargs="*", choices=["text", "mochi-vae", "mochi", "mochi-export", []], default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="in place of the part's own number")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {} if arguments.steps is None else {"steps": arguments.steps}
    for part in arguments.parts or ["text", "mochi-vae", "mochi"]:
        if part == "text":
            from tools.demo.text_encoder import train_text

            train_text(arguments.folder, **given)
        elif part == "mochi-vae":
            from tools.demo.mochi_vae import train_vae

            train_vae(arguments.folder, **given)
        elif part == "mochi":
            from tools.demo.mochi import train_mochi

            train_mochi(arguments.folder, **given)
        else:
            from tools.demo.mochi import export

            export(arguments.folder)


if __name__ == "__main__":
    main()
