"""Checkpoints by the names that their publishers gave them: copies in the hub's local cache. No network, no torch.

The cache is huggingface_hub's, where diffusers and `hf download` keep what they fetched; HF_HOME and HF_HUB_CACHE say
where it is.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.registry.downloads import Part
from common.registry.forks import Fork, Model, fork_of, forks, models
from common.system.files import absence, kind_of, shown

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:https?:/+)?(?:huggingface\.co/)?({_PART}/{_PART})/?", re.ASCII)
_TEXT = ("text_encoder/", "tokenizer/")
_SHOWN = 3
"""Names of missing files that an error lists."""


def checkpoint_folder(checkpoint: str | Path, fork: Fork | None, text: bool = True) -> Path:
    """A checkpoint's folder: `checkpoint` itself, or the copy of a repository `owner/name` in the hub's local cache.

    fork: whose it has to be; None: anybody's. text: whether the text encoder has to be there. ValueError says what is
    missing, and the command that fetches it.
    """
    path = Path(checkpoint)
    kind = kind_of(path)
    if kind == "folder":
        return path
    match = _ID.fullmatch(str(checkpoint))
    if kind is not None or match is None:
        raise ValueError(f"{absence(path, 'folder')}{_named(path)}")
    repo = match[1]
    model = _published(repo)
    if model is not None and fork is not None and model.name not in fork.names:
        raise ValueError(f"{repo} is a checkpoint of {model.title}; use {fork_of(model).program}")
    snapshot = cached(repo)
    if snapshot is None:
        raise ValueError(_absent(repo, model))
    missing = [] if model is None else _missing(model, repo, snapshot, text)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{repo} is in the hub's local cache, but not all of it: {', '.join(missing[:_SHOWN])}{more} "
            f"{'is' if len(missing) == 1 else 'are'} missing; fetch what is missing with: {_completing(repo, missing)}"
        )
    return snapshot


def other_program(folder: Path | None, fork: Fork) -> str:
    """The end of an error: whose checkpoint a folder is that is none of `fork`'s; empty where it is nobody's."""
    for other in forks():
        if folder is not None and other.name != fork.name and other.read_rules is not None:
            with suppress(ValueError, OSError):
                other.read_rules(folder)
                return f"; it is a checkpoint of {other.title}: use {other.program}"
    return ""


def cached(repo: str) -> Path | None:
    """The folder that the hub's local cache has of a repository's main branch; parts of it may be missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No pattern: whether the copy is whole is asked of the files that are read, not of all that were published.
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, OSError, ValueError):  # ValueError: no repository can have this name
        return None


def lacks(part: Part, folder: Path) -> list[str]:
    """Names or patterns of the files of a part that are not in a copy of its repository."""
    names = _names(folder)
    return [name for pick in part.picks for name in pick.missing(names)]


def _names(folder: Path) -> list[str]:
    """Of a copy's files; a link whose file is gone is none."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _missing(model: Model, repo: str, snapshot: Path, text: bool) -> list[str]:
    """What a copy lacks, in the layout in which it lacks least."""
    ways = []
    for layout in (model.files, *model.layouts):
        missing = [name for places in layout for name in _missing_part(places, repo, snapshot)]
        ways.append([name for name in dict.fromkeys(missing) if text or not name.startswith(_TEXT)])
    return min(ways, key=len, default=[])


def _missing_part(places: Sequence[Part], repo: str, snapshot: Path) -> list[str]:
    """What the first place lacks; nothing when any of them is whole."""
    here = places[0].repo
    ways = []
    for part in places:
        folder = snapshot if part.repo == here else cached(part.repo)
        ways.append(["?"] if folder is None else lacks(part, folder))
    return [] if [] in ways else ways[0]


def _completing(repo: str, missing: Sequence[str]) -> str:
    if any("*" in name for name in missing):
        missing = [word for name in missing for word in ("--include", name)]
    return shlex.join(["hf", "download", repo, *missing])


def _published(repo: str) -> Model | None:
    """The model of a repository, or of one that bears its name: another owner's copy, or an owner's old name."""
    catalogue = models()
    same = [model for model in catalogue if model.repo.lower() == repo.lower()]
    name = repo.split("/")[1].lower()
    return next(iter(same + [model for model in catalogue if model.repo.split("/")[-1].lower() == name]), None)


def _absent(repo: str, model: Model | None) -> str:
    where = (
        f"{shown(repo)} does not exist, and the hub's local cache ({shown(_place())}) has no repository of this name"
    )
    if model is not None:
        return f"{where}; fetch it with: xdit-download {model.name}"
    by_repo = {m.repo: m for m in models() if m.repo}
    spellings = {name.lower(): name for name in by_repo}
    if near := difflib.get_close_matches(repo.lower(), spellings, n=1, cutoff=0.75):
        suggestion = spellings[near[0]]
        return f"{where}; did you mean {suggestion}? It is fetched with: xdit-download {by_repo[suggestion].name}"
    return where


def _named(path: Path) -> str:
    """The command that makes a folder of this name, where it is that of a model."""
    model = next((m for m in models() if path.name.lower() in (m.folder.lower(), m.name)), None)
    if model is None or path.exists():
        return ""
    return f"; fetch it with: {shlex.join(['xdit-download', model.name, '--dir', shown(path)])}"


def _place() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def fork_of_class(kind: type) -> Fork | None:
    """The fork whose pipeline a class is, or is derived from."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((fork for package in packages for fork in forks() if fork.package == package), None)
