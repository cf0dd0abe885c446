"""The tables of memory in the pages, of which one line is counted anew."""

from __future__ import annotations

import re

import pytest

from common.registry.forks import forks, get_model
from tools.docs import memory


@pytest.mark.slow
def test_a_line_of_the_table_is_what_is_counted():
    assert f"\n{memory.row(get_model('cogvideox-2b'), 1)}\n" in memory.PAGES[0].read_text()


@pytest.mark.parametrize("page", memory.PAGES, ids=lambda page: page.parent.name)
def test_tables_have_a_line_for_each_model_and_number_of_gpus(page):
    (_, models, _), *more = memory.MARKED.findall(page.read_text())
    table = page.read_text().split("<!-- memory:")[1].split("<!-- end -->")[0].splitlines()[3:]
    wanted = [(get_model(name).title, str(gpus)) for name in models.split() for gpus in memory.GPUS]
    assert [(re.split(r", | \| ", line[2:])[0], line.split(" | ")[1]) for line in table] == wanted and not more


def test_every_fork_is_in_a_table():
    named = " ".join(page.read_text() for page in memory.PAGES)
    assert all(fork.models[0].title in named for fork in forks())
