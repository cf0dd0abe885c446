"""The forks' pipelines on fake GPUs: what stands for files, text and pictures, and what the host may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import cogvideox_xdit.pipeline
import common.weights.blocks
import common.weights.load
import consisid_xdit.pipeline
import wan_xdit.pipeline
from cogvideox_xdit import CogVideoXPipeline
from common.parallel.mesh import Mesh
from common.registry.settings import CompileOptions, DecodeOptions
from common.text.encoder import TextFeatures
from common.video.decode_planning import KnownPlans
from consisid_xdit import ConsisIDPipeline
from consisid_xdit.face import IdentityFeatures
from consisid_xdit.sampling import PATCHES
from mochi_xdit import MochiPipeline
from tests.rehearsal.models import MODELS
from tests.rehearsal.packages import installed
from tests.rehearsal.scene import STEPS, WORDS, Scene
from tests.rehearsal.trace import HOST, READER
from tests.rehearsal.tracer import Tracer
from wan_xdit import WanPipeline

KINDS = {"mochi": MochiPipeline, "consisid": ConsisIDPipeline, "wan": WanPipeline}


class Said:
    """In place of a text encoder: features as it gives them, on the CPU."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, prompts: list[str], limit: int, use_mask: bool) -> TextFeatures:
        features = torch.empty(len(prompts), limit, self.width)
        mask = torch.empty(len(prompts), limit, dtype=torch.bool)
        return TextFeatures(features, mask, (WORDS,) * len(prompts), ("",) * len(prompts))


class Locked:
    """In place of `common.weights.blocks.Pinned`: page-locked memory by name."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def release(self) -> None:
        return None


class OneThread:
    """In place of a pool of one thread: what it is given is done at once, and is seen as that thread's."""

    tracer: Tracer

    def __init__(self, workers: int, name: str, start: Any = None, given: tuple[Any, ...] = ()) -> None:
        if start is not None:
            start(*given)

    def submit(self, call: Callable[..., Any], *args: Any) -> Any:
        with self.tracer.other_thread():
            call(*args)

        def result() -> None:
            self.tracer.join(HOST, self.tracer.clocks[READER])

        return SimpleNamespace(result=result)


@contextmanager
def stand_ins(tracer: Tracer) -> Iterator[None]:
    """What reads files and pictures is left out; what it fills is there."""
    threads = type("OneThread", (OneThread,), {"tracer": tracer})
    solver = cogvideox_xdit.pipeline.Solver

    def outside(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # it makes its tables by reading numbers
            return solver(*args, **kwargs)

    def image(source: Any, height: int, width: int, *fit: Any) -> Tensor:
        return torch.empty(1, height, width, 3, dtype=torch.uint8)

    def video(source: Any, height: int, width: int, frames: int, *fit: Any) -> Tensor:
        return torch.empty(frames, height, width, 3, dtype=torch.uint8)

    def picture(source: Any) -> Any:
        with unset_fake_temporarily():
            return np.zeros((480, 832, 3), np.uint8)

    with (
        installed(),
        mock.patch.object(common.weights.load._FileReader, "_bytes", lambda *_: None),
        mock.patch.multiple(common.weights.blocks, Pinned=Locked, ThreadPoolExecutor=threads),
        # Counted on the meta device, which takes as long as two chunks: every plan fits.
        mock.patch.object(KnownPlans, "count", lambda *_: 2**30),
        mock.patch.multiple(cogvideox_xdit.pipeline, Solver=outside, image_frames=image, video_frames=video),
        mock.patch.multiple(consisid_xdit.pipeline, image_frames=image),
        mock.patch.multiple(wan_xdit.pipeline, image_frames=image, as_array=picture),
    ):
        yield


def generate(scene: Scene, folder: Path, mesh: Mesh, tracer: Tracer) -> Tensor | None:
    """One video by the fork's pipeline: text, encode where it starts from a picture, two steps, decode."""
    kind = KINDS.get(scene.model.split("-")[0], CogVideoXPipeline)
    options = {"scheduler": scene.scheduler} if issubclass(kind, CogVideoXPipeline) else {}
    model = MODELS[scene.model]
    with stand_ins(tracer):
        pipe = kind.from_pretrained(
            folder,
            mesh=mesh,
            dtype=scene.dtype,
            attention=scene.attention,
            offload=scene.offload,
            shard_weights=scene.shard,
            compiling=CompileOptions(compile=scene.compiled, backend="eager"),
            overlap_groups=scene.groups,
            interleave_branches=scene.turns,
            report=tracer.steps,
            **options,
        )
        pipe.text_files = lambda: None  # type: ignore[method-assign,assign,return-value]
        pipe._text_encoder = lambda files: Said(model.text_width)  # type: ignore[method-assign]
        given: dict[str, Any] = {"negative_prompt": "blurred"}
        if kind is MochiPipeline or scene.latents is not None:
            given["num_frames"] = model.frames(scene.latents)
        if kind is ConsisIDPipeline:
            given["identity"] = identity(model.config)
        elif scene.model == "wan-ti2v-5b":
            given["image"] = "picture.png"
        elif scene.video:
            given |= {"video": "clip.mp4", "strength": 1.0}
        elif getattr(model.config, "image_channels", None):
            given["image"] = "picture.png"
        with no_cuda_for_dynamo(scene.compiled):
            return pipe("a boat", num_steps=STEPS, decode=DecodeOptions(scene.vae), output=scene.output, **given)


def no_cuda_for_dynamo(compiled: bool) -> AbstractContextManager[object]:
    """Else dynamo would save and restore the state of a CUDA that this PyTorch may not have."""
    return mock.patch.object(torch.cuda, "is_available", lambda: False) if compiled else nullcontext()


def identity(config: Any) -> IdentityFeatures:
    """Of one person, as the face models give them."""
    hidden = tuple(torch.empty(1, PATCHES, config.vit_dim) for _ in range(config.scales))
    image = torch.empty(512, 512, 3, dtype=torch.uint8)
    return IdentityFeatures(torch.empty(1, config.id_dim), hidden, image, torch.empty(5, 2))
