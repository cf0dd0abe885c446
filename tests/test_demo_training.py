"""How the demo checkpoints are trained: captions tell the truth, and training is the product's arithmetic."""

import copy
import dataclasses
import itertools
import json
import random

import pytest
import torch
from torch import nn

from mochi_xdit.demo import demo_config
from mochi_xdit.transformer import pack
from tests.helpers.mochi import denoise
from tools.demo import lossy
from tools.demo.cogvideox_vae import Autoencoder, _whitened, load_autoencoder, train_decoder, whiten
from tools.demo.evaluate import SEED, evaluate, from_pictures
from tools.demo.mochi import Velocity, start
from tools.demo.mochi_vae import clips
from tools.demo.reading import read
from tools.demo.text_encoder import named
from tools.demo.training import MAX_LOST, Plan, in_bf16, train
from tools.demo.world import FIELDS, VALUES, caption, dataset, draw, held_out, render


def test_scenes_repeat_and_held_out_combinations_are_never_trained():
    assert dataset(1, 20, 13) == dataset(1, 20, 13) != dataset(2, 20, 13)
    assert not any(held_out(scene.attributes) for scene, _ in dataset(0, 300, 13))
    assert all(held_out(scene.attributes) for scene, _ in dataset(0, 30, 13, test=True))


def test_captions_name_what_they_must():
    rng = random.Random(0)
    for scene in (draw(rng, 13) for _ in range(50)):
        text = caption(scene, rng)
        indices = named(scene, text)
        for field, value, index in zip(FIELDS, scene.attributes, indices, strict=True):
            assert index == (VALUES[field].index(value) if value in text.lower() else len(VALUES[field]))
        assert all(index < len(VALUES[field]) for field, index in list(zip(FIELDS, indices, strict=True))[:3])


@pytest.mark.parametrize("frames", [9, 13, 17])
def test_pixels_are_read_back_even_through_noise(frames):
    wrong = 0
    for scene, _ in dataset(3, 40, frames, test=True):
        clip = render(scene, frames).float()
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0)) * 12
        result = read((clip + noise).clamp(0, 255).to(torch.uint8))
        found = {f: getattr(result, f) for f in ("shape", "colour", "direction", "size", "background")}
        wrong += any(getattr(scene, f) != value for f, value in found.items())
    assert wrong <= 1


def test_reading_does_not_see_what_is_not_there():
    assert read(torch.full((13, 64, 64, 3), 90, dtype=torch.uint8)).shape is None
    noise = torch.randint(0, 256, (13, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert read(noise).shape is None
    scene, _ = dataset(3, 1, 13)[0]
    assert read(render(scene, 13)[:1].expand(13, -1, -1, -1)).direction is None


def test_evaluation_counts_what_came_true():
    scenes = {text: scene for scene, text in dataset(4242, 20, 13, test=True)}
    assert set(evaluate(lambda text, seed: render(scenes[text], 13), 20, 13)["right"].values()) == {1.0}
    blank = torch.full((13, 64, 64, 3), 16, dtype=torch.uint8)
    result = evaluate(lambda text, seed: blank, 20, 13)
    assert result["right"]["colour"] == result["right"]["shape"] == result["right"]["direction"] == 0.0
    assert len(result["misses"]) == 20


def test_pictures_are_the_first_frames_of_the_captions_clips():
    seen = []

    def generate(text, seed, image):
        seen.append((text, image))
        return torch.zeros(13, 64, 64, 3, dtype=torch.uint8)

    evaluate(from_pictures(generate, 3, 13), 3, 13)
    for (scene, text), (said, image) in zip(dataset(SEED, 3, 13, test=True), seen, strict=True):
        assert said == text and torch.equal(torch.from_numpy(image), render(scene, 13)[0])


def test_the_page_on_fidelity_is_what_was_measured():
    assert lossy.page(json.loads(lossy.RESULTS.read_text())) == lossy.TARGET.read_text()


def test_the_trained_function_is_the_products():
    config = dataclasses.replace(demo_config(), depth=2)
    velocity = Velocity(config)
    start(velocity.model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in velocity.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    z, text = torch.randn(2, 12, 3, 8, 8, generator=generator), torch.randn(2, 9, 64, generator=generator)
    t, mask = torch.tensor([300.0, 900.0]), torch.tensor([[True] * 5 + [False] * 4, [False] * 9])
    out = velocity(pack(z), t, text, mask)
    expected = [denoise(velocity.model, z[:1], t[:1], text[:1, :5]), denoise(velocity.model, z[1:], t[1:])]
    assert (out - pack(torch.cat(expected))).abs().max() < 1e-5
    out.square().mean().backward()
    assert all(p.grad is not None for p in velocity.parameters() if p.requires_grad)


def test_white_latents_are_white_and_decode_to_the_same_pixels():
    torch.manual_seed(0)
    model, videos = Autoencoder(), clips("white", 4, 9)
    with torch.no_grad():
        before = model.encode(videos)[0]
        # Around a mean of zero nothing happens at the border either.
        z = before - before.mean((0, 2, 3, 4), keepdim=True)
        pixels = model.decode(z)
        white = _whitened(copy.deepcopy(model), before)
        found = white.encode(videos)[0]
        flat = found.movedim(1, -1).flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-4
        assert (torch.cov(flat.T) - torch.eye(flat.shape[1])).abs().max() < 1e-3
        # The same around zero: encoder and decoder take up inverse maps.
        assert (_whitened(model, z).decode(found) - pixels).abs().max() < 1e-4


def test_the_decoder_alone_is_trained_and_the_latents_stay(tmp_path):
    torch.manual_seed(0)
    torch.save({"average": Autoencoder().state_dict()}, tmp_path / "cogvideox_vae.pt")
    whiten(tmp_path, count=2)
    before = load_autoencoder(tmp_path).state_dict()
    train_decoder(tmp_path, steps=1, batch=1)
    after = load_autoencoder(tmp_path).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_an_interrupted_training_ends_where_the_whole_one_does(tmp_path):
    class Stop(Exception):
        pass

    def run(file, stop_at=None):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)

        def step(generator, i):
            if i == stop_at:
                raise Stop
            x = torch.randn(8, 4, generator=generator)
            return {"loss": (in_bf16(model, x.bfloat16()).float() - x.sum(1, keepdim=True)).square().mean()}

        return train(model, step, Plan(12, 0.05, warmup=2, average=0.9, save_seconds=0), file)

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Stop):
        run(tmp_path / "parts.pt", stop_at=7)
    parts = run(tmp_path / "parts.pt")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "parts.jsonl").read_text().count("loss") >= 1


@pytest.mark.parametrize("bad", [MAX_LOST, MAX_LOST + 1])
def test_a_gradient_that_is_no_number_moves_nothing_and_ends_what_has_no_other(tmp_path, bad):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    seen = []

    def step(generator, i):
        seen.append(model.weight.detach().clone())
        broken = float("nan") if 2 <= i < 2 + bad else 1.0
        return {"loss": model(torch.ones(1, 2)).square().mean() * broken}

    plan = Plan(10, 0.1, warmup=1)
    if bad > MAX_LOST:
        with pytest.raises(RuntimeError, match=f"step {1 + bad}: the gradient is nan; lower the rate and resume"):
            train(model, step, plan, tmp_path / "a.pt")
        return
    train(model, step, plan, tmp_path / "a.pt")
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(seen)]
    assert moved == [not 2 <= i < 2 + bad for i in range(9)]
