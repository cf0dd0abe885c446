"""Which files of which repositories each program reads. No sizes here: the hub's own listing says them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Pick = Callable[[Sequence[str]], list[str] | None]
"""From the names in a repository to the ones that are needed; None when the repository does not have them."""


def file(name: str) -> Pick:
    """One file."""
    return lambda names: [name] if name in names else None


def weights(stem: str, *variants: str) -> Pick:
    """`<stem>.safetensors`, or the shards with their index. Of several variants ("" or "bf16") the first that is there.

    Both spellings of a sharded variant are in use: `model.bf16-00001-of-00002` and `model-00001-of-00002.bf16`.
    """

    def pick(names: Sequence[str]) -> list[str] | None:
        for variant in variants or ("",):
            dotted = f".{variant}" if variant else ""
            if (single := f"{stem}{dotted}.safetensors") in names:
                return [single]
            counted = r"-\d{5}-of-\d{5}"
            spellings = (rf"{re.escape(stem + dotted)}{counted}", rf"{re.escape(stem)}{counted}{re.escape(dotted)}")
            shards = [name for name in names if re.fullmatch(rf"({'|'.join(spellings)})\.safetensors", name)]
            if shards and (index := f"{stem}.safetensors.index{dotted}.json") in names:
                return [index, *sorted(shards)]
        return None

    return pick


def first(*picks: Pick) -> Pick:
    """The first of several ways that the repository has."""

    def pick(names: Sequence[str]) -> list[str] | None:
        for one in picks:
            if (found := one(names)) is not None:
                return found
        return None

    return pick


@dataclass(frozen=True)
class Part:
    """Some files of one repository. into: the folder under the target that they go to. licence: for the user's eyes."""

    what: str
    repo: str
    picks: tuple[Pick, ...]
    licence: str
    into: str = ""


@dataclass(frozen=True)
class Model:
    """One checkpoint. parts: for each part the places to take it from; the first that has all its files is taken."""

    folder: str
    parts: tuple[tuple[Part, ...], ...]


APACHE = "Apache-2.0"
COGVIDEOX = "CogVideoX licence (see the model card: registration for commercial use)"

_T5 = Part(
    "text encoder (T5 v1.1 XXL)",
    "",
    (
        file("text_encoder/config.json"),
        weights("text_encoder/model", "bf16", "fp16", ""),
        first(file("tokenizer/spiece.model"), file("tokenizer/tokenizer.json")),
    ),
    APACHE,
)
_GOOGLE_T5 = Part(
    "text encoder (T5 v1.1 XXL)",
    "google/t5-v1_1-xxl",
    (file("config.json"), first(weights("model"), file("pytorch_model.bin")), file("spiece.model")),
    APACHE,
    into="text_encoder",
)


def _diffusers(repo: str, licence: str, *more: Part) -> Model:
    def part(what: str, *picks: Pick) -> tuple[Part, ...]:
        return (Part(what, repo, picks, licence),)

    return Model(
        repo.split("/")[1],
        (
            part("settings", file("model_index.json"), file("scheduler/scheduler_config.json")),
            part("transformer", file("transformer/config.json"), weights("transformer/diffusion_pytorch_model")),
            part("autoencoder", file("vae/config.json"), weights("vae/diffusion_pytorch_model")),
            (replace(_T5, repo=repo),),
            *((one,) for one in more),
        ),
    )


def _mochi() -> Model:
    repo = "genmo/mochi-1-preview"
    return Model(
        "mochi-1-preview",
        (
            (Part("transformer", repo, (file("dit.safetensors"),), APACHE),),
            (Part("decoder", repo, (file("decoder.safetensors"),), APACHE),),
            # The repository's own copy is the encoder alone; Google's file holds the decoder half too.
            (replace(_T5, repo=repo), _GOOGLE_T5),
        ),
    )


def _faces(repo: str) -> tuple[Part, ...]:
    def part(what: str, licence: str, *names: str) -> Part:
        return Part(what, repo, tuple(file(f"face_encoder/{name}") for name in names), licence)

    return (
        part(
            "face detection and recognition (antelopev2)",
            "insightface: non-commercial research only",
            "models/antelopev2/scrfd_10g_bnkps.onnx",
            "models/antelopev2/glintr100.onnx",
        ),
        part("face landmarks and parsing", "see facexlib", "detection_Resnet50_Final.pth", "parsing_bisenet.pth"),
        part("image tower (EVA02-CLIP)", "see EVA-CLIP", "EVA02_CLIP_L_336_psz14_s6B.pt"),
    )


MODELS: dict[str, Model] = {
    "mochi": _mochi(),
    "cogvideox-2b": _diffusers("zai-org/CogVideoX-2b", APACHE),
    "cogvideox-5b": _diffusers("zai-org/CogVideoX-5b", COGVIDEOX),
    "cogvideox-5b-i2v": _diffusers("zai-org/CogVideoX-5b-I2V", COGVIDEOX),
    "cogvideox1.5-5b": _diffusers("zai-org/CogVideoX1.5-5B", COGVIDEOX),
    "cogvideox1.5-5b-i2v": _diffusers("zai-org/CogVideoX1.5-5B-I2V", COGVIDEOX),
    "consisid": _diffusers(
        "BestWishYsh/ConsisID-preview",
        "see the model card (built on CogVideoX-5b-I2V)",
        *_faces("BestWishYsh/ConsisID-preview"),
    ),
}
