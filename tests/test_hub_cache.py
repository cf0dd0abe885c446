"""Checkpoints by their repositories' names, found in a hub cache of temporary files. Nothing here has a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from cogvideox_xdit.fork import FORK as COGVIDEOX
from common.registry.downloads import T5, first, weights
from common.registry.forks import forks, get_model
from common.registry.hub import checkpoint_folder
from common.run.quantize import run as quantize
from mochi_xdit import MochiPipeline
from mochi_xdit.fork import FORK as MOCHI
from tests.helpers import cogvideox
from tests.helpers.hub import COMMIT, copy_of_folder, keep
from tests.helpers.mochi import write_checkpoint
from tests.helpers.programs import problems, read
from tests.test_download import MOCHI as NATIVE
from tests.test_download import OWN_T5, PIPELINE, T5_OF_GOOGLE

REPO = "genmo/mochi-1-preview"
ROOT = Path(__file__).resolve().parents[1]
GENERATE = ("--prompt", "a prompt", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return {layout: write_checkpoint(tmp_path_factory.mktemp(layout), layout) for layout in ("native", "diffusers")}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("spelling", [REPO, f"https://huggingface.co/{REPO}", f"{REPO}/"])
def test_a_repository_is_found_in_the_cache(cache, tiny, layout, spelling):
    folder = copy_of_folder(cache, REPO, tiny[layout])
    request = read(MOCHI, "--model", spelling, *GENERATE)
    assert request.source.model_dir == folder
    assert request.rules.heads == 5, "of the small checkpoint"


def test_python_takes_the_same_names(cache, tiny):
    folder = copy_of_folder(cache, REPO, tiny["native"])
    pipe = MochiPipeline.from_pretrained(REPO, dtype="fp32")
    pipe.check_weights()
    assert pipe.model_dir == folder
    derived = type("Derived", (MochiPipeline,), {"__module__": "somewhere"})
    assert derived.from_pretrained(REPO, dtype="fp32").model_dir == folder
    with pytest.raises(ValueError, match=r"did you mean genmo/mochi-1-preview\? .*xdit-download mochi"):
        MochiPipeline.from_pretrained("genmo/mochi-preview")


def test_a_folder_of_that_name_wins(cache, tiny):
    copy_of_folder(cache, REPO, tiny["native"])
    Path("genmo").mkdir()
    Path(REPO).symlink_to(tiny["diffusers"])
    assert read(MOCHI, "--model-dir", REPO, *GENERATE).source.model_dir == Path(REPO)
    Path(REPO).unlink()
    Path(REPO).write_text("a file")
    assert "is not a directory" in problems(MOCHI, "--model-dir", REPO, *GENERATE)[0]


@pytest.mark.parametrize("model", [model for fork in forks() for model in fork.models if model.files])
def test_every_registered_repository_is_known(model):
    fork = next(fork for fork in forks() if model in fork.models)
    with pytest.raises(ValueError, match=rf"fetch it with: xdit-download {model.name}$"):
        checkpoint_folder(model.repo, fork)
    assert get_model(model.repo) == model


@pytest.mark.parametrize("given", ["genmo/mochi-1-previw", "Genmo/mochi1-preview"])
def test_a_name_that_is_nearly_one_gets_a_suggestion(given):
    (said,) = problems(MOCHI, "--model-dir", given, *GENERATE)
    assert f"did you mean {REPO}?" in said and "xdit-download mochi" in said


def test_the_authors_own_layout_leads_to_the_registered_one():
    fork = next(fork for fork in forks() if fork.name == "wan")
    with pytest.raises(ValueError, match=r"did you mean Wan-AI/Wan2.1-T2V-14B-Diffusers"):
        checkpoint_folder("Wan-AI/Wan2.1-T2V-14B", fork)


def test_unknown_names_are_told_where_was_looked(cache):
    (said,) = problems(MOCHI, "--model-dir", "models/of-mine", *GENERATE)
    assert "models/of-mine does not exist" in said and str(cache) in said and "did you mean" not in said
    (said,) = problems(MOCHI, "--model-dir", "one/two/three", *GENERATE)
    assert said == "--model-dir one/two/three does not exist"
    (said,) = problems(MOCHI, "--model-dir", "a--b/c..d", *GENERATE)
    assert "does not exist" in said


def test_the_usual_folders_name_has_the_command_too():
    (said,) = problems(MOCHI, "--model-dir", "disk/of/mochi-1-preview", *GENERATE)
    assert said.endswith("does not exist; fetch it with: xdit-download mochi --dir disk/of/mochi-1-preview")


def test_another_programs_repository_names_the_program():
    (said,) = problems(MOCHI, "--model-dir", "zai-org/CogVideoX-5b", *GENERATE)
    assert said.endswith("is a checkpoint of CogVideoX-5b; use cogvideox-xdit")


def test_another_programs_folder_names_the_program(tmp_path):
    folder = cogvideox.write_checkpoint(tmp_path / "model", "2b")
    (said,) = problems(MOCHI, "--model-dir", folder, *GENERATE)
    assert said.endswith("; it is a checkpoint of CogVideoX: use cogvideox-xdit")


def test_an_old_owners_name_is_the_same_checkpoint(cache):
    folder = keep(cache, "THUDM/CogVideoX-5b", PIPELINE)
    assert checkpoint_folder("THUDM/CogVideoX-5b", COGVIDEOX) == folder
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hf download THUDM/CogVideoX-5b vae/config.json"):
        checkpoint_folder("THUDM/CogVideoX-5b", COGVIDEOX)


def lost(cache: Path, kept: dict[str, bytes], *gone: str, repo: str = REPO, text: bool = True) -> str:
    """What is said of a copy without some of the files; the command is one that the hub's client has."""
    keep(cache, repo, {name: content for name, content in kept.items() if name not in gone})
    with pytest.raises(ValueError) as error:
        checkpoint_folder(repo, MOCHI if repo == REPO else COGVIDEOX, text)
    return str(error.value)


def test_what_is_missing_is_said_with_the_line_that_fetches_it(cache):
    whole = NATIVE | OWN_T5
    said = lost(cache, whole, "decoder.safetensors")
    assert "not all of it: decoder.safetensors is missing" in said
    assert said.endswith("with: hf download genmo/mochi-1-preview decoder.safetensors")
    shard = "text_encoder/model.bf16-00002-of-00002.safetensors"
    said = lost(cache, whole, shard, "dit.safetensors")
    assert said.endswith(f"hf download genmo/mochi-1-preview dit.safetensors {shard}")
    said = lost(cache, whole, *(name for name in OWN_T5 if name.startswith("text_encoder/model")))
    assert said.endswith("hf download genmo/mochi-1-preview --include 'text_encoder/model*'")
    assert "are missing" in lost(cache, {"README.md": b"#"})


def test_links_to_nothing_are_missing_files(cache):
    folder = keep(cache, "zai-org/CogVideoX-5b", PIPELINE)
    shard = folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    os.remove(shard.resolve())
    assert shard.is_symlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        checkpoint_folder("zai-org/CogVideoX-5b", COGVIDEOX)


def test_diffusers_users_have_the_other_half_of_mochis_repository(cache):
    keep(cache, REPO, PIPELINE)
    assert checkpoint_folder(REPO, MOCHI)
    said = lost(cache, PIPELINE, "transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    assert "transformer/diffusion_pytorch_model-00001-of-00002.safetensors is missing" in said


def test_the_text_encoder_may_lie_elsewhere(cache):
    keep(cache, REPO, NATIVE)
    with pytest.raises(ValueError, match="text_encoder"):
        checkpoint_folder(REPO, MOCHI)
    assert checkpoint_folder(REPO, MOCHI, text=False)
    keep(cache, T5_REPO := "google/t5-v1_1-xxl", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="text_encoder"):
        checkpoint_folder(REPO, MOCHI)
    keep(cache, T5_REPO, T5_OF_GOOGLE)
    assert checkpoint_folder(REPO, MOCHI)


def test_a_listing_of_files_that_nobody_reads_does_not_matter(cache):
    """Newer clients keep one beside a copy, and call a copy partial that lacks a file of it."""
    kept = pytest.importorskip("huggingface_hub._snapshot_download", reason="a private part of the client")
    folder = keep(cache, REPO, NATIVE | OWN_T5)
    listed = (*NATIVE, *OWN_T5, "assets/picture.png")
    entry = kept.TreeCacheEntry(size=1, blob_id="0", lfs_sha256=None, lfs_size=None, xet_hash=None)
    kept.write_tree_cache(str(folder.parents[1]), COMMIT, dict.fromkeys(listed, entry))
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        huggingface_hub.snapshot_download(REPO, local_files_only=True)
    assert checkpoint_folder(REPO, MOCHI) == folder


def test_variants_have_to_be_whole():
    pick = weights("vae/model")
    assert pick.missing(["vae/model.fp16.safetensors"]) == []
    both = [
        "vae/model.safetensors",
        "vae/model.safetensors.index.bf16.json",
        "vae/model-00002-of-00003.bf16.safetensors",
    ]
    lost = ["vae/model-00001-of-00003.bf16.safetensors", "vae/model-00003-of-00003.bf16.safetensors"]
    assert pick.missing(both) == lost
    assert pick.missing(["vae/model.safetensors.index.json"]) == ["vae/model*"]
    assert pick.missing(["vae/model-00001-of-00001.safetensors"]) == ["vae/model.safetensors.index.json"]
    assert first(pick, weights("other")).missing(["other.safetensors"]) == []
    assert [pick.missing([]) for pick in T5.picks][1:] == [["text_encoder/model*"], ["tokenizer/spiece.model"]]


def test_quantize_reads_from_the_cache(cache, tiny, capsys):
    copy_of_folder(cache, REPO, tiny["native"])
    assert quantize(MOCHI, ["--model-dir", REPO, "--output", "small"]) == 0
    assert Path("small/dit.safetensors").is_file()
    assert quantize(MOCHI, ["--model-dir", "genmo/mochi-1", "--output", "smaller"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --model-dir genmo/mochi-1 does not exist")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_command_looks_where_the_environment_says(cache, tiny, variable):
    copy_of_folder(cache, REPO, tiny["native"])
    place = cache if variable == "HF_HUB_CACHE" else cache.parent
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    line = [sys.executable, "-m", "mochi_xdit", "--model-dir", REPO, "--prompt", "x", "--device", "cpu", "--dry-run"]
    line += ["--width", "64", "--height", "64", "--num-frames", "7"]
    environment = {**plain, variable: str(place), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment[variable] = str(place / "elsewhere")
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.endswith("fetch it with: xdit-download mochi\n") and str(place / "elsewhere") in done.stderr


def test_help_waits_for_no_library():
    code = """if True:
        import sys
        from common.registry.forks import forks
        from common.run import launch
        assert [launch.run(fork, None, ["--help"]) for fork in forks()] == [0] * len(forks())
        assert launch.run(forks()[0], None, ["--model-dir", "nowhere", "--prompt", "x"]) == 2
        heavy = {"torch", "huggingface_hub", "transformers", "numpy"}.intersection(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nowhere does not exist" in done.stderr
