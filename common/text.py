"""T5: prompts -> features, loaded and freed inside.

A T5 encoder directory is either a diffusers folder (with `text_encoder/` and `tokenizer/`) or one
directory with `config.json`, the weights and `spiece.model` or `tokenizer.json`.

Token ids are those of the sentencepiece model followed by `</s>` (id 1) and padded with 0, which is
what upstream's slow T5 tokenizer with `legacy=False` gives; no tokenizer of another library stands
between, so ids do not change with its version.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.blocks import Blocks, FromFile, Image, Stream, bind
from common.fp8 import FLOAT8, SCALE, fill_float8, use_float8
from common.parallel import Mesh, broadcast_object, broadcast_tensors
from common.weights import assign

EOS, PAD = 1, 0
_LAYERS = "encoder.block."
FLOAT8_LAYERS = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1")),
)
Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]
_TOKENIZERS = ("spiece.model", "tokenizer.json")
_INDEXES = ("model.safetensors.index*.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "model.*.safetensors", "pytorch_model.bin", "*.safetensors")


@dataclass(frozen=True)
class TextFeatures:
    """What T5 makes of B prompts.

    features: (B, L, D) fp32, L = the token limit; rows of masked padding are zero
    mask: (B, L) bool, True where a token of the prompt (its `</s>` included) stands
    used: tokens of each prompt, at most L
    cut: the end of each prompt that did not fit, "" where everything did
    """

    features: Tensor
    mask: Tensor
    used: tuple[int, ...]
    cut: tuple[str, ...]

    @property
    def limit(self) -> int:
        return self.features.shape[1]


@dataclass(frozen=True)
class EncoderFiles:
    """The files of one T5 encoder, found but not read (weights: every shard, in order)."""

    config: Path
    tokenizer: Path
    weights: tuple[Path, ...]

    @classmethod
    def find(cls, directory: str | Path) -> EncoderFiles:
        """Raise ValueError with the fix if `directory` is no T5 encoder with a tokenizer."""
        root = Path(directory).expanduser()
        if not root.is_dir():
            raise ValueError(f"no such directory for the T5 text encoder: {root}")
        model = root / "text_encoder" if (root / "text_encoder").is_dir() else root
        config = model / "config.json"
        _check_config(config)
        folders = dict.fromkeys((root / "tokenizer", model.parent / "tokenizer", model, root))
        found = [f / name for f in folders for name in _TOKENIZERS if (f / name).is_file()]
        if not found:
            raise ValueError(
                f"no tokenizer for the T5 text encoder in {root}: put spiece.model or "
                f"tokenizer.json beside config.json or into {root / 'tokenizer'}"
            )
        return cls(config, found[0], _find_weights(model))

    def fingerprint(self) -> str:
        """A hash that changes with the configuration, the tokenizer and the weights.

        Weights are sampled (size, both ends and 62 places between), not read whole.
        """
        digest = hashlib.sha256(self.config.read_bytes())
        digest.update(self.tokenizer.read_bytes())
        for path in self.weights:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                for k in range(64):
                    file.seek(k * max(size - 65536, 0) // 63)
                    digest.update(file.read(65536))
        return digest.hexdigest()


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"not a T5 text encoder: {path} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "t5":
        raise ValueError(f"not a T5 text encoder: {path} says model_type {kind!r}, needed is 't5'")


def _find_weights(model: Path) -> tuple[Path, ...]:
    for pattern in _INDEXES:
        for index in sorted(model.glob(pattern)):
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{index} is no index of weight files: {error!r}") from None
            shards = tuple(model / name for name in names)
            for shard in shards:
                if not shard.is_file():
                    raise ValueError(f"{index} names {shard.name}, which is missing in {model}")
            return shards
    for pattern in _SINGLES:
        if files := sorted(model.glob(pattern)):
            return (files[0],)
    raise ValueError(
        f"no weights for the T5 text encoder in {model}: expected model.safetensors, "
        "model.safetensors.index.json with its shards, or pytorch_model.bin"
    )


class Tokenizer:
    """Prompt -> token ids, from `spiece.model` or `tokenizer.json`, without network."""

    def __init__(self, path: Path) -> None:
        read = _sentencepiece if path.suffix == ".model" else _tokenizer_json
        self._encode, self._decode = read(path)

    def __call__(self, prompt: str, limit: int) -> tuple[list[int], str]:
        """Ids ending in `</s>`, at most `limit` of them, and the text that was cut off."""
        if limit < 1:
            raise ValueError(f"the token limit must be at least 1, not {limit}")
        ids = self._encode(prompt)
        cut = self._decode(ids[limit - 1 :]) if len(ids) >= limit else ""
        return [*ids[: limit - 1], EOS], cut


def _sentencepiece(path: Path) -> Codec:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no sentencepiece model: {error}") from None
    return model.encode, model.decode


def _tokenizer_json(path: Path) -> Codec:
    from tokenizers import Tokenizer as Fast

    try:
        model = Fast.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None
    model.no_truncation()
    model.no_padding()
    return lambda text: model.encode(text, add_special_tokens=False).ids, model.decode


def _tensors(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Memory-mapped tensors of one file; other tensors (a full T5's decoder) are not touched."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                for name in names.intersection(file.keys()):
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
        return
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # zip, pickle and runtime errors alike
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
    for name in names.intersection(state):
        yield name, state[name]


def new_t5(config: dict, device: str = "meta") -> nn.Module:
    """A T5EncoderModel, without memory by default; its embedding's two names are one parameter."""
    from transformers import T5Config, T5EncoderModel

    with torch.device(device):
        model = T5EncoderModel(T5Config(**config)).eval()
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.requires_grad_(False)


def load_t5(
    files: EncoderFiles,
    device: torch.device | str,
    dtype: torch.dtype,
    float8: bool = False,
    stream: bool = False,
) -> nn.Module:
    """A T5EncoderModel whose tensors went one by one from the mapped files to `device`.

    float8: the layers' matmul weights but the last (transformers itself keeps that one in a wider type) in eight bits.
    stream: layers come from the mapped files when their turn comes, two at a time on the device.
    Raises ValueError naming file and tensor for missing, extra-shaped or truncated weights.
    """
    model = new_t5(json.loads(files.config.read_text()))
    mapped = _mapped(files, {name: tuple(p.shape) for name, p in model.named_parameters()})
    layers = model.encoder.block = Blocks(model.encoder.block)  # type: ignore[arg-type]
    for layer in layers if float8 else ():
        use_float8(layer, FLOAT8_LAYERS)
    for name in list(mapped):
        if not (stream and name.startswith(_LAYERS)):
            kind = model.get_parameter(name).dtype if float8 else dtype
            _put(model, name, mapped.pop(name), torch.device(device), FLOAT8 if kind == FLOAT8 else dtype)
    model.encoder.embed_tokens.weight = model.shared.weight
    if stream:
        _stream_layers(layers, mapped, torch.device(device), dtype)
    return model


def _mapped(files: EncoderFiles, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The encoder's tensors as views of the mapped files."""
    aliases = {"encoder.embed_tokens.weight": "shared.weight"}
    found: dict[str, Tensor] = {}
    for path in files.weights:
        for stored, tensor in _tensors(path, set(wanted) | set(aliases)):
            name = aliases.get(stored, stored)
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(
                    f"{path}: {stored} has shape {tuple(tensor.shape)}, config.json asks for {wanted[name]}"
                )
            found.setdefault(name, tensor)
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(
            f"{files.weights[0].parent}: {len(missing)} tensors of the T5 encoder are missing, "
            f"the first is {missing[0]}"
        )
    return found


def _put(model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    if dtype != FLOAT8:
        assign(model, name, tensor.to(device=device, dtype=dtype))
        return
    values = torch.empty(tensor.shape, dtype=FLOAT8)
    scale = torch.empty(tensor.shape[0], 1)
    fill_float8(tensor, values, scale)
    assign(model, name, values.to(device))
    assign(model, name.removesuffix("weight") + SCALE, scale.to(device))


def _stream_layers(layers: Blocks, mapped: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Let the layers' weights come from the mapped files, two layers at a time."""

    def fill(index: int, tensors: Mapping[str, Tensor]) -> None:
        for name, out in tensors.items():
            if name.endswith(SCALE):
                continue
            stored = mapped[f"{_LAYERS}{index}.{name}"]
            if out.dtype != FLOAT8:
                out.copy_(stored)
                continue
            values, scale = torch.empty(out.shape, dtype=FLOAT8), torch.empty(out.shape[0], 1)
            fill_float8(stored, values, scale)
            out.copy_(values)
            tensors[name.removesuffix("weight") + SCALE].copy_(scale)

    def kind(layer: nn.Module, name: str) -> torch.dtype:
        slot = layer.get_parameter(name).dtype
        return slot if slot == FLOAT8 or name.endswith(SCALE) else dtype

    images = [Image.of(layer, partial(kind, layer)) for layer in layers]
    room = max(image.nbytes for image in images)
    stream = Stream(FromFile(fill, images, device), images, device, room, again=False)
    for i, layer in enumerate(layers):
        bind(layer, stream.views(i))
    layers.stream = stream


class TextEncoder:
    """A T5 encoder that loads at the first prompt it has to run and is freed by `free`.

    dtype is that of the weights and of the arithmetic; features come out in fp32.
    cache_dir keeps features by hash of prompt and encoder, so that a known prompt loads nothing.
    float8, stream: see `load_t5`.
    """

    def __init__(
        self,
        directory: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        cache_dir: str | Path | None = None,
        float8: bool = False,
        stream: bool = False,
    ) -> None:
        self.files = EncoderFiles.find(directory)
        self.tokenizer = Tokenizer(self.files.tokenizer)
        self.device, self.dtype = torch.device(device), dtype
        self.width = int(json.loads(self.files.config.read_text())["d_model"])
        self.options = {"float8": float8, "stream": stream}
        kind = f"{dtype} float8" if float8 else str(dtype)
        self._cache = None if cache_dir is None else FeatureCache(cache_dir, self.files, kind)
        self.model: nn.Module | None = None

    def __enter__(self) -> TextEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def free(self) -> None:
        """Drop the weights and hand their memory back to the device."""
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[str], max_length: int, use_mask: bool) -> TextFeatures:
        """Features of every prompt, cut to `max_length` tokens.

        use_mask: T5 sees the prompt's own tokens only (Mochi). Otherwise the prompt is padded to
        `max_length` and T5 attends to the padding as to any token (CogVideoX).
        One prompt at a time, so that a prompt's features do not depend on its neighbours.
        """
        features = torch.zeros(len(prompts), max_length, self.width)
        mask = torch.zeros(len(prompts), max_length, dtype=torch.bool)
        cuts = []
        for b, prompt in enumerate(prompts):
            ids, cut = self.tokenizer(prompt, max_length)
            mask[b, : len(ids)] = True
            cuts.append(cut)
            padded = ids if use_mask else ids + [PAD] * (max_length - len(ids))
            known = self._cache.get(padded) if self._cache else None
            rows = self._run(padded) if known is None else known
            if self._cache and known is None:
                self._cache.put(padded, rows)
            features[b, : len(rows)] = rows
        used = tuple(int(n) for n in mask.sum(1))
        return TextFeatures(features, mask, used, tuple(cuts))

    @torch.no_grad()
    def _run(self, ids: list[int]) -> Tensor:
        if self.model is None:
            self.model = load_t5(self.files, self.device, self.dtype, **self.options)
        # The ids are exactly the tokens T5 may attend to, so no mask is needed: masked padding
        # has weight zero in every softmax and leaves no trace in the other rows.
        out = self.model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state
        return out[0].to("cpu", torch.float32)


class FeatureCache:
    """Features on disk, one safetensors file per (encoder, dtype, token ids).

    The token ids carry prompt, limit and padding. A damaged file counts as unknown; a cache that
    cannot be written costs time, not the run.
    """

    def __init__(self, directory: str | Path, files: EncoderFiles, dtype: str) -> None:
        self.directory = Path(directory).expanduser()
        self._base = f"{files.fingerprint()}:{dtype}".encode()

    def _path(self, ids: Sequence[int]) -> Path:
        key = hashlib.sha256(self._base + struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
        return self.directory / f"t5-{key[:40]}.safetensors"

    def get(self, ids: Sequence[int]) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            rows = load_file(self._path(ids))["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        return rows if rows.shape[0] == len(ids) else None

    def put(self, ids: Sequence[int], rows: Tensor) -> None:
        from safetensors.torch import save

        path = self._path(ids)
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                temporary = file.name
                file.write(save({"features": rows.contiguous()}))
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def encode(
    prompts: Sequence[str],
    directory: str | Path,
    max_length: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    use_mask: bool = True,
    cache_dir: str | Path | None = None,
) -> TextFeatures:
    """Load, encode, free. See TextEncoder.encode."""
    with TextEncoder(directory, device, dtype, cache_dir) as encoder:
        return encoder.encode(prompts, max_length, use_mask)


def encode_on_main(
    mesh: Mesh, prompts: Sequence[str], encoder: TextEncoder | None, max_length: int, use_mask: bool
) -> TextFeatures:
    """Rank 0 encodes with its `encoder`, every rank receives the features on `mesh.device`.

    Ranks other than 0 pass None. What goes wrong on rank 0 is raised as ValueError on all.
    """
    result, failure = None, None
    if mesh.is_main:
        assert encoder is not None
        try:
            result = encoder.encode(prompts, max_length, use_mask)
        except Exception as error:  # told to every rank before it goes on
            failure = error
    plain = (result.used, result.cut) if result else None
    plain, reason = broadcast_object(mesh.world, (plain, failure and f"{failure}"))
    if plain is None:
        raise failure or ValueError(reason)
    tensors = {"features": result.features, "mask": result.mask} if result else None
    tensors = broadcast_tensors(mesh.world, tensors, mesh.device)
    return TextFeatures(tensors["features"], tensors["mask"].bool(), *plain)
