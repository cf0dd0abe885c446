"""Files that a run writes: names that fit and that one run holds at a time, files that are whole or absent.

Everything here looks at names and folders alone; no torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows, where files are not locked
    fcntl = None  # type: ignore[assignment]

PROBE_BYTES = 65536
MOST_CLAIMED = 64
"""Of a command's outputs so many are locked at once: each takes a file descriptor."""


class WriteError(OSError):
    """Why a file cannot be written, in words, with the name that the user gave it."""


class Partial:
    """A file that grows under a hidden name of its own and gets its name when it is complete.

        with Partial(path) as partial:
            ... write to partial.name ...
            partial.commit()

    The hidden name is created exclusively and locked while it is written, so that nobody else writes to it and
    `remove_partial` can tell it from one that a dead run left. Leaving without `commit` removes it. Raises WriteError.
    """

    _mode = 0o666

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._descriptor, name = self._make(f".{path.stem}.", f".partial{path.suffix}", path.parent)
        self.name = Path(name)
        _lock(self._descriptor)
        mask = os.umask(0)
        os.umask(mask)
        self._mode &= ~mask
        with suppress(OSError):
            os.fchmod(self._descriptor, self._mode)  # tempfile's are for their owner's eyes only

    def _make(self, prefix: str, suffix: str, folder: Path) -> tuple[int, str]:
        return tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):
            self.name.unlink()
        with suppress(OSError):
            os.close(self._descriptor)

    def commit(self) -> None:
        """Flush the file to the disk, which may find out only now that it is full, and give it its name."""
        with writing(self.path):
            with suppress(OSError):
                os.chmod(self.name, self._mode)  # a library may have put a file of its own under the name
            _flush(self.name)
            os.replace(self.name, self.path)


class PartialFolder(Partial):
    """A folder of files that grows under a hidden name and gets its name when all of it is complete, as `Partial` does.

    own: what the names of its files look like. A folder that has the name already is replaced when it holds nothing
    else, by two renames: one run's files and another's are never mixed, and nothing that a user keeps there is lost.
    """

    _mode = 0o777

    def __init__(self, path: Path, own: re.Pattern[str]) -> None:
        super().__init__(path)
        self.own = own

    def _make(self, prefix: str, suffix: str, folder: Path) -> tuple[int, str]:
        name = tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=folder)
        return os.open(name, os.O_RDONLY), name

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.name, ignore_errors=True)
        with suppress(OSError):
            os.close(self._descriptor)

    def commit(self) -> None:
        """Flush the files to the disk and give the folder its name. WriteError where a folder holds something else."""
        with writing(self.path):
            for file in self.name.iterdir():
                _flush(file)
            if problem := replacing_problem(self.path, self.own):
                raise WriteError(f"cannot write {problem}")
            if kind_of(self.path) is None:
                os.rename(self.name, self.path)
                return
            aside = tempfile.mkdtemp(prefix=f".{self.path.stem}.", dir=self.path.parent)
            os.rename(self.path, aside)
            try:
                os.rename(self.name, self.path)
            except OSError:
                os.rename(aside, self.path)
                raise
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside becomes a WriteError with the name that the user knows, not the hidden one."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        write_error = WriteError(f"cannot write {shown(path)}: {error.strerror or error}")
        write_error.errno = error.errno
        raise write_error from None


def write_file(path: Path, content: bytes) -> None:
    """A file of this content, whole or not at all. Raises WriteError."""
    with Partial(path) as partial, writing(path):
        partial.name.write_bytes(content)
        partial.commit()


def _flush(path: Path) -> None:
    """To the disk, which may find out only now that it is full."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_partial(path: Path) -> None:
    """Remove what dead runs left of what was to be `path`; never raises, and leaves live runs' files alone.

    Where the file system has no locks the two cannot be told apart, and all are left.
    """
    with suppress(OSError):
        names = [
            n
            for n in os.listdir(path.parent)
            if n.startswith(f".{path.stem}.") and n.endswith(f".partial{path.suffix}")
        ]
        for name in names:
            with suppress(OSError):
                partial = path.parent / name
                descriptor = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
                try:
                    if _lock(descriptor):
                        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
                finally:
                    os.close(descriptor)


@contextmanager
def claimed(outputs: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Hold these names against other runs, on this machine or on a shared disk that knows locks.

    Yields what gives them back early, for a process that ends without leaving. A run that ends in any way gives its
    names back; killed, it leaves the empty hidden file that was locked. Raises ValueError, with what to do, for a name
    that another run holds. Of many outputs the first and the last are held.
    """
    if len(outputs) > MOST_CLAIMED:
        outputs = [*outputs[: MOST_CLAIMED - 1], outputs[-1]]
    with ExitStack() as stack:
        for output in outputs:
            stack.enter_context(_claimed(output))
        yield stack.close


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    lock = output.with_name(f".{output.name}.lock")
    try:
        descriptor = _open_locked(lock)
    except OSError:
        # A folder that takes no further file says so when the output itself is probed.
        yield
        return
    if descriptor is None:
        raise ValueError(f"--output {shown(output)}: another run is writing it; wait for that, or give another name")
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is still locked: whoever opens it meanwhile sees that it is gone
        os.close(descriptor)


def _open_locked(lock: Path) -> int | None:
    """A descriptor that holds `lock`; None when another run does."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if _lock(descriptor) is False:
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)  # its last holder has just removed it: take the next one


def _lock(descriptor: int) -> bool | None:
    """Lock an open file; False when another run has, None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def reason(error: OSError) -> str:
    """An OSError in words, without number and file name."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the disk"
    return (os.strerror(error.errno) if error.errno else str(error)).lower()


def shown(text: object) -> str:
    """A user's string, such as a path, as a terminal takes it: what it would obey or cannot show is escaped."""
    return "".join(c if c.isprintable() or c == "\t" else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte outside of UTF-8, as Python carries it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


def as_argument(text: str) -> bytes:
    """A text as another program's argument: UTF-8 whatever the locale. A path's bytes are `os.fsencode`'s."""
    return text.replace("\0", "").encode("utf-8", "surrogateescape")


def as_text(argument: str) -> str:
    """A command line argument as text: UTF-8 also in a locale without it, where Python keeps the bytes as they are."""
    if not any("\udc80" <= character <= "\udcff" for character in argument):
        return argument
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return argument


def text_problem(text: str) -> str | None:
    """Why a prompt cannot be used: control characters (but tabs and new lines), or bytes outside UTF-8."""
    for position, character in enumerate(text, 1):
        if "\ud800" <= character <= "\udfff":
            return f"character {position} is no UTF-8 text"
        if unicodedata.category(character) == "Cc" and character not in "\t\n\r":
            return f"character {position} is the control character U+{ord(character):04X}; leave it out"
    return None


def kind_of(path: Path) -> str | None:
    """`file`, `folder`, or `other` (a device, a pipe); None where nothing is. OSError in words as ValueError.

    Links are followed, to nothing as well.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{shown(path)}: {reason(error)}") from None
    except ValueError:
        raise ValueError(f"{shown(path)} is no file name") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def absence(path: Path, what: str) -> str | None:
    """Why `path` is no readable `file` or `folder`, in words that follow the option's name; None when it is one."""
    try:
        kind = kind_of(path)
    except ValueError as error:
        return str(error)
    if kind == what:
        return None
    article = {"file": "a file", "folder": "a directory"}[what]
    return f"{shown(path)} {'does not exist' if kind is None else f'is not {article}'}"


def taken_problem(path: Path) -> str | None:
    """Why no file can have this name: a folder, a device or a pipe has it. None when nothing or a file has."""
    try:
        kind = kind_of(path)
    except ValueError as error:
        return str(error)
    if kind == "folder":
        return f"{shown(path)} is a directory; name a file, such as {shown(path / 'video')}{path.suffix or '.mp4'}"
    return f"{shown(path)} is a device or a pipe; name a file" if kind == "other" else None


def writing_problem(path: Path) -> str | None:
    """Why `path`, a file to be, cannot be written; None when it can. Leaves nothing behind.

    The longest name that is derived from it while it is written is tried as well.
    """
    return taken_problem(path) or _parent_problem(path)


def folder_problem(path: Path, own: re.Pattern[str]) -> str | None:
    """Why `path`, a folder to be, cannot be written; None when it can. own: as of `PartialFolder`."""
    return replacing_problem(path, own) or _parent_problem(path)


def replacing_problem(path: Path, own: re.Pattern[str]) -> str | None:
    """Why no folder of files named as `own` can have this name: something else has it. None when nothing else has."""
    try:
        if (kind := kind_of(path)) is None:
            return None
        if kind != "folder":
            return f"{shown(path)}: a file has this name; give another, or one with a suffix"
        with os.scandir(path) as entries:
            other = next((entry.name for entry in entries if not own.fullmatch(entry.name)), None)
    except OSError as error:
        return f"{shown(path)}: {reason(error)}"
    except ValueError as error:
        return str(error)
    return None if other is None else f"{shown(path)}: the folder holds {shown(other)}; name a new or an empty one"


def _parent_problem(path: Path) -> str | None:
    """Why nothing can be written beside `path`."""
    folder = path.parent
    try:
        kind = kind_of(folder)
    except ValueError as error:
        return str(error)
    if kind is None:
        return f"the folder {shown(folder)} does not exist; create it first (mkdir -p {shown(folder)})"
    if kind != "folder":
        return f"{shown(folder)} is not a folder"
    try:
        with Partial(path) as partial:
            partial.name.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"the name {shown(path.name)[:60]}... is too long to be written safely; use one of fewer letters"
        return f"the folder {shown(folder)} cannot be written: {reason(error)}"
    return None


def resolved(path: Path) -> Path:
    """The file behind a link, which is what gets replaced; other paths as they are. ValueError for a loop of links."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{shown(path)}: {reason(error) if isinstance(error, OSError) else 'a loop of links'}"
        ) from None


def spare_file(path: Path) -> Path:
    """Where a file goes when its own folder does not take it: a name for this path alone, short whatever the path."""
    mark = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"xdit-{os.getuid()}-{mark}{''.join(path.suffixes[-2:])}")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 for one that is not there: whoever needs it will say so."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def identity(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written anew; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def tell(text: str) -> None:
    """Print a line on stdout. A reader that has left, or a full disk behind it, stops nothing: the line is dropped."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        with suppress(OSError):
            discard_stdout()


def discard_stdout() -> None:
    """From here on nobody gets what is printed; nor does Python, which flushes once more at its end, complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(line: str, stream: IO[str] | None = None) -> None:
    """Print a line on stderr, or on `stream`; dropped, as by `tell`, where it cannot be written."""
    with suppress(OSError, ValueError):
        print(line, file=stream or sys.stderr, flush=True)


def lenient_streams() -> None:
    """What stdout and stderr cannot encode is escaped, in whatever locale: a name must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def cache_home(cache_dir: str | Path | None = None) -> Path:
    """What can be made again lies here: `cache_dir`, else $XDG_CACHE_HOME/xdit, else ~/.cache/xdit."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "xdit"
