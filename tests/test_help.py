"""The screens of --help: groups, defaults, and lines that fit."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from common.registry.forks import forks, version
from common.run import quantize
from common.run.command_line import command
from common.run.help import GROUPS, grouped
from planner.cli import command as plan
from xdit_doctor.cli import command as doctor
from xdit_download.cli import command as download
from xdit_serve.cli import command as serve

FORKS = pytest.mark.parametrize("fork", forks(), ids=lambda fork: fork.name)
GIVEN = {"model_dir", "demo", "prompt", "prompt_file", "image", "video", "id_embeddings", "save_id_embeddings"}
GIVEN |= {"text_cache", "from_latents", "resume", "dry_run", "ray_address", "model", "cors"}
"""Options without a default: what they name is there, or it is not."""


def screen(fork, width: int) -> str:
    spec = command(fork)
    context = spec.make_context(fork.program, ["--prompt", "x"], terminal_width=width, max_content_width=width)
    return spec.get_help(context)


@FORKS
def test_every_default_is_shown_or_said(fork):
    options = [o for o in command(fork).params if isinstance(o, click.Option) and not o.hidden]
    context = click.Context(command(fork), show_default=True)
    for option in options:
        shown = option.get_help_record(context)
        assert shown is not None and len(option.help or "") > 5, option.name
        if option.name not in GIVEN and (not option.is_flag or option.secondary_opts):
            assert "efault" in shown[1], f"--{option.name}: {shown[1]}"


TOOLS = {"xdit-plan": plan, "xdit-doctor": doctor, "xdit-download": download, "xdit-serve": serve}


@pytest.mark.parametrize("name", [*TOOLS, "quantize"])
def test_the_other_programs_say_theirs_too(name):
    spec = TOOLS.get(name) or quantize._command(forks()[0])
    context = click.Context(spec, **spec.context_settings)
    for option in (o for o in spec.params if isinstance(o, click.Option)):
        shown = option.get_help_record(context)
        assert shown is not None and len(option.help or "") > 5, option.name
        if not (option.name in GIVEN or option.required or (option.is_flag and not option.secondary_opts)):
            assert "efault" in shown[1], f"--{option.name}: {shown[1]}"


@pytest.mark.parametrize("name", TOOLS)
def test_every_program_tells_its_version(name):
    told = CliRunner().invoke(TOOLS[name], ["--version"], prog_name=name)
    assert told.exit_code == 0 and told.output == f"{name} {version()}\n"


@FORKS
def test_every_option_is_in_one_group(fork):
    params = command(fork).params
    members = [option for options in grouped(params).values() for option in options]
    assert sorted(o.name for o in members) == sorted(o.name for o in params if not getattr(o, "hidden", False))
    assert list(grouped(params)) == list(GROUPS), "all groups, in their order"


@FORKS
@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_and_no_name_is_broken(fork, width):
    text = screen(fork, width)
    table = text.split("Defaults of each checkpoint:\n")[1].splitlines()
    terms = {line for line in text.splitlines() if line.startswith("  --")}  # metavars are never wrapped
    for line in text.splitlines():
        assert len(line) <= width or line in table or line in terms, line
        assert not re.search(r"[a-z]-$", line), line
    headings = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[A-Z].*:", line)]
    assert headings == [*GROUPS, "Defaults of each checkpoint"]
    assert "\N{NON-BREAKING HYPHEN}" not in text


@FORKS
def test_the_table_has_every_checkpoints_own_numbers(fork):
    table = screen(fork, 80).split("Defaults of each checkpoint:\n")[1]
    known = {model.name: model.rules for model in fork.models}
    known |= {f"--demo {name}": rules for name, rules in fork.demos.items()}
    rows = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    assert [row[0] for row in rows[1:]] == list(known)
    for row, rules in zip(rows[1:], known.values()):
        numbers = rules.num_frames, rules.num_steps, rules.cfg_scale, rules.fps
        assert row[1:] == [f"{rules.width}x{rules.height}", *map(str, numbers), rules.dtype]
