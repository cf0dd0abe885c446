"""Hostile commands, drawn from a seed: each case is a command line, the files it reads and the environment it meets.

Everything is a dry run or a video of one frame of 16 x 16 pixels, so that a case which turns out to be harmless is
cheap as well.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.documents import damaged
from tests.fuzz.headers import split
from tests.fuzz.values import mutate_json, odd_number, odd_text

ROOT = Path(__file__).resolve().parents[2]
FORKS = ("mochi", "cogvideox", "consisid")
JSON_FILES = (
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
SMALL = ("--num-steps", "1", "--num-frames", "1", "--gpus", "1", "--device", "cpu", "--prompt", "a red circle")


@dataclass(frozen=True)
class Case:
    """One hostile command."""

    area: str
    seed: int
    program: str  # module with a `main`
    arguments: tuple[str, ...]
    folder: Path  # the working folder; everything that the case reads or writes lies in it
    environment: Mapping[str, str] = field(default_factory=dict)
    culprit: str = ""  # the file or folder that an error has to name


def make(area: str, seed: int, folder: Path) -> Case:
    """The case of an area and a seed, its files written into `folder`, which is empty."""
    return AREAS[area](random.Random(f"{area} {seed}"), seed, folder)


def _checkpoint(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """A fork and a copy of its demo checkpoint: links, so that a case replaces what it wants to spoil."""
    fork = rng.choice(FORKS)
    source = ROOT / f"{fork}_xdit" / "demo_data"
    copy = folder / "checkpoint"
    for path in source.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return fork, copy


def _spoil(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _from_checkpoint(fork: str, *more: str) -> tuple[str, ...]:
    if fork == "consisid":  # makes no small pictures, so that nothing is made of it
        return (
            "--model-dir",
            "checkpoint",
            *SMALL,
            "--id-embeddings",
            "checkpoint/red_circle.safetensors",
            "--dry-run",
        )
    size = ("--width", "16", "--height", "16")
    # With a placement given, nothing is estimated first.
    given = () if "--dry-run" in more else ("--offload", "stage")
    return ("--model-dir", "checkpoint", *SMALL, *size, "--output", "out.mp4", *given, *more)


def configs(rng: random.Random, seed: int, folder: Path) -> Case:
    """A json of a checkpoint with one to three values of the wrong kind or of absurd size."""
    fork, copy = _checkpoint(rng, folder)
    files = [name for name in JSON_FILES if (copy / name).exists()]
    name = rng.choice(files)
    content = (copy / name).read_bytes()
    if rng.random() < 0.15:
        content = damaged(content, rng)
    else:
        content = mutate_json(rng, json.loads(content)).encode(errors="surrogatepass")
    _spoil(copy / name, content)
    dry = ("--dry-run",) if rng.random() < 0.25 else ()
    return Case(
        "configs", seed, f"{fork}_xdit.cli", _from_checkpoint(fork, *dry), folder, culprit=Path(name).parent.name
    )


def headers(rng: random.Random, seed: int, folder: Path) -> Case:
    """A safetensors file whose header lies about names, kinds, shapes, offsets or its own length."""
    fork, copy = _checkpoint(rng, folder)
    name = rng.choice(WEIGHTS)
    tensors, rest = split((copy / name).read_bytes())
    header = json.dumps(tensors).encode()
    kind = rng.random()
    if kind < 0.6:
        header = mutate_json(rng, tensors, deep=True).encode(errors="surrogatepass")
    elif kind < 0.8:
        header = damaged(header, rng)
    else:
        rest = rest[: rng.randrange(len(rest) + 1)]
    length = odd_number(rng) if rng.random() < 0.1 else len(header)
    size = length if isinstance(length, int) and 0 <= length < 2**64 else rng.getrandbits(64)
    _spoil(copy / name, struct.pack("<Q", size) + header + rest)
    return Case("headers", seed, f"{fork}_xdit.cli", _from_checkpoint(fork), folder, culprit=Path(name).parent.name)


def indexes(rng: random.Random, seed: int, folder: Path) -> Case:
    """A single file turned into shards with an index that points anywhere."""
    fork, copy = _checkpoint(rng, folder)
    name = rng.choice(WEIGHTS)
    path = copy / name
    names = [key for key in split(path.read_bytes())[0] if key != "__metadata__"]
    shard = path.name.replace(".safetensors", "-00001-of-00001.safetensors")
    path.rename(path.with_name(shard))
    index: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    kind = rng.random()
    if kind < 0.5:
        text = mutate_json(rng, index, deep=True)
    else:
        target = rng.choice(["../../outside.safetensors", "/etc/passwd", "", ".", "..", shard + "\0", odd_text(rng)])
        index["weight_map"][rng.choice(names)] = target
        text = json.dumps(index)
    where = path.with_name(path.name + ".index.json")
    where.write_bytes(text.encode(errors="surrogatepass"))
    return Case("indexes", seed, f"{fork}_xdit.cli", _from_checkpoint(fork), folder, culprit=where.parent.name)


OPTIONS = {
    "--width": "number",
    "--height": "number",
    "--num-frames": "number",
    "--num-steps": "number",
    "--cfg-scale": "number",
    "--seed": "number",
    "--fps": "number",
    "--gpus": "number",
    "--ulysses-degree": "number",
    "--ring-degree": "number",
    "--overlap-groups": "number",
    "--num-videos": "number",
    "--vae-chunk": "number",
    "--vae-tile": "number",
    "--max-memory": "number",
    "--timeout": "number",
    "--prompt": "text",
    "--negative-prompt": "text",
    "--output": "text",
    "--model-dir": "text",
    "--text-encoder-dir": "text",
    "--text-cache": "text",
    "--from-latents": "text",
    "--prompt-file": "text",
    "--dtype": "text",
    "--attention": "text",
    "--offload": "text",
}
FLAGS = (
    "--cfg-parallel",
    "--no-cfg-parallel",
    "--shard-weights",
    "--compile",
    "--keep-loaded",
    "--demo",
    "--vae-exact",
)


def arguments(rng: random.Random, seed: int, folder: Path) -> Case:
    """Options with values that no one means, in any number and order."""
    line: list[str] = []
    for _ in range(rng.randint(1, 5)):
        name = rng.choice(list(OPTIONS))
        value = str(odd_number(rng)) if OPTIONS[name] == "number" and rng.random() < 0.9 else odd_text(rng)
        spelled = name.replace("-", "_").replace("__", "--", 1) if rng.random() < 0.2 else name
        line += [f"{spelled}={value}"] if rng.random() < 0.5 else [spelled, value]
    if rng.random() < 0.3:
        line.insert(rng.randrange(len(line) + 1), rng.choice(FLAGS))
    if rng.random() < 0.1:
        line.insert(rng.randrange(len(line) + 1), odd_text(rng))
    demo = [] if any(word.startswith(("--model", "--demo")) for word in line) else ["--demo"]
    line = [*demo, "--device", "cpu", *line, "--dry-run"]
    return Case("arguments", seed, f"{rng.choice(FORKS)}_xdit.cli", _as_argv(line), folder)


def _as_argv(words: list[str]) -> tuple[str, ...]:
    """As a shell could hand them over: no NUL, nothing past what a kernel takes."""
    return tuple(word.replace("\0", "")[:100_000] for word in words)


def prompts(rng: random.Random, seed: int, folder: Path) -> Case:
    """Prompt files of any bytes."""
    kind = rng.random()
    if kind < 0.4:
        content = rng.randbytes(rng.randint(0, 300))
    elif kind < 0.8:
        content = "\n".join(odd_text(rng) for _ in range(rng.randint(0, 5))).encode(errors="surrogatepass")
    else:
        content = rng.choice([b"", b"\n\n", b"\xef\xbb\xbf", b"a\0b", b"a" * 1_000_000, b"\xff\xfea\0", b"x\r\n\ry"])
    (folder / "prompts.txt").write_bytes(content)
    line = ("--demo", "--device", "cpu", "--prompt-file", "prompts.txt", "--output", "o.mp4", "--dry-run")
    return Case("prompts", seed, f"{rng.choice(FORKS[:2])}_xdit.cli", line, folder, culprit="prompts.txt")


def names(rng: random.Random, seed: int, folder: Path) -> Case:
    """Names of files and folders: too long, taken, unreadable, of odd letters."""
    (folder / "taken").mkdir()
    (folder / "file").write_bytes(b"x")
    (folder / "taken.json").mkdir()
    (folder / "taken.latents.safetensors").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling.mp4").symlink_to("nowhere/x.mp4")
    base = rng.choice(
        [
            *("taken", "file/x", "loop", "loop/x", "dangling", "x/" * 600, "a" * rng.randint(1, 400)),
            *("é" * rng.randint(1, 200), odd_text(rng), "/dev/null", "/proc/self/x", "-", "--", ".", ".."),
            *("", "\udce9", "x\ny", "~", "$HOME", "con"),
        ]
    )
    name = rng.choice(["--output", "--output", "--from-latents", "--text-cache", "--model-dir", "--text-encoder-dir"])
    suffix = rng.choice([".mp4", "", ".MP4"]) if name == "--output" else ""
    demo = () if name == "--model-dir" else ("--demo",)
    line = [*demo, "--device", "cpu", f"{name}={base}{suffix}", "--dry-run"]
    return Case("names", seed, f"{rng.choice(FORKS[:2])}_xdit.cli", _as_argv(line), folder)


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def environments(rng: random.Random, seed: int, folder: Path) -> Case:
    """What other launchers leave in the environment, and locales, homes and temporary folders that are not there."""
    chosen = rng.sample(VARIABLES, rng.randint(1, len(VARIABLES)))
    values = {name: rng.choice(["", "0", "1", "2", "-1", "abc", "1e3", " 1", "99999999999", "²"]) for name in chosen}
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        if rng.random() < 0.2:
            values[name] = rng.choice(["", "/nowhere", "\udcff", "/proc", "relative"])
    if rng.random() < 0.3:
        values |= {"LC_ALL": rng.choice(["C", "POSIX", "xx_YY.latin1"])}
    line = ("--demo", "--device", "cpu", "--dry-run", *(("--gpus", "2") if rng.random() < 0.5 else ()))
    return Case("environments", seed, f"{rng.choice(FORKS)}_xdit.cli", line, folder, environment=values)


PROFILE: Mapping[str, Any] = {
    "name": "mine",
    "gpu": "l40",
    "tflops": 181.0,
    "hbm_gbs": 864.0,
    "memory_gib": 45.0,
    "matmul": 0.6,
    "links": {"kind": "pcie", "gbs": 16.0, "across": 0.8, "gpus_per_socket": 4, "gpus_per_node": 8, "node_gbs": 12.0},
}


def profiles(rng: random.Random, seed: int, folder: Path) -> Case:
    """Profiles of machines for the planner, and its own options."""
    (folder / "machine.json").write_bytes(mutate_json(rng, PROFILE).encode(errors="surrogatepass"))
    line = ["--model", rng.choice(["mochi", "cogvideox-5b", "consisid"]), "--gpu", "machine.json"]
    line += ["--gpus", str(rng.choice([1, 2, 6, 8, odd_number(rng)]))]
    for name in ("--width", "--height", "--num-frames", "--num-steps", "--nodes"):
        if rng.random() < 0.2:
            line += [name, str(odd_number(rng))]
    return Case("profiles", seed, "planner.cli", _as_argv(line), folder)


Maker = Callable[[random.Random, int, Path], Case]
AREAS: Mapping[str, Maker] = {
    maker.__name__: maker for maker in (arguments, prompts, names, environments, profiles, configs, headers, indexes)
}
