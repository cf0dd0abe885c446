"""xdit-download against a small stand-in of the hub on loopback: the real client and command, in an own process."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from common.registry.downloads import weights
from common.registry.forks import get_model, model_names
from tests.helpers.hub import Hub, download, there

BIG = os.urandom(3 << 20)
# The client writes what it received in blocks of 10 MB; these files are smaller.
SMALL_BLOCKS = "import huggingface_hub.constants as c\nc.DOWNLOAD_CHUNK_SIZE = 65536\n"
T5_OF_GOOGLE = {"config.json": b"{}", "spiece.model": b"pieces", "pytorch_model.bin": b"encoder and decoder"}
MOCHI = {
    "dit.safetensors": BIG,
    "decoder.safetensors": b"decoder",
    "encoder.safetensors": b"encoder",
    "README.md": b"#",
}
OWN_T5 = {
    "text_encoder/config.json": b"{}",
    "text_encoder/model-00001-of-00002.safetensors": b"fp32 1",
    "text_encoder/model-00002-of-00002.safetensors": b"fp32 2",
    "text_encoder/model.safetensors.index.json": b"{}",
    "text_encoder/model.bf16-00001-of-00002.safetensors": b"bf16 1",
    "text_encoder/model.bf16-00002-of-00002.safetensors": b"bf16 2",
    "text_encoder/model.safetensors.index.bf16.json": b"{}",
    "tokenizer/spiece.model": b"pieces",
    "tokenizer/tokenizer_config.json": b"{}",
}
PIPELINE = {
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": b"one",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": b"two",
    "transformer/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
    "text_encoder/config.json": b"{}",
    "text_encoder/model-00001-of-00002.safetensors": b"fp32 1",
    "text_encoder/model-00002-of-00002.safetensors": b"fp32 2",
    "text_encoder/model.safetensors.index.json": b"{}",
    "tokenizer/spiece.model": b"pieces",
}
FACES = {
    "face_encoder/EVA02_CLIP_L_336_psz14_s6B.pt": b"eva",
    "face_encoder/detection_Resnet50_Final.pth": b"detection",
    "face_encoder/parsing_bisenet.pth": b"parsing",
    "face_encoder/parsing_parsenet.pth": b"never needed",
    "face_encoder/models/antelopev2/scrfd_10g_bnkps.onnx": b"scrfd",
    "face_encoder/models/antelopev2/glintr100.onnx": b"arcface",
    "face_encoder/models/buffalo_l/det_10g.onnx": b"never needed",
}


def test_mochi_takes_t5_from_google_when_its_repository_has_none(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    done = download(hub.url, "mochi", "--dir", tmp_path / "mochi", "--check-hashes")
    assert done.returncode == 0, done.stderr
    expected = {name: MOCHI[name] for name in ("dit.safetensors", "decoder.safetensors")}
    expected |= {f"text_encoder/{name}": content for name, content in T5_OF_GOOGLE.items()}
    assert there(tmp_path / "mochi") == expected
    assert "3.1 MB" in done.stdout and "free for" in done.stdout and "Apache-2.0" in done.stdout


def test_mochi_prefers_its_own_half_precision_encoder(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI | OWN_T5}
    done = download(hub.url, "mochi", "--dir", tmp_path)
    assert done.returncode == 0, done.stderr
    names = {name for name in OWN_T5 if "bf16" in name} | {"text_encoder/config.json", "tokenizer/spiece.model"}
    assert set(there(tmp_path)) == {"dit.safetensors", "decoder.safetensors"} | names


@pytest.mark.parametrize(
    "model", [name for name in model_names() if name.startswith("cogvideox")] + ["CogVideoX1.5_5b"]
)
@pytest.mark.slow
def test_cogvideox_needs_exactly_the_pipeline(hub: Hub, tmp_path: Path, model: str) -> None:
    hub.repos = {
        get_model(model).files[0][0].repo: PIPELINE | {"README.md": b"#", "tokenizer/added_tokens.json": b"{}"}
    }
    done = download(hub.url, model, "--dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert there(tmp_path) == PIPELINE


@pytest.mark.slow
def test_consisid_takes_five_face_files(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"BestWishYsh/ConsisID-preview": PIPELINE | FACES}
    done = download(hub.url, "consisid", "--dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert there(tmp_path) == PIPELINE | {n: c for n, c in FACES.items() if c != b"never needed"}
    assert "non-commercial" in done.stdout


@pytest.mark.slow
def test_a_cut_connection_is_continued_within_a_run(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    hub.cut = [1 << 20, 1 << 19]
    done = download(hub.url, "mochi", "--dir", tmp_path, before=SMALL_BLOCKS)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dit.safetensors").read_bytes() == BIG
    ranges = [asked for path, asked in hub.asked if path.endswith("dit.safetensors")]
    assert ranges == [None, f"bytes={1 << 20}-", f"bytes={(1 << 20) + (1 << 19)}-"]


@pytest.mark.slow
def test_a_stopped_run_is_continued_by_the_next(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    have = 1234567
    digest = hashlib.sha256(BIG).hexdigest()
    (tmp_path / f".dit.safetensors.{digest[:12]}.part").write_bytes(BIG[:have])
    done = download(hub.url, "mochi", "--dir", tmp_path, "--check-hashes")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dit.safetensors").read_bytes() == BIG
    assert ("bytes=1234567-") in [asked for _, asked in hub.asked]
    hub.asked.clear()
    again = download(hub.url, "mochi", "--dir", tmp_path)
    assert again.returncode == 0 and "0 bytes to fetch" in again.stdout
    assert all(path.startswith("/api/") for path, _ in hub.asked), "nothing is fetched twice"


@pytest.mark.slow
def test_killed_in_the_middle_leaves_no_file_under_the_true_name(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    hub.cut = [1 << 20]
    die = SMALL_BLOCKS + "import os, huggingface_hub.file_download as f\nf.time.sleep = lambda s: os._exit(9)"
    killed = download(hub.url, "mochi", "--dir", tmp_path, before=die)
    assert killed.returncode == 9
    (partial,) = there(tmp_path).items()
    assert partial[0].endswith(".part") and partial[1] == BIG[: 1 << 20]
    assert download(hub.url, "mochi", "--dir", tmp_path).returncode == 0
    assert there(tmp_path)["dit.safetensors"] == BIG
    assert f"bytes={1 << 20}-" in [asked for _, asked in hub.asked]


@pytest.mark.parametrize("claimed", [3, 11])
@pytest.mark.slow
def test_a_wrong_size_is_refused_and_nothing_is_kept(hub: Hub, tmp_path: Path, claimed: int) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    hub.claimed = {"decoder.safetensors": claimed}
    done = download(hub.url, "mochi", "--dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: decoder.safetensors: 7 bytes came, the hub says {claimed}; start the command again"
    )
    assert set(there(tmp_path)) == {"dit.safetensors"}


def test_a_file_of_another_size_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    (tmp_path / "decoder.safetensors").write_bytes(b"an older one")
    assert download(hub.url, "mochi", "--dir", tmp_path).returncode == 0
    assert (tmp_path / "decoder.safetensors").read_bytes() == b"decoder"


def test_a_damaged_file_is_found_by_its_hash(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    (tmp_path / "decoder.safetensors").write_bytes(b"DECODER")
    done = download(hub.url, "mochi", "--dir", tmp_path, "--check-hashes")
    assert done.returncode == 1 and "decoder.safetensors is damaged" in done.stderr
    assert not (tmp_path / "decoder.safetensors").exists()


def test_no_space_is_told_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"genmo/mochi-1-preview": MOCHI, "google/t5-v1_1-xxl": T5_OF_GOOGLE}
    full = "import shutil, collections\nshutil.disk_usage = lambda p: collections.namedtuple('U', 'free')(1000000)"
    done = download(hub.url, "mochi", "--dir", tmp_path / "new", before=full)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: 3.1 MB are to be fetched, but only 1.0 MB are free for {tmp_path / 'new'}; "
        "free 2.1 MB more, or name another disk with --dir\n"
    )
    assert not (tmp_path / "new").exists()
    assert all(path.startswith("/api/") for path, _ in hub.asked)


def test_offline_is_one_line(tmp_path: Path) -> None:
    done = download("http://127.0.0.1:9", "mochi", "--dir", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot reach the hub for genmo/mochi-1-preview (")
    done = download("http://127.0.0.1:9", "mochi", "--dir", tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "HF_HUB_OFFLINE is set" in line


def test_a_repository_that_is_not_there_or_lacks_files(hub: Hub, tmp_path: Path) -> None:
    done = download(hub.url, "mochi", "--dir", tmp_path)
    assert done.returncode == 1 and "no such repository" in done.stderr and len(done.stderr.splitlines()) == 1
    hub.repos = {"zai-org/CogVideoX-2b": {n: c for n, c in PIPELINE.items() if "vae" not in n}}
    done = download(hub.url, "cogvideox-2b", "--dir", tmp_path)
    assert done.stderr == "error: zai-org/CogVideoX-2b lack files of the autoencoder\n" and done.returncode == 1


def test_wrong_use(hub: Hub, tmp_path: Path) -> None:
    done = download(hub.url, "sora")
    assert done.returncode == 2 and "cogvideox-5b" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "file").write_text("")
    done = download(hub.url, "mochi", "--dir", tmp_path / "file")
    assert done.returncode == 2 and "name a folder" in done.stderr
    assert download(hub.url).returncode == 2
    assert download(hub.url, "--help").returncode == 0


def test_dry_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"zai-org/CogVideoX-2b": PIPELINE}
    done = download(hub.url, "CogVideoX_2b", "--dir", tmp_path / "new", "--dry-run")
    assert done.returncode == 0 and "13 files" in done.stdout, done.stderr
    assert not (tmp_path / "new").exists() and all(path.startswith("/api/") for path, _ in hub.asked)


def test_both_spellings_of_sharded_variants() -> None:
    dotted = ["m.bf16-00001-of-00001.safetensors", "m.safetensors.index.bf16.json"]
    late = ["m-00001-of-00001.bf16.safetensors", "m.safetensors.index.bf16.json"]
    assert sorted(weights("m", "bf16")(dotted) or []) == sorted(dotted)
    assert sorted(weights("m", "bf16")(late) or []) == sorted(late)
    assert weights("m")(dotted) is None and weights("m", "bf16")(["m.safetensors"]) is None
