"""`xdit-serve`: the models behind HTTP. Exit status: 0 after SIGTERM, 1 failed, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.registry.forks import version
from common.registry.request import WrongUse
from common.registry.settings import filled
from common.system.environment import open_standard_streams
from common.system.extras import install
from common.system.files import lenient_streams, say, shown, tell
from xdit_serve.keys import is_here

if TYPE_CHECKING:
    from xdit_serve.offers import Offer
    from xdit_serve.service import Settings
    from xdit_serve.serving import Page

PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "multipart", "prometheus_client")
"""Modules of the extra `serve`."""
MOST = 10**6
PATH = click.Path(path_type=Path)


@click.command(
    "xdit-serve",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 110,
        "show_default": True,
    },
)
@click.version_option(version(), message="%(prog)s %(version)s", help="Show the version.")
@click.option(
    "--demo",
    is_flag=True,
    help="Serve the small checkpoints that --demo has in all programs, to try the server without a download.",
)
@click.option(
    "--model-dir",
    type=PATH,
    multiple=True,
    help="A checkpoint to serve: a folder, or the name of a repository in the hub's local cache. Clients name it as "
    "the folder is called, or the repository behind its owner. Repeat the option for more.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute; auto: on GPUs if there are any, else on the CPU.",
)
@click.option(
    "--gpus",
    type=int,
    help="GPUs to use, of all groups together; each runs one process. Default: all that are visible; on a CPU two "
    "processes for each group.",
)
@click.option(
    "--replicas",
    type=int,
    help="Groups that the GPUs are split into; each makes one video at a time. Default: 1, or the planner's advice "
    "where it knows the GPUs.",
)
@click.option(
    "--ray-address",
    help="Run on a Ray cluster of any number of machines: its address; 'auto': RAY_ADDRESS, or the one that this "
    "machine is in. --gpus says how many of its GPUs.",
)
@click.option(
    "--keep-loaded/--no-keep-loaded", default=True, help="Models stay in memory from job to job, as many as fit."
)
@click.option("--host", default="127.0.0.1", help="Address to listen at; 127.0.0.1 is for this machine alone.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen at; 0: one that is free.")
@click.option(
    "--api-key-file",
    type=PATH,
    help="A file of keys that let clients in, one a line. Default: those in the environment, XDIT_API_KEY.",
)
@click.option("--no-auth", is_flag=True, help="Ask nobody for a key, though others can connect.")
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="A site, as https://host, whose pages may use the server from a browser. Repeat the option for more.",
)
@click.option(
    "--data-dir",
    type=PATH,
    default=Path("xdit-data"),
    help="Folder of all that is kept: jobs, videos, and how far those are that were not finished.",
)
@click.option("--keep-hours", type=float, default=168.0, help="Hours after which a job that has ended is removed.")
@click.option(
    "--keep-gb",
    type=float,
    default=100.0,
    help="GB (10^9 bytes) that all jobs may take; when they take more, the oldest that have ended are removed.",
)
@click.option(
    "--page/--no-page",
    default=None,
    help="A page at / for a browser, which makes and shows videos. Default: where Gradio is installed.",
)
@click.option("--queue", type=click.IntRange(1, MOST), default=1000, help="Jobs that may wait; more are refused.")
@click.option("--timeout", type=float, default=1800.0, help="Seconds after which processes that hang are ended.")
@click.option(
    "--save-every",
    type=float,
    default=60.0,
    help="Seconds between two writes of how far a job is, from where it goes on after a restart.",
)
@click.option("--debug", is_flag=True, help="Show what the processes write.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
def command(**params: Any) -> int:
    """Serve models by the video API that OpenAI's client speaks, /v1/videos and more.

    OPTIONS, behind --, are the programs' own and go to every job, such as: -- --dtype fp8 --max-memory 40
    """
    return run(params)


def run(params: dict[str, Any]) -> int:
    """Serve as asked until a signal comes. WrongUse for what cannot be."""
    _require_packages()
    # What takes time to import comes after --help.
    from xdit_serve.groups import deployment, workers
    from xdit_serve.memory import Memory
    from xdit_serve.serving import serve
    from xdit_serve.store import StoreError

    try:
        keys = _keys(params)
        _check_numbers(params)
        offers = _offers(params)
        at = deployment(params["device"], params["gpus"], params["replicas"], params["ray_address"], offers)
        make_workers = workers(at, params["keep_loaded"], params["timeout"], params["debug"])
    except ValueError as error:
        raise WrongUse([str(error)]) from None
    if at.replicas > 1 and params["replicas"] is None:
        say(f"note: {at.replicas} groups of {at.ranks} GPUs, which the planner says make most videos")
    own = (*at.words, f"--timeout={params['timeout']}", f"--save-every={params['save_every']}")
    own += ("--keep-loaded" if params["keep_loaded"] else "--no-keep-loaded", *params["options"])
    _try(offers, own)
    settings = _settings(params, offers, own, keys)
    memory = Memory()
    try:
        return serve(
            settings, make_workers, memory.problem, lambda url: tell(f"xdit-serve is at {url}"), _page(params["page"])
        )
    except StoreError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        raise WrongUse([f"--host {params['host']} --port {params['port']}: {error.strerror or error}"]) from None
    finally:
        memory.close()


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise WrongUse([f"the package of {missing[0]} is not installed: {install('serve')}"])


def _keys(params: dict[str, Any]) -> list[str]:
    """Those that open the server, none where it asks for none. ValueError."""
    from xdit_serve.keys import VARIABLE, read_keys

    keys = [] if params["no_auth"] else read_keys(params["api_key_file"])
    if params["no_auth"] and params["api_key_file"]:
        raise ValueError("--no-auth and --api-key-file exclude each other; give one of them")
    if not keys and not params["no_auth"] and not is_here(params["host"]):
        raise ValueError(
            f"--host {shown(params['host'])} lets others connect: give --api-key-file FILE or {VARIABLE} in the "
            "environment, or say --no-auth"
        )
    return keys


def _offers(params: dict[str, Any]) -> list[Offer]:
    """The models that clients can name, at least one. ValueError."""
    from xdit_serve.offers import checkpoint, demos

    offers = demos() if params["demo"] else []
    for folder in params["model_dir"]:
        offers.append(checkpoint(folder, [offer.name for offer in offers]))
    if not offers:
        raise ValueError("nothing to serve: give --model-dir FOLDER, or --demo")
    return offers


def _try(offers: Sequence[Offer], own: Sequence[str]) -> None:
    """Whether each model's program takes the words that every job gets. WrongUse, as a job would be refused with."""
    from common.run.command_line import parse

    for offer in offers:
        words = [*offer.weights, *own, "--prompt=a trial", f"--output={os.devnull}.mp4"]
        try:
            parse(offer.fork, words)
        except WrongUse as wrong:
            problems = [one for one in wrong.problems if not one.startswith(("--output", "--image", "--prompt"))]
            if problems:
                raise WrongUse([f"{offer.name}: {problem}" for problem in problems]) from None


def _settings(params: dict[str, Any], offers: list[Offer], own: Sequence[str], keys: Sequence[str]) -> Settings:
    from xdit_serve.service import Settings

    return filled(
        Settings,
        params,
        data_dir=params["data_dir"].absolute(),
        offers=offers,
        own=own,
        keys=tuple(keys),
        open=params["no_auth"],
        origins=params["cors"],
    )


def _page(page: bool | None) -> Page | None:
    """What puts the page at /. page: None: where Gradio is installed. WrongUse where it is not and must be."""
    if page is False:
        return None
    if importlib.util.find_spec("gradio") is not None:
        from xdit_serve.page.mount import mount

        return mount
    if page:
        raise WrongUse([f"--page: the package gradio is not installed: {install('page')}"])
    say(f"note: there is no page at /: {install('page')}")
    return None


def _check_numbers(params: dict[str, Any]) -> None:
    for name in ("keep_hours", "keep_gb", "save_every"):
        if not (params[name] > 0 and math.isfinite(params[name])):
            raise ValueError(f"--{name.replace('_', '-')} {params[name]} is not a number above 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    open_standard_streams()
    lenient_streams()
    try:
        return command.main(args=arguments, prog_name="xdit-serve", standalone_mode=False) or 0
    except click.UsageError as error:
        say(f"error: {error.format_message()}")
        return 2
    except WrongUse as wrong:
        for problem in wrong.problems:
            say(f"error: {shown(problem)}")
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130


if __name__ == "__main__":
    sys.exit(main())
