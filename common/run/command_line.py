"""The command line that the forks share: click options in, frozen dataclasses out.

`parse` collects everything that is wrong with a command and raises it as one `WrongUse`, before torch is imported.
Hyphens and underscores are alike in every option (`--model-dir`, `--model_dir`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from common.registry.checks import (
    Ranks,
    Rules,
    interleave_problems,
    kernel_problems,
    layout_problems,
    xfuser_problems,
)
from common.registry.forks import Fork, Size, official
from common.registry.hub import checkpoint_folder, other_program
from common.registry.layout import Layout
from common.registry.request import Request, Source, Video, WrongUse
from common.registry.settings import CompileOptions, DecodeOptions, Runtime, Sampling, default_dtype, filled
from common.run.degrees import choose_layout, ray_problems, share_out, with_overlap
from common.run.destination import format_problem, named, numbered, own_name, place_problems
from common.run.help import Command
from common.run.kept import SAMPLED, contradictions, decode_options, fixed, given_options, settings_of
from common.run.options import DRAWN, MOST, NO_EFFECT, SYNONYMS, options
from common.run.unknown import unknown_words
from common.system import environment
from common.system.files import absence, as_text, reason, shown, text_problem, writing_problem
from common.system.host import gpus_are_hidden

MAX_SEED = 2**63 - 1
MAX_SCALE = 1000.0
MAX_MEMORY = 1_000_000  # GiB
MAX_PROMPT_FILE = 64 << 20
MAX_TIMEOUT = 10_000_000
UNUSABLE_GPU = "there is a GPU driver, but PyTorch sees no GPU (a CPU build, or a driver older than its CUDA?)"
DEMO_RANKS = 2
"""Of a demo on a CPU."""


def command(fork: Fork) -> click.Command:
    """The click command; `parse` reads with it, documentation can be made from it."""
    return Command(
        fork,
        params=options(fork),
        help="Make a video from a prompt, on one GPU, on many, or on the CPU.\n\n"
        f"`{fork.program} quantize --help`: a copy of a checkpoint in 8 bits. Under torchrun the same command runs in "
        "every process. Options are also known by diffusers' and xDiT's names, such as --model, "
        "--num-inference-steps, --guidance-scale; docs/flags.md has them all.",
        context_settings={
            "token_normalize_func": _spelled_out,
            "help_option_names": ["-h", "--help"],
            "ignore_unknown_options": True,
            "allow_extra_args": True,
            "show_default": True,
            "max_content_width": 110,
        },
    )


def _spelled_out(token: str) -> str:
    token = token.replace("_", "-")
    return SYNONYMS.get(token, token)


def parse(fork: Fork, arguments: Sequence[str], at: environment.Process | None = None) -> Request:
    """A checked Request from command line arguments.

    at: this process among others; ranks of a running world bring their number. Default: alone.
    Raises WrongUse with all problems, and click's Exit after --help or --version.
    """
    spec = command(fork)
    try:
        context = spec.make_context(fork.program, list(arguments))
    except click.UsageError as error:
        raise WrongUse([error.format_message()]) from None
    problems = list(context.meta.get("problems", []))
    problems += unknown_words(fork, context.args, spec.params)
    reader = _RequestBuilder(fork, context.params, problems, at or environment.Process(), given_options(context))
    return replace(reader.request(), decode_options=decode_options(context, fixed(fork)))


class _RequestBuilder:
    """Turns option values into a Request, noting every problem on the way."""

    def __init__(
        self, fork: Fork, values: Mapping[str, Any], problems: list[str], at: environment.Process, names: set[str]
    ) -> None:
        texts = {name: as_text(values[name]) for name in ("prompt", "negative_prompt") if values[name] is not None}
        self.fork, self.values, self.problems, self.process = fork, {**values, **texts}, problems, at
        self.names = names
        self.made = self._made()
        self.output, self.probe = Path(), True  # probe: whether the output is still to be tried
        self.gpus = 0 if values["device"] == "cpu" else environment.visible_gpus()
        self.dry = values["dry_run"] is not None
        degrees = [values["ulysses_degree"], values["ring_degree"], 2 if values["cfg_parallel"] else 1]
        ranks = values["gpus"] or math.prod(max(1, degree or 1) for degree in degrees)
        self.unseen = ranks if not self.gpus and values["device"] == "auto" and ranks > 1 else 0
        """Ranks of a command that counts on GPUs, where none is visible."""
        imagined = values["device"] == "cuda" or (self.unseen and values["demo"] is None)
        if self.dry and imagined and not self.gpus:
            self.gpus = max(1, ranks)  # a dry run asks nothing of them
        if values["ray_address"] is not None:
            problems += ray_problems(self.process.launcher is None)
            self.gpus = 0 if values["device"] == "cpu" else max(1, (values["replicas"] or 1) * ranks)
            self.unseen = 0
        self.device = "cuda" if self.gpus else "cpu"

    def request(self) -> Request:
        source, rules = self._source()
        videos = self._videos(source, rules)
        self._check_settings()
        if self._unusable_gpu() and source.model_dir is not None and not self.dry:
            self.problems.append(f"{UNUSABLE_GPU}; install a driver and a PyTorch that fit, or say --device cpu")
        self._placement()
        options = filled(self.fork.options, self.values)
        self.problems += options.problems(rules, source, videos, self.dry)
        layout, why, replicas = self._layout(rules, videos)
        runtime = self._runtime(rules, len(videos) > 1, layout.ranks)
        if runtime.engine == "xfuser":
            self.problems += xfuser_problems(
                runtime.device, runtime.attention, runtime.dtype, rules.heads, layout.ulysses
            )
        if self.problems:
            raise WrongUse(list(dict.fromkeys(self.problems)))
        request = filled(
            Request,
            self.values,
            program=self.fork.program,
            source=source,
            rules=rules,
            layout=layout,
            layout_chosen=why,
            replicas=replicas,
            runtime=runtime,
            decode=filled(DecodeOptions, self.values),
            options=options,
            videos=tuple(videos),
            output=self.output,
            dry_run=self.dry,
            cpu_by_default=not self.gpus and self.values["device"] != "cpu",
            remarks=tuple(self._remarks(layout.ranks, rules, options)),
        )
        return with_overlap(request, self.fork.names)

    def _check_settings(self) -> None:
        self._positive("vae_chunk")
        self._positive("overlap_groups")
        if self.values["vae"] == "exact" and self.values["vae_tile"]:
            self.problems.append("--vae exact does not cut the picture; leave --vae-tile out, or use --vae tiled")
        if (folder := self.values["text_encoder_dir"]) is not None and (problem := absence(folder, "folder")):
            self.problems.append(f"--text-encoder-dir {problem}")
        if (room := self.values["max_memory"]) is not None and not 0 < room <= MAX_MEMORY:
            self.problems.append(f"--max-memory {room} is not a number of GiB above 0 and up to {MAX_MEMORY}")
        if not 0 < (self.values["timeout"] or 0) <= MAX_TIMEOUT:
            self.problems.append(f"--timeout {self.values['timeout']} is no number of seconds up to {MAX_TIMEOUT}")

    def _runtime(self, rules: Rules, several: bool, ranks: int) -> Runtime:
        keep = {"none": True, None: several}.get(self.values["offload"], False)
        return filled(
            Runtime,
            self.values,
            device=self.device,
            dtype=self._dtype(rules),
            keep_loaded=self._value("keep_loaded", keep),
            shard_weights=self.values["shard_weights"] and ranks > 1,
            compiling=filled(CompileOptions, {name: v for name, v in self.values.items() if v is not None}),
        )

    def _dtype(self, rules: Rules) -> str:
        return self.values["dtype"] or default_dtype(self.device, rules.dtype)

    def _source(self) -> tuple[Source, Rules]:
        model_dir, demo = self.values["model_dir"], self.values["demo"]
        rules = self.fork.rules(Source())  # to check the rest by, where the source itself is wrong
        if self.dry and (name := self._official(model_dir or demo)):
            return Source(official=name), self.fork.rules(Source(official=name))
        if model_dir is not None and demo is not None:
            self.problems.append("--model-dir and --demo exclude each other; give one of them")
        elif model_dir or demo:
            return self._opened(model_dir, demo) or (Source(model_dir, demo), rules)
        elif "demo" not in self.names and not self.dry:  # what is wrong with a name is said
            self.problems.append("--model-dir is missing; name a checkpoint directory, or use --demo")
        return Source(model_dir, demo), rules

    def _opened(self, model_dir: Path | None, demo: str | None) -> tuple[Source, Rules] | None:
        """A checkpoint folder, by its place or its repository's name, or a demo, and what it admits."""
        try:
            folder = model_dir and checkpoint_folder(model_dir, self.fork, self.values["text_encoder_dir"] is None)
        except (ValueError, OSError) as error:
            self.problems.append(f"--model-dir {error}")
            return None
        source = Source(folder, demo)
        try:
            return source, self.fork.rules(source)
        except (ValueError, OSError) as error:
            self.problems.append(f"--model-dir {model_dir}: {error}{other_program(folder, self.fork)}")
        return None

    def _official(self, weights: object) -> str | None:
        """The official model whose numbers a dry run takes; None where there are weights to look at."""
        try:
            return official(self.fork, self.values["dry_run"], weights)
        except ValueError as error:
            self.problems.append(f"--dry-run {error}")
            return None

    def _value(self, name: str, default: Any) -> Any:
        value = self.values[name]
        return default if value is None else value

    def _positive(self, *names: str) -> None:
        for name in names:
            value = self.values[name]
            option = f"--{name.replace('_', '-')} {value}"
            if value is not None and value < 1:
                self.problems.append(f"{option} is not a positive number; at least 1")
            elif value is not None and value > MOST[name]:
                self.problems.append(f"{option} is more than any machine makes; at most {MOST[name]}")

    def _sizes(self, rules: Rules) -> tuple[int, int, int]:
        """Width, height and frames; where they are absurd, the official ones, so that nothing else trips over them."""
        sizes = {name: self._value(name, getattr(rules, name)) for name in ("width", "height", "num_frames")}
        absurd = [name for name, value in sizes.items() if value > MOST[name]]
        if absurd:
            self._positive(*absurd)
            return rules.width, rules.height, rules.num_frames
        self.problems += rules.problems(*sizes.values())
        return sizes["width"], sizes["height"], sizes["num_frames"]

    def _videos(self, source: Source, rules: Rules) -> list[Video]:
        self._positive("num_steps", "fps", "num_videos")
        width, height, num_frames = self._sizes(rules)
        scale = self._value("cfg_scale", rules.cfg_scale)
        if not 0 <= scale <= MAX_SCALE:
            self.problems.append(f"--cfg-scale {scale} is not a number from 0 to {MAX_SCALE}")
        seed = None if self.values["seed"] == DRAWN else self.values["seed"]
        count = min(max(1, self._value("num_videos", 1)), MOST["num_videos"])
        if seed is not None and not 0 <= seed <= MAX_SEED - count:
            self.problems.append(f"--seed {seed} is outside 0 .. {MAX_SEED - count}; {DRAWN} draws one")
        self.output, folder = self._output(source)
        base = Video(
            prompt="",
            negative_prompt=self._value("negative_prompt", rules.negative_prompt),
            sampling=Sampling(width, height, num_frames, self._value("num_steps", rules.num_steps), scale),
            fps=self._value("fps", rules.fps),
            output=self.output,
            folder=folder,
            crf=self.values["crf"],
            save_latents=bool(self.values["save_latents"]),
            seed=seed,
            latents=self.values["from_latents"],
            made=self.made,
        )
        prompts = self._prompts(rules)
        for name in ("prompt", "negative_prompt"):
            if (problem := text_problem(self.values[name] or "")) is not None:
                self.problems.append(f"--{name.replace('_', '-')}: {problem}")
        if len(prompts) * count > MOST["num_videos"]:
            self.problems.append(f"{len(prompts)} prompts x {count} videos are more than {MOST['num_videos']}")
            count = 1
        return self._writable(numbered(base, prompts, count))

    def _writable(self, videos: list[Video]) -> list[Video]:
        """The videos, after a look at every file that they will leave."""
        if self.process.rank == 0 and self.probe:
            problem = format_problem(videos[0])
            self.problems += [f"--output {problem}"] if problem else []
            self.problems += [f"--output: {problem}" for problem in place_problems(videos)]
        return videos

    def _placement(self) -> None:
        offload, keep, cache = self.values["offload"], self.values["keep_loaded"], self.values["text_cache"]
        if offload == "disk" and self.values["shard_weights"]:
            self.problems.append(
                "--shard-weights with --offload disk: no rank keeps weights then; leave one out, or use --offload block"
            )
        if (offload, keep) in (("none", False), ("stage", True)):
            flag = "--keep-loaded" if keep else "--no-keep-loaded"
            self.problems.append(f"--offload {offload} and {flag} say the opposite; give one of them")
        if cache is not None and (problem := absence(cache, "folder")) and not problem.endswith("does not exist"):
            self.problems.append(f"--text-cache {problem}")

    def _made(self) -> dict[str, Any] | None:
        """What --from-latents says of its latents, which stands for the options that decide them; None without it."""
        path = self.values["from_latents"]
        if path is None:
            return None
        if problem := absence(path, "file"):
            self.problems.append(f"--from-latents {problem}")
            return {}
        if self.values["prompt_file"] or (self.values["num_videos"] or 1) > 1:
            self.problems.append("--from-latents decodes one video; leave --prompt-file and --num-videos out")
        if self.values["save_latents"]:
            self.problems.append(
                "--save-latents keeps what is sampled, and --from-latents samples nothing; leave it out"
            )
        try:
            settings = settings_of(path, self.fork)
        except ValueError as error:
            self.problems.append(f"--from-latents {error}")
            return {}
        options = {name: self.values[name] for name in fixed(self.fork) if name in self.names}
        self.problems += contradictions(path, settings, options)
        self.values |= {name: settings[name] for name in SAMPLED if name in settings}
        # A file that does not say: what the user knows of it.
        return {**{name: str(v) if isinstance(v, Path) else v for name, v in options.items()}, **settings}

    def _prompts(self, rules: Rules) -> list[str]:
        prompt, file = self.values["prompt"], self.values["prompt_file"]
        if prompt is not None and file is not None:
            self.problems.append("--prompt and --prompt-file exclude each other; give one of them")
        elif file is not None:
            return self._prompts_of(file) or [""]
        elif prompt is None and self.values["from_latents"] is None:
            if rules.default_prompt is None and not self.dry and "demo" not in self.names:
                self.problems.append("--prompt is missing; say what the video shows")
            return [rules.default_prompt or ""]
        return [prompt or ""]

    def _prompts_of(self, file: Path) -> list[str]:
        name = f"--prompt-file {shown(file)}"
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_PROMPT_FILE + 1)
            lines = content.decode("utf-8-sig").split("\n")
        except OSError as error:
            self.problems.append(f"{name} cannot be read: {reason(error)}")
            return []
        except (UnicodeDecodeError, ValueError) as error:
            where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
            self.problems.append(f"{name} is not UTF-8 text{where}")
            return []
        if len(content) > MAX_PROMPT_FILE:
            self.problems.append(f"{name} is larger than {MAX_PROMPT_FILE >> 20} MiB; split it")
            return []
        for number, line in enumerate(lines, 1):
            if (problem := text_problem(line)) is not None:
                self.problems.append(f"{name}, line {number}: {problem}")
                return []
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            self.problems.append(f"{name} holds no prompt; write one a line")
        return prompts

    def _output(self, source: Source) -> tuple[Path, bool]:
        """The output, and whether it is a folder of frames."""
        destination = self.values["output"]
        if destination is None and source.demo is None:
            output = own_name(self.fork.program)
            # A folder that is missing is made when the run begins; here it only has to be possible.
            self.probe = output.parent.exists()
            if not self.probe and self.process.rank == 0 and (problem := writing_problem(Path(output.name))):
                self.problems.append(f"--output: {problem}")
            return output, False
        try:
            return named("demo.mp4" if destination is None else destination)
        except ValueError as error:
            self.problems.append(f"--output {error}")
            self.probe = False
            return Path("video.mp4"), False

    def _layout(self, rules: Rules, videos: Sequence[Video]) -> tuple[Layout, str, int]:
        """The layout, why it was chosen where the program chose a degree of it, and how many groups have one."""
        ring, ulysses = self.values["ring_degree"], self.values["ulysses_degree"]
        cfg = {True: 2, False: 1, None: None}[self.values["cfg_parallel"]]
        self.problems += interleave_problems(self.values["interleave_branches"], cfg or 1, self.values["engine"])
        if self.values["interleave_branches"]:
            cfg = cfg or 1
        self._positive("gpus")
        absurd = [name for name in ("gpus", "ulysses_degree", "ring_degree") if (self.values[name] or 0) > MOST[name]]
        if absurd:
            self._positive(*(name for name in absurd if name != "gpus"))
            return Layout(), "", 1
        if self.values["device"] == "cuda" and not self.gpus:
            self.problems.append("--device cuda: no GPU is visible; use --device cpu, or check CUDA_VISIBLE_DEVICES")
        if self.unseen and not self.gpus and self.values["demo"] is None and self.process.launcher is None:
            self.problems.append(
                f"{self.unseen} ranks were asked for, but no GPU is visible; for ranks on the CPU add --device cpu"
            )
        self.problems += kernel_problems(self.values["attention"], self.device, self._dtype(rules))
        ranks = self._ranks(self.gpus, [d for d in (cfg, ring, ulysses) if d is not None])
        guided = rules.guided(self._value("cfg_scale", rules.cfg_scale))
        case = (cfg, ring, ulysses, self.device, Size.of(videos[0].sampling, guided))
        model = (self.fork.names, rules.heads, guided, *case)
        alone = self.process.launcher is None
        ranks, replicas, wrong = share_out(ranks, self.values["replicas"], len(videos), alone, model)
        wrong += layout_problems(ranks, rules.heads, guided, cfg, ring, ulysses)
        self.problems += wrong
        if wrong:
            return Layout(), "", 1
        groups = self.values["overlap_groups"]
        return *choose_layout(self.fork.names, ranks.count, rules.heads, guided, *case, groups), replicas

    def _ranks(self, gpus: int, degrees: Sequence[int]) -> Ranks:
        replicas = min(max(1, self.values["replicas"] or 1), MOST["replicas"])
        requested, product = self.values["gpus"], replicas * math.prod(max(1, degree) for degree in degrees)
        if self.process.launcher is not None:
            world = self.process.world_size
            if requested and requested != world:
                self.problems.append(f"--gpus {requested}, but torchrun started {world} ranks; leave --gpus out")
            if gpus > 1 and self.process.local_world_size > gpus:  # one: each rank may be shown its own
                self.problems.append(f"{self.process.local_world_size} ranks on this machine, but {_visible(gpus)}")
            return Ranks(world, f"{world} are running")
        if requested and requested > 0:
            if gpus and requested > gpus:
                self.problems.append(f"--gpus {requested}, but {_visible(gpus)}; at most {gpus}")
            return Ranks(requested, f"--gpus is {requested}")
        if degrees:
            return Ranks(gpus, _visible(gpus)) if gpus and product > gpus else Ranks(product, f"{product} would run")
        if gpus:
            return Ranks(gpus, _visible(gpus))
        alone = max(replicas, DEMO_RANKS if self.values["demo"] else 1)
        return Ranks(alone, f"{alone} would run on the CPU")

    def _unusable_gpu(self) -> bool:
        unseen = self.values["device"] == "auto" and not self.gpus and environment.driver_present()
        return unseen and not gpus_are_hidden(os.environ)

    def _remarks(self, ranks: int, rules: Rules, options: Any) -> list[str]:
        remarks = []
        scale = self._value("cfg_scale", rules.cfg_scale)
        if self.values["negative_prompt"] and "negative_prompt" in self.names and not options.guided(rules, scale):
            some = rules.guided(MAX_SCALE)
            why = f"at --cfg-scale {scale:g} there is no guidance" if some else "this checkpoint has no guidance"
            remarks.append(f"--negative-prompt has no effect: {why}")
        if self._unusable_gpu():
            remarks.append(f"{UNUSABLE_GPU}: running on the CPU")
        if self.unseen:
            where = "are planned for GPUs; --device cpu plans for this machine" if self.gpus else "run on the CPU"
            remarks.append(f"no GPU is visible: {self.unseen} ranks {where}")
        if self.values["shard_weights"] and ranks == 1:
            remarks.append("--shard-weights has no effect on one rank, which has nobody to share with")
        unused = {name: why for name, why in options.without_effect(rules).items() if name in self.names}
        remarks += [f"--{name.replace('_', '-')} has no effect {why}" for name, why in unused.items()]
        return remarks + [text for name, text in NO_EFFECT.items() if self.values[name]]


def _visible(gpus: int) -> str:
    return f"{gpus} GPU{' is' if gpus == 1 else 's are'} visible"
