"""The trained demo checkpoints: whole, small, and what they were trained for comes true, read from the pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from common.registry.forks import forks
from tests.helpers.programs import demo_of
from tools.demo.reading import read
from tools.demo.world import SHAPES, dataset, render

ROOT = Path(__file__).resolve().parents[1]
FORKS = {fork.name: fork for fork in forks() if (ROOT / fork.package / "demo_data").is_dir()}
PARTS = ("transformer", "vae", "text_encoder")
LIMIT = 8_000_000


def folder_of(fork: str) -> Path:
    return demo_of(FORKS[fork])[0]


def maker(fork: str) -> Callable[..., Tensor]:
    """From a prompt and more to frames, as `--demo` makes them."""
    folder, rules = demo_of(FORKS[fork])
    pipe = FORKS[fork].pipeline_class().from_pretrained(folder, keep_loaded=True)
    names = ("width", "height", "num_frames", "num_steps", "cfg_scale", "negative_prompt")
    settings = {name: getattr(rules, name) for name in names}
    return lambda prompt, **more: pipe(prompt, **settings, **more)


@pytest.mark.parametrize("fork", FORKS)
def test_a_checkpoint_is_whole_small_and_says_what_it_is(fork: str) -> None:
    folder = folder_of(fork)
    assert folder.is_dir() and folder.name == "demo_data"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LIMIT
    assert json.loads((folder / "model_index.json").read_text())["_class_name"]
    for part in PARTS:
        (weights,) = (folder / part).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            dtypes = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
        assert dtypes.count("BF16") > 0.9 * len(dtypes)
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("Data", "Objective", "steps", "Limits", "dB", "colour", "direction", "shape"))
    assert fork != "consisid" or "no face" in card.lower()


@pytest.mark.parametrize("fork", ["mochi", "cogvideox", "wan"])
@pytest.mark.slow
def test_prompts_that_were_held_out_come_true(fork: str) -> None:
    """Of a few all but one in colour and direction; the cards have the figures of a hundred."""
    make, few = maker(fork), 1 if fork == "cogvideox" else 3  # as long as the others' three together
    right = {"colour": 0, "direction": 0}
    for seed, (scene, text) in enumerate(dataset(4242, few, 17, test=True)):
        found = read(make(text, seed=seed))
        for name in right:
            right[name] += getattr(found, name) == getattr(scene, name)
    assert min(right.values()) >= max(1, few - 1)


@pytest.mark.slow
def test_wans_videos_go_on_from_a_picture() -> None:
    """The first frame is the picture's, and what it shows moves where the caption says."""
    make = maker("wan")
    for seed, (scene, text) in enumerate(dataset(4242, 3, 13, test=True)):
        picture = render(scene, 13)[0]
        video = make(text, seed=seed, image=picture.numpy())
        found = read(video)
        assert (found.colour, found.direction) == (scene.colour, scene.direction)
        assert (video[0].float() - picture.float()).square().mean() < 100


@pytest.mark.slow
def test_the_picture_that_stands_for_a_face_decides_the_colour() -> None:
    from consisid_xdit.demo import SHOWN
    from consisid_xdit.face import load_identity

    make = maker("consisid")
    for name, (shape, colour) in SHOWN.items():
        assert shape in SHAPES
        who = load_identity(folder_of("consisid") / name)
        video = make("A big shape moves slowly right on a black background.", identity=who, seed=1)
        assert read(video).colour == colour


def test_training_can_go_on_from_what_is_shipped(tmp_path: Path) -> None:
    from cogvideox_xdit.transformer import CogVideoXTransformer
    from consisid_xdit.transformer import ConsisIDTransformer
    from tools.demo import cogvideox, consisid, shipped, wan
    from tools.demo.cogvideox_vae import load_autoencoder
    from wan_xdit.demo import trained_config
    from wan_xdit.transformer import WanTransformer

    shipped.take_up(tmp_path)
    load_autoencoder(tmp_path)
    kinds = {"cogvideox": (CogVideoXTransformer, cogvideox), "consisid": (ConsisIDTransformer, consisid)}
    WanTransformer(trained_config()).load_state_dict(cogvideox.trained(tmp_path, "wan"))
    made = wan.export(tmp_path)
    for part in ("transformer", "vae", "text_encoder"):
        (file,) = (made / part).glob("*.safetensors")
        assert file.read_bytes() == (folder_of("wan") / part / file.name).read_bytes()
    for name, (kind, module) in kinds.items():
        kind(module.trained_config()).load_state_dict(cogvideox.trained(tmp_path, name))
        out = module.export(tmp_path) / "transformer" / "diffusion_pytorch_model.safetensors"
        assert out.read_bytes() == (folder_of(name) / "transformer" / out.name).read_bytes()
