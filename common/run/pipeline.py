"""What the forks' pipelines share: a rank's place, text features, models that load and leave, the decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.model.compile import compile_decoder, compile_transformer
from common.parallel.device_memory import release_memory
from common.parallel.guidance import Guidance
from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Mesh, on_main, resolve_device
from common.parallel.usp import SequenceParallel
from common.parallel.xfuser import sequence_parallel
from common.registry.checks import interleave_problems
from common.registry.hub import checkpoint_folder, fork_of_class
from common.registry.settings import DecodeOptions, Runtime, default_dtype
from common.system.progress import Report
from common.text.encoder import Encoder, TextEncoder, TextFeatures
from common.text.t5 import EncoderFiles
from common.video.causal import lay_out
from common.video.decode import VideoDecoder
from common.video.decode_planning import KnownPlans
from common.video.decode_video import AllFrames, FrameSink, decode_video
from common.video.latents import save_latents
from common.weights.blocks import finish
from common.weights.dtypes import Precision
from common.weights.placement import Placement, check_model, held_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

    from common.run.quantize import TransformerFiles

TextBranch = tuple[Tensor, Tensor]
"""Features (1, L, D) of one guidance branch's prompt and the mask (1, L) of its tokens that are no padding."""


def check_output(output: str) -> None:
    """Raise ValueError for a kind of result that no pipeline has."""
    if output not in ("frames", "latent"):
        raise ValueError(f"output is {output!r}; choose frames or latent")


class Pipeline:
    """Loads each stage's model when its turn comes, and lets it go before the next one's.

    model_dir: the checkpoint's folder. mesh: this rank's place (`common.parallel.mesh.distributed`); without one, a
    single process on `device`. runtime: where and how it computes; options: fields of
    `common.registry.settings.Runtime` by name, in place of its own. report: where progress and times go.
    """

    config: Any
    """The transformer's numbers, of the fork's own class."""
    own_dtype = "bf16"
    """What the checkpoint was published in."""

    def __init__(
        self,
        model_dir: str | Path,
        mesh: Mesh | None = None,
        runtime: Runtime | None = None,
        report: Report | None = None,
        **options: Any,
    ) -> None:
        runtime = replace(runtime or Runtime(), **options)
        mesh = mesh or Mesh(device=resolve_device(runtime.device or "cpu"))
        if problems := interleave_problems(runtime.interleave_branches, mesh.layout.cfg, runtime.engine):
            raise ValueError("; ".join(problems))
        mesh = replace(mesh, interleaver=Interleaver() if runtime.interleave_branches else None)
        self.model_dir, self.mesh, self.device, self.runtime = Path(model_dir), mesh, mesh.device, runtime
        self.precision = Precision.of(runtime, default_dtype(mesh.device.type, self.own_dtype))
        self.dtype = self.precision.dtype
        self.placement = Placement(runtime.offload or "stage", runtime.shard_weights, self.precision.float8)
        self.report = report or Report(device=mesh.device)
        self.sp = sequence_parallel(mesh, runtime.attention, runtime.engine, runtime.overlap_groups or 1, self.dtype)
        self.guidance = Guidance(mesh.cfg)
        self._loaded: dict[str, Any] | None = None
        self._facts: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        mesh: Mesh | None = None,
        runtime: Runtime | None = None,
        report: Report | None = None,
        **options: Any,
    ) -> Self:
        """A pipeline over a checkpoint folder; only headers and json files are read here.

        model_dir: also the name of a repository, `owner/name`, of which the hub's local cache has a copy; nothing is
        downloaded. The other arguments as for the constructor. ValueError for a folder that is no checkpoint of this
        model or names something unknown, a repository that is not in the cache as a whole, a device or kernel that is
        not there, or more Ulysses ranks than attention heads.
        """
        if (fork := fork_of_class(cls)) is not None:
            own_text = (options.get("text_encoder_dir") or (runtime and runtime.text_encoder_dir)) is None
            model_dir = checkpoint_folder(model_dir, fork, own_text)
        return cls(model_dir, mesh, runtime, report, **options)

    @property
    def keeps(self) -> bool:
        """Whether models stay on the device between stages and calls."""
        return self.runtime.keep_loaded or self.runtime.offload == "none"

    @property
    def model_key(self) -> Any:
        """All that decides what this pipeline's models are: equal for two that can use each other's on one mesh.

        Not what hides exchanges, which is chosen by the size of a video; but a stream of weights knows whether guidance
        branches take turns.
        """
        in_turn = self.placement.streams and bool(self.runtime.interleave_branches)
        hidden = replace(self.runtime, overlap_groups=None, interleave_branches=in_turn)
        runtime = replace(hidden, keep_loaded=False, max_memory=None)
        return type(self).__qualname__, type(self).__module__, self.model_dir.absolute(), runtime

    @property
    def loaded(self) -> dict[str, Any]:
        """The models that are here now, by name: this pipeline's own, or those that the mesh keeps."""
        if self._loaded is None:
            cache = self.mesh.cache
            self._loaded = {} if cache is None else cache.of(self.model_key if self.keeps else None)
        return self._loaded

    @property
    def facts(self) -> dict[str, Any]:
        """What was found out with the models that are here; an empty one, kept nowhere, where there are none.

        It stays with models that stay, and with a pipeline that loads the same ones again.
        """
        cache = self.mesh.cache
        if cache is not None and cache.models and self.keeps and cache.key == self.model_key:
            return cache.facts
        return self._facts if self._loaded else {}

    def check_weights(self, sample: bool = True, text: bool = True, frames: bool = False) -> None:
        """Compare all tensors that a call would load with the models', by headers alone: names, shapes and dtypes.

        sample: there is something to sample, not only latents to decode. text: there is a prompt to encode. frames: it
        starts from pictures. CheckpointError names file and tensor, so that none is found missing after an hour. Done
        once while models stay.
        """
        checked = self.facts.setdefault("checked", set())
        if (sample, text, frames) in checked:
            return
        self.check_vae(frames)
        if sample:
            for files in self.transformer_files():
                check_model(files.module, files.checkpoint, files.rename)
            if text and self.mesh.is_main:
                self.check_text()
        checked.add((sample, text, frames))

    def check_text(self) -> None:
        """The text encoders' part of `check_weights`, on rank 0."""
        self.text_files().check(self.config.text_dim)

    def check_vae(self, frames: bool) -> None:
        """The autoencoder's part of `check_weights`: the decoder, and for frames the encoder."""
        raise NotImplementedError

    def transformer_files(self) -> tuple[TransformerFiles, ...]:
        """Of every transformer that takes a turn."""
        raise NotImplementedError

    def text_folder(self) -> Path:
        """Where the text encoder lies; ValueError when it is nowhere."""
        return Path(self.runtime.text_encoder_dir or self.model_dir)

    def text_files(self) -> Encoder:
        """The encoder that the model's text comes from, its files found; ValueError says what is missing."""
        return EncoderFiles.find(self.text_folder())

    @contextmanager
    def stage_model(self, name: str, load: Callable[[], Any]) -> Iterator[Any]:
        """The model `name`, loaded now or still there; it leaves the device afterwards unless models are kept.

        Any number of models take turns this way. The caller must not hold on to one: that is what keeps memory from
        falling.
        """
        if name not in self.loaded:
            # Not after the previous stage: its own frame still held the model then.
            release_memory()
            self.loaded[name] = load()
            if self.mesh.cache is not None:
                self.mesh.cache.loadings += 1
        model = self.loaded[name]
        if isinstance(sp := getattr(model, "sp", None), SequenceParallel):
            # It may be another pipeline's, whose video was of another size.
            sp.groups, sp.interleaver = self.sp.groups, self.sp.interleaver
        try:
            yield model
            if not self.keeps and isinstance(model, nn.Module):
                finish(model)
        finally:
            if not self.keeps:
                del self.loaded[name]

    def encode_text(
        self, prompts: Mapping[int, str], limit: int, use_mask: bool, find: Callable[[], Encoder] | None = None
    ) -> dict[int, TextBranch]:
        """Features of each branch's prompt, on every rank. The encoder runs on rank 0 alone and is gone before this
        returns.

        limit: tokens, longer prompts are truncated with a warning. use_mask: whether padding is kept from the encoder
        too. find: the encoder, for models with several or another one; default: `text_files`. Collective.
        """

        def encode() -> TextFeatures:
            files = (find or self.text_files)()
            name = "text encoder" if find is None else f"text encoder {files.name}"
            with self.stage_model(name, partial(self._text_encoder, files)) as encoder, self.report.stage("encoding"):
                return encoder.encode(list(prompts.values()), limit, use_mask)

        with self.report.stage("text features", quiet=True):
            encoded = on_main(self.mesh, encode)
        text = {}
        for i, (branch, prompt) in enumerate(prompts.items()):
            text[branch] = (encoded.features[i : i + 1], encoded.mask[i : i + 1])
            self.report.note(f"{'negative ' if branch else ''}prompt: {encoded.num_tokens[i]} of {limit} tokens")
            if encoded.truncated[i]:
                self.report.warn(
                    f"the prompt {prompt[:40]!r}... is too long; this was cut off: {encoded.truncated[i]!r}"
                )
        return text

    def _text_encoder(self, files: Encoder) -> TextEncoder:
        with self.report.stage("loading text encoder"):
            return TextEncoder(
                files,
                self.device,
                self.precision.text,
                self.runtime.text_cache,
                float8=self.precision.text_float8,
                stream=self.placement.streams,
            )

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, options: DecodeOptions | None = None, frames: FrameSink | None = None
    ) -> Tensor | None:
        """Latents (1, C, T, h, w) to all frames, uint8 (frames, 8h, 8w, 3) on rank 0, None elsewhere. Collective.

        frames: takes them on rank 0, a chunk at a time, instead; then None is returned.
        """
        all_frames = AllFrames()
        with self.stage_model("decoder", self._compiled_decoder) as decoder:
            most = self.runtime.max_bytes
            room = None if most is None else most - self._held()
            plans = self.facts.setdefault("plans", KnownPlans())
            how = (options or DecodeOptions(), self.report, frames or all_frames, room, plans)
            decode_video(decoder, latents, self.mesh, *how)
        return all_frames.frames

    def finished(
        self, latents: Tensor, output: str, file: str | Path | None, decode: DecodeOptions | None, **about: Any
    ) -> Tensor | None:
        """What a call gives back: the final latents, or the frames that `decode` makes of them. Collective.

        file: where rank 0 keeps the latents first, with what `about` tells of them.
        """
        if file is not None and self.mesh.is_main:
            save_latents(file, latents, about, self.report.warn)
        return latents if output == "latent" else self.decode(latents, decode)

    def _held(self) -> int:
        """Bytes of the weights that are loaded here now."""
        return held_bytes(self.loaded.values())

    def load_decoder(self) -> VideoDecoder:
        raise NotImplementedError

    def _compiled_decoder(self) -> VideoDecoder:
        decoder = lay_out(self.load_decoder(), self.device)
        compile_decoder(decoder, self.runtime.compiling)
        return decoder

    def load_transformer(self) -> nn.Module:
        """The fork's transformer, loaded as `placement` says."""
        raise NotImplementedError

    def compiled_transformer(self) -> Any:
        model = self.load_transformer()
        compile_transformer(model, self.runtime.compiling)
        return model
