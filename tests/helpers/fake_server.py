"""`python -m tests.helpers.fake_server DATA [...]`: the server over a group without ranks; its address on stdout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = ("--device=cpu", "--gpus=2")


class Served:
    """A server that runs. url: where; process: it."""

    def __init__(self, process: subprocess.Popen[str], url: str, errors: Path) -> None:
        self.process, self.url, self._errors = process, url, errors

    @property
    def said(self) -> str:
        """All that it wrote on stderr."""
        return self._errors.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; its status."""
        self.process.send_signal(number)
        return self.process.wait(40)


@contextmanager
def served(folder: Path, *arguments: str, command: Sequence[str] = ()) -> Iterator[Served]:
    """A server with its data in `folder`, killed at the end unless it has ended. command: another program's."""
    command = command or [sys.executable, "-m", "tests.helpers.fake_server", str(folder)]
    errors = folder.parent / f"{folder.name}.{time.monotonic_ns()}.stderr"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder.parent, env=environment
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()
        assert url, errors.read_text()
        yield Served(process, url[-1], errors)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def main() -> int:
    from common.workers.replicas import Replicas
    from tests.helpers.fake_group import FakeGroup
    from xdit_serve.offers import demos
    from xdit_serve.service import Settings
    from xdit_serve.serving import serve

    parser = ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--keys", nargs="*", default=())
    parser.add_argument("--queue", type=int, default=1000)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--starts-after", type=float, default=0.0)
    parser.add_argument("--body-seconds", type=float, default=60.0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    settings = Settings(
        given.data,
        demos(),
        OWN,
        port=given.port,
        keys=tuple(given.keys),
        queue=given.queue,
        body_seconds=given.body_seconds,
    )

    def make(devices: Sequence[int]) -> FakeGroup:
        return FakeGroup(given.step_seconds, given.starts_after, given.log, devices)

    return serve(
        settings,
        lambda take, tell: Replicas(make, [(0, 1)] * given.groups, take, tell),
        lambda model, request: "not enough memory" if request.videos[0].sampling.width > 8000 else "",
        lambda url: print(url, flush=True),
        _page() if given.page else None,
    )


def _page() -> Callable[..., None]:
    from xdit_serve.page.mount import mount

    return mount


if __name__ == "__main__":
    sys.exit(main())
