"""`python -m tools.demo FOLDER [PART ...]`: train the demo checkpoints, each part from where it stopped."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch

PARTS = {
    "take-up": ("shipped", "take_up"),
    "text": ("text_encoder", "train_text"),
    "mochi-vae": ("mochi_vae", "train_vae"),
    "mochi": ("mochi", "train_mochi"),
    "mochi-export": ("mochi", "export"),
    "cogvideox-vae": ("cogvideox_vae", "train_vae"),
    "cogvideox-white": ("cogvideox_vae", "whiten"),
    "cogvideox-decoder": ("cogvideox_vae", "train_decoder"),
    "cogvideox": ("cogvideox", "train_cogvideox"),
    "cogvideox-export": ("cogvideox", "export"),
    "consisid": ("consisid", "train_consisid"),
    "consisid-export": ("consisid", "export"),
    "wan-vae": ("wan_vae", "train_vae"),
    "wan-white": ("wan_vae", "whiten"),
    "wan-decoder": ("wan_vae", "train_decoder"),
    "wan": ("wan", "train_wan"),
    "wan-export": ("wan", "export"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("folder", type=Path, help="where states, logs and intermediate results lie")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="in place of the part's own number")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {} if arguments.steps is None else {"steps": arguments.steps}
    for part in arguments.parts or [part for part in PARTS if part != "take-up" and not part.endswith("export")]:
        module, name = PARTS[part]
        getattr(import_module(f"tools.demo.{module}"), name)(arguments.folder, **given)


if __name__ == "__main__":
    main()
