"""Streams and causal convolutions, on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.video.causal import CausalConv3d, CausalStream, LocalLink, lay_out
from tests.helpers.causal_net import latents, net, stream_through


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [[1], [1] * 7, [7], [2, 1, 1, 3], [1, 6], [6, 1]])
def test_streaming_equals_the_whole(kernel, lengths):
    model, z = net(kernel=kernel), latents(sum(lengths))
    link = LocalLink()
    assert torch.allclose(model(z), stream_through(model, z, lengths, link), rtol=0, atol=1e-12)
    assert not any(link.kept.values()), "tails were left behind"


def test_the_first_frame_is_repeated_before_the_video():
    x = latents(3)
    assert torch.equal(CausalStream().before("key", x, 2), torch.cat([x[:, :, :1], x[:, :, :1]], 2))
    assert torch.equal(CausalStream().skip(x, 1), x[:, :, 1:])
    assert torch.equal(CausalStream(first=False).skip(x, 1), x)


def test_causal_convolution_never_looks_ahead_and_pads_space_as_told():
    x = latents(5)
    for mode in ("zeros", "replicate"):
        conv = CausalConv3d(2, 3, 3, mode).double()
        plain = nn.Conv3d(2, 3, 3, padding=(0, 1, 1), padding_mode=mode).double()
        plain.load_state_dict(conv.state_dict())
        padded = torch.cat([x[:, :, :1]] * 2 + [x], 2)
        assert torch.allclose(conv(x, CausalStream()), plain(padded), rtol=0, atol=1e-14)
        changed = x.clone()
        changed[:, :, 3:] += 1
        assert torch.equal(conv(x, CausalStream())[:, :, :3], conv(changed, CausalStream())[:, :, :3])


class Operations(TorchDispatchMode):
    """Writes down the names of operations and the elements that copies write."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.copied = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] in ("copy_", "clone", "cat", "pad", "replication_pad3d"):
            self.copied += out.numel()
        return out


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_convolutions_input_is_written_once(mode):
    conv, x, link = CausalConv3d(2, 3, 3, mode).double(), torch.randn(1, 2, 4, 30, 40).double(), LocalLink()
    with torch.inference_mode():
        conv(x, CausalStream(link, last=False))
        with Operations() as done:
            conv(x, CausalStream(link, first=False))
    assert not {"cat", "pad", "replication_pad3d"} & set(done.names)
    border = 2 * 6 * (30 * 42 + 2 * 40 + 4 - 30 * 40) if mode == "replicate" else 0
    assert 2 * 6 * 30 * 40 + border <= done.copied <= 2 * 6 * 30 * 40 + 1.1 * border


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_convolution_trains_as_one_that_pads_by_itself(mode):
    conv, x = CausalConv3d(2, 3, 3, mode).double(), latents(4).requires_grad_()
    plain = nn.Conv3d(2, 3, 3, padding=(0, 1, 1), padding_mode=mode).double()
    plain.load_state_dict(conv.state_dict())
    ours, theirs = conv(x, CausalStream()), plain(torch.cat([x[:, :, :1]] * 2 + [x], 2))
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), (x, *conv.parameters()))
    expected = torch.autograd.grad((theirs * weights).sum(), (x, *plain.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected))


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_gpus_memory_order_changes_no_frame(monkeypatch, mode):
    model, z, seen = net(mode=mode, channels=4), latents(5), []
    expected = stream_through(model, z, [2, 3], LocalLink())
    convolve = torch.nn.functional.conv3d
    monkeypatch.setattr("torch.nn.functional.conv3d", lambda x, *rest: seen.append(x) or convolve(x, *rest))
    assert lay_out(model, torch.device("cpu")).layers[0].weight.is_contiguous()
    assert torch.equal(stream_through(model, z, [2, 3], LocalLink()), expected)
    assert all(x.is_contiguous() for x in seen)
    seen.clear()
    lay_out(model, torch.device("cuda"))
    assert torch.allclose(stream_through(model, z, [2, 3], LocalLink()), expected, rtol=0, atol=1e-12)
    assert len(seen) == 8 and all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_large_convolutions_go_in_stretches_of_time(monkeypatch, mode, stride):
    conv = CausalConv3d(2, 3, (3, 3, 3), mode, stride=(stride, 1, 1)).double()
    x = latents(9)
    whole = conv(x, CausalStream())
    for frames in (1, 4, 5, 100):
        monkeypatch.setattr("common.video.causal.LARGEST_CONVOLUTION", frames * x[:, :, 0].numel())
        assert torch.allclose(conv(x, CausalStream()), whole, rtol=0, atol=1e-14)
    assert whole.shape[2] == 9 // stride + 9 % stride


def test_a_whole_video_trains_and_keeps_no_tails():
    model, z = net(), latents(4).requires_grad_()
    model(z).square().sum().backward()
    assert z.grad is not None and all(p.grad.abs().sum() > 0 for p in model.parameters())
