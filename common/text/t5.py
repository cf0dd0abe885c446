"""The encoders of T5's family, T5 and UMT5: files found, checked by their headers, and loaded tensor by tensor.

An encoder's directory is either a diffusers folder (with `text_encoder/` and `tokenizer/`) or one directory with
`config.json`, the weights and `spiece.model` or `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.text.encoder import TextWork
from common.text.tokenizer import PAD, SENTENCEPIECE, Tokenizer, content
from common.weights.blocks import BlockLayout, Blocks, FromFile, Stream, StreamedLayers, bind
from common.weights.checkpoint import DTYPE_NAMES, Checkpoint, Stored, is_zip, open_checkpoint, read_index
from common.weights.float8 import FLOAT8, SCALE, fill_float8, has_float8_matmul, use_float8
from common.weights.load import CASTABLE, assign
from common.weights.scaled import with_row_scales
from common.weights.schema import MAX_LAYERS, CheckpointError, bounded, build, one_of, quoted, read_object, shown

_LAYERS = "encoder.block."
_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
FLOAT8_LAYERS = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1")),
)
_INDEXES = ("model.safetensors.index*.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "model.*.safetensors", "pytorch_model.bin", "*.safetensors")


@dataclass(frozen=True)
class T5Numbers:
    """What an encoder takes of its `config.json`; names and defaults are transformers' T5Config's."""

    vocab_size: int = bounded(32128, 1 << 20)
    d_model: int = 512
    d_kv: int = bounded(64, 1024)
    d_ff: int = 2048
    num_layers: int = bounded(6, MAX_LAYERS)
    num_heads: int = bounded(8, 1024)
    relative_attention_num_buckets: int = bounded(32, 4096, least=4)
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = one_of("relu", "gelu", "gated-gelu", "gated-silu")

    def __post_init__(self) -> None:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance {self.relative_attention_max_distance} is too small for "
                f"relative_attention_num_buckets {self.relative_attention_num_buckets}"
            )


@dataclass(frozen=True)
class UMT5Numbers(T5Numbers):
    """The same of UMT5Config; eps, buckets and their distance are T5's."""

    vocab_size: int = bounded(250112, 1 << 20)
    d_ff: int = 1024
    num_layers: int = bounded(8, MAX_LAYERS)
    num_heads: int = bounded(6, 1024)
    feed_forward_proj: str = one_of("gated-gelu", "relu")


@dataclass(frozen=True)
class Member:
    """One member of the family: what differs between T5 and UMT5."""

    name: str
    """As errors say it; in lower case it is the `model_type` of config.json."""
    numbers: type[T5Numbers]
    classes: tuple[str, str]
    """transformers' classes of the configuration and of the encoder."""
    tokenizers: tuple[str, str]
    """The tokenizer's file, and what is taken where there is none."""


T5 = Member("T5", T5Numbers, ("T5Config", "T5EncoderModel"), ("spiece.model", "tokenizer.json"))
UMT5 = Member("UMT5", UMT5Numbers, ("UMT5Config", "UMT5EncoderModel"), ("tokenizer.json", "spiece.model"))
"""T5 with a table of relative positions in every layer, where T5 has the first layer's in all.

tokenizer.json first: for characters that no piece covers it has the unknown token, as every program that loads UMT5's
fast tokenizer; sentencepiece would spell them in bytes.
"""


T5_XXL: Mapping[str, Any] = asdict(
    T5Numbers(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
)
"""The numbers of T5 v1.1 XXL's encoder."""


@dataclass(frozen=True)
class EncoderFiles:
    """The files of one encoder, found but not read; a `common.text.encoder.Encoder`."""

    config: Path
    """What describes the weights: config.json, or the weights' own file where `known` has the numbers."""
    tokenizer: Path
    """Its file, or one of weights that holds it."""
    weights: tuple[Path, ...]
    """Every shard, in order."""
    member: Member = T5
    known: T5Numbers | None = None
    """The numbers of a layout without config.json."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """transformers' modules -> the files' names, where they have names of their own."""

    @classmethod
    def find(cls, directory: str | Path, member: Member = T5) -> EncoderFiles:
        """Raise ValueError with the fix if `directory` is no encoder of this kind with a tokenizer."""
        root, kind = Path(directory).expanduser(), member.name
        if not root.is_dir():
            raise ValueError(f"no such directory for the {kind} text encoder: {root}")
        model = root / "text_encoder" if (root / "text_encoder").is_dir() else root
        config = model / "config.json"
        read_numbers(config, member)
        folders = dict.fromkeys((root / "tokenizer", model.parent / "tokenizer", model, root))
        tokenizers = [f / name for f in folders for name in member.tokenizers if (f / name).is_file()]
        if not tokenizers:
            raise ValueError(
                f"no tokenizer for the {kind} text encoder in {root}: put {' or '.join(member.tokenizers)} "
                f"beside config.json or into {root / 'tokenizer'}"
            )
        return cls(config, tokenizers[0], _find_weights(model, kind), member)

    @property
    def name(self) -> str:
        return self.member.name.lower()

    @property
    def width(self) -> int:
        return self.numbers().d_model

    @property
    def pad(self) -> int:
        return PAD

    def numbers(self) -> T5Numbers:
        return self.known or read_numbers(self.config, self.member)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer)

    def tokenize(self, prompt: str, limit: int) -> tuple[list[int], str]:
        return self._tokenizer(prompt, limit)

    def check(self, width: int | None = None) -> None:
        check_t5(self, width)

    def load(self, device: torch.device, dtype: torch.dtype, float8: bool = False, stream: bool = False) -> nn.Module:
        return load_t5(self, device, dtype, float8, stream)

    def run(self, model: nn.Module, ids: Tensor) -> Tensor:
        return features_of(model, ids)

    def fingerprint(self) -> str:
        """A hash that changes with the configuration, the tokenizer and the weights.

        Weights are sampled (size, both ends and 62 places between), not read whole.
        """
        digest = hashlib.sha256(f"{self.name} {self.known}".encode() if self.known else self.config.read_bytes())
        digest.update(content(self.tokenizer))
        for path in self.weights:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                for k in range(64):
                    file.seek(k * max(size - 65536, 0) // 63)
                    digest.update(file.read(65536))
        return digest.hexdigest()


def features_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Features (B, L, D) of ids (B, L)."""
    return model(input_ids=ids).last_hidden_state


def text_work(
    tokens: int,
    find: Callable[[], Path | EncoderFiles] | None = None,
    official: Mapping[str, Any] = T5_XXL,
    member: Member = T5,
) -> TextWork:
    """An encoder of the family at work on prompts of so many tokens.

    find: its folder or files, None where there is no checkpoint. official: numbers that count without one, and where
    `find` raises ValueError: that is told when a prompt needs the encoder, for a run without prompts does not.
    """
    numbers = official
    with suppress(ValueError):
        encoder = find() if find is not None else None
        files = EncoderFiles.find(encoder, member) if isinstance(encoder, Path) else encoder
        numbers = official if files is None else asdict(files.numbers())

    def new(dtype: torch.dtype) -> nn.Module:
        model = new_t5(numbers, member=member).to(dtype)
        model.encoder.embed_tokens.weight = model.shared.weight  # type: ignore[union-attr]
        model.encoder.block = StreamedLayers(model.encoder.block)  # type: ignore[union-attr,arg-type]
        return model

    return TextWork(new, features_of, tokens, FLOAT8_LAYERS)


def read_numbers(path: Path, member: Member = T5) -> T5Numbers:
    """The numbers of an encoder's config.json. CheckpointError names the file, and the key where there is one."""
    if not path.is_file():
        raise CheckpointError(f"not a {member.name} text encoder: {path} is missing")
    raw, model_type = read_object(path), member.name.lower()
    if (kind := raw.get("model_type")) != model_type:
        difference = f"{path} says model_type {shown(kind)}, needed is {model_type!r}"
        raise CheckpointError(f"not a {member.name} text encoder: {difference}")
    return build(member.numbers, {one.name: one.name for one in fields(member.numbers)}, raw, str(path))


def _find_weights(model: Path, kind: str) -> tuple[Path, ...]:
    for pattern in _INDEXES:
        for index in sorted(model.glob(pattern)):
            names = sorted(set(read_index(index).values()))
            shards = tuple(model / name for name in names)
            for shard in shards:
                if not shard.is_file():
                    raise CheckpointError(f"{index} names {quoted(shard.name)}, which is missing in {model}")
            return shards
    for pattern in _SINGLES:
        if files := sorted(model.glob(pattern)):
            return (files[0],)
    raise ValueError(
        f"no weights for the {kind} text encoder in {model}: expected model.safetensors, "
        "model.safetensors.index.json with its shards, or pytorch_model.bin"
    )


def new_t5(config: Mapping[str, Any], device: str = "meta", member: Member = T5) -> nn.Module:
    """transformers' encoder, without memory by default; its embedding's two names are one parameter."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in member.classes)
    with torch.device(device):
        model = model_class(config_class(**config)).eval()
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.requires_grad_(False)


def load_t5(
    files: EncoderFiles,
    device: torch.device | str,
    dtype: torch.dtype,
    float8: bool = False,
    stream: bool = False,
) -> nn.Module:
    """transformers' encoder, whose tensors went one by one from the mapped files to `device`.

    float8: the layers' matmul weights but the last (transformers itself keeps that one in a wider type) in eight bits.
    stream: layers come from the mapped files when their turn comes, two at a time on the device.
    Raises ValueError naming file and tensor for missing, extra-shaped or truncated weights.
    """
    model = new_t5(asdict(files.numbers()), member=files.member)
    loaders = _mapped(files, _shapes(model))
    layers = model.encoder.block = StreamedLayers(model.encoder.block)  # type: ignore[arg-type]
    for layer in layers if float8 else ():
        use_float8(layer, FLOAT8_LAYERS, has_float8_matmul(torch.device(device)))
    for name in list(loaders):
        if not (stream and name.startswith(_LAYERS)):
            slot_dtype = model.get_parameter(name).dtype if float8 else dtype
            _put(model, name, loaders.pop(name)(), torch.device(device), FLOAT8 if slot_dtype == FLOAT8 else dtype)
    model.encoder.embed_tokens.weight = model.shared.weight
    if stream:
        _stream_layers(layers, loaders, torch.device(device), dtype)
    return model


def check_t5(files: EncoderFiles, width: int | None = None) -> None:
    """Raise what `load_t5` would raise for these files, and read headers only: for a check at the door.

    width: of the features that the model takes. Pickles of the format before torch 1.6 have no header; whether they
    are whole is seen when they are loaded.
    """
    numbers = files.numbers()
    if width is not None and numbers.d_model != width:
        raise CheckpointError(f"{files.config} says d_model={numbers.d_model}; the model takes features of {width}")
    if all(path.suffix == ".safetensors" or is_zip(path) for path in files.weights):
        _mapped(files, _shapes(new_t5(asdict(numbers), member=files.member)))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _mapped(files: EncoderFiles, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Callable[[], Tensor]]:
    """What gives each of the encoder's tensors, a view of its mapped file unless it has to be widened from eight bits.

    CheckpointError names file and tensor where one is wrong.
    """
    tensors: dict[str, Callable[[], Tensor]] = {}
    kind = files.member.name
    aliases = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in files.rename.items()} or _ALIASES
    for tensor, checkpoint in _tensors(files.weights, {*shapes, *aliases}, every=bool(files.rename)):
        name, at = aliases.get(tensor.name, tensor.name), f"{tensor.file}: tensor {quoted(tensor.name)}"
        if name not in shapes:
            raise CheckpointError(f"{at} is unknown to the {kind} encoder that {files.config} describes")
        if tensor.dtype not in CASTABLE:
            has = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
            castable = ", ".join(DTYPE_NAMES[dtype] for dtype in CASTABLE)
            raise CheckpointError(f"{at} has dtype {has}, expected {castable}")
        if tuple(tensor.shape) != shapes[name]:
            asks = f"{files.config.name} asks for {shapes[name]}"
            raise CheckpointError(f"{at} has shape {tuple(tensor.shape)}, {asks}")
        tensors.setdefault(name, partial(checkpoint.tensor, tensor.name))
    if missing := sorted(set(shapes) - set(tensors)):
        raise CheckpointError(
            f"{files.weights[0].parent}: {len(missing)} tensors of the {kind} encoder are missing, "
            f"the first is {missing[0]}"
        )
    return tensors


def _tensors(paths: Collection[Path], names: Collection[str], every: bool) -> Iterator[tuple[Stored, Checkpoint]]:
    """Tensors that are wanted, or are an encoder's; a whole T5's decoder is not touched.

    every: files that hold an encoder and nothing else.
    """
    checkpoint = with_row_scales(open_checkpoint(paths))
    for name, entry in checkpoint.items():
        if (every or name in names or name.startswith("encoder.")) and name != SENTENCEPIECE:
            yield entry, checkpoint


def _put(model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    if dtype != FLOAT8:
        assign(model, name, tensor.to(device=device, dtype=dtype))
        return
    values = torch.empty(tensor.shape, dtype=FLOAT8)
    scale = torch.empty(tensor.shape[0], 1)
    fill_float8(tensor, values, scale)
    assign(model, name, values.to(device))
    assign(model, name.removesuffix("weight") + SCALE, scale.to(device))


def _stream_layers(
    layers: Blocks, loaders: Mapping[str, Callable[[], Tensor]], device: torch.device, dtype: torch.dtype
) -> None:
    """Let the layers' weights come from the mapped files, two layers at a time."""

    def fill(index: int, tensors: Mapping[str, Tensor]) -> None:
        for name, out in tensors.items():
            if name.endswith(SCALE):
                continue
            tensor = loaders[f"{_LAYERS}{index}.{name}"]()
            if out.dtype != FLOAT8:
                out.copy_(tensor)
                continue
            values, scale = torch.empty(out.shape, dtype=FLOAT8), torch.empty(out.shape[0], 1)
            fill_float8(tensor, values, scale)
            out.copy_(values)
            tensors[name.removesuffix("weight") + SCALE].copy_(scale)

    def dtype_of(layer: nn.Module, name: str) -> torch.dtype:
        slot = layer.get_parameter(name).dtype
        return slot if slot == FLOAT8 or name.endswith(SCALE) else dtype

    layouts = [BlockLayout.of(layer, partial(dtype_of, layer)) for layer in layers]
    buffer_bytes = max(layout.nbytes for layout in layouts)
    stream = Stream(FromFile(fill, layouts, device), layouts, device, buffer_bytes, wrap_around=False)
    for i, layer in enumerate(layers):
        bind(layer, stream.views(i))
    layers.stream = stream
