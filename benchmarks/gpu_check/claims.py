"""What is claimed of GPUs, as a table, and what the measurements say of it: holds, falls short, not tested here.

Claims with `row` are those of docs/cuda-to-check.md, by the first column of its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.runner import Row
from common.system.units import figure

Rows = Mapping[str, Row]
"""Of one part, by cell."""
CPU = "a miniature on the CPU; needs a GPU"


class Untested(Exception):
    """Why a claim could not be tested here."""


@dataclass(frozen=True)
class Claim:
    """A figure that is claimed of GPUs, and what decides it."""

    what: str
    part: str = ""
    """Parts whose names begin so, each a subject of its own."""
    value: Callable[[Rows], float] | None = None
    """(rows, rate) -> the figure that is compared."""
    target: float = 0.0
    """At least so much, or at most where `most`."""
    most: bool = False
    unit: str = ""
    """The unit of the figure."""
    cpu: bool = False
    """It is also true of CPU ranks."""
    row: str = ""
    """The row of docs/cuda-to-check.md."""
    only: str = ""
    manual: str = ""
    """Why no program decides it."""


@dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    claim: Claim
    subject: str
    said: str
    """Holds, falls short, or not tested here."""
    figure: str

    def __str__(self) -> str:
        subject = f" [{self.subject}]" if self.subject else ""
        return f"{self.said:16} {self.claim.what}{subject}: {self.figure}"


def cell(rows: Rows, key: str) -> Row:
    """A measured cell. Untested tells why there is none."""
    if "all" in rows and key not in rows:
        key = "all"
    row = rows.get(key)
    if row is None:
        raise Untested(f"{key} was not reached")
    for name in ("skipped", "error"):
        if name in row:
            raise Untested(f"{key}: {row[name]}" if name == "skipped" else f"{key} failed: {row[name]}")
    return row


def ratio(one: str, other: str, field: str = "step_s") -> Callable[[Rows], float]:
    return lambda rows: cell(rows, one)[field] / cell(rows, other)[field]


def share(variant: str) -> Callable[[Rows], float]:
    """Of the measured rate of a bf16 matmul, in per cent."""
    return lambda rows: 100 * cell(rows, variant)["tflops"] / cell(rows, "rate")["matmul_tflops"]


def worst(field: str, start: str = "") -> Callable[[Rows], float]:
    """The largest figure of the measured cells whose keys begin so; a failed cell counts as untested."""

    def find(rows: Rows) -> float:
        keys = [key for key, row in rows.items() if key.startswith(start) and field in cell_or_empty(row, key)]
        if not keys:
            raise Untested("; ".join(str(row.get("skipped", "nothing was measured")) for row in rows.values())[:200])
        return max(rows[key][field] for key in keys)

    return find


def cell_or_empty(row: Row, key: str) -> Row:
    if "error" in row:
        raise Untested(f"{key} failed: {row['error']}")
    return row


def sides(one: str, other: str) -> Callable[[Rows], float]:
    return lambda rows: cell(rows, "sides")["seconds"][one] / cell(rows, "sides")["seconds"][other]


def failures(rows: Rows) -> float:
    """Failed tests; a file that could not be run counts as one."""
    if not sum(row.get("passed", 0) + len(row.get("failed", ())) + ("error" in row) for row in rows.values()):
        reasons = sorted({reason for row in rows.values() for reason in row.get("reasons", ())})
        raise Untested("every test was skipped: " + "; ".join(reasons))
    return sum(len(row.get("failed", ())) + ("error" in row) for row in rows.values())


def over_plan(variant: str) -> Callable[[Rows], float]:
    """Bytes made while sampling over those planned, in per cent."""

    def find(rows: Rows) -> float:
        row = cell(rows, variant)
        return 100 * (row["peak_gib"] - row["held_gib"]) / cell(rows, "plan")["sampling_work_gib"]

    return find


def workspace(rows: Rows) -> float:
    """MiB that went from the device beside what is planned."""
    return (cell(rows, "bf16")["taken_gib"] - cell(rows, "plan")["sampling_work_gib"]) * 2**10


def kept_host(rows: Rows) -> float:
    """GiB of host memory that blocks had and that are not back at the end, in per cent of what they took."""
    row = cell(rows, "block")
    taken = row["host_before_gib"] - row["host_least_gib"]
    return 100 * max(0.0, row["host_before_gib"] - row["host_after_gib"]) / max(taken, 0.1)


def hidden(rows: Rows) -> float:
    """Best number of head groups against one group, over the ranks that were measured."""
    found = {key: row for key, row in rows.items() if key.startswith("ulysses") and "1" in cell_or_empty(row, key)}
    if not found:
        raise Untested(str(rows.get("all", {}).get("skipped", "nothing was measured")))
    return max(min(row["2"], row["4"]) / row["1"] for row in found.values())


def ring_over_alone(rows: Rows) -> float:
    """A ring's attention against its share of one GPU's, at the worst number of ranks."""
    alone, found = cell(rows, "1 rank")["1"], {k: r for k, r in rows.items() if k.startswith("ring")}
    return max(cell(found, key)["1"] * int(key.split()[1]) / alone for key in found)


def decoded_over_plan(rows: Rows) -> float:
    measured = {key: row for key, row in rows.items() if row.get("estimate MiB") and "error" not in row}
    if not measured:
        cell(rows, "1 ranks")
    return 100 * max(row["peak MiB"] / row["estimate MiB"] for row in measured.values())


def contexts(rows: Rows) -> float:
    row = cell(rows, "disk on 2")
    if not row["on_first"]:
        raise Untested("nvidia-smi does not show these processes by their own numbers (a container?)")
    return row["on_first"]


CLAIMS = (
    Claim("tests that need a GPU that fail", "tests", failures, 0, True),
    Claim("latents of every layout as of one process", "exact-", worst("latents"), 1e-4, True, cpu=True),
    Claim("frames of every layout as of one process, levels", "exact-", worst("levels"), 1, True, cpu=True),
    Claim("attention in bf16 against fp64, relative", "kernels", worst("out", "auto bf16"), 2e-2, True),
    Claim("attention in fp32 against fp64, relative", "kernels", worst("out", "auto fp32"), 5e-3, True, cpu=True),
    Claim("share of the bf16 matmul rate, compiled", "step-", share("bf16 compiled"), 70, unit=" %"),
    Claim("fp8 against bf16, compiled", "step-", ratio("bf16 compiled", "fp8 compiled"), 1.3, unit=" x"),
    Claim("block offload's step over resident", "step-", ratio("block", "bf16"), 1.1, True, " x"),
    Claim(
        "sampling by block offload, GiB",
        "step-",
        lambda rows: cell(rows, "block")["peak_gib"],
        11.2,
        True,
        only="mochi",
    ),
    Claim("activations over the estimate, %", "step-", over_plan("block"), 125, True),
    Claim("eager against diffusers eager", "peers-", sides("diffusers", "ours"), 1.25, unit=" x"),
    Claim("compiled against diffusers compiled", "peers-", sides("diffusers-compiled", "ours-compiled"), 1, unit=" x"),
    Claim(
        "decode's peak over the estimate, %",
        "decode-",
        decoded_over_plan,
        125,
        True,
        row="Peak of a decode with channels last",
    ),
    Claim(
        "decode with channels last against contiguous",
        "decode-",
        ratio("contiguous", "1 ranks", "seconds"),
        1,
        unit=" x",
        row="The decoders' memory order",
    ),
    Claim(
        "a second video's decode is not tried out again",
        row="Trying a decode out",
        manual="memory has to be short: two videos by hand, --max-memory 1.5 to 2 times the decode's need",
    ),
    Claim("decode against diffusers'", "decode-", ratio("diffusers", "1 ranks", "seconds"), 1, unit=" x"),
    Claim("exchange in head groups over one group", "overlap-", hidden, 1, True, " x"),
    Claim("ring attention over its share of one GPU's", "overlap-", ring_over_alone, 1.1, True, " x"),
    Claim(
        "cuDNN's kernel in a ring faster than flash attention",
        "step-",
        ratio("ring 2, sdpa", "ring 2, auto"),
        1,
        unit=" x",
        row="The ring's attention on Hopper and Blackwell",
    ),
    Claim(
        "max-autotune against the default mode",
        "step-",
        ratio("bf16 compiled", "bf16 autotuned"),
        1,
        unit=" x",
        row="Compile modes",
    ),
    Claim(
        "CUDA graphs gain nothing",
        row="Compile modes",
        manual="reduce-overhead is not among the modes that the program takes",
    ),
    Claim(
        "memory reserved with expandable segments over without",
        "step-",
        ratio("bf16", "fixed segments", "reserved_gib"),
        1,
        True,
        " x",
        row="Expandable segments",
    ),
    Claim(
        "step with expandable segments over without",
        "step-",
        ratio("bf16", "fixed segments"),
        1.02,
        True,
        " x",
        row="Expandable segments",
    ),
    Claim(
        "block offload, any socket over the GPU's",
        "step-",
        ratio("block, any socket", "block"),
        1,
        unit=" x",
        row="Ranks on their GPU's socket",
    ),
    Claim(
        "fp8 matmul, exact sums over fast ones",
        "kernels",
        lambda rows: cell(rows, "fp8 accumulation")["exact_s"] / cell(rows, "fp8 accumulation")["fast_s"],
        1,
        unit=" x",
        row="fp8 matmul",
    ),
    Claim(
        "error of fast sums over exact ones",
        "kernels",
        lambda rows: cell(rows, "fp8 accumulation")["fast_error"] / cell(rows, "fp8 accumulation")["exact_error"],
        1.05,
        True,
        " x",
        row="fp8 matmul",
    ),
    Claim(
        "fp8 without --compile against bf16",
        "step-",
        ratio("bf16", "fp8"),
        1,
        unit=" x",
        row="Rounding activations to fp8",
    ),
    Claim(
        "copies from registered memory against PyTorch's pinned",
        "kernels",
        lambda rows: cell(rows, "host copies")["registered_gbs"] / cell(rows, "host copies")["torch_gbs"],
        0.95,
        unit=" x",
        row="Blocks in host memory",
    ),
    Claim("host memory not back after sampling, %", "step-", kept_host, 10, True, row="Blocks in host memory"),
    Claim("ranks with a context on the first GPU", "step-", contexts, 1, True, row="Reading thread"),
    Claim("memory beside activations, MiB", "step-", workspace, 512, True, row="Workspaces beside activations"),
)


def verdicts(machine: Machine, results: Mapping[str, Rows]) -> Iterator[Verdict]:
    """Every claim, for every part that it is about. results: rows by part."""
    for claim in CLAIMS:
        if claim.value is None:
            yield Verdict(claim, "", "not tested here", claim.manual)
            continue
        parts = [
            name for name in results if name == claim.part or (claim.part[-1] == "-" and name.startswith(claim.part))
        ]
        parts = [name for name in parts if claim.only in name.removeprefix(claim.part)]
        if not parts:
            yield Verdict(claim, "", "not tested here", "its part did not run")
        for name in parts:
            yield _verdict(machine, claim, name.removeprefix(claim.part), results[name])


def _verdict(machine: Machine, claim: Claim, subject: str, rows: Rows) -> Verdict:
    assert claim.value is not None
    if machine.mini and not claim.cpu:
        return Verdict(claim, subject, "not tested here", CPU)
    try:
        found = claim.value(rows)
    except Untested as why:
        return Verdict(claim, subject, "not tested here", str(why))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        return Verdict(claim, subject, "not tested here", f"the results lack {error}")
    holds = found <= claim.target if claim.most else found >= claim.target
    said = f"{figure(found)}{claim.unit}, {'at most' if claim.most else 'at least'} {claim.target:g}{claim.unit}"
    if not holds:
        said += f", off by {figure(abs(found - claim.target))}{claim.unit}"
    return Verdict(claim, subject, "holds" if holds else "falls short", said)
