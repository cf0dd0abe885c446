"""What the forks' pipelines share: a rank's place, text features, stages that load and leave, the decode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.compile import Compile
from common.decode import AgreedPlans, VideoDecoder
from common.generation import Models, decode_video, parse_dtype
from common.guidance import Guidance
from common.parallel import Mesh, on_main, resolve_device
from common.placement import Placement, check_model, resident_bytes
from common.progress import Stages
from common.t5 import EncoderFiles
from common.text import Encoder, TextEncoder, TextFeatures
from common.vae import lay_out
from common.xfuser_engine import sequence_parallel

if TYPE_CHECKING:
    from common.quantize import TransformerFiles

GIB = 2**30

TextBranch = tuple[Tensor, Tensor]
"""Features (1, L, D) of one guidance branch's prompt and the mask (1, L) of its tokens that are no padding."""


class Pipeline:
    """Loads each stage's model when its turn comes, and lets it go before the next one's.

    model_dir: the checkpoint's folder. mesh: this rank's place (`common.parallel.distributed`); without one, a single
    process on `device`. dtype: of the blocks; `fp8`: bf16 with matmul weights in float8. attention, engine: kernel, see
    `common.attention`, and who spreads it, see `common.xfuser_engine`. keep_loaded: models stay on the device between
    calls. stages: where progress and times go. text_encoder_dir: the T5 encoder's folder, where it is not in the
    checkpoint's. text_cache: folder that keeps text features between runs. text_dtype: of the T5 encoder; default: as
    `dtype`, bf16 for fp8. offload, shard_weights: where weights are, see `common.placement.Placement`; by default one
    stage's are on the device. compiling: a `common.compile.Compile`, or its fields. overlap_groups: groups of heads
    that travel apart, see `common.usp.SequenceParallel`. max_memory: GiB that this rank may use on its device, which
    the decode keeps to; default: what is free.
    """

    config: Any
    """The transformer's numbers, of the fork's own class."""

    def __init__(
        self,
        model_dir: str | Path,
        mesh: Mesh | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "bf16",
        attention: str = "auto",
        engine: str = "native",
        keep_loaded: bool = False,
        stages: Stages | None = None,
        text_encoder_dir: str | Path | None = None,
        text_cache: str | Path | None = None,
        text_dtype: str | torch.dtype | None = None,
        offload: str | None = None,
        shard_weights: bool = False,
        compiling: Compile | Mapping[str, Any] | None = None,
        overlap_groups: int = 1,
        max_memory: float | None = None,
    ) -> None:
        mesh = mesh or Mesh(device=resolve_device(device or "cpu"))
        float8 = dtype == "fp8"
        self.mesh, self.device, self.dtype = mesh, mesh.device, parse_dtype("bf16" if float8 else dtype)
        self.text_float8 = text_dtype == "fp8"
        self.text_dtype = self.dtype if text_dtype in (None, "fp8") else parse_dtype(text_dtype)
        self.compiling = compiling if isinstance(compiling, Compile) else Compile(**(compiling or {}))
        self.placement = Placement(offload or "stage", shard_weights, float8)
        self.model_dir = Path(model_dir)
        self.text_encoder_dir, self.text_cache = text_encoder_dir, text_cache
        self.stages = stages or Stages(device=mesh.device)
        self.sp = sequence_parallel(mesh, attention, engine, overlap_groups, self.dtype)
        self.guidance = Guidance(mesh.cfg)
        self.models = Models(keep_loaded or offload == "none")
        self.agreed_plans: AgreedPlans = {}
        self.max_memory = None if max_memory is None else int(max_memory * GIB)

    def check_weights(self, sample: bool = True, text: bool = True, frames: bool = False) -> None:
        """Compare all tensors that a call would load with the models', by headers alone: names, shapes and dtypes.

        sample: there is something to sample, not only latents to decode. text: there is a prompt to encode. frames: it
        starts from pictures. CheckpointError names file and tensor, so that none is found missing after an hour.
        """
        self.check_vae(frames)
        if not sample:
            return
        files = self.transformer_files()
        check_model(files.module, files.checkpoint, files.rename)
        if text and self.mesh.is_main:
            self.text_files().check(self.config.text_dim)

    def check_vae(self, frames: bool) -> None:
        """The autoencoder's part of `check_weights`: the decoder, and for frames the encoder."""
        raise NotImplementedError

    def transformer_files(self) -> TransformerFiles:
        raise NotImplementedError

    def text_folder(self) -> Path:
        """Where the T5 encoder lies; ValueError when it is nowhere."""
        return Path(self.text_encoder_dir) if self.text_encoder_dir else self.model_dir

    def text_files(self) -> Encoder:
        """The encoder that the model's text comes from, its files found; ValueError says what is missing."""
        return EncoderFiles.find(self.text_folder())

    def encode_text(self, prompts: Mapping[int, str], limit: int, use_mask: bool) -> dict[int, TextBranch]:
        """Features of each branch's prompt, on every rank. T5 runs on rank 0 alone and is gone before this returns.

        limit: tokens, longer prompts are cut with a warning. use_mask: whether padding is kept from T5 too. Collective.
        """

        def encode() -> TextFeatures:
            with self.models.use("text encoder", self._load_text_encoder) as encoder, self.stages.stage("encoding"):
                return encoder.encode(list(prompts.values()), limit, use_mask)

        with self.stages.stage("text features", quiet=True):
            found = on_main(self.mesh, encode)
        text = {}
        for i, (branch, said) in enumerate(prompts.items()):
            text[branch] = (found.features[i : i + 1], found.mask[i : i + 1])
            self.stages.note(f"{'negative ' if branch else ''}prompt: {found.used[i]} of {limit} tokens")
            if found.cut[i]:
                self.stages.warn(f"the prompt {said[:40]!r}... is too long; this was cut off: {found.cut[i]!r}")
        return text

    def _load_text_encoder(self) -> TextEncoder:
        with self.stages.stage("loading text encoder"):
            return TextEncoder(
                self.text_files(),
                self.device,
                self.text_dtype,
                self.text_cache,
                float8=self.text_float8,
                stream=self.placement.streams,
            )

    def decode(
        self,
        latents: Tensor,
        vae: str = "auto",
        vae_chunk: int | None = None,
        vae_tile: int | tuple[int, int] | None = None,
    ) -> Tensor | None:
        """Latents (1, C, T, h, w) to all frames, uint8 (frames, 8h, 8w, 3) on rank 0, None elsewhere. Collective.

        vae, vae_chunk, vae_tile: how, see `common.decode.decode_plans`; the tile is (height, width) or its side, in
        pixels.
        """
        with self.models.use("decoder", self._compiled_decoder) as decoder:
            tile = None
            if vae_tile is not None:
                height, width = (vae_tile, vae_tile) if isinstance(vae_tile, int) else vae_tile
                tile = (height // decoder.scale, width // decoder.scale)
            return decode_video(
                decoder,
                latents,
                self.mesh,
                self.stages,
                vae,
                vae_chunk,
                tile,
                None if self.max_memory is None else self.max_memory - self._held(),
                self.agreed_plans,
            )

    def _held(self) -> int:
        """Bytes of the weights that are loaded here now."""
        loaded = [m.model if isinstance(m, TextEncoder) else m for m in self.models.loaded.values()]
        return sum(resident_bytes(model) for model in loaded if isinstance(model, nn.Module))

    def _load_decoder(self) -> VideoDecoder:
        raise NotImplementedError

    def _compiled_decoder(self) -> VideoDecoder:
        decoder = lay_out(self._load_decoder(), self.device)
        self.compiling.decoder(decoder)
        return decoder

    def _load_transformer(self) -> nn.Module:
        raise NotImplementedError

    def _compiled_transformer(self) -> Any:
        """The fork's transformer, loaded as `placement` says and compiled as `compiling` says."""
        model = self._load_transformer()
        self.compiling.transformer(model)
        return model
