"""Train the small ConsisID transformer: a reference picture says what moves, the caption says how.

The reference shows one shape in one colour, large, in the middle of a gray picture. It reaches the model as a person
does: as latents beside the noise of the first frame and as face tokens (`consisid_xdit.demo.shape_identity` in place of
the face models). Captions name neither shape nor colour. Objective, schedule, autoencoder and text encoder are those of
CogVideoX's demo.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.demo import model_index, scheduler_json, write_vae
from cogvideox_xdit.transformer import CogVideoXTransformer, pack
from common.run.demo import write_json, write_part
from common.video.inputs import pixels
from consisid_xdit.config import consisid_json
from consisid_xdit.demo import SHOWN, shape_identity, trained_config
from consisid_xdit.face import save_identity
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table
from tools.demo import cogvideox
from tools.demo.cogvideox import LATENT, alphas, encoded, losses, noised, pool, scenes, trained
from tools.demo.cogvideox_vae import load_autoencoder
from tools.demo.training import Losses, Plan, WrittenOut, in_bf16, train, write_atomically
from tools.demo.world import COLOURS, SHAPES, Scene, caption, render

FACE_SCALE = 1.5
"""What the checkpoint's config gives what is read from the face: like guidance, but of the picture. Training has 1."""
WHO = [(shape, colour) for shape in SHAPES for colour in COLOURS]


def reference(shape: str, colour: str) -> Tensor:
    """The picture (64, 64, 3) uint8 of a shape that stands still in the middle."""
    return render(Scene(shape, colour, "left", "big", "slowly", "gray", 32.0, 32.0), 1)[0]


def nameless(text: str, shape: str, colour: str) -> str:
    """A caption without shape and colour."""
    return text.replace(f"{colour} {shape}", "shape").replace("An shape", "A shape").replace("an shape", "a shape")


class Velocity(torch.nn.Module):
    """The product's transformer with its face as one call, so that its weights can be handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ConsisIDTransformer(trained_config(), WrittenOut())

    def forward(self, x: Tensor, t: Tensor, text: Tensor, image: Tensor, identity: Tensor, *hidden: Tensor) -> Tensor:
        """As `tools.demo.cogvideox.Velocity`, with image latents and identity features of every clip."""
        face = self.model.read_face(identity, hidden)
        return self.model(x, t, self.model.prepare(text, LATENT, image, face=face)).float()


@torch.no_grad()
def start(model: ConsisIDTransformer, seed: int) -> None:
    """As CogVideoX's; the stored positions begin as its sines and cosines."""
    cogvideox.start(model, seed)
    fixed = dataclasses.replace(model.config, rotary=False, learned=False)
    grid = (LATENT[0], LATENT[1] // 2, LATENT[2] // 2)
    numbers = {f.name: getattr(fixed, f.name) for f in dataclasses.fields(cogvideox.trained_config())}
    plain = CogVideoXTransformer(dataclasses.replace(cogvideox.trained_config(), **numbers))
    _, table = plain._added_positions(fixed.text_length, grid)
    assert table is not None
    model.positions.zero_()
    model.positions[:, fixed.text_length :] = table
    for cross in model.perceiver_cross_attention:
        cross.to_out.weight.mul_(0.1)


def people(folder: Path, factor: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """For every shape and colour: image latents (32, C, 5, 8, 8), identity vectors, and hidden states by scale."""
    encoder, config = load_autoencoder(folder), trained_config()
    pictures = [reference(*who) for who in WHO]
    found = [shape_identity(picture, config) for picture in pictures]
    with torch.no_grad():
        latents = encoder.encode(torch.cat([pixels(picture[None], torch.float32) for picture in pictures]))[0] * factor
    zeros = latents.new_zeros(*latents.shape[:2], LATENT[0] - 1, *LATENT[1:])
    hidden = [torch.cat([who.id_vit_hidden[i] for who in found]) for i in range(config.scales)]
    return torch.cat((latents, zeros), dim=2), torch.cat([who.id_cond for who in found]), hidden


def features(folder: Path, count: int, seed: int) -> Tensor:
    """Features (count + 1, 1, L, D) of captions without shape and colour; the last entry is the empty caption's."""
    file = folder / f"consisid-features-{seed}-{count}.pt"
    if not file.exists():
        rng = random.Random(f"consisid captions {seed}")
        said = [*(nameless(caption(s, rng), s.shape, s.colour) for s in scenes(count, seed)), ""]
        write_atomically(file, encoded(folder, said))
    return torch.load(file, weights_only=True)


def train_consisid(folder: Path, steps: int = 12000, batch: int = 40, clip_count: int = 5000, seed: int = 0) -> None:
    """Train, or go on where it stopped, and write the whole checkpoint into `folder`/consisid."""
    texts = features(folder, clip_count, seed)
    latents, factor = pool(folder, clip_count, seed)
    tokens = pack(latents, trained_config().patch)
    who = torch.tensor([WHO.index((s.shape, s.colour)) for s in scenes(clip_count, seed)])
    images, vectors, hidden = people(folder, factor)
    model, table = Velocity(), alphas()
    start(model.model, seed)

    def step(generator: torch.Generator, _: int) -> Losses:
        index = torch.randint(len(tokens), (batch,), generator=generator)
        empty = torch.rand(batch, generator=generator) < 0.1
        data, text, shown = tokens[index], texts[torch.where(empty, len(texts) - 1, index)], who[index]
        t = torch.randint(1000, (batch,), generator=generator)
        noisy, v = noised(data, torch.randn(data.shape, generator=generator), table[t])
        given = (images[shown], vectors[shown], *(h[shown] for h in hidden))
        return losses(in_bf16(model, noisy, t, text, *given) - v, t)

    plan = Plan(steps, 2e-3, warmup=100, average=0.998, decay=0.01, muon=True, seed=seed)
    train(model, step, plan, folder / "consisid.pt")
    export(folder)


def export(folder: Path) -> Path:
    """Write the checkpoint from the parts as far as they are trained, into `folder`/consisid."""
    vae = VAEConfig(**torch.load(folder / "cogvideox_vae_config.pt", weights_only=True))
    config, autoencoder, target = trained_config(), load_autoencoder(folder), folder / "consisid"
    state = trained(folder, "consisid")
    shown = consisid_json(dataclasses.replace(config, face_scale=FACE_SCALE))
    write_part(target / "transformer", shown, state, rename_table(config), torch.bfloat16)
    write_vae(target / "vae", vae, autoencoder.encoder, autoencoder.decoder, torch.bfloat16)
    write_json(target / "scheduler" / "scheduler_config.json", scheduler_json("2b"))
    write_json(target / "model_index.json", model_index("ConsisIDPipeline", "ConsisIDTransformer3DModel"))
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, target / part, dirs_exist_ok=True)
    for name, who in SHOWN.items():
        save_identity(target / name, shape_identity(reference(*who), config))
    return target
