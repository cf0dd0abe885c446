"""`python -m tools.docs.flags`: docs/flags.md from the command lines themselves."""

from __future__ import annotations

from pathlib import Path

import click

from common.registry.forks import forks
from common.run.command_line import command

TARGET = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
KNOWN = {
    "mochi-xdit": {
        "`--model_dir`, `--prompt`, `--num_frames`, ... (underscores)": "the same; hyphens and underscores are alike",
        "`--use_xdit`": "accepted, no effect: the parallel path is the only one",
        "`--ulysses_degree`, `--ring_degree`, `--cfg_parallel`": "the same names; any degrees that multiply to the "
        "ranks, chosen when left out",
        "`--cpu_offload`": "accepted; see `--offload block` and `--offload disk`",
        "`--use_fsdp`": "accepted; see `--shard-weights`",
        "`--threshold_noise`, `--linear_steps`": "the same",
        "`--t5_model_path`, `--max_t5_token_length`": "`--text-encoder-dir`; the model's own limit is used",
    },
    "xDiT's examples": {
        "`--model DIR`": "`--model-dir DIR`",
        "`--use_cfg_parallel`": "`--cfg-parallel`",
        "`--num_inference_steps`": "`--num-steps`",
        "`--guidance_scale`": "`--cfg-scale`",
        "`--enable_tiling`, `--enable_slicing`": "not needed: the decode fits itself; `--vae tiled` cuts the picture",
        "`--use_parallel_vae`": "always on, exact",
        "`--enable_sequential_cpu_offload`, `--enable_model_cpu_offload`": "`--offload block`, `--offload stage`",
        "`--use_torch_compile`": "`--compile`",
        "`--use_fp8_t5_encoder`": "`--text-dtype fp8`",
        "`--warmup_steps`, `--use_teacache`, `--pipefusion_parallel_degree`": "not here: they change the picture",
    },
}


def described(option: click.Parameter) -> tuple[str, str]:
    """The flag with its values, and its help with the default."""
    assert isinstance(option, click.Option)
    names = "/".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    values = "" if option.is_flag or not isinstance(option.type, click.ParamType) else f" {option.type.name.upper()}"
    if isinstance(option.type, click.Choice):
        values = " " + ", ".join(map(str, option.type.choices))
    default = option.default if isinstance(option.default, (str, int, float)) and not option.is_flag else None
    shown = f" Default: {default}." if default not in (None, "") else ""
    return names + values, (option.help or "") + shown


def table(rows: list[tuple[str, str]], heads: tuple[str, str]) -> list[str]:
    return [f"| {heads[0]} | {heads[1]} |", "|---|---|", *(f"| {a.replace('|', ' ')} | {b} |" for a, b in rows), ""]


def page() -> str:
    """The whole page."""
    commands = {f.program: [o for o in command(f).params if not getattr(o, "hidden", False)] for f in forks()}
    names = [{o.name for o in options} for options in commands.values()]
    shared = set.intersection(*names)
    lines = ["# Flags", "", "Made by `python -m tools.docs.flags` from the programs' own command lines.", ""]
    first = next(iter(commands.values()))
    lines += [
        "## All programs",
        "",
        *table([described(o) for o in first if o.name in shared], ("flag", "meaning")),
    ]
    for program, options in commands.items():
        own = [described(o) for o in options if o.name not in shared]
        lines += [f"## {program}", "", *table(own, ("flag", "meaning"))]
    for other, known in KNOWN.items():
        lines += [f"## Coming from {other}", "", *table(list(known.items()), ("there", "here"))]
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(page())
