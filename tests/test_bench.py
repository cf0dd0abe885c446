"""The benchmark harness on CPU ranks, its files, and the pages made of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import performance, plots, run, true_size
from benchmarks.published import rows
from common.registry.forks import Size, get_model
from common.registry.layout import Layout
from common.weights.checkpoint import open_checkpoint
from common.weights.load import load, on_meta


def bench(*arguments: str, expect: int = 0):
    result = CliRunner().invoke(run.command, arguments)
    assert result.exit_code == expect, result.output
    return result


@pytest.mark.slow
def test_layouts_are_measured_with_the_real_program_and_a_second_run_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    common = ["--model", "mochi", "--demo", "--device", "cpu", "--repeats", "1", "--num-steps", "2"]
    common += ["--output", str(output)]
    shown = bench(*common, "--layouts", "1x1x1").stdout
    assert "ours" in shown
    data = json.loads(output.read_text())
    assert {"machine", "versions", "commit", "command"} <= data["context"].keys()
    (row,) = data["rows"]
    assert row["stages_s"].keys() >= {"sampling", "decode"} and row["total_s"] >= row["stages_s"]["sampling"] > 0
    again = bench(*common, "--layouts", "1x1x1,1x1x2")
    assert "measured before" in again.output
    both = json.loads(output.read_text())["rows"]
    assert [r["key"]["ulysses"] for r in both] == [1, 2] and both[0] == row
    assert len(both[1]["peak_gib"]["sampling"]) == 2
    with output.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["ulysses"] for line in lines] == ["1", "2"] and float(lines[0]["total_s"]) == row["total_s"]


def a_row(**key) -> dict:
    size = {"width": 848, "height": 480, "num_frames": 49, "num_steps": 64, "guided": True}
    place = {"cfg": 2, "ring": 3, "ulysses": 1, "model": "mochi", "program": "ours"}
    return {
        "key": {**place, **size, "dtype": "bf16", "device": "cuda", "weights": "random", **key},
        "total_s": 100.0,
        "spread_s": 1.0,
        "stages_s": {"text": 0.5, "sampling": 64.0, "decode": 4.0},
        "peak_gib": {"sampling": [22.0] * 6},
        "repeats": 3,
    }


def test_a_failed_row_is_tried_again_and_an_alien_file_is_refused(tmp_path: Path) -> None:
    results = run.Results(tmp_path / "r.json")
    key = a_row()["key"]
    results.add({"key": key, "error": "the ranks ended with status 1"})
    assert not run.Results(tmp_path / "r.json").has(key)
    results.add(a_row())
    resumed = run.Results(tmp_path / "r.json")
    assert resumed.has(key) and len(resumed.data["rows"]) == 1
    (tmp_path / "alien.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="no results file"):
        run.Results(tmp_path / "alien.json")


def test_published_rows_stand_beside_what_they_cover() -> None:
    found = run.published_seconds(a_row(), "mochi-l40-sampling")
    assert found is not None and found[0].seconds == 74 and found[1] == 64.0
    whole = run.published_seconds(a_row(), "mochi-l40-e2e")
    assert whole is not None and whole[0].seconds == 125 and whole[1] == 100.0
    assert run.published_seconds(a_row(num_frames=43), None) is None


def test_layouts_are_written_as_products() -> None:
    model = get_model("mochi")
    size = model.default_size
    assert run.parse_layouts("2x3x1,1x1x6", model, size, 6) == [Layout(2, 3, 1), Layout(1, 1, 6)]
    assert len(run.parse_layouts("all", model, size, 4)) == 1 + 3 + 2 + 5
    for wrong, told in (("2x3", "2x3x1"), ("3x1x1", "cfg x ring"), ("1x1x48", "24 attention heads"), ("1x4x1", "2")):
        with pytest.raises(ValueError, match=told):
            run.parse_layouts(wrong, model, size, 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--table", "no-such"], "mochi-l40-e2e"),
        (["--model", "mochi", "--demo", "--device", "cpu", "--peers", "other"], "diffusers-compiled"),
        (["--model", "mochi", "--demo", "--device", "cpu", "--layouts", "x"], "2x3x1"),
        (["--model", "mochi", "--demo", "--device", "cpu", "--peers", "xfuser"], "xfuser needs GPUs"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], told: str) -> None:
    assert told in bench(*arguments, expect=2).output


def test_a_published_table_gives_model_size_and_layouts() -> None:
    names = ("model", "model_dir", "layouts", "width", "height", "num_frames", "num_steps", "dtype", "output")
    options = dict.fromkeys(names) | {"table": "cogvideox-2b-l40", "demo": True, "device": "cpu", "gpus": 4}
    options |= {"attention": "auto", "repeats": 1, "warmup_steps": 1, "peers": "diffusers"}
    jobs, table, path = run.plan(options)
    assert table == "cogvideox-2b-l40" and "cogvideox-2b" in path.name
    assert [job.layout for job in jobs[:-1]] == [r.layout for r in rows() if r.group == table and r.layout.ranks <= 4]
    assert jobs[-1].program == "diffusers" and jobs[-1].layout == Layout()


@pytest.mark.parametrize("name", ["mochi", "cogvideox-1.5-5b-i2v", "consisid"])
@pytest.mark.slow
def test_hollow_checkpoints_load_by_the_programs_own_path(name: str, tmp_path: Path) -> None:
    """A true model but for its depth; the files are sparse, and the loader is strict."""
    model = get_model(name)
    depth = {"depth": 1} if name == "mochi" else {"layers": 2}
    model = replace(model, config=replace(model.config, **depth))
    folder = true_size.make(model, tmp_path / name)
    text = folder / "text_encoder" / "model.safetensors"
    assert text.stat().st_size > 9e9 and text.stat().st_blocks * 512 < 1e6
    transformer = loaded(name, model, folder)
    assert sum(p.numel() for p in transformer.parameters()) > 1e7
    first = next(p for p in transformer.parameters() if p.ndim > 1)
    assert not first.any()
    true_size.draw(transformer)
    assert first.std() > 0


def loaded(name: str, model, folder: Path) -> torch.nn.Module:
    """The transformer, and the decoder of the VAE, through the fork's loader."""
    from cogvideox_xdit.config import read_checkpoint
    from cogvideox_xdit.weights import load_decoder
    from cogvideox_xdit.weights import load_transformer as load_cogvideox
    from common.parallel.usp import SequenceParallel

    if name == "mochi":
        from mochi_xdit.vae import MochiDecoder
        from mochi_xdit.weights import find_decoder, load_transformer

        part = find_decoder(folder)
        load(on_meta(MochiDecoder, part.config), part.open(), part.rename, "cpu", torch.bfloat16)
        return load_transformer(folder, SequenceParallel(), torch.device("cpu"), torch.bfloat16)
    if name == "consisid":
        from consisid_xdit.pipeline import ConsisIDPipeline

        return ConsisIDPipeline.from_pretrained(folder).load_transformer()
    known = read_checkpoint(folder)
    assert known.transformer == model.config
    load_decoder(folder, known.vae, torch.device("cpu"), torch.bfloat16)
    return load_cogvideox(folder, known.transformer, SequenceParallel(), torch.device("cpu"), torch.bfloat16)


def test_hollow_files_have_true_headers(tmp_path: Path) -> None:
    state = {"a.weight": torch.empty(6, 4, dtype=torch.bfloat16, device="meta"), "b": torch.empty(3, device="meta")}
    true_size.hollow(tmp_path / "x.safetensors", state)
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert opened["a.weight"].shape == (6, 4) and opened.tensor("b").tolist() == [0, 0, 0]


@pytest.mark.slow
def test_the_page_is_made_of_the_files_and_never_mixes_columns(tmp_path: Path) -> None:
    calibration = json.loads(performance.CALIBRATION.read_text())
    gpu = {"system": "Linux", "cores": 8, "gpus": ["NVIDIA X, 1.0"]}
    context = {"machine": gpu, "versions": {"torch": "2"}, "commit": "c" * 40, "command": "run", "date": "2026-01-01"}
    text = performance.page([{"context": context, "rows": [a_row()]}], calibration)
    assert text == performance.page([{"context": context, "rows": [a_row()]}], calibration)
    assert "NVIDIA X, 1.0" in text and "| 100.00 |" in text
    assert "No GPU has been measured" in performance.page([], calibration)
    for row in rows():
        assert f"| {row.seconds:g} |" in text and row.id in text
    heads = [line for line in text.splitlines() if line.startswith("|") and "---" not in line and "published" in line]
    assert all("predicted" in line.split("published")[1] for line in heads if "row |" in line)


def test_the_committed_page_is_up_to_date() -> None:
    """Regenerate with `python benchmarks/performance.py --output docs/performance.md` after a calibration."""
    found = [json.loads(path.read_text()) for path in sorted(performance.RESULTS.glob("run-*.json"))]
    calibration = json.loads(performance.CALIBRATION.read_text())
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(found, calibration)


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, draw in plots.FIGURES.items():
        draw(tmp_path / name)
    plots.measured([{"rows": [a_row()]}], tmp_path / "measured.png")
    for image in tmp_path.glob("*.png"):
        assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 5000
    assert len(list(tmp_path.glob("*.png"))) == len(plots.FIGURES) + 1
    assert Size(1, 1, 1, 1).guided
