"""From a Model to files on disk: list, compare with what is there, check the room, fetch, verify.

Files grow under a name that carries the hub's hash of their content, so that an interrupted download goes on where it
was, in the same process or a later one, and never mixes two versions.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.registry.downloads import Part
from common.registry.forks import Model
from common.system.units import gb

BLOCK = 1 << 22


class DownloadError(Exception):
    """Why the download cannot go on, in one line."""


@dataclass(frozen=True)
class RemoteFile:
    """One file: where it is, where it goes."""

    part: Part
    name: str
    path: Path
    size: int
    revision: str
    digest: str
    """The hub's name for its content."""
    sha256: str | None
    """Of the content, where the hub knows it."""

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{self.digest[:12]}.part")

    @property
    def missing(self) -> int:
        """Bytes still to fetch."""
        if self.path.is_file() and self.path.stat().st_size == self.size:
            return 0
        return self.size - min(self.size, self.partial.stat().st_size if self.partial.is_file() else 0)


@contextmanager
def _plain_words(what: str) -> Iterator[None]:
    """Turn what the hub's client raises into one DownloadError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise DownloadError(f"cannot fetch {what}: HF_HUB_OFFLINE is set; unset it to download") from None
    except errors.GatedRepoError:
        raise DownloadError(
            f"{what}: the hub wants you to accept the licence on its page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(f"{what}: the hub has no such repository, or it is private (`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{what}: the hub has no such revision") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "unknown"
        raise DownloadError(f"cannot fetch {what}: the hub answered with status {status}; try again later") from None
    except OSError as error:
        raise DownloadError(f"cannot fetch {what}: {error.strerror or _first_line(error)}") from None
    except Exception as error:
        # The client's transport errors share no base class with OSError; other exceptions are faults of ours.
        if _is_transport_error(error):
            raise DownloadError(
                f"cannot reach the hub for {what} ({_first_line(error)}); is there a network?"
            ) from None
        raise


def _is_transport_error(error: BaseException) -> bool:
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def plan(model: Model, folder: Path, revision: str | None = None) -> list[RemoteFile]:
    """The files `model` needs, as they lie on the hub now. DownloadError when it cannot be asked or lacks them."""
    listings: dict[str, Any] = {}

    def listing(repo: str) -> Any:
        from huggingface_hub import HfApi

        if repo not in listings:
            with _plain_words(repo):
                # A revision names a commit of the model's own repository, not of the one T5 comes from.
                at = revision if repo == model.files[0][0].repo else None
                listings[repo] = HfApi().model_info(repo, files_metadata=True, revision=at)
        return listings[repo]

    downloads = []
    for places in model.files:
        for part in places:
            info = listing(part.repo)
            files = {entry.rfilename: entry for entry in info.siblings or []}
            matches = [pick(list(files)) for pick in part.picks]
            if all(names is not None for names in matches):
                downloads += [
                    _remote_file(part, files[name], folder, info.sha) for names in matches for name in names or []
                ]
                break
        else:
            raise DownloadError(f"{' and '.join(p.repo for p in places)} lack files of the {places[0].what}")
    return downloads


def _remote_file(part: Part, entry: Any, folder: Path, revision: str) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    path = folder / part.into / entry.rfilename
    digest = sha256 or entry.blob_id or revision
    if entry.size is None:
        raise DownloadError(f"{part.repo}: the hub does not say how large {entry.rfilename} is")
    return RemoteFile(part, entry.rfilename, path, entry.size, revision, digest, sha256)


def free_room(folder: Path) -> int:
    """Bytes free on the disk that `folder` is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_room(files: Sequence[RemoteFile], folder: Path) -> None:
    """Make the folder. DownloadError when its disk has no room for what is missing, or it cannot be written."""
    needed, free = sum(one.missing for one in files), free_room(folder)
    if needed > free:
        raise DownloadError(
            f"{gb(needed)} are to be fetched, but only {gb(free)} are free for {folder}; "
            f"free {gb(needed - free)} more, or name another disk with --dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"the folder {folder} cannot be made: {error.strerror}") from None


def fetch(one: RemoteFile) -> None:
    """Bring one file to its place, going on with what is there of it. DownloadError when its size is not the hub's."""
    if one.path.is_file() and one.path.stat().st_size == one.size:
        return
    with _plain_words(f"{one.part.repo}/{one.name}"):
        one.path.parent.mkdir(parents=True, exist_ok=True)
        if not one.partial.is_file() or one.partial.stat().st_size > one.size:
            one.partial.write_bytes(b"")
        try:
            _transfer(one)
        except OSError as error:
            # The client's complaint about a size is the one without a number; what came is of no use then.
            if type(error) is not OSError or error.errno is not None:
                raise
    have = one.partial.stat().st_size
    if have != one.size:
        one.partial.unlink()
        raise DownloadError(f"{one.name}: {have} bytes came, the hub says {one.size}; start the command again")
    one.partial.replace(one.path)


def _transfer(one: RemoteFile) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled
    # Compressed answers could not be continued at a byte position.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with open(one.partial, "r+b") as file:
        have = file.seek(0, 2)
        http_get(
            hf_hub_url(one.part.repo, one.name, revision=one.revision),
            file,
            resume_size=have,
            headers=headers,
            expected_size=one.size,
            displayed_filename=one.name,
        )


def verify(one: RemoteFile) -> None:
    """DownloadError unless the file's content is what the hub says, where the hub knows (large files)."""
    if one.sha256 is None:
        return
    digest = hashlib.sha256()
    with open(one.path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != one.sha256:
        one.path.unlink()
        raise DownloadError(
            f"{one.name} is damaged (its hash is not the hub's) and was removed; start the command again"
        )
