"""Mochi's transformer against diffusers', through both checkpoint layouts, and on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.model.compile import compile_transformer
from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from common.registry.settings import CompileOptions
from common.run.quantize import TransformerFiles
from common.weights.load import CheckpointError, Concat, Rename, Swap, load, on_meta, open_checkpoint, save
from common.weights.placement import check_model
from mochi_xdit.config import MochiConfig, MochiVAEConfig
from mochi_xdit.transformer import MochiTransformer, pack, unpack
from mochi_xdit.weights import (
    KEEP_FP32,
    decoder_rename,
    encoder_rename,
    find_transformer,
    load_transformer,
    transformer_files,
    transformer_rename,
)
from tests.helpers.mochi import denoise

NAMES = json.loads((Path(__file__).parent / "data" / "mochi_names.json").read_text())
SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 3,
    "pooled_projection_dim": 24,
    "text_embed_dim": 32,
    "time_embed_dim": 16,
}
SHAPES = [
    # latent (T, H, W), text tokens, valid ones
    ((3, 6, 10), 11, 5),
    ((1, 2, 2), 4, 4),
    ((2, 14, 6), 256, 256),
    ((5, 2, 26), 256, 1),
    ((1, 10, 6), 7, 0),
]


def new_oracle(seed: int = 0, **sizes: int) -> nn.Module:
    """A small diffusers transformer in fp64 with random weights; none is left at zero or one."""
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(**(SMALL | sizes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.5 if p.ndim < 2 else p[0].numel() ** -0.5
        offset = 1.0 if ".norm_" in name and p.ndim == 1 and name.endswith("weight") else 0.0
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale + offset
    model.pos_frequencies.data *= 0.1
    return model


class _Lifted:
    """The torch module, with fp64 where a file says fp32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def lifted() -> Iterator[None]:
    """diffusers rounds norms, rotations and timesteps to fp32 whatever its weights are; in here it does not."""
    from diffusers.models import embeddings, normalization
    from diffusers.models.transformers import transformer_mochi

    with pytest.MonkeyPatch.context() as patch:
        for module in (embeddings, normalization, transformer_mochi):
            patch.setattr(module, "torch", _Lifted())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def inputs(
    size: tuple[int, int, int], words: int = 11, valid: int = 5, batch: int = 1, seed: int = 1
) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, words, dtype=torch.bool)
    mask[:, :valid] = True
    return SimpleNamespace(
        latents=torch.randn(batch, 12, *size, generator=generator, dtype=torch.float64),
        text=torch.randn(batch, words, SMALL["text_embed_dim"], generator=generator, dtype=torch.float64),
        mask=mask,
        t=torch.tensor([317.25] * batch, dtype=torch.float64),
    )


def expected(model: nn.Module, given: SimpleNamespace, dtype: torch.dtype = torch.float64) -> Tensor:
    args = (given.latents.to(dtype), given.text.to(dtype), given.t.to(dtype), given.mask)
    with torch.no_grad():
        if dtype != torch.float64:
            return model(*args).sample
        with lifted():
            return model(*args).sample


def actual(model: MochiTransformer, given: SimpleNamespace) -> Tensor:
    wide = torch.promote_types(model.dtype, torch.float32)
    return denoise(model, given.latents.to(wide), given.t.to(wide), given.text.to(wide), given.mask)


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    return new_oracle()


@pytest.fixture(scope="module")
def folder(oracle: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle as diffusers saves it: config.json, an index and several shards."""
    path = tmp_path_factory.mktemp("diffusers")
    oracle.save_pretrained(path / "transformer", max_shard_size="150KB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def native(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as one native file."""
    path = tmp_path_factory.mktemp("native")
    save(load_transformer(folder).state_dict(), path / "dit.safetensors")
    return path


@pytest.mark.parametrize(("size", "words", "valid"), SHAPES)
def test_oracle_fp64(oracle: nn.Module, folder: Path, native: Path, size, words, valid) -> None:
    given = inputs(size, words, valid)
    want = expected(oracle, given)
    for place in (folder, native):
        torch.testing.assert_close(actual(load_transformer(place), given), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("size", "words", "valid"), SHAPES)
def test_oracle_fp32(folder: Path, native: Path, size, words, valid) -> None:
    given = inputs(size, words, valid)
    want = expected(new_oracle().float(), given, torch.float32)
    for place in (folder, native):
        got = actual(load_transformer(place, dtype=torch.float32), given)
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("sizes", [{"num_layers": 1}, {"num_attention_heads": 5, "attention_head_dim": 6}])
def test_oracle_other_sizes(tmp_path: Path, sizes: dict[str, int]) -> None:
    oracle = new_oracle(seed=3, **sizes)
    oracle.save_pretrained(tmp_path / "transformer")
    given = inputs((2, 6, 4), batch=2)
    torch.testing.assert_close(actual(load_transformer(tmp_path), given), expected(oracle, given), atol=1e-10, rtol=0)


def test_bf16_is_as_near_to_the_truth_as_the_oracle(folder: Path, oracle: nn.Module) -> None:
    given = inputs((3, 6, 10))
    truth = expected(oracle, given)
    ours = load_transformer(folder, dtype=torch.bfloat16)
    assert ours.pos_frequencies.dtype == torch.float32
    assert {p.dtype for name, p in ours.named_parameters() if name in KEEP_FP32} == {torch.float32}
    assert {p.dtype for name, p in ours.named_parameters() if name not in KEEP_FP32} == {torch.bfloat16}
    got = actual(ours, given)
    assert got.dtype == torch.float32
    theirs = expected(new_oracle().bfloat16(), given, torch.bfloat16)
    assert (got - truth).norm() <= 1.05 * (theirs - truth).norm()
    assert (got - truth).norm() <= 0.03 * truth.norm()


def test_diffusers_reads_what_we_save(native: Path, oracle: nn.Module, tmp_path: Path) -> None:
    from diffusers import MochiTransformer3DModel

    ours = load_transformer(native)
    # The native file has no config; its shapes give everything but the pooling heads.
    table = transformer_rename(ours.config)
    files = save(ours.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors", table, shard_bytes=150_000)
    assert len(files) > 3 and files[-1].name == "diffusion_pytorch_model.safetensors.index.json"
    oracle.save_config(tmp_path)
    theirs = MochiTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float64).state_dict()
    want = oracle.state_dict()
    assert theirs.keys() == want.keys()
    assert all(torch.equal(theirs[name], want[name]) for name in want)


def check(folder: Path) -> TransformerFiles:
    (files,) = transformer_files(folder, None)
    check_model(files.module, files.checkpoint, files.rename)
    return files


def test_folders_are_checked_without_reading(folder: Path, native: Path, tmp_path: Path) -> None:
    for place in (folder, native):
        assert check(place).module.config.depth == 3
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory"):
        check(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"no Mochi checkpoint, neither dit\.safetensors nor a folder transformer/"
    ):
        check(tmp_path)
    state = load_transformer(native).state_dict()
    save(state | {"blocks.1.mod_x.bias": torch.ones(5)}, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"dit\.safetensors: tensor blocks\.1\.mod_x\.bias has shape \[5\]"):
        check(tmp_path)
    save({name: value for name, value in state.items() if name != "t5_yproj.weight"}, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"not a Mochi transformer, tensor t5_yproj\.weight is missing"):
        check(tmp_path)


def test_single_file_prefix(native: Path, oracle: nn.Module, tmp_path: Path) -> None:
    """Files of graphical front ends put all names under one prefix."""
    state = {f"model.diffusion_model.{k}": v for k, v in load_transformer(native).state_dict().items()}
    save(state, tmp_path / "dit.safetensors")
    given = inputs((1, 6, 10))
    torch.testing.assert_close(actual(load_transformer(tmp_path), given), expected(oracle, given), atol=1e-10, rtol=0)


@pytest.mark.parametrize("entry", ["final_layer.mod", "blocks.1.mlp_x.w1", "blocks.0.mlp_y.w1", "blocks.2.attn.qkv_x"])
def test_a_wrong_rename_is_seen(oracle: nn.Module, folder: Path, entry: str) -> None:
    part = find_transformer(folder)
    source = part.rename[entry]
    wrong = source.name if isinstance(source, Swap) else Concat(source.names[::-1])
    given = inputs((3, 6, 10))
    model = load(on_meta(MochiTransformer, part.config), part.open(), {**part.rename, entry: wrong})
    assert (actual(model, given) - expected(oracle, given)).abs().max() > 1e-2


def test_empty_prompt_needs_no_features(folder: Path) -> None:
    model, given = load_transformer(folder), inputs((1, 6, 10), valid=0, batch=2)
    assert torch.equal(denoise(model, given.latents, given.t), actual(model, given))
    given.text *= 100
    assert torch.equal(denoise(model, given.latents, given.t), actual(model, given))


def test_padding_has_no_influence(folder: Path) -> None:
    model, given = load_transformer(folder), inputs((1, 6, 10))
    want = actual(model, given)
    given.text[:, 5:] = 1e3
    assert torch.equal(actual(model, given), want)
    torch.testing.assert_close(denoise(model, given.latents, given.t, given.text[:, :5]), want, atol=1e-12, rtol=0)


def test_batch_equals_one_at_a_time(folder: Path) -> None:
    model, given = load_transformer(folder), inputs((2, 6, 4), batch=3)
    given.t = torch.tensor([0.0, 500.0, 999.5], dtype=torch.float64)
    whole = actual(model, given)
    for i in range(3):
        one = SimpleNamespace(**{key: value[i : i + 1] for key, value in vars(given).items()})
        torch.testing.assert_close(actual(model, one), whole[i : i + 1], atol=1e-12, rtol=0)


def test_text_is_projected_once(folder: Path) -> None:
    model, given = load_transformer(folder), inputs((1, 6, 10))
    calls: list[nn.Module] = []
    for module in (model.t5_yproj, model.t5_y_embedder):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    cond = model.prepare((1, 6, 10), given.text, given.mask)
    first = len(calls)
    x = pack(given.latents)
    outs = [model(x, given.t, cond) for _ in range(3)]
    assert first == 2 and len(calls) == 2
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(unpack(outs[0], (1, 6, 10)), actual(model, given))


def test_pack_orders_rows_columns_channels() -> None:
    z = torch.arange(2 * 3 * 2 * 4 * 6.0).view(2, 3, 2, 4, 6)
    tokens = pack(z)
    assert tokens.shape == (2, 2 * 2 * 3, 12)
    assert torch.equal(tokens[1, 1 * 6 + 1 * 3 + 2].view(2, 2, 3), z[1, :, 1, 2:4, 4:6].permute(1, 2, 0))
    assert torch.equal(unpack(tokens, (2, 4, 6)), z)


def test_the_regions_of_a_block_are_whole_graphs(folder: Path) -> None:
    model, given = load_transformer(folder), inputs((1, 6, 10))
    want = actual(model, given)
    compile_transformer(model, CompileOptions(compile=True, backend="eager"))
    torch.testing.assert_close(actual(model, given), want, atol=1e-12, rtol=0)


def test_bad_input_is_named(folder: Path) -> None:
    model, given = load_transformer(folder), inputs((1, 6, 10), batch=2)
    with pytest.raises(ValueError, match="5 x 10 do not split into patches of 2 x 2"):
        denoise(model, given.latents[:, :, :, :5], given.t)
    with pytest.raises(ValueError, match=r"expected \[batch, tokens, 32\]"):
        model.prepare((1, 6, 10), given.text[..., :31])
    with pytest.raises(ValueError, match=r"mask has shape \[2, 10\], expected \[2, 11\]"):
        model.prepare((1, 6, 10), given.text, given.mask[:, :10])
    given.mask[1, 2] = False
    with pytest.raises(ValueError, match=r"prompts of \[5, 4\] tokens"):
        model.prepare((1, 6, 10), given.text, given.mask)


def on_rank(layout: Layout, folder: Path, cases: list[tuple]) -> list[Tensor]:
    with distributed(layout) as mesh:
        model = load_transformer(folder, SequenceParallel(mesh))
        return [actual(model, inputs(*case)) for case in cases]


@pytest.mark.parametrize(
    ("ring", "ulysses"), [(1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (5, 1), (2, 3), (3, 2), (8, 1), (4, 2)]
)
@pytest.mark.slow
def test_layouts(run_ranks: Callable, native: Path, ring: int, ulysses: int) -> None:
    # 45 video tokens and 7 of text, fewer than ranks of either, no text, a batch.
    cases = [((3, 6, 10), 9, 7), ((1, 2, 6), 5, 1), ((1, 2, 14), 4, 0), ((1, 6, 2), 300, 256, 2)]
    layout = Layout(ring=ring, ulysses=ulysses)
    single = load_transformer(native)
    want = [actual(single, inputs(*case)) for case in cases]
    for got in run_ranks(layout.ranks, on_rank, layout, native, cases):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def _blocks(table: dict[str, Any], prefix: str, depth: int) -> dict[str, tuple[int, ...]]:
    """The compact reference (all blocks but the last are alike) written out."""
    shapes = {name: tuple(shape) for name, shape in table.items() if name != prefix}
    for i in range(depth):
        block = table[prefix]["last" if i == depth - 1 else "each"]
        shapes |= {f"{prefix}.{i}.{name}": tuple(shape) for name, shape in block.items()}
    return shapes


def test_full_size_names_and_shapes() -> None:
    state = on_meta(MochiTransformer).state_dict()
    want = _blocks(NAMES["native"]["dit"], "blocks", 48)
    assert len(want) == 879
    assert {name: tuple(p.shape) for name, p in state.items()} == want
    assert sum(p.numel() for p in state.values()) == 10_027_677_744


@pytest.mark.parametrize(
    ("part", "table"),
    [
        ("dit", transformer_rename(MochiConfig())),
        ("decoder", decoder_rename(MochiVAEConfig())),
        ("encoder", encoder_rename(MochiVAEConfig())),
    ],
)
def test_rename_tables(part: str, table: Rename) -> None:
    """Every entry of the reference, in both layouts; blocks 0 and 47 stand for all."""
    ops = {"copy": lambda names: names[0], "thirds": lambda names: Concat(tuple(names)), "swap": lambda n: Swap(n[0])}
    want = {name: ops[op](others) for name, (op, *others) in NAMES["mapping"][part].items()}
    shown = {name: source for name, source in table.items() if name in want}
    assert shown == want
    hidden = {name.split(".")[1] for name in table.keys() - want.keys()}
    assert hidden <= {str(i) for i in range(1, 47)}


def test_config_from_shapes_and_json() -> None:
    native, theirs = NAMES["native"], NAMES["diffusers"]
    assert MochiConfig.from_native(_blocks(native["dit"], "blocks", 48)) == MochiConfig()
    assert MochiVAEConfig.from_native(native["decoder"]) == MochiVAEConfig()
    assert MochiVAEConfig.from_native(native["encoder"]) == MochiVAEConfig()
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    transformer, vae = on_meta(MochiTransformer3DModel), on_meta(AutoencoderKLMochi)
    shapes = {name: tuple(p.shape) for name, p in transformer.state_dict().items()}
    assert shapes == _blocks(theirs["transformer"], "transformer_blocks", 48)
    assert {name: list(p.shape) for name, p in vae.state_dict().items()} == theirs["vae"]
    assert MochiConfig.from_diffusers(dict(transformer.config), dict(vae.config)) == MochiConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_scale": 1, "foo": 2}, "config.json says depth_scale=1, which is unknown here"),
        ({"qk_norm": "layer_norm"}, "config.json says qk_norm='layer_norm'; supported is 'rms_norm'"),
        ({"out_channels": 24}, "config.json says out_channels=24; supported is None or 12"),
        ({"_class_name": "FluxTransformer2DModel"}, "config.json describes a 'FluxTransformer2DModel'"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MochiConfig.from_diffusers({"_class_name": "MochiTransformer3DModel", "num_layers": 2, "_note": 1} | change)


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, mochi_xdit; assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_reading_the_file_twice_shares_it(native: Path) -> None:
    """On the CPU in the stored dtype the weights are the file."""
    checkpoint = open_checkpoint(native / "dit.safetensors")
    model = load(on_meta(MochiTransformer, find_transformer(native).config), checkpoint)
    weight = model.blocks[0].mlp_x.w1.weight
    assert weight.data_ptr() == checkpoint.tensor("blocks.0.mlp_x.w1.weight").data_ptr()
