"""Which files of which repositories a checkpoint consists of, as values; `xdit-download` fetches them.

No sizes here: the hub's own listing says them.
"""

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


APACHE = "Apache-2.0"

T5 = Part(
    "text encoder (T5 v1.1 XXL)",
    "",
    (
        file("text_encoder/config.json"),
        weights("text_encoder/model", "bf16", "fp16", ""),
        first(file("tokenizer/spiece.model"), file("tokenizer/tokenizer.json")),
    ),
    APACHE,
)
GOOGLE_T5 = Part(
    "text encoder (T5 v1.1 XXL)",
    "google/t5-v1_1-xxl",
    (file("config.json"), first(weights("model"), file("pytorch_model.bin")), file("spiece.model")),
    APACHE,
    into="text_encoder",
)


def t5_of(repo: str) -> Part:
    """T5 v1.1 XXL as a repository in the diffusers layout has it."""
    return replace(T5, repo=repo)


def diffusers_files(repo: str, licence: str, *more: Part) -> tuple[tuple[Part, ...], ...]:
    """A repository in the diffusers layout, with T5, and `more` parts."""

    def part(what: str, *picks: Pick) -> tuple[Part, ...]:
        return (Part(what, repo, picks, licence),)

    return (
        part("settings", file("model_index.json"), file("scheduler/scheduler_config.json")),
        part("transformer", file("transformer/config.json"), weights("transformer/diffusion_pytorch_model")),
        part("autoencoder", file("vae/config.json"), weights("vae/diffusion_pytorch_model")),
        (t5_of(repo),),
        *((one,) for one in more),
    )
