"""The command line that the forks share: click options in, frozen dataclasses out.

`parse` collects everything that is wrong with a command and raises it as one `WrongUse`, before torch is imported.
Hyphens and underscores are alike in every option (`--model-dir`, `--model_dir`).
"""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from common import launch
from common.checks import (
    COMPILE_MODES,
    DTYPES,
    ENGINES,
    OFFLOADS,
    Ranks,
    Rules,
    dry_run_problems,
    folder_problem,
    kernel_problems,
    layout_problems,
    reason,
    xfuser_problems,
)
from common.degrees import choose_layout
from common.host import gpus_are_hidden
from common.layout import Layout
from common.request import Program, Request, Setup, Source, Video, WrongUse

MAX_SEED = 2**63 - 1
MAX_TIMEOUT = 10_000_000
MIN_TILE = 32
UNUSABLE_GPU = "there is a GPU driver, but PyTorch sees no GPU (a CPU build, or a driver older than its CUDA?)"
AS_GIVEN = (
    *("attention", "engine", "vae", "vae_chunk", "vae_tile", "timeout", "debug"),
    *("text_encoder_dir", "text_dtype", "text_cache", "offload", "shard_weights", "overlap_groups", "max_memory"),
    *("compile", "compile_vae", "compile_mode", "compile_dynamic", "compile_fullgraph"),
)


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
        if len(sides) > 2 or not all(side.isdigit() and int(side) >= MIN_TILE for side in sides):
            self.fail(f"{value!r} is no tile size; write 256 or 320x240, at least {MIN_TILE} pixels a side", param, ctx)
        return int(sides[-1]), int(sides[0])


def _options(program: Program) -> list[click.Parameter]:
    def option(name: str, *, type: Any = None, default: Any = None, help: str, **more: Any) -> Option:
        if more.get("is_flag"):
            default = False
        return Option([name], type=type, default=default, help=help, **more)

    path = click.Path(path_type=Path)
    choice = click.Choice
    unlisted = {"hidden": True, "is_flag": True}
    return [
        option("--model-dir", type=path, help="Checkpoint directory."),
        option(
            "--demo",
            is_flag=False,
            flag_value=program.demos[0],
            type=choice(program.demos),
            help="Use a small checkpoint that is made on first use.",
        ),
        option("--text-encoder-dir", type=path, help="T5 directory, where it is not in the checkpoint's."),
        option("--prompt", help="What the video shows."),
        option("--prompt-file", type=path, help="A text file, one prompt a line: one loading, many videos."),
        option("--num-videos", type=int, default=1, help="Videos per prompt, each with the next seed."),
        option("--negative-prompt", default="", help="What it should not show."),
        option("--width", type=int, help="Pixels."),
        option("--height", type=int, help="Pixels."),
        option("--num-frames", type=int, help="Frames of the video."),
        option("--num-steps", type=int, help="Sampling steps."),
        option("--cfg-scale", type=float, help="Strength of classifier-free guidance; 1 turns it off."),
        option("--seed", type=int, help="Without it one is drawn and printed."),
        option("--output", type=path, help="The mp4 to write; a json with every setting lies beside it."),
        option("--fps", type=int, help="Frames per second of the mp4."),
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
        option("--vae", type=choice(["auto", "exact", "tiled"]), default="auto", help="How to decode."),
        option("--vae-chunk", type=int, help="Latent frames decoded at once."),
        option("--vae-tile", type=TileSize(), help="Largest tile in pixels: 256, or 320x240 (width x height)."),
        option(
            "--offload",
            type=choice(OFFLOADS),
            help="none: keep every stage on the device; stage: one at a time; block: blocks wait in host memory; "
            "disk: they are read from the checkpoint in every step. Default: what fits.",
        ),
        option("--shard-weights", is_flag=True, help="Every rank keeps a part of each block; a gather makes it whole."),
        option("--text-dtype", type=choice(DTYPES), help="Precision of the T5 encoder."),
        option("--text-cache", type=path, help="Directory that keeps text features, so that known prompts skip T5."),
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
            help=f"Print layout, memory, bytes and what is chosen; without weights for {', '.join(program.models)}.",
        ),
        option("--timeout", type=float, default=1800.0, help="Seconds after which a hung collective ends the run."),
        option("--debug", is_flag=True, help="Show tracebacks and the libraries' own output."),
        Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it."
        ),
        option("--use-xdit", help="Accepted; no effect.", **unlisted),
        option("--use-fsdp", help="Accepted; no effect.", **unlisted),
        option("--cpu-offload", help="Accepted; no effect.", **unlisted),
        *program.options,
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


def command(program: Program) -> click.Command:
    """The click command; `parse` reads with it, documentation can be made from it."""
    return click.Command(
        program.name,
        params=_options(program),
        help="Make a video from a prompt, on one GPU, many, or none. Also runs under torchrun. "
        f"`{program.name} quantize --help`: write a checkpoint in eight bits.",
        context_settings={
            "token_normalize_func": lambda token: token.replace("_", "-"),
            "help_option_names": ["-h", "--help"],
            "ignore_unknown_options": True,
            "allow_extra_args": True,
            "show_default": True,
            "max_content_width": 110,
        },
    )


def parse(program: Program, arguments: Sequence[str], at: launch.Place | None = None) -> Request:
    """A checked Request from command line arguments.

    at: this process's place; ranks of a running world bring their number. Default: alone.
    Raises WrongUse with all problems, and click's Exit after --help or --version.
    """
    spec = command(program)
    try:
        context = spec.make_context(program.name, list(arguments))
    except click.UsageError as error:
        raise WrongUse([error.format_message()]) from None
    problems = list(context.meta.get("problems", []))
    problems += _unknown(context.args, [name for option in spec.params for name in option.opts])
    return _Reader(program, context.params, problems, at or launch.Place()).request()


def _unknown(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    found = []
    for i, argument in enumerate(arguments):
        if argument.startswith("-"):
            name = argument.split("=")[0].replace("_", "-")
            near = difflib.get_close_matches(name, known, n=1)
            found.append(f"no such option: {name}" + (f"; did you mean {near[0]}?" if near else ""))
        elif i == 0 or not arguments[i - 1].startswith("-"):
            found.append(f"unexpected argument {argument!r}; quote a prompt that has spaces")
    return found


class _Reader:
    """Turns option values into a Request, noting every problem on the way."""

    def __init__(self, program: Program, values: Mapping[str, Any], problems: list[str], at: launch.Place) -> None:
        self.program, self.values, self.problems, self.place = program, values, problems, at
        self.output = Path()
        self.gpus = 0 if values["device"] == "cpu" else launch.visible_gpus()
        self.dry = values["dry_run"] is not None
        if self.dry and values["device"] == "cuda" and not self.gpus:
            self.gpus = max(1, values["gpus"] or 1)  # imagined: a dry run asks nothing of them

    def request(self) -> Request:
        source, rules = self._source()
        videos = self._videos(source, rules)
        self._positive("vae_chunk")
        self._positive("overlap_groups")
        if self.values["vae"] == "exact" and self.values["vae_tile"]:
            self.problems.append("--vae exact does not cut the picture; leave --vae-tile out, or use --vae tiled")
        if (folder := self.values["text_encoder_dir"]) is not None and not folder.is_dir():
            self.problems.append(f"--text-encoder-dir {folder} is not a directory")
        if (room := self.values["max_memory"]) is not None and not 0 < room < math.inf:
            self.problems.append(f"--max-memory {room} is not a number of GiB above 0")
        if not 0 < (self.values["timeout"] or 0) <= MAX_TIMEOUT:
            self.problems.append(f"--timeout {self.values['timeout']} is no number of seconds up to {MAX_TIMEOUT}")
        if self._unusable_gpu() and source.model_dir is not None and not self.dry:
            self.problems.append(f"{UNUSABLE_GPU}; install a driver and a PyTorch that fit, or say --device cpu")
        self._placement()
        extra = {option.name: self.values[option.name] for option in self.program.options}
        self.problems += self.program.check(extra, videos)
        ranks, layout, chosen = self._layout(rules)
        if self.values["engine"] == "xfuser":
            dtype = self.values["dtype"] or rules.dtype
            device, kernel = "cuda" if self.gpus else "cpu", self.values["attention"]
            self.problems += xfuser_problems(device, kernel, dtype, rules.heads, layout.ulysses)
        if self.problems:
            raise WrongUse(list(dict.fromkeys(self.problems)))
        taken = {name: self.values[name] for name in AS_GIVEN} | {"device": "cuda" if self.gpus else "cpu"}
        kept = {"none": True, None: len(videos) > 1}.get(self.values["offload"], False)
        taken["keep_loaded"] = self._value("keep_loaded", kept)
        dtype = self.values["dtype"] or rules.dtype
        setup = Setup(source, rules, ranks, layout, chosen, dtype=dtype, extra=extra, **taken)
        return Request(setup, self.output, tuple(videos), tuple(self._remarks()), self.dry)

    def _source(self) -> tuple[Source, Rules]:
        model_dir, demo = self.values["model_dir"], self.values["demo"]
        official = self.program.rules(Source())  # to check the rest by, where the source itself is wrong
        if self.dry and (name := self._official(model_dir or demo)):
            return Source(official=name), self.program.rules(Source(official=name))
        if model_dir is not None and demo is not None:
            self.problems.append("--model-dir and --demo exclude each other; give one of them")
        elif model_dir is None and demo is None:
            self.problems.append("--model-dir is missing; name a checkpoint directory, or use --demo")
        elif model_dir is not None and not model_dir.is_dir():
            what = "is not a directory" if model_dir.exists() else "does not exist"
            self.problems.append(f"--model-dir {model_dir} {what}")
        else:
            source = Source(model_dir, demo)
            try:
                return source, self.program.rules(source)
            except (ValueError, OSError) as error:
                self.problems.append(f"--model-dir {model_dir}: {error}")
        return Source(model_dir, demo), official

    def _official(self, weights: object) -> str | None:
        """The official model whose numbers a dry run takes; None where there are weights to look at."""
        name, models = self.values["dry_run"], self.program.models
        self.problems += (found := dry_run_problems(name, weights, models))
        return None if found or weights else name or models[0]

    def _value(self, name: str, default: Any) -> Any:
        given = self.values[name]
        return default if given is None else given

    def _positive(self, *names: str) -> None:
        for name in names:
            value = self.values[name]
            if value is not None and value < 1:
                self.problems.append(f"--{name.replace('_', '-')} {value} is not a positive number; at least 1")

    def _videos(self, source: Source, rules: Rules) -> list[Video]:
        self._positive("num_steps", "fps", "num_videos")
        width, height = self._value("width", rules.width), self._value("height", rules.height)
        num_frames = self._value("num_frames", rules.num_frames)
        self.problems += rules.problems(width, height, num_frames)
        scale = self._value("cfg_scale", rules.cfg_scale)
        if not (math.isfinite(scale) and scale >= 0):
            self.problems.append(f"--cfg-scale {scale} is not a number of at least 0")
        seed, count = self.values["seed"], max(1, self._value("num_videos", 1))
        if seed is not None and not 0 <= seed <= MAX_SEED - count:
            self.problems.append(f"--seed {seed} is outside 0 .. {MAX_SEED - count}")
        self.output = self._output(source)
        base = Video(
            prompt="",
            negative_prompt=self._value("negative_prompt", ""),
            width=width,
            height=height,
            num_frames=num_frames,
            num_steps=self._value("num_steps", rules.num_steps),
            cfg_scale=scale,
            fps=self._value("fps", rules.fps),
            output=self.output,
            seed=seed,
            latents=self._latents(),
        )
        return _numbered(base, self._prompts(rules), count)

    def _placement(self) -> None:
        offload, kept, cache = self.values["offload"], self.values["keep_loaded"], self.values["text_cache"]
        if offload == "disk" and self.values["shard_weights"]:
            self.problems.append(
                "--shard-weights with --offload disk: no rank keeps weights then; leave one out, or use --offload block"
            )
        if (offload, kept) in (("none", False), ("stage", True)):
            flag = "--keep-loaded" if kept else "--no-keep-loaded"
            self.problems.append(f"--offload {offload} and {flag} say the opposite; give one of them")
        if cache is not None and cache.exists() and not cache.is_dir():
            self.problems.append(f"--text-cache {cache} is not a directory")

    def _latents(self) -> Path | None:
        path = self.values["from_latents"]
        if path is not None and not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            self.problems.append(f"--from-latents {path} {what}")
        if path is not None and (self.values["prompt_file"] or (self.values["num_videos"] or 1) > 1):
            self.problems.append("--from-latents decodes one video; leave --prompt-file and --num-videos out")
        return path

    def _prompts(self, rules: Rules) -> list[str]:
        prompt, file = self.values["prompt"], self.values["prompt_file"]
        if prompt is not None and file is not None:
            self.problems.append("--prompt and --prompt-file exclude each other; give one of them")
        elif file is not None:
            try:
                prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except OSError as error:
                self.problems.append(f"--prompt-file {file} cannot be read: {reason(error)}")
            except UnicodeDecodeError as error:
                self.problems.append(f"--prompt-file {file} is not UTF-8 text (byte {error.start})")
            else:
                if not prompts:
                    self.problems.append(f"--prompt-file {file} holds no prompt; write one a line")
                return prompts or [""]
        elif prompt is None and self.values["from_latents"] is None:
            if rules.default_prompt is None and not self.dry:
                self.problems.append("--prompt is missing; say what the video shows")
            return [rules.default_prompt or ""]
        return [prompt or ""]

    def _output(self, source: Source) -> Path:
        output = self.values["output"]
        if output is None and source.demo is not None:
            output = Path("demo.mp4")
        elif output is None:
            # The folder is made when the run begins; here it only has to be possible.
            output = Path("outputs", f"{self.program.name.split('-')[0]}-{time.strftime('%Y%m%d-%H%M%S')}.mp4")
            problem = None if output.parent.exists() else folder_problem(Path(output.name))
            self.problems += [f"--output: {problem}"] if problem else []
            return output
        if output.suffix != ".mp4" and not output.is_dir():
            self.problems.append(f"--output {output} must end in .mp4, such as {output.with_suffix('.mp4').name}")
        if self.place.rank == 0 and (problem := folder_problem(output)):
            self.problems.append(f"--output: {problem}")
        return output

    def _layout(self, rules: Rules) -> tuple[int, Layout, bool]:
        ring, ulysses = self.values["ring_degree"], self.values["ulysses_degree"]
        cfg = {True: 2, False: 1, None: None}[self.values["cfg_parallel"]]
        self._positive("gpus")
        if self.values["device"] == "cuda" and not self.gpus:
            self.problems.append("--device cuda: no GPU is visible; use --device cpu, or check CUDA_VISIBLE_DEVICES")
        dtype = self.values["dtype"] or rules.dtype
        self.problems += kernel_problems(self.values["attention"], "cuda" if self.gpus else "cpu", dtype)
        ranks = self._ranks(self.gpus, [d for d in (cfg, ring, ulysses) if d is not None])
        guided = self._value("cfg_scale", rules.cfg_scale) != 1
        wrong = layout_problems(ranks, rules.heads, guided, cfg, ring, ulysses)
        self.problems += wrong
        if wrong:
            return ranks.count, Layout(), False
        layout = choose_layout(self.program.models, ranks.count, rules.heads, guided, cfg, ring, ulysses)
        return ranks.count, layout, None in (cfg, ring, ulysses) and ranks.count > 1

    def _ranks(self, gpus: int, given: Sequence[int]) -> Ranks:
        asked, product = self.values["gpus"], math.prod(max(1, degree) for degree in given)
        if self.place.launcher is not None:
            world = self.place.world_size
            if asked and asked != world:
                self.problems.append(f"--gpus {asked}, but torchrun started {world} ranks; leave --gpus out")
            if gpus > 1 and self.place.local_world_size > gpus:  # one: each rank may be shown its own
                self.problems.append(f"{self.place.local_world_size} ranks on this machine, but {_visible(gpus)}")
            return Ranks(world, f"{world} are running")
        if asked and asked > 0:
            if gpus and asked > gpus:
                self.problems.append(f"--gpus {asked}, but {_visible(gpus)}; at most {gpus}")
            return Ranks(asked, f"--gpus is {asked}")
        if given:
            return Ranks(gpus, _visible(gpus)) if gpus and product > gpus else Ranks(product, f"{product} would run")
        if gpus:
            return Ranks(gpus, _visible(gpus))
        alone = self.program.demo_ranks if self.values["demo"] else 1
        return Ranks(alone, f"{alone} would run on the CPU")

    def _unusable_gpu(self) -> bool:
        unseen = self.values["device"] == "auto" and not self.gpus and launch.driver_present()
        return unseen and not gpus_are_hidden(os.environ)

    def _remarks(self) -> list[str]:
        remarks = []
        if self._unusable_gpu():
            remarks.append(f"{UNUSABLE_GPU}: running on the CPU")
        if self.values["use_xdit"] or self.values["use_fsdp"]:
            remarks.append("--use-xdit and --use-fsdp have no effect: the parallel path is the only one here")
        if self.values["cpu_offload"]:
            remarks.append("--cpu-offload has no effect: a stage is loaded when it is needed and freed after it")
        return remarks


def _visible(gpus: int) -> str:
    return f"{gpus} GPU{' is' if gpus == 1 else 's are'} visible"


def _numbered(base: Video, prompts: Sequence[str], count: int) -> list[Video]:
    """Every prompt `count` times; the k-th of each prompt has the k-th seed. Several get numbers in their names."""
    total = len(prompts) * count
    videos = []
    for index in range(total):
        seed = None if base.seed is None else base.seed + index % count
        output = base.output
        if total > 1:
            output = output.with_stem(f"{output.stem}-{index + 1:0{len(str(total))}}")
        videos.append(replace(base, prompt=prompts[index // count], seed=seed, take=index % count, output=output))
    return videos
