"""The hardware profile that the planner and the programs choose layouts by, out of what xdit-doctor found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.registry.layout import MOST_RANKS
from planner.hardware import Machine, get_profile
from planner.machine import profile_path, recognise

COMPUTE = (
    *("tflops", "hbm_gbs", "memory_gib", "matmul", "attention", "convolution", "elementwise", "half_rows"),
    *("merge_bytes", "exposed", "layer_overhead_ms"),
)
"""What a profile takes from the kind of GPU."""
SLOW_LINK = 0.7
"""A pair this much slower than the fastest lies across something: sockets, or switches."""


def profile(report: Mapping[str, Any]) -> dict[str, Any]:
    """A hardware profile out of the findings, as `planner.hardware.read_profile` takes it.

    Links are this machine's own. Compute is the calibrated kind's where the GPU is known, else what was measured.
    """
    measurements, ranks = report["links"], report["links"]["ranks"]
    name = report["gpus"][0]["name"] if report["gpus"] else f"cpu ({report['machine']['system']})"
    kind = recognise(name) if report["gpus"] else None
    fields: dict[str, Any] = {
        "name": "this machine",
        "gpu": kind or name,
        "calibrated_on": "xdit-doctor on this machine",
    }
    if kind:
        base = get_profile(kind)
        fields |= {name: getattr(base, name) for name in COMPUTE}
        if not base.calibrated_on:
            fields["calibrated_on"] = "links: xdit-doctor on this machine; compute: data sheet"
    else:
        compute = measurements["compute"]
        tflops = compute["matmul_tflops"]
        fields |= {
            "tflops": tflops,
            "hbm_gbs": compute["copy_gbs"],
            "memory_gib": report["machine"]["memory_gib"] / ranks,
            "matmul": 0.9,
            "attention": min(1.0, 0.9 * compute["attention_tflops"] / tflops),
        }
    if report["gpus"]:
        fields["memory_gib"] = float(report["gpus"][0]["memory.total"]) / 2**10
    per_node = ranks if report["gpus"] else MOST_RANKS
    return fields | {"machine": report["identity"], "links": links(measurements, per_node), "measured": measurements}


def links(measurements: Mapping[str, Any], per_node: int) -> dict[str, Any]:
    """The planner's link constants from the measured pairs, ring and all-to-all. per_node: ranks a machine takes."""
    pairs, ranks = measurements.get("pairs", []), measurements["ranks"]
    if not pairs:
        return {"kind": "none measured", "gpus_per_node": per_node}
    fastest = max(pair["gbs"] for pair in pairs)
    near = [pair["gbs"] for pair in pairs if pair["gbs"] >= SLOW_LINK * fastest]
    far = [pair["gbs"] for pair in pairs if pair["gbs"] < SLOW_LINK * fastest]
    gbs = statistics.median(near)
    together = 1 + max((sum(p["a"] == 0 and p["gbs"] >= SLOW_LINK * fastest for p in pairs)), 0)
    links: dict[str, Any] = {"kind": "links", "source": "measured", "gbs": gbs, "gpus_per_node": per_node}
    links["across"] = statistics.median(far) / gbs if far else 1.0
    links["gpus_per_socket"] = together if far else max(ranks, 1)
    if ranks > 2:
        links["ring_gain"] = max(0.2, measurements["ring_gbs"] / (gbs * links["across"]))
    if ranks > 3:
        slower = gbs / measurements["all_to_all_gbs"] - 1
        links["contention"] = max(0.0, slower) / (ranks - 3)
    return links


def default_path(report: Mapping[str, Any], quick: bool) -> tuple[Path | None, str]:
    """Where the findings' profile goes when no file was named, or None and why it is not kept."""
    identity, ranks = report["identity"], report["links"]["ranks"]
    if quick:
        return None, "--quick measures too little for one"
    if identity is None:
        return None, "nvidia-smi names no GPU, so it would not be known again"
    machine = Machine(**identity)
    if machine.device == "cuda" and machine.count != ranks:
        return None, f"{ranks} of {machine.count} GPUs were measured"
    return profile_path(machine), "there is no home directory"


def write(report: Mapping[str, Any], path: Path) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(profile(report), indent=1) + "\n", encoding="utf-8")
