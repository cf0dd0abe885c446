"""Wan's transformer and autoencoders on fake GPUs, as far as they go: there is no pipeline of it yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.compile import Compile
from common.decode import DecodePlan, decode_frames
from common.generation import Models, require_finite
from common.guidance import Guidance
from common.parallel import Mesh, on_main
from common.placement import Placement, place
from common.usp import SequenceParallel
from common.vae import TimeSplit, encode_moments, lay_out
from common.weights import load, on_meta, open_checkpoint, save
from tests.rehearsal.folders import BF16, sparse
from tests.rehearsal.models import MODELS
from tests.rehearsal.pipelines import no_cuda_for_dynamo, stand_ins
from tests.rehearsal.scene import STEPS, WORDS, Scene
from tests.rehearsal.trace import Tracer
from wan_xdit.config import VAE_2_2, VAEConfig, with_stats
from wan_xdit.transformer import WanTransformer, pack, unpack
from wan_xdit.vae import WanDecoder, WanEncoder
from wan_xdit.weights import exact_names

SCALE = 5.0


def autoencoder(model: str) -> VAEConfig:
    config = VAE_2_2 if model == "wan-ti2v-5b" else VAEConfig()
    zeros = (0.0,) * config.latent_channels
    return with_stats(config, zeros, zeros)


def write_folder(folder: Path, model: str, layers: int | None = None) -> Path:
    """Our own names, since nothing reads a checkpoint's folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    config = (MODELS[model] if layers is None else MODELS[model].shallow(layers)).config
    parts = {
        "transformer": on_meta(WanTransformer, config),
        "decoder": on_meta(WanDecoder, autoencoder(model)),
        "encoder": on_meta(WanEncoder, autoencoder(model)),
    }
    with sparse():
        for name, module in parts.items():
            save({key: tensor.to(BF16) for key, tensor in module.state_dict().items()}, folder / f"{name}.safetensors")
    return folder


def generate(scene: Scene, folder: Path, mesh: Mesh, tracer: Tracer) -> Tensor | None:
    """Text, encode where the model starts from an image, two guided steps, decode."""
    config = (MODELS[scene.model] if scene.layers is None else MODELS[scene.model].shallow(scene.layers)).config
    vae, stages, models = autoencoder(scene.model), tracer.steps, Models()
    size, width = MODELS[scene.model].size, config.image_width
    guidance, split = Guidance(mesh.cfg), TimeSplit(mesh.world)
    placement = Placement(scene.offload, scene.shard, scene.dtype == "fp8")

    def transformer() -> WanTransformer:
        checkpoint = open_checkpoint(folder / "transformer.safetensors")
        where = (placement, mesh.weights)
        model = place(
            on_meta(WanTransformer, config, sp), checkpoint, None, mesh.device, BF16, exact_names(config), *where
        )
        Compile(blocks=scene.compiled, backend="eager").transformer(model)
        return model

    def half(name: str, build: Any) -> Any:
        checkpoint = open_checkpoint(folder / f"{name}.safetensors")
        return lay_out(load(on_meta(build, vae), checkpoint, None, mesh.device, BF16), mesh.device)

    def encode() -> Tensor:
        with models.use("encoder", lambda: half("encoder", WanEncoder)) as encoder, stages.stage("encoding video"):
            video = torch.empty(1, 3, vae.time * (size[0] - 1) + 1, size[1] * vae.space, size[2] * vae.space)
            moments = encode_moments(encoder, video.to(mesh.device, BF16), encoder.chunks(video.shape[2]), split)
            return moments.chunk(2, dim=1)[0]

    with stand_ins(tracer), torch.inference_mode(), no_cuda_for_dynamo(scene.compiled):
        sp = SequenceParallel(mesh, scene.attention, scene.groups, BF16)
        text = {b: on_main(mesh, lambda: torch.empty(1, WORDS, config.text_width)) for b in (0, 1)}
        seen = None if width is None else on_main(mesh, lambda: torch.empty(1, config.image_tokens, width))
        beside = None
        if config.image_channels:
            mask = torch.empty(1, config.image_channels - vae.latent_channels, *size, device=mesh.device)
            beside = torch.cat((mask, encode()), dim=1)
        with models.use("transformer", transformer) as model:
            conds = {b: model.prepare(text[b], size, beside, seen) for b in guidance.branches(SCALE)}
            tokens = pack(torch.empty(1, config.out_channels, *size).to(mesh.device), config.patch)
            z = sp.shard(tokens)
            with stages.stage("sampling", total=STEPS) as step:
                for i in range(STEPS):
                    predictions = {b: model(z, 1000.0 / (i + 1), conds[b]) for b in guidance.branches(SCALE)}
                    z = z - 0.5 * guidance.combine(predictions, SCALE)
                    require_finite(z, f"step {i + 1}")
                    step()
            latents = unpack(sp.gather(z, sp.lengths(tokens.shape[1])), size, config.patch)
        if scene.output == "latent":
            return latents
        with models.use("decoder", lambda: half("decoder", WanDecoder)) as decoder:
            plan = DecodePlan(scene.vae, 2, (32, 40) if scene.vae == "tiled" else None)
            with stages.stage("decoding", total=len(decoder.chunks(size[0], plan.chunk)), unit="chunk") as step:
                kept = [piece for piece in decode_frames(decoder, latents, plan, split) if piece is not None]
        return torch.cat(kept) if kept else None
