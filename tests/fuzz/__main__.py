"""`python -m tests.fuzz [--cases N] [--area NAME] [--seed N]`: run hostile commands and list those that end badly."""

from __future__ import annotations

import statistics
from collections import Counter

import click

from tests.fuzz.cases import AREAS
from tests.fuzz.run import Outcome, outcomes, prepare


@click.command()
@click.option("--cases", default=400, help="How many in all, the same number of each area.")
@click.option("--area", type=click.Choice(list(AREAS)), help="Only this one.")
@click.option("--seed", default=0, help="The first case's.")
def main(cases: int, area: str | None, seed: int) -> None:
    prepare()
    chosen = [area] if area else list(AREAS)
    each = -(-cases // len(chosen))
    bad: list[Outcome] = []
    for name in chosen:
        found = list(outcomes(name, range(seed, seed + each)))
        wrong = [outcome for outcome in found if outcome.problem]
        bad += wrong
        ended = ", ".join(f"status {s}: {n}" for s, n in sorted(Counter(str(o.status) for o in found).items()))
        middle, longest = statistics.median(o.seconds for o in found), max(o.seconds for o in found)
        memory = max(o.resident for o in found) / 2**30
        click.echo(
            f"{name:13} {len(found)} cases, {ended}; median {middle:.2f} s, longest {longest:.1f} s, "
            f"at most {memory:.2f} GiB; bad: {len(wrong)}"
        )
        for outcome in wrong:
            _show(outcome)
    click.echo(f"{len(chosen) * each} cases, {len(bad)} bad")
    raise SystemExit(1 if bad else 0)


def _show(outcome: Outcome) -> None:
    case, words = outcome.case, outcome.errors.strip().splitlines()
    click.echo(f"  {case.area} {case.seed}: {outcome.problem}: {case.program} {' '.join(case.arguments)!r:.300}")
    if case.environment:
        click.echo(f"    environment {dict(case.environment)!r}")
    for line in words[-2:]:
        click.echo(f"    {line!r:.300}")


if __name__ == "__main__":
    main()
