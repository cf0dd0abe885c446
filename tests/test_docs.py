"""The documentation: every command is run or read by the programs' own parsers, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.registry.forks import Fork, forks
from common.run.command_line import command
from common.run.unknown import unknown_words
from planner.cli import command as plan
from tests.helpers.programs import on_ranks
from tools.docs import flags, tables
from xdit_doctor.cli import command as doctor
from xdit_download.cli import command as download
from xdit_serve.cli import command as serve

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "docker" / "README.md"]
    + [page for folder in ("docs", "tools") for page in (ROOT / folder).rglob("*.md")]
    + [page for fork in forks() for page in (ROOT / fork.package).rglob("*.md")]
)
PROGRAMS = {fork.program: fork for fork in forks()}
FOLDERS = {fork.package: PROGRAMS[fork.program] for fork in forks()}
IMAGES = {f"xdit-{fork.name}": fork.program for fork in forks()} | {"xdit-serve": "xdit-serve"}
TOOLS = {"xdit-plan": plan, "xdit-doctor": doctor, "xdit-download": download, "xdit-serve": serve}
NEEDS = {"weights", "gpu", "network", "docker"}


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)[:60]}"


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        blocks = re.finditer(r"(?:<!-- needs: ([^>]*?) -->\n)?```bash\n(.*?)```", page.read_text(), re.DOTALL)
        for block in blocks:
            needs = frozenset(filter(None, re.split(r",\s*", block[1] or "")))
            for line in block[2].replace("\\\n", " ").splitlines():
                if words := tuple(shlex.split(line, comments=True)):
                    found.append(Command(str(page.relative_to(ROOT)), words, needs))
    return found


COMMANDS = commands()


def program_of(words: tuple[str, ...]) -> tuple[Fork, list[str]] | None:
    """The fork that a command runs, directly, by torchrun or in an image, and what it is given."""
    for i, word in enumerate(words):
        name = IMAGES.get(word, word) if "run" in words[:4] else word
        if name in PROGRAMS:
            return PROGRAMS[name], list(words[i + 1 :])
        if word.endswith("_xdit/cli.py") or (word in FOLDERS and words[i - 1] == "-m"):
            return FOLDERS[word.split("/")[0]], list(words[i + 1 :])
    return None


def test_the_lower_bounds_that_others_would_lose_are_named():
    text = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'^    "(\w+)>=([\d.]+)",$', text.split("[project.optional")[0], re.MULTILINE))
    install = (ROOT / "README.md").read_text().split("## Install")[1].split("\n## ")[0]
    for name in ("torch", "transformers", "huggingface_hub", "diffusers", "tokenizers", "protobuf", "numpy", "pillow"):
        assert re.search(rf"\b{name}\s+{bounds[name]}\b", install), (name, bounds[name])


def test_make_demo_ends_with_what_to_do_next(tmp_path):
    """Paths in full, as the commands are typed in a shell that knows nothing of .venv."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mochi-xdit"
    program.write_text("#!/bin/sh\ntouch demo.mp4\n")
    program.chmod(0o755)
    line = ["make", "--no-print-directory", "-f", ROOT / "Makefile", "-o", "setup", "demo", f"BIN={tmp_path / 'bin'}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{tmp_path}/demo.mp4 was made in \d+ s\.", done.stdout, re.MULTILINE)
    shown = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(shown) >= 3 and all(words[0].startswith(f"{tmp_path}/bin/") for words in shown)
    names = [Path(words[0]).name for words in shown]
    assert names[:2] == ["mochi-xdit", "cogvideox-xdit"] and f"source {tmp_path}/bin/activate" in done.stdout
    for name, words in zip(names[:2], shown):
        context = command(PROGRAMS[name]).make_context(name, words[1:])
        assert not context.meta.get("problems")


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()) - {"help"}
    done = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and {line.split()[1] for line in done.stdout.splitlines()} == targets
    assert all(len(line.split()) > 3 and len(line) < 100 for line in done.stdout.splitlines())


def test_every_extra_is_named():
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", text, re.MULTILINE)) - {"dev"}
    (line,) = re.findall(r"# with an extra: (.*)", (ROOT / "README.md").read_text())
    assert extras == set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", line)))
    (listed,) = re.findall(r"extras are ([^|]*)", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert extras == set(re.findall(r"\w+", listed))


def test_there_are_pages_and_commands():
    assert len(PAGES) >= 12 and len(COMMANDS) >= 25
    assert all(c.needs <= NEEDS for c in COMMANDS)


@pytest.mark.parametrize("given", COMMANDS, ids=str)
def test_a_command_is_one_that_exists(given):
    words = given.words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "xdit-download":
        download.make_context("xdit-download", list(words[1:]))
    elif words[0] == "xdit-serve" or "xdit-serve" in words[2:]:
        serve.make_context("xdit-serve", list(words[words.index("xdit-serve") + 1 :]))
    elif words[0] == "curl":
        assert given.page == "docs/serving.md", "test_serve_docs.py runs those of that page alone"
    elif words[0] == "docker" and words[1] == "build":
        stages = (ROOT / "docker" / "Dockerfile").read_text()
        assert f" AS {words[words.index('--target') + 1]}\n" in stages
    elif "--entrypoint" in words and (tool := TOOLS.get(words[words.index("--entrypoint") + 1])):
        image = next(i for i, word in enumerate(words) if word in IMAGES)
        tool.make_context("tool", list(words[image + 1 :]))
    elif (found := program_of(words)) is not None:
        program, arguments = found
        if arguments[:1] == ["quantize"] or words[-1] == "torchrun":
            return
        if "torchrun" in words and "-m" in arguments:
            arguments = arguments[arguments.index("-m") + 2 :]
        spec = command(program)
        context = spec.make_context(program.program, arguments)
        assert not context.meta.get("problems"), context.meta["problems"]
        assert not unknown_words(program, context.args, spec.params)
    elif words[:3] == ("pip", "install", "-e"):
        extras = re.findall(r"\w+", words[3])
        text = (ROOT / "pyproject.toml").read_text()
        assert words[3].startswith(".") and all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras)
    elif words[0] == "source":
        venv = re.search(r"^VENV := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert venv and words[1] == f"{venv[1]}/bin/activate"
    elif words[0] in ("xdit-plan", "xdit-doctor"):
        assert not given.needs, "it runs anywhere: it is run below"
    elif words[:3] == ("python", "-m", "pytest"):
        assert (ROOT / words[3]).is_file()
    elif words[0] == "torchrun":
        assert any((ROOT / word).is_file() for word in words if word.endswith(".py"))
    elif words[0] == "python":
        path = ROOT.joinpath(*words[2].split(".")) if words[1] == "-m" else ROOT / words[1]
        assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    else:
        assert "docker" in given.needs, f"nobody checks {words[0]}"


def test_the_planner_is_never_named_without_a_model() -> None:
    """In sentences too: it has no default."""
    for page in PAGES:
        for line in re.findall(r"`(xdit-plan -[^`]*)`", page.read_text()):
            assert "--model" in line, f"{page}: {line}"


RUN = [c for c in COMMANDS if not c.needs and (c.words[0] == "xdit-plan" or "--demo" in c.words)]


@pytest.mark.slow
@pytest.mark.parametrize("given", RUN, ids=str)
def test_a_command_that_needs_nothing_runs(run_ranks, given, tmp_path):
    words = list(given.words)
    if words[0] == "xdit-plan":
        line = [sys.executable, "-m", "planner.cli", *words[1:]]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return
    if "--output" not in words:
        words += ["--output", "out.mp4"]
    at = words.index("--output") + 1
    words[at] = str(tmp_path / words[at])
    on_ranks(run_ranks, PROGRAMS[words[0]], *words[1:], "--num-steps", "1")
    assert Path(words[at]).stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} points to {target}"


def test_the_page_of_flags_is_current():
    assert flags.TARGET.read_text() == flags.page(), "run python -m tools.docs.flags"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page):
    assert page.read_text() == tables.filled(page.read_text()), "run python -m tools.docs.tables"
    assert len(page.read_text().split("<!-- end -->")) == 3


def test_troubleshooting_quotes_real_messages():
    source = " ".join(
        path.read_text()
        for package in ("common", *FOLDERS, "xdit_download", "xdit_serve")
        for path in (ROOT / package).rglob("*.py")
    )
    # Messages go over line ends: join the pieces of a string literal.
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) >= 12
    for message in rows:
        # "missing tensor" is put together from two words.
        assert message in source or message == "missing tensor", message


def test_no_page_names_a_flag_that_is_not_there():
    known = {name for p in PROGRAMS.values() for o in command(p).params for name in (*o.opts, *o.secondary_opts)}
    tools = [ROOT / name for name in ("planner", "xdit_doctor", "xdit_download", "xdit_serve", "benchmarks", "tools")]
    text = "".join(path.read_text() for folder in tools for path in folder.rglob("*.py"))
    others = {"--gpus", "--shm-size", "--build-arg", "--ulimit", "--network", "--entrypoint", "--user", "--target"}
    for page in PAGES:
        if page.name in ("flags.md", "coming-from.md", "CHANGELOG.md"):
            continue
        for flag in re.findall(r"`(--[a-z][a-z0-9-]+)", page.read_text()):
            assert flag in known or flag in others or f'"{flag}"' in text, f"{page.name}: {flag}"
