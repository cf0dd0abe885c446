"""T5 against transformers as an oracle, token ids against sentencepiece, and what users get wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.parallel.mesh import Layout, distributed, on_main
from common.run.demo import write_text_encoder
from common.text.encoder import TextEncoder, TextFeatures
from common.text.encoder import encode as encode_by
from common.text.t5 import EncoderFiles
from common.text.tokenizer import Tokenizer

CAPTIONS = [f"A {c} {s} moves {d}." for c in ("red", "blue") for s in ("circle", "square") for d in ("left", "up")]
PROMPTS = ["A red circle moves left.", "blue", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random T5 in a diffusers folder."""
    root = tmp_path_factory.mktemp("t5")
    write_text_encoder(root, CAPTIONS, seed=0, d_model=24, layers=2, heads=3, d_kv=8, d_ff=32)
    return root


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def encode(prompts: list[str], folder: Path, *args: object, **options: object) -> TextFeatures:
    return encode_by(prompts, EncoderFiles.find(folder), *args, **options)


def oracle(folder: Path, ids: list[list[int]], mask: torch.Tensor | None) -> torch.Tensor:
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("use_mask", [True, False])
def test_features_equal_transformers(folder, use_mask):
    out = encode(PROMPTS, folder, 30, dtype=torch.float32, use_mask=use_mask)
    tokenizer = Tokenizer(EncoderFiles.find(folder).tokenizer)
    rows = [tokenizer(p, 30)[0] for p in PROMPTS]
    ids = [r + [0] * (30 - len(r)) for r in rows]
    expected = oracle(folder, ids, out.mask.long() if use_mask else None)
    keep = out.mask[..., None] if use_mask else torch.ones(3, 30, 1)
    assert (out.features - expected * keep).abs().max() < 1e-5
    assert out.num_tokens == tuple(map(len, rows)) and out.truncated == ("", "", "") and out.limit == 30
    assert out.num_tokens[2] == 1 and out.features.dtype == torch.float32


def test_ids_are_those_of_sentencepiece_and_of_transformers(folder):
    from sentencepiece import SentencePieceProcessor
    from transformers import T5Tokenizer

    files = EncoderFiles.find(folder)
    ours = Tokenizer(files.tokenizer)
    plain = SentencePieceProcessor(model_file=str(files.tokenizer))
    theirs = T5Tokenizer.from_pretrained(files.tokenizer.parent)
    for text in (*CAPTIONS, "", "  two   spaces ", "Ünknown ☂ red", "</s> <pad>", "ﬁne. red\ncircle"):
        ids, cut = ours(text, 256)
        assert ids == [*plain.encode(text), 1] and cut == ""
        if "<" not in text and "☂" not in text:
            assert ids == theirs(text)["input_ids"], text


def test_tokenizer_json_gives_the_same_ids(folder, copy):
    from transformers import T5Tokenizer

    T5Tokenizer.from_pretrained(copy / "tokenizer").save_pretrained(copy / "fast")
    slow = Tokenizer(EncoderFiles.find(folder).tokenizer)
    (copy / "tokenizer" / "spiece.model").unlink()
    (copy / "fast" / "tokenizer.json").replace(copy / "tokenizer" / "tokenizer.json")
    files = EncoderFiles.find(copy)
    assert files.tokenizer.name == "tokenizer.json"
    for text in (*CAPTIONS, " red  circle"):
        assert Tokenizer(files.tokenizer)(text, 6) == slow(text, 6)


def test_long_prompts_are_cut_and_the_cut_text_is_told(folder):
    tokenizer = Tokenizer(EncoderFiles.find(folder).tokenizer)
    text = "A red circle moves left. A blue square moves up."
    full, _ = tokenizer(text, 256)
    ids, cut = tokenizer(text, 7)
    assert len(ids) == 7 and ids == [*full[:6], 1]
    assert cut and text.endswith(cut) and len(cut) < len(text)
    assert tokenizer(text, len(full)) == (full, "")
    ids, cut = tokenizer(text, len(full) - 1)
    assert cut in (".", "p.")
    out = encode([text], folder, 7, dtype=torch.float32)
    assert out.num_tokens == (7,) and out.truncated[0] and out.mask.all()


def test_a_prompts_features_do_not_depend_on_the_others(folder):
    together = encode(PROMPTS, folder, 16, dtype=torch.float32)
    alone = encode(PROMPTS[:1], folder, 16, dtype=torch.float32)
    assert torch.equal(together.features[:1], alone.features)


def test_bf16_is_close_and_features_stay_fp32(folder):
    exact = encode(PROMPTS[:1], folder, 16, dtype=torch.float32).features
    half = encode(PROMPTS[:1], folder, 16, dtype=torch.bfloat16).features
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.2


@pytest.mark.slow
def test_flat_directory_sharded_and_bin_weights(folder, copy, tmp_path):
    expected = encode(PROMPTS, folder, 16, dtype=torch.float32).features
    flat = tmp_path / "flat"
    shutil.copytree(copy / "text_encoder", flat)
    shutil.copy(copy / "tokenizer" / "spiece.model", flat)
    assert torch.equal(encode(PROMPTS, flat, 16, dtype=torch.float32).features, expected)
    assert torch.equal(encode(PROMPTS, copy / "text_encoder", 16, dtype=torch.float32).features, expected)

    state = load_file(flat / "model.safetensors")
    names = sorted(state)
    parts = {"a-1.safetensors": names[:5], "a-2.safetensors": names[5:]}
    for part, keys in parts.items():
        save_file({k: state[k] for k in keys}, flat / part)
    index = {"weight_map": {k: part for part, keys in parts.items() for k in keys}}
    (flat / "model.safetensors.index.json").write_text(json.dumps(index))
    (flat / "model.safetensors").unlink()
    assert torch.equal(encode(PROMPTS, flat, 16, dtype=torch.float32).features, expected)
    (flat / "a-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a-2\.safetensors"):
        EncoderFiles.find(flat)

    for path in flat.glob("*.safetensors*"):
        path.unlink()
    torch.save({**state, "decoder.unused": torch.zeros(2)}, flat / "pytorch_model.bin")
    assert torch.equal(encode(PROMPTS, flat, 16, dtype=torch.float32).features, expected)
    whole = (flat / "pytorch_model.bin").read_bytes()
    (flat / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        encode(PROMPTS, flat, 16)


def _weights(change):
    def apply(root: Path) -> None:
        path = root / "text_encoder" / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


def _truncate(root: Path) -> None:
    path = root / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "no such directory": shutil.rmtree,
    "no tokenizer": lambda r: shutil.rmtree(r / "tokenizer"),
    "config.json is missing": lambda r: (r / "text_encoder" / "config.json").unlink(),
    "model_type 'bert'": lambda r: (r / "text_encoder" / "config.json").write_text('{"model_type": "bert"}'),
    "not readable JSON": lambda r: (r / "text_encoder" / "config.json").write_text("{"),
    "no weights": lambda r: (r / "text_encoder" / "model.safetensors").unlink(),
    "model.safetensors: truncated file, tensor shared.weight ends": _truncate,
    "missing, the first is encoder.final_layer_norm.weight": _weights(
        lambda s: s.pop("encoder.final_layer_norm.weight")
    ),
    r"shared.weight has shape \(3, 24\)": _weights(lambda s: s.update({"shared.weight": torch.zeros(3, 24)})),
    "no sentencepiece model": lambda r: (r / "tokenizer" / "spiece.model").write_bytes(b"nothing"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named(copy, message):
    FAULTS[message](copy)
    with pytest.raises(ValueError, match=message):
        encode(PROMPTS, copy, 16)


@pytest.mark.slow
def test_cache_returns_the_same_and_knows_its_encoder(folder, copy, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = encode(PROMPTS, folder, 16, cache_dir=cache)
    assert len(list(cache.iterdir())) == 3
    with TextEncoder(EncoderFiles.find(folder), cache_dir=cache) as encoder:
        monkeypatch.setattr("common.text.t5.load_t5", None)
        again = encoder.encode(PROMPTS, 16, True)
    assert torch.equal(first.features, again.features) and first.num_tokens == again.num_tokens
    monkeypatch.undo()

    _weights(lambda s: s["encoder.final_layer_norm.weight"].mul_(2))(copy)
    other = encode(PROMPTS, copy, 16, cache_dir=cache)
    assert not torch.equal(other.features, first.features) and len(list(cache.iterdir())) == 6
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(encode(PROMPTS, folder, 16, cache_dir=cache).features, first.features)
    (tmp_path / "file").touch()
    assert torch.equal(encode(PROMPTS, folder, 16, cache_dir=tmp_path / "file").features, first.features)


def encode_everywhere(folder, prompts):
    mesh = distributed(Layout(cfg=2), "cpu")
    try:
        out = on_main(mesh, lambda: encode(prompts, folder, 16, dtype=torch.float32))
    except ValueError as error:
        return str(error)
    return out.features, out.mask, out.num_tokens


def test_only_rank_0_encodes(run_ranks, folder):
    expected = encode(PROMPTS, folder, 16, dtype=torch.float32)
    for features, mask, used in run_ranks(2, encode_everywhere, folder, PROMPTS):
        assert torch.equal(features, expected.features) and torch.equal(mask, expected.mask)
        assert used == expected.num_tokens


def test_a_fault_on_rank_0_reaches_every_rank(run_ranks, copy):
    _truncate(copy)
    for message in run_ranks(2, encode_everywhere, copy, PROMPTS):
        assert "model.safetensors: truncated file, tensor shared.weight ends" in message
