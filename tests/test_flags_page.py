"""What docs/flags.md says of other programs: their names exist there, the flags beside them here."""

from __future__ import annotations

import inspect
import re
import shlex

import diffusers
import pytest

from common.registry.forks import forks
from common.run.command_line import command
from common.run.options import SYNONYMS
from tools.docs.flags import COMING_FROM

SECTIONS = dict(
    re.findall(r"^## Coming from ([^\n]*)\n(.*?)(?=^## |\Z)", COMING_FROM.read_text(), re.MULTILINE | re.DOTALL)
)
FLAGS = {name for fork in forks() for o in command(fork).params for name in (*o.opts, *o.secondary_opts)}
FLAGS |= {f"--{name}" for name in SYNONYMS}
PIPELINES = ("Mochi", "CogVideoX", "CogVideoXImageToVideo", "CogVideoXVideoToVideo", "ConsisID", "WanImageToVideo")


def rows(section: str, table: int = 0) -> list[tuple[str, str]]:
    """The rows of one of its tables."""
    tables = re.split(r"\n\n(?=\|)", f"\n{SECTIONS[section]}")[1:]
    lines = [line.strip("| \n").split(" | ") for line in tables[table].split("\n\n")[0].splitlines()[2:]]
    return [(there, here) for there, here in lines]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("section", SECTIONS)
def test_flags_on_the_right_are_ours(section):
    for _, here in [row for table in range(SECTIONS[section].count("\n|---")) for row in rows(section, table)]:
        for words in map(shlex.split, quoted(here)):
            assert not words[0].startswith("--") or words[0] in FLAGS, here
    assert rows(section)


def values(flag: str) -> set[str]:
    options = [o for fork in forks() for o in command(fork).params if flag in o.opts]
    return {str(choice) for option in options for choice in getattr(option.type, "choices", ())}


@pytest.mark.parametrize("section", SECTIONS)
def test_their_values_are_ours(section):
    for flag, value in re.findall(r"`(--[a-z-]+) ([a-z0-9]+)`", SECTIONS[section]):
        assert not values(flag) or value in values(flag), f"{flag} {value}"


def test_arguments_of_diffusers_calls_are_arguments():
    calls = [getattr(diffusers, f"{name}Pipeline").__call__ for name in PIPELINES]
    known = {name for call in calls for name in inspect.signature(call).parameters} - {"self"}
    said = {name for there, _ in rows("diffusers") for name in quoted(there)}
    assert said <= known, said - known
    small = {"return_dict", "callback_on_step_end_tensor_inputs", "prompt_attention_mask", "image_embeds", "last_image"}
    small |= {"negative_prompt_attention_mask", "id_vit_hidden", "id_cond", "kps_cond"}
    assert known - said <= small, known - said - small


def test_methods_around_the_call_are_methods():
    kinds = (diffusers.WanPipeline, diffusers.WanTransformer3DModel, diffusers.AutoencoderKLWan)
    said = [
        name for there, _ in rows("diffusers", 1) for text in quoted(there) for name in re.findall(r"(\w+)\(", text)
    ]
    assert len(said) > 10
    for name in said:
        known = any(hasattr(kind, name) for kind in kinds) or hasattr(diffusers, name) or hasattr(diffusers.utils, name)
        assert known, name


def test_diffusers_names_are_taken_where_the_page_says_so():
    for there, here in rows("diffusers"):
        if here.startswith("the same") and "checkpoints" not in here:
            for name in quoted(there):
                arguments = ["--prompt", "x", f"--{name}", "2"]
                context = command(forks()[0]).make_context("x", arguments)
                assert not context.args and context.params, name
