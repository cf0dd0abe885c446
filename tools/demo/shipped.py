"""Go on from the shipped checkpoints of CogVideoX, ConsisID and Wan where the states of their training are gone."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import nn

from cogvideox_xdit.config import vae_config
from cogvideox_xdit.demo import SHIPPED as COGVIDEOX
from cogvideox_xdit.demo import trained_config as cogvideox_config
from cogvideox_xdit.weights import load_decoder, load_encoder
from cogvideox_xdit.weights import transformer_files as cogvideox_files
from common.weights.load import load
from common.weights.schema import read_object
from consisid_xdit.demo import SHIPPED as CONSISID
from consisid_xdit.demo import trained_config as consisid_config
from consisid_xdit.weights import transformer_files as consisid_files
from tools.demo.training import write_atomically
from wan_xdit.checkpoint import find_checkpoint
from wan_xdit.demo import SHIPPED as WAN
from wan_xdit.weights import load_decoder as load_wan_decoder
from wan_xdit.weights import load_encoder as load_wan_encoder
from wan_xdit.weights import transformer_files as wan_files

DONE = {"cogvideox": 8000, "consisid": 5800, "wan": 12000}
"""Steps that the shipped transformers were trained for last; what came before is in their model cards."""


def take_up(folder: Path) -> None:
    """Make `folder` one in which the trainings stopped at the shipped weights, averages in bf16, optimizers new."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(COGVIDEOX / part, folder / part, dirs_exist_ok=True)
    vae = vae_config(read_object(COGVIDEOX / "vae" / "config.json"))
    write_atomically(folder / "cogvideox_vae_config.pt", dataclasses.asdict(vae))
    decoder = load_decoder(COGVIDEOX, vae, dtype=torch.float32)
    halves = nn.ModuleDict({"encoder": load_encoder(COGVIDEOX, vae, dtype=torch.float32), "decoder": decoder})
    write_atomically(folder / "cogvideox_white.pt", {"average": halves.state_dict()})
    wan = find_checkpoint(WAN)
    halves = nn.ModuleDict({"encoder": load_wan_encoder(wan, dtype=torch.float32)})
    halves["decoder"] = load_wan_decoder(wan, dtype=torch.float32)
    write_atomically(folder / "wan_white.pt", {"average": halves.state_dict()})
    for name, (files,) in {
        "cogvideox": cogvideox_files(COGVIDEOX, cogvideox_config()),
        "consisid": consisid_files(CONSISID, consisid_config()),
        "wan": wan_files(WAN),
    }.items():
        model = load(files.module, files.checkpoint, files.rename, "cpu", torch.float32)
        weights = {f"model.{key}": p for key, p in model.state_dict().items()}
        state = {"module": weights, "average": weights, "optimizers": [], "step": DONE[name]}
        write_atomically(folder / f"{name}.pt", state)
