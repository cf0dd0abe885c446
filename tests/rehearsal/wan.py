"""Wan's transformer and autoencoders on fake GPUs, as far as they go: there is no pipeline of it yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.model.compile import compile_transformer
from common.parallel.guidance import Guidance
from common.parallel.mesh import Mesh, on_main
from common.parallel.usp import SequenceParallel
from common.registry.settings import CompileOptions
from common.run.pipeline import Pipeline
from common.video.causal import TimeSplit, encode_moments, lay_out
from common.video.decode import DecodePlan, decode_frames
from common.video.latents import require_finite
from common.weights.dtypes import parse_dtype
from common.weights.load import load, on_meta, open_checkpoint, save
from common.weights.placement import Placement, place
from tests.rehearsal.folders import BF16, sparse
from tests.rehearsal.models import MODELS
from tests.rehearsal.pipelines import no_cuda_for_dynamo, stand_ins
from tests.rehearsal.scene import STEPS, WORDS, Scene
from tests.rehearsal.tracer import Tracer
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
    with stand_ins(tracer), torch.inference_mode(), no_cuda_for_dynamo(scene.compiled):
        run = _Generation(scene, folder, mesh, tracer)
        latents = run.sample(run.encode() if run.config.image_channels else None)
        return latents if scene.output == "latent" else run.decode(latents)


class _Generation:
    """Stages one after another, each with its model."""

    keeps = False
    stage_model = Pipeline.stage_model

    def __init__(self, scene: Scene, folder: Path, mesh: Mesh, tracer: Tracer) -> None:
        model = MODELS[scene.model] if scene.layers is None else MODELS[scene.model].shallow(scene.layers)
        self.scene, self.folder, self.mesh = scene, folder, mesh
        self.config, self.size, self.vae = model.config, model.size, autoencoder(scene.model)
        self.report = tracer.steps
        self.loaded: dict[str, Any] = {}
        self.guidance, self.split = Guidance(mesh.cfg), TimeSplit(mesh.world)
        self.dtype = parse_dtype("bf16" if scene.dtype == "fp8" else scene.dtype)
        self.sp = SequenceParallel(mesh, scene.attention, scene.groups, self.dtype)

    def sample(self, encoded: Tensor | None) -> Tensor:
        """encoded: of the image, (1, C, *size). Returns the latents on every rank."""
        mesh, config, size, sp = self.mesh, self.config, self.size, self.sp
        text = {b: on_main(mesh, lambda: torch.empty(1, WORDS, config.text_dim)) for b in (0, 1)}
        width, seen, beside = config.image_width, None, None
        if width is not None:
            seen = on_main(mesh, lambda: torch.empty(1, config.image_tokens, width))
        if encoded is not None:
            mask = torch.empty(1, config.image_channels - encoded.shape[1], *size, device=mesh.device)
            beside = torch.cat((mask, encoded), dim=1)
        with self.stage_model("transformer", self._transformer) as model:
            conds = {b: model.prepare(text[b], size, beside, seen) for b in self.guidance.branches(SCALE)}
            tokens = pack(torch.empty(1, config.out_channels, *size).to(mesh.device), config.patch)
            z = sp.shard(tokens)
            with self.report.stage("sampling", total=STEPS) as step:
                for i in range(STEPS):
                    predictions = {b: model(z, 1000.0 / (i + 1), conds[b]) for b in self.guidance.branches(SCALE)}
                    z = z - 0.5 * self.guidance.combine(predictions, SCALE)
                    require_finite(z, f"step {i + 1}")
                    step()
            return unpack(sp.gather(z, sp.lengths(tokens.shape[1])), size, config.patch)

    def encode(self) -> Tensor:
        """Latents (1, C, *size) of a video."""
        vae, (time, rows, columns) = self.vae, self.size
        with self.stage_model("encoder", lambda: self._half("encoder", WanEncoder)) as encoder:
            video = torch.empty(1, 3, vae.time * (time - 1) + 1, rows * vae.space, columns * vae.space)
            with self.report.stage("encoding video"):
                given = video.to(self.mesh.device, self.dtype)
                moments = encode_moments(encoder, given, encoder.chunks(video.shape[2]), self.split)
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor | None:
        with self.stage_model("decoder", lambda: self._half("decoder", WanDecoder)) as decoder:
            plan = DecodePlan(self.scene.vae, 2, (32, 40) if self.scene.vae == "tiled" else None)
            with self.report.stage("decoding"):
                pieces = decode_frames(decoder, latents, plan, self.split)
                kept = [piece for piece in pieces if piece is not None]
        return torch.cat(kept) if kept else None

    def _transformer(self) -> WanTransformer:
        checkpoint, scene = open_checkpoint(self.folder / "transformer.safetensors"), self.scene
        placement = Placement(scene.offload, scene.shard, scene.dtype == "fp8")
        where = (self.mesh.device, self.dtype, exact_names(self.config), placement, self.mesh.weights)
        model = place(on_meta(WanTransformer, self.config, self.sp), checkpoint, None, *where)
        compile_transformer(model, CompileOptions(compile=scene.compiled, backend="eager"))
        return model

    def _half(self, name: str, build: Any) -> Any:
        checkpoint = open_checkpoint(self.folder / f"{name}.safetensors")
        return lay_out(load(on_meta(build, self.vae), checkpoint, None, self.mesh.device, self.dtype), self.mesh.device)
