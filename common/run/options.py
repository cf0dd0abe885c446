"""The options that the forks share, for click: names, kinds, defaults, help."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from common.registry.checks import COMPILE_MODES, DECODE_MODES, DTYPES, ENGINES, FITS, OFFLOADS
from common.registry.forks import Fork, version
from common.registry.layout import MOST_RANKS
from common.run.help import EXPERT, GPUS, GROUPS, MEMORY, OUTPUT, SPEED, WHAT, Option

MIN_TILE = 32
MOST = {
    **{"width": 16384, "height": 16384, "num_frames": 100_000, "num_steps": 10_000, "fps": 1000},
    **{"num_videos": 100_000, "gpus": MOST_RANKS, "ulysses_degree": MOST_RANKS, "ring_degree": MOST_RANKS},
    **{"replicas": MOST_RANKS, "vae_chunk": 100_000, "overlap_groups": 1024},
}
"""The largest numbers that are taken: beyond what any machine makes, so that an absurd one costs no time or memory."""
SYNONYMS = {
    **{"model": "model-dir", "num-inference-steps": "num-steps", "guidance-scale": "cfg-scale"},
    **{"guidance-scale-2": "cfg-scale-2", "flow-shift": "shift"},
    **{"t5-model-path": "text-encoder-dir", "use-cfg-parallel": "cfg-parallel", "use-torch-compile": "compile"},
}
"""Names that diffusers and xDiT have for options, without hyphens in front."""
NO_EFFECT = {
    "use_xdit": "--use-xdit has no effect: the parallel path is the only one here",
    "use_fsdp": "--use-fsdp has no effect; --shard-weights is what keeps a share of the weights on each GPU",
    "cpu_offload": "--cpu-offload has no effect: a stage is loaded when it is needed and freed after it, and "
    "--offload block keeps less on the GPU",
}
"""What is said of options that are taken for mochi-xdit's published command lines."""
DRAWN = -1
"""A seed that stands for one to be drawn, as in ComfyUI and other programs with a window."""


PATH = click.Path(path_type=Path)
_OWN = "Default: the checkpoint's."


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


class HeadGroups(click.ParamType):
    """A number of groups, or `auto` as None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither auto nor a whole number", param, ctx)


def _is_size(side: str) -> bool:
    return side.isascii() and side.isdigit() and len(side) < 9 and MIN_TILE <= int(side) <= MOST["width"]


def options(fork: Fork) -> list[click.Parameter]:
    """All options of a program, in the order of its help."""
    own = {group: [o for o in fork.options.command_line if getattr(o, "group", WHAT) == group] for group in GROUPS}
    inputs = own.pop(WHAT)
    return [
        *(*_weights(fork), *_prompts(fork), *inputs, *_numbers()),
        *(*_how_many(), *_degrees(fork), _replicas(), *_memory(), *_precision(), *_speed(), *_output()),
        *(option for options in own.values() for option in options),
        *(*_expert(), *_of_others()),
    ]


def _weights(fork: Fork) -> list[Option]:
    repo = next((model.repo for model in fork.models if model.repo), "owner/name")
    first = next(iter(fork.demos), "")
    return [
        Option(
            ["--model-dir"],
            type=PATH,
            help=f"The checkpoint: a folder, or the name of a repository, such as {repo}, that diffusers or `hf "
            "download` left in the hub's local cache. Nothing is downloaded here; xdit-download does that.",
        ),
        Option(
            ["--demo"],
            is_flag=False,
            flag_value=first,
            type=click.Choice(tuple(fork.demos)),
            help="In place of --model-dir: a small checkpoint of the same architecture, to try the program without a "
            f"download. Without a name: {first}.",
        ),
    ]


def _prompts(fork: Fork) -> list[Option]:
    fixed = any(model.rules.negative_prompt for model in fork.models)
    default = "the authors' own sentence; '' for none" if fixed else "empty"
    return [
        Option(["--prompt"], help="What the video shows."),
        Option(
            ["--negative-prompt"], help=f"What guidance (--cfg-scale) leads the video away from. Default: {default}."
        ),
        Option(
            ["--prompt-file"],
            type=PATH,
            help="A text file with one prompt a line: a video of each, and the checkpoint is loaded once.",
        ),
    ]


def _numbers() -> list[Option]:
    return [
        Option(["--num-videos"], type=int, default=1, help="Videos of each prompt; each has the next seed."),
        Option(["--width"], type=int, help=f"Pixels. {_OWN}"),
        Option(["--height"], type=int, help=f"Pixels. {_OWN}"),
        Option(["--num-frames"], type=int, help=f"Frames of the video. {_OWN}"),
        Option(["--num-steps"], type=int, help=f"Denoising steps, diffusers' num_inference_steps. {_OWN}"),
        Option(
            ["--cfg-scale"],
            type=float,
            help="How strongly the prompt is followed, diffusers' guidance_scale; 1 turns guidance off and halves the "
            f"work. {_OWN}",
        ),
        Option(
            ["--seed"],
            type=int,
            help="A number for the random noise that the video begins as: the same one, the same video. Default, and "
            "-1: a random one, which is printed.",
        ),
    ]


def _how_many() -> list[Option]:
    option = partial(Option, group=GPUS)
    return [
        option(
            ["--gpus"],
            type=int,
            help="GPUs to use; each runs one process. Default: the product of the degrees below, else all that are "
            "visible. Without GPUs it is the number of CPU processes; default: one, of a demo two.",
        ),
        option(
            ["--device"],
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            help="Where to compute; auto: on GPUs if there are any, else on the CPU.",
        ),
    ]


def _degrees(fork: Fork) -> list[Option]:
    heads = max(model.heads for model in fork.models)
    option = partial(Option, group=GPUS)
    return [
        option(
            ["--cfg-parallel/--no-cfg-parallel"],
            default=None,
            help="Guidance runs the model twice a step, with the prompt and with the negative prompt: do both at the "
            "same time, each on half of the GPUs (degree 2). Default: chosen.",
        ),
        option(
            ["--ring-degree"],
            type=int,
            help="GPUs that split the video's tokens and pass keys and values round (ring attention); any number. "
            "Default: chosen.",
        ),
        option(
            ["--ulysses-degree"],
            type=int,
            help="GPUs that split the video's tokens and exchange them for attention heads (DeepSpeed-Ulysses); at "
            f"most as many as the model has heads ({heads}). Default: chosen.",
        ),
    ]


def _replicas() -> Option:
    return Option(
        ["--replicas"],
        type=int,
        group=GPUS,
        help="Of several videos, how many are made at the same time, each by its share of the GPUs; a GPU that "
        "fails costs its share a restart and the video a step. Default: 1, or the planner's advice where it knows "
        "the GPUs.",
    )


def _memory() -> list[Option]:
    option = partial(Option, group=MEMORY)
    return [
        option(
            ["--offload"],
            type=click.Choice(OFFLOADS),
            help="Which weights are on the GPU. none: all models; stage: text encoder, transformer and decoder one "
            "after another; block: the transformer's blocks wait in main memory and are copied ahead of their turn; "
            "disk: they are read from the checkpoint in every step. Default: the first that fits, and none only "
            "where several videos are made.",
        ),
        option(
            ["--shard-weights"],
            is_flag=True,
            help="Each GPU keeps only its share of the weights, and a block is gathered when it is needed (like FSDP). "
            "Default: where the weights do not fit otherwise.",
        ),
        option(
            ["--keep-loaded/--no-keep-loaded"],
            default=None,
            help="Keep all models loaded from one video to the next. Default: with several videos, where it fits.",
        ),
        option(["--max-memory"], type=float, help="GiB of each GPU that may be used. Default: all that is free."),
    ]


def _precision() -> list[Option]:
    option = partial(Option, group=MEMORY)
    return [
        option(
            ["--dtype"],
            type=click.Choice(DTYPES),
            help="Precision of the transformer. fp8: its matrices in 8 bits, the rest in bf16; what that costs is in "
            "docs/fidelity.md. Default: on GPUs the checkpoint's, on the CPU fp32.",
        ),
        option(["--text-dtype"], type=click.Choice(DTYPES), help="Precision of the text encoder. Default: as --dtype."),
        option(
            ["--vae"],
            type=click.Choice(DECODE_MODES),
            default="auto",
            help="How latents become frames. exact: as one picture; tiled: in tiles that are blended, which takes less "
            "memory and changes the picture; auto: exact where it fits.",
        ),
        option(["--vae-chunk"], type=int, help="Latent frames decoded at once. Default: as many as fit."),
        option(
            ["--vae-tile"],
            type=TileSize(),
            help="Largest tile of a tiled decode in pixels: 256, or 320x240 (width x height). Default: what fits.",
        ),
        option(
            ["--dry-run"],
            is_flag=False,
            flag_value="",
            metavar="[MODEL]",
            help="Make nothing: print how the work would be split, what each GPU would hold and send, and why. MODEL, "
            "one of the names at the end, needs no weights; without it --model-dir's, or the first of them.",
        ),
    ]


def _speed() -> list[Option]:
    option = partial(Option, group=SPEED)
    return [
        option(
            ["--attention"],
            type=click.Choice(["auto", "sdpa", "cudnn", "flash2", "flash3"]),
            default="auto",
            help="Attention kernel: PyTorch's own choice (sdpa), cuDNN's, or a flash-attn package of version 2 or 3; "
            "auto: the fastest of PyTorch's.",
        ),
        option(
            ["--compile"],
            is_flag=True,
            help="torch.compile for the transformer. The first step takes longer, the others less.",
        ),
        option(["--compile-vae"], is_flag=True, help="torch.compile for parts of the decoder."),
        option(
            ["--overlap-groups"],
            type=HeadGroups(),
            default="auto",
            help="Split what GPUs exchange into this many groups of heads, so that one travels under the work on "
            "others; auto: as many as the planner predicts to be fastest over this machine's links.",
        ),
        option(
            ["--interleave-branches/--no-interleave-branches"],
            default=None,
            help="The two passes of guidance take turns on the same GPUs: one computes while what the other has sent "
            "is on its way, and weights that do not stay on the GPU come once a step for both. Takes some more memory. "
            "Default: where weights do not stay, or the links are so slow that it pays, and there is room.",
        ),
        option(
            ["--text-cache"],
            type=PATH,
            help="A folder that keeps encoded prompts: one that was encoded before needs no text encoder.",
        ),
    ]


def _output() -> list[Option]:
    option = partial(Option, group=OUTPUT)
    return [
        option(
            ["--output"],
            help="File to write, by its suffix: .mp4, .webm, .gif, .webp, .png or .jpg (one frame), .npy or "
            ".safetensors (frames as numbers); without a suffix a folder of PNGs. A .json with every setting is "
            "written beside it: x.json for x.mp4, x.gif.json for x.gif, x.frames.json for a folder x. Default: a new "
            "name in outputs/; of a demo demo.mp4.",
        ),
        option(["--overwrite"], is_flag=True, help="Replace an output that is there already."),
        option(["--fps"], type=int, help=f"Frames per second. {_OWN}"),
        option(
            ["--crf"],
            type=int,
            help="Quality of .mp4 and .webm: lower is better and makes a larger file; 0 is lossless, also for .webp. "
            "Default: 17 for .mp4, 20 for .webm.",
        ),
        option(["--save-latents"], is_flag=True, help="Keep the latents beside the output, for --from-latents."),
        option(
            ["--from-latents"],
            type=PATH,
            help="Only decode: latents that --save-latents, or a run whose decode failed, left.",
        ),
        option(
            ["--resume"],
            type=PATH,
            metavar="STATE",
            help="Go on with an interrupted run from the .state.safetensors file that it left. The other options are "
            "those of that run, but for what is given here.",
        ),
        option(
            ["--save-every"],
            type=float,
            default=60.0,
            help="Seconds between two writes of the file for --resume, while the run lasts.",
        ),
    ]


def _expert() -> list[Option]:
    option = partial(Option, group=EXPERT)
    return [
        option(
            ["--ray-address"],
            is_flag=False,
            flag_value="auto",
            metavar="[ADDRESS]",
            help="Run on a Ray cluster of any number of machines: its address; without one, what RAY_ADDRESS says. "
            "--gpus says how many of its GPUs; outputs are written by one of its machines. Needs the extra ray.",
        ),
        option(
            ["--text-encoder-dir"],
            type=PATH,
            help="Folder of the text encoder. Default: in the checkpoint's folder.",
        ),
        option(
            ["--engine"],
            type=click.Choice(ENGINES),
            default="native",
            help="Attention across GPUs: native, or the xfuser package's.",
        ),
        *_compiling(),
        option(
            ["--timeout"],
            type=float,
            default=1800.0,
            help="Seconds that processes wait for each other before the run ends with an error.",
        ),
        option(["--debug"], is_flag=True, help="Show tracebacks and what libraries print."),
        option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version.",
        ),
    ]


def _compiling() -> list[Option]:
    option = partial(Option, group=EXPERT)
    return [
        option(["--compile-mode"], type=click.Choice(COMPILE_MODES), default="default", help="torch.compile's mode."),
        option(
            ["--compile-dynamic/--no-compile-dynamic"],
            default=True,
            help="torch.compile: one graph for all sizes and prompt lengths, or one for each.",
        ),
        option(
            ["--compile-fullgraph/--no-compile-fullgraph"],
            default=True,
            help="torch.compile: fail where a block does not become one graph, or let it be several.",
        ),
    ]


def _of_others() -> list[Option]:
    """Options of mochi-xdit's published command lines that have nothing to do here."""
    flags = [Option([name], is_flag=True, hidden=True) for name in ("--use-xdit", "--use-fsdp", "--cpu-offload")]
    return [*flags, Option(["--max-t5-token-length"], type=int, hidden=True)]


def fit_option(what: str) -> Option:
    """Of forks that take pictures. what: the options that name them."""
    text = f"Where the shape of {what} is not the video's: cut it, stretch it, or put it between black bars."
    return Option(["--fit"], type=click.Choice(FITS), default=FITS[0], help=text)


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"{context.info_name} {version()}")
        context.exit()


def unreadable_image(path: Path) -> list[str]:
    """What is wrong with the file of --image, for forks that have such an option."""
    from common.video.pictures import read_image

    try:
        read_image(path)
    except ValueError as error:
        return [f"--image {error}"]
    return []
