# ruff: noqa: RUF001 (Chinese prompts have wide commas)
"""UMT5 against transformers, from diffusers' layout and from the original's, and the original's cleaning of prompts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.run.demo import fill
from common.text.encoder import TextEncoder, encode
from common.text.t5 import FLOAT8_LAYERS, UMT5, EncoderFiles, UMT5Numbers, new_t5
from common.weights.float8 import fill_float8
from common.weights.load import CheckpointError, save
from wan_xdit.text import clean, find_text_encoder, rename_table

CAPTIONS = [f"A {c} {s} moves {d}." for c in ("red", "blue") for s in ("circle", "square") for d in ("left", "up")]
CAPTIONS += ["色调艳丽，过曝，静态，细节模糊不清", "Ein Würfel rollt über grünes Gras."]
PROMPTS = ["A red circle moves left.", "过曝，静态", ""]
NUMBERS = UMT5Numbers(d_model=24, d_kv=8, d_ff=32, num_layers=3, num_heads=3)


def train_tokenizer(path: Path) -> int:
    """As umt5-xxl's: pad 0, end 1, begin 2, unknown 3, then bytes for what no piece covers."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    special = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 4),
        model_prefix=str(path.with_suffix("")),
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
        **special,
    )
    return SentencePieceProcessor(model_file=str(path)).vocab_size()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random UMT5 in diffusers' layout, its tables of positions different in every layer."""
    root = tmp_path_factory.mktemp("umt5")
    (root / "tokenizer").mkdir()
    numbers = replace(NUMBERS, vocab_size=train_tokenizer(root / "tokenizer" / "spiece.model"))
    model = new_t5(asdict(numbers), "cpu", UMT5)
    fill(model, seed=0)
    model.save_pretrained(root / "text_encoder")
    return root


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def original_names(folder: Path) -> dict[str, Tensor]:
    table = rename_table(NUMBERS.num_layers)
    return {f"{table[name.removesuffix('.weight')]}.weight": value for name, value in tensors(folder).items()}


@pytest.fixture(scope="module")
def original(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the original's layout: one pickle beside the tokenizer's folder."""
    root = tmp_path_factory.mktemp("original")
    shutil.copytree(folder / "tokenizer", root / "google" / "umt5-xxl")
    torch.save(original_names(folder), root / "models_t5_umt5-xxl-enc-bf16.pth")
    return root


def comfyui_file(folder: Path, path: Path, scaled: bool = False, tokenizer: bool = True) -> dict[str, Tensor]:
    """ComfyUI's one file, in half precision or partly in eight bits with scales; returns what its weights stand for."""
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {}
    meant = {}
    for name, tensor in tensors(folder).items():
        if scaled and tensor.ndim == 2 and "SelfAttention." in name and "bias" not in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            meant[name] = stored[name].float() * scale
        else:
            stored[name] = tensor.half()
            meant[name] = stored[name].float()
    if tokenizer:
        spiece = (folder / "tokenizer" / "spiece.model").read_bytes()
        stored["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path)
    return meant


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import UMT5EncoderModel

    return UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)


@pytest.mark.parametrize("use_mask", [True, False])
@torch.no_grad()
def test_features_equal_transformers(folder: Path, use_mask: bool) -> None:
    files = find_text_encoder(folder)
    out = encode(PROMPTS, files, 30, dtype=torch.float32, use_mask=use_mask)
    rows = [files.tokenize(prompt, 30)[0] for prompt in PROMPTS]
    ids = torch.tensor([row + [0] * (30 - len(row)) for row in rows])
    expected = oracle(folder)(ids, attention_mask=out.mask.long() if use_mask else None).last_hidden_state
    keep = out.mask[..., None] if use_mask else torch.ones(3, 30, 1)
    assert (out.features - expected * keep).abs().max() < 1e-5
    assert out.num_tokens == tuple(map(len, rows)) and out.num_tokens[2] == 1 and out.truncated == ("", "", "")


@pytest.mark.parametrize("stream", [False, True])
@torch.no_grad()
def test_both_layouts_equal_transformers_in_fp64(folder: Path, original: Path, stream: bool) -> None:
    for root in (folder, original):
        files = find_text_encoder(root)
        ids = torch.tensor([files.tokenize(PROMPTS[0], 30)[0]])
        rows = files.run(files.load(torch.device("cpu"), torch.float64, stream=stream), ids)
        expected = oracle(folder, torch.float64)(ids).last_hidden_state
        assert rows.dtype == torch.float64 and (rows - expected).abs().max() < 1e-10


@torch.no_grad()
def test_layers_in_eight_bits(folder: Path, original: Path) -> None:
    results = []
    for root, stream in ((folder, False), (original, False), (original, True)):
        options = {"dtype": torch.float32, "float8": True, "stream": stream}
        with TextEncoder(find_text_encoder(root), **options) as encoder:
            results.append(encoder.encode(PROMPTS[:1], 30, True).features)
            layer = next(iter(encoder.model.encoder.block))
            assert layer.layer[1].DenseReluDense.wi_0.weight.dtype == torch.float8_e4m3fn
    rounded = oracle(folder)
    for layer in rounded.encoder.block:
        for name in FLOAT8_LAYERS:
            weight = layer.get_parameter(f"{name}.weight")
            values, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(len(weight), 1)
            fill_float8(weight, values, scale)
            weight.copy_(values.float() * scale)
    ids = find_text_encoder(folder).tokenize(PROMPTS[0], 30)[0]
    expected = rounded(torch.tensor([ids])).last_hidden_state[0]
    for features in results:
        assert (features[0, : len(ids)] - expected).abs().max() < 1e-5


def test_numbers_of_the_original_are_those_of_its_tensors(folder: Path, original: Path) -> None:
    assert find_text_encoder(original).numbers() == find_text_encoder(folder).numbers()
    find_text_encoder(original).check(width=24)
    with pytest.raises(CheckpointError, match="d_model=24; the model takes features of 4096"):
        find_text_encoder(original).check(width=4096)


def test_the_table_writes_the_original_too(folder: Path, original: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "google", tmp_path / "google")
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors"
    save(tensors(folder), path, rename=rename_table(NUMBERS.num_layers))
    written = load_file(path)
    assert written.keys() == original_names(folder).keys()
    assert all(torch.equal(written[name], value) for name, value in original_names(folder).items())
    features = [encode(PROMPTS, find_text_encoder(root), 16).features for root in (tmp_path, original, folder)]
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])


def test_ids_are_those_of_transformers(folder: Path, original: Path, tmp_path: Path) -> None:
    """By tokenizer.json, which comes first, all; by spiece.model those of characters that the model knows."""
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(folder / "tokenizer")
    slow = find_text_encoder(original)
    root = Path(shutil.copytree(original, tmp_path / "m"))
    theirs.save_pretrained(root / "google" / "umt5-xxl")
    fast = find_text_encoder(root)
    assert (slow.tokenizer.name, fast.tokenizer.name) == ("spiece.model", "tokenizer.json")
    known = (*CAPTIONS, "", "  moves   left ", "ﬁ. red\ncircle", "过曝，静态")
    for text in (*known, "no piece: ☂ </s> <pad>"):
        ids = theirs(text)["input_ids"]
        assert fast.tokenize(text, 256) == (ids, "")
        assert fast.tokenize(text, 4)[0] == theirs(text, truncation=True, max_length=4)["input_ids"]
        assert text not in known or slow.tokenize(text, 256) == (ids, ""), text
    assert slow.fingerprint() != fast.fingerprint()


def test_long_prompts_are_cut_as_transformers_cuts_them(folder: Path) -> None:
    from transformers import T5Tokenizer

    files, text = find_text_encoder(folder), "A red circle moves left. A blue square moves up."
    theirs = T5Tokenizer.from_pretrained(folder / "tokenizer")
    out = encode([text], files, 7)
    assert files.tokenize(text, 7)[0] == theirs(text, truncation=True, max_length=7)["input_ids"]
    assert out.num_tokens == (7,) and out.truncated[0] and text.endswith(out.truncated[0]) and out.mask.all()


def test_the_cache_tells_encoders_apart(folder: Path, original: Path, tmp_path: Path) -> None:
    """Features of one layout are not taken for the other's, nor a UMT5 for a T5 of the same sizes."""
    first = encode(PROMPTS, find_text_encoder(folder), 16, cache_dir=tmp_path / "cache")
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == 3 and all(name.startswith("umt5-") for name in kept)
    again = encode(PROMPTS, find_text_encoder(original), 16, cache_dir=tmp_path / "cache")
    assert torch.equal(again.features, first.features) and len(list((tmp_path / "cache").iterdir())) == 6
    shutil.copytree(folder, tmp_path / "t5")
    path = tmp_path / "t5" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="not a UMT5 text encoder"):
        find_text_encoder(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="not a T5 text encoder"):
        EncoderFiles.find(folder)


def test_faults_of_the_original_are_named(folder: Path, original: Path, tmp_path: Path) -> None:
    def fails(state: object, message: str) -> None:
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message) as error:
            find_text_encoder(root).check()
        assert path.name in str(error.value) or str(root) in str(error.value)

    root = Path(shutil.copytree(original, tmp_path / "m"))
    path = root / "models_t5_umt5-xxl-enc-bf16.pth"
    state = original_names(folder)
    fails(list(state.values()), "does not hold a table of named tensors")
    fails({}, "no matrix token_embedding.weight")
    fails(state | {"head.weight": torch.zeros(2, 2)}, "head.weight is unknown to the UMT5 encoder")
    fails({k: v for k, v in state.items() if k != "blocks.1.ffn.fc2.weight"}, "1 tensors of the UMT5 encoder")
    fails(state | {"blocks.1.attn.o.weight": torch.zeros(3, 24)}, r"blocks.1.attn.o.weight has shape \(3, 24\)")
    fails(state | {"x": Path("a")}, "no file of plain tensors: it holds code")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"\.pth is damaged"):
        find_text_encoder(root)
    shutil.copyfile(original / path.name, path)
    shutil.rmtree(root / "google")
    with pytest.raises(ValueError, match=r"put tokenizer\.json or spiece\.model into .*google/umt5-xxl"):
        find_text_encoder(root)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", ["text_encoders", "split_files/text_encoders", "clip", "."])
@torch.no_grad()
def test_comfyuis_file_has_the_tokenizer_in_it(folder: Path, tmp_path: Path, place: str, scaled: bool) -> None:
    name = "umt5_xxl_fp8_e4m3fn_scaled" if scaled else "umt5_xxl_fp16"
    meant = comfyui_file(folder, tmp_path / place / f"{name}.safetensors", scaled)
    save_file({"encoder.final_layer_norm.weight": torch.ones(3)}, tmp_path / place / "t5xxl_fp16.safetensors")
    files, plain = find_text_encoder(tmp_path), find_text_encoder(folder)
    assert files.numbers() == plain.numbers() and files.weights == (files.tokenizer,)
    files.check(width=24)
    for prompt in (*CAPTIONS, "", "no piece: ☂"):
        assert files.tokenize(prompt, 30) == plain.tokenize(prompt, 30)
    theirs = oracle(folder)
    theirs.load_state_dict({"encoder.embed_tokens.weight": meant["shared.weight"], **meant})
    ids = torch.tensor([files.tokenize(PROMPTS[0], 30)[0]])
    rows = files.run(files.load(torch.device("cpu"), torch.float32), ids)
    assert (rows - theirs(ids).last_hidden_state).abs().max() < 1e-5


def test_comfyuis_file_is_known_again_and_its_faults_are_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text_encoders" / "umt5_xxl_fp16.safetensors"
    comfyui_file(folder, path)
    first = find_text_encoder(tmp_path).fingerprint()
    assert find_text_encoder(tmp_path).fingerprint() == first != find_text_encoder(folder).fingerprint()
    comfyui_file(folder, path, tokenizer=False)
    with pytest.raises(ValueError, match=r"umt5_xxl_fp16\.safetensors has no tokenizer in it .*put tokenizer\.json or"):
        find_text_encoder(tmp_path)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    assert find_text_encoder(tmp_path).tokenizer == tmp_path / "tokenizer" / "spiece.model"
    state = load_file(path)
    save_file({name: tensor for name, tensor in state.items() if name != "shared.weight"}, path)
    with pytest.raises(CheckpointError, match=r"no matrix shared\.weight; this is not a UMT5 encoder"):
        find_text_encoder(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated file"):
        find_text_encoder(tmp_path)


def test_prompts_are_cleaned_as_the_original_does() -> None:
    cases = {
        "  a \n\t red  cube ": "a red cube",
        "salt &amp;amp; pepper &lt;3": "salt & pepper <3",
        "it\u2019s \u201cgood\u201d": 'it\'s "good"',
        "a\u00a0b\u3000c": "a b c",
        "过曝，静态": "过曝,静态",
        "ﬁne ＡＢＣ cafe\u0301 &ldquo;x&rdquo;": 'fine ABC caf\u00e9 "x"',
        "": "",
    }
    assert {text: clean(text) for text in cases} == cases
