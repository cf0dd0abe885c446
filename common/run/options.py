"""The options that the forks share, for click: names, kinds, defaults, help."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from common.registry.checks import COMPILE_MODES, DECODE_MODES, DTYPES, ENGINES, OFFLOADS
from common.registry.forks import Fork
from common.registry.layout import MOST_RANKS

MIN_TILE = 32
MOST = {
    **{"width": 16384, "height": 16384, "num_frames": 100_000, "num_steps": 10_000, "fps": 1000},
    **{"num_videos": 100_000, "gpus": MOST_RANKS, "ulysses_degree": MOST_RANKS, "ring_degree": MOST_RANKS},
    **{"vae_chunk": 100_000, "overlap_groups": 1024},
}
"""The largest numbers that are taken: beyond what any machine makes, so that an absurd one costs no time or memory."""
SYNONYMS = {
    **{"model": "model-dir", "num-inference-steps": "num-steps", "guidance-scale": "cfg-scale"},
    **{"guidance-scale-2": "cfg-scale-2", "flow-shift": "shift"},
    **{"t5-model-path": "text-encoder-dir", "use-cfg-parallel": "cfg-parallel", "use-torch-compile": "compile"},
}
"""Names that diffusers and xDiT have for options, without hyphens in front."""
DRAWN = -1
"""A seed that stands for one to be drawn, as in ComfyUI and other programs with a window."""


class Option(click.Option):
    """An option that notes what is wrong with its value in `ctx.meta` and lets the others be read."""

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> Any:
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.UsageError as error:
            ctx.meta.setdefault("problems", []).append(error.format_message())
            ctx.params[self.name] = None
            return None, args


class TileSize(click.ParamType):
    """`256` or `320x240` (width x height), as (height, width)."""

    name = "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        sides = str(value).lower().split("x")
        if len(sides) > 2 or not all(_is_size(side) for side in sides):
            self.fail(
                f"{value!r} is no tile size; write 256 or 320x240, {MIN_TILE} to {MOST['width']} pixels a side",
                param,
                ctx,
            )
        return int(sides[-1]), int(sides[0])


def _is_size(side: str) -> bool:
    return side.isascii() and side.isdigit() and len(side) < 9 and MIN_TILE <= int(side) <= MOST["width"]


def options(fork: Fork) -> list[click.Parameter]:
    def option(name: str, *, type: Any = None, default: Any = None, help: str, **more: Any) -> Option:
        if more.get("is_flag"):
            default = False
        return Option([name], type=type, default=default, help=help, **more)

    path = click.Path(path_type=Path)
    choice = click.Choice
    fixed = any(model.rules.negative_prompt for model in fork.models)
    unsaid = " Default: the authors' own sentence; '' is an empty one." if fixed else ""
    unlisted = {"hidden": True, "is_flag": True}
    return [
        option(
            "--model-dir",
            type=path,
            help="Checkpoint directory, or a repository's name (owner/name) of which the hub's local cache has a copy.",
        ),
        option(
            "--demo",
            is_flag=False,
            flag_value=next(iter(fork.demos), ""),
            type=choice(tuple(fork.demos)),
            help="Use a small checkpoint that is made on first use.",
        ),
        option("--text-encoder-dir", type=path, help="Text encoder's directory, where it is not in the checkpoint's."),
        option("--prompt", help="What the video shows."),
        option("--prompt-file", type=path, help="A text file, one prompt a line: one loading, many videos."),
        option("--num-videos", type=int, default=1, help="Videos per prompt, each with the next seed."),
        option("--negative-prompt", help=f"What it should not show.{unsaid}"),
        option("--width", type=int, help="Pixels."),
        option("--height", type=int, help="Pixels."),
        option("--num-frames", type=int, help="Frames of the video."),
        option("--num-steps", type=int, help="Sampling steps."),
        option("--cfg-scale", type=float, help="Strength of classifier-free guidance; 1 turns it off."),
        option("--seed", type=int, help="Of the noise. Default, and -1: one is drawn, and printed."),
        option(
            "--output",
            help="What to write: .mp4, .webm, .gif, .webp, .png or .jpg (one frame), .npy or .safetensors (the frames "
            "as numbers), or without a suffix a folder of PNGs. A json with every setting lies beside it.",
        ),
        option("--overwrite", is_flag=True, help="Replace an output that is there already."),
        option("--fps", type=int, help="Frames per second."),
        option("--crf", type=int, help="Quality of .mp4 and .webm, less is better; 0: without loss, also in .webp."),
        option("--save-latents", is_flag=True, help="Keep the latents beside the output, for --from-latents."),
        option("--from-latents", type=path, help="Only decode a latents file that an earlier run left."),
        option("--device", type=choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute."),
        option("--dtype", type=choice(DTYPES), help="Precision of the blocks; fp8: their weights, in bf16."),
        option("--gpus", type=int, help="Processes to start, one per GPU (with --device cpu: CPU ranks)."),
        option("--ulysses-degree", type=int, help="Ranks that split the heads."),
        option("--ring-degree", type=int, help="Ranks that pass keys and values around."),
        Option(["--cfg-parallel/--no-cfg-parallel"], default=None, help="The two guidance branches on two halves."),
        option(
            "--attention",
            type=choice(["auto", "sdpa", "cudnn", "flash2", "flash3"]),
            default="auto",
            help="Attention kernel.",
        ),
        option(
            "--engine",
            type=choice(ENGINES),
            default="native",
            help="Who runs attention over several ranks: this program, or the package xfuser.",
        ),
        option(
            "--overlap-groups",
            type=int,
            default=1,
            help="Groups of heads that travel apart between ulysses ranks, one under the attention of another.",
        ),
        option("--vae", type=choice(DECODE_MODES), default="auto", help="How to decode."),
        option("--vae-chunk", type=int, help="Latent frames decoded at once."),
        option("--vae-tile", type=TileSize(), help="Largest tile in pixels: 256, or 320x240 (width x height)."),
        option(
            "--offload",
            type=choice(OFFLOADS),
            help="none: keep every stage on the device; stage: one at a time; block: blocks wait in host memory; "
            "disk: they are read from the checkpoint in every step. Default: what fits.",
        ),
        option("--shard-weights", is_flag=True, help="Every rank keeps a part of each block; a gather makes it whole."),
        option("--text-dtype", type=choice(DTYPES), help="Precision of the text encoder."),
        option(
            "--text-cache",
            type=path,
            help="Directory that keeps text features: known prompts need no encoder.",
        ),
        option("--compile", is_flag=True, help="Compile the transformer's blocks; pays from the second step on."),
        option("--compile-vae", is_flag=True, help="Compile the decoder's parts that keep nothing between chunks."),
        option("--compile-mode", type=choice(COMPILE_MODES), default="default", help="As for torch.compile."),
        Option(
            ["--compile-dynamic/--no-compile-dynamic"], default=True, help="One graph for all sizes and prompt lengths."
        ),
        Option(["--compile-fullgraph/--no-compile-fullgraph"], default=True, help="Stop at a graph break."),
        Option(
            ["--keep-loaded/--no-keep-loaded"],
            default=None,
            help="Keep every stage in memory between videos. Default: when there are several.",
        ),
        option("--max-memory", type=float, help="GiB a device may use, when weights are placed. Default: all free."),
        option(
            "--dry-run",
            is_flag=False,
            flag_value="",
            metavar="[MODEL]",
            help=f"Print layout, memory, bytes and what is chosen; without weights for {', '.join(fork.names)}.",
        ),
        option(
            "--resume",
            type=path,
            metavar="STATE",
            help="Go on with an interrupted run from the state file it left; other options may be given again.",
        ),
        option("--save-every", type=float, default=60.0, help="Seconds between two states of the sampling on disk."),
        option("--timeout", type=float, default=1800.0, help="Seconds after which a hung collective ends the run."),
        option("--debug", is_flag=True, help="Show tracebacks and the libraries' own output."),
        Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it."
        ),
        option("--use-xdit", help="Accepted; no effect.", **unlisted),
        option("--use-fsdp", help="Accepted; no effect.", **unlisted),
        option("--cpu-offload", help="Accepted; no effect.", **unlisted),
        option("--max-t5-token-length", type=int, hidden=True, help="Accepted; the model's own limit is used."),
        *fork.options.command_line,
    ]


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"{context.info_name} {version()}")
        context.exit()


def version() -> str:
    try:
        return metadata.version("xdit-zoo")
    except metadata.PackageNotFoundError:
        return "0 (not installed)"


def unreadable_image(path: Path) -> list[str]:
    """What is wrong with the file of --image, for forks that have such an option."""
    from common.video.pictures import read_image

    try:
        read_image(path)
    except ValueError as error:
        return [f"--image {error}"]
    return []
