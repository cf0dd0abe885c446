"""`xdit-plan` in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from planner.cli import command


def ask(*arguments: str, expect: int = 0) -> Result:
    """What it prints; `expect`: the exit status it must have."""
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == expect, result.output
    return result
