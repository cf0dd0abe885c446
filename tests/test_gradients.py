"""Models can be trained as they are: gradients reach every parameter and are those of the function that is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.transformer import pack as cogvideox_pack
from common.run.demo import fill
from consisid_xdit.transformer import ConsisIDTransformer
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.transformer import pack as mochi_pack
from tests.helpers import cogvideox, consisid, mochi

SIZE = (3, 8, 12)
T = torch.tensor([300.0, 900.0])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mochis() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model in fp64 and its prediction for a batch of two."""
    model = MochiTransformer(mochi.TINY).double()
    x, text = mochi_pack(draw(2, mochi.TINY.channels, *SIZE)), draw(2, 9, mochi.TINY.text_dim)
    return model, lambda: model(x, T, model.prepare(SIZE, text))


def cogvideoxs(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """As `mochis`."""
    config = cogvideox.small(kind)
    model, given = CogVideoXTransformer(config).double(), cogvideox.inputs(config, SIZE, batch=2)
    x = cogvideox_pack(given["latents"], config.patch)
    return model, lambda: model(x, T, model.prepare(given["text"], SIZE, given.get("image")))


def consisids() -> tuple[nn.Module, Callable[[], Tensor]]:
    """As `mochis`, with one face for both."""
    config = consisid.small()
    model, given, who = ConsisIDTransformer(config).double(), consisid.inputs(config, SIZE), consisid.identity(config)
    x, text, image = (given[name].expand(2, *given[name].shape[1:]) for name in ("latents", "text", "image"))
    x = cogvideox_pack(x, config.patch)
    return model, lambda: model(x, T, model.prepare(text, SIZE, image, face=model.read_face(**who)))


@pytest.mark.parametrize("kind", ["mochi", "2b", "5b", "5b-i2v", "consisid"])
def test_gradients_are_those_of_the_prediction(kind: str) -> None:
    """Along a random direction through all parameters, against a difference quotient."""
    own = {"mochi": mochis, "consisid": consisids}
    model, predict = own[kind]() if kind in own else cogvideoxs(kind)
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        fill(model, 0)
        for p in named.values():  # no gain at 1 and no bias at 0: each has to be seen
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
        aim = torch.randn(predict().shape, generator=generator, dtype=torch.float64)
        step = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in named.items()}
    (predict() * aim).sum().backward()
    assert [name for name, p in named.items() if p.grad is None] == []
    slope = sum((p.grad * step[name]).sum() for name, p in named.items() if p.grad is not None)

    def along(distance: float) -> Tensor:
        with torch.no_grad():
            for name, p in named.items():
                p.add_(step[name], alpha=distance)
            value = (predict() * aim).sum()
            for name, p in named.items():
                p.add_(step[name], alpha=-distance)
        return value

    h = 1e-6
    torch.testing.assert_close(slope, (along(h) - along(-h)) / (2 * h), rtol=1e-5, atol=0)
