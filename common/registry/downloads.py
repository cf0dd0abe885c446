"""Which files of which repositories a checkpoint consists of, as values; `xdit-download` fetches them.

No sizes here: the hub's own listing says them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

VARIANTS = ("", "bf16", "fp16")
"""Of the weights in one repository: the marks in their files' names."""


class Pick(Protocol):
    """Some files of a repository, chosen by name."""

    def __call__(self, names: Sequence[str]) -> list[str] | None:
        """From the names in a repository to the ones that are needed; None when the repository does not have them."""

    def missing(self, names: Sequence[str]) -> list[str]:
        """What has to be fetched beside the files `names` before a program can read these, as names or patterns."""


@dataclass(frozen=True)
class _File:
    name: str

    def __call__(self, names: Sequence[str]) -> list[str] | None:
        return [self.name] if self.name in names else None

    def missing(self, names: Sequence[str]) -> list[str]:
        return [] if self.name in names else [self.name]


@dataclass(frozen=True)
class _Weights:
    stem: str
    variants: tuple[str, ...]

    def __call__(self, names: Sequence[str]) -> list[str] | None:
        for variant in self.variants:
            if (single := self._single(variant)) in names:
                return [single]
            if (shards := self._shards(variant, names)) and (index := self._index(variant)) in names:
                return [index, *shards]
        return None

    def missing(self, names: Sequence[str]) -> list[str]:
        """Of the variants that are there every one has to be whole: which of them is read depends on the dtype."""
        begun, missing = False, []
        for variant in VARIANTS:
            shards, index = self._shards(variant, names), self._index(variant)
            begun |= self._single(variant) in names or bool(shards) or index in names
            if shards or index in names:
                missing += ([] if index in names else [index]) + self._lost(variant, shards)
        return missing if begun else [f"{self.stem}*"]

    def _lost(self, variant: str, shards: Sequence[str]) -> list[str]:
        """The shards whose numbers are not among those that are there."""
        if not shards:
            return [f"{self.stem}*{variant}*" if variant else f"{self.stem}*"]
        count = int(re.findall(r"-of-(\d{5})", shards[0])[0])
        spelling = re.sub(r"-\d{5}-of-", "-{:05}-of-", shards[0])
        return [name for i in range(count) if (name := spelling.format(i + 1)) not in shards]

    def _single(self, variant: str) -> str:
        return f"{self.stem}{_dotted(variant)}.safetensors"

    def _index(self, variant: str) -> str:
        return f"{self.stem}.safetensors.index{_dotted(variant)}.json"

    def _shards(self, variant: str, names: Sequence[str]) -> list[str]:
        """Both spellings are in use: `model.bf16-00001-of-00002` and `model-00001-of-00002.bf16`."""
        stem, dotted, number = re.escape(self.stem), re.escape(_dotted(variant)), r"-\d{5}-of-\d{5}"
        pattern = rf"({stem}{dotted}{number}|{stem}{number}{dotted})\.safetensors"
        return sorted(name for name in names if re.fullmatch(pattern, name))


def _dotted(variant: str) -> str:
    return f".{variant}" if variant else ""


@dataclass(frozen=True)
class _First:
    picks: tuple[Pick, ...]

    def __call__(self, names: Sequence[str]) -> list[str] | None:
        return next((files for one in self.picks if (files := one(names)) is not None), None)

    def missing(self, names: Sequence[str]) -> list[str]:
        ways = [one.missing(names) for one in self.picks]
        return [] if [] in ways else ways[0]


def file(name: str) -> Pick:
    """One file."""
    return _File(name)


def weights(stem: str, *variants: str) -> Pick:
    """`<stem>.safetensors`, or the shards with their index. Of several variants ("" or "bf16") the first that is there.

    stem: with the folder that it is in.
    """
    return _Weights(stem, variants or ("",))


def first(*picks: Pick) -> Pick:
    """The first of several ways that the repository has."""
    return _First(picks)


@dataclass(frozen=True)
class Part:
    """Some files of one repository."""

    what: str
    repo: str
    picks: tuple[Pick, ...]
    licence: str
    """Shown to the user."""
    into: str = ""
    """The folder under the target that they go to."""


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
