"""Resident memory that one stage of a pipeline adds at its peak, in a process of its own; see tests/test_estimate.py.

python stage_memory.py mochi|cogvideox FOLDER STAGE OFFLOAD HEIGHT WIDTH FRAMES: prints measured and estimated bytes
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from cogvideox_xdit.pipeline import CogVideoXPipeline
from cogvideox_xdit.sampling import workload as cogvideox_workload
from common.memory.estimate import Estimator, Precision
from common.parallel.mesh import Mesh
from common.registry.forks import Size
from common.registry.settings import DecodeOptions
from common.system.progress import Report
from common.video.latents import draw_noise
from common.weights.placement import Placement
from mochi_xdit.pipeline import MochiPipeline
from mochi_xdit.sampling import workload as mochi_workload

# The text encoder in the dtype of its file: of one that is converted, the file's pages count as resident too.
PRECISION = Precision(torch.float32, text=torch.bfloat16)


def status(name: str) -> int:
    """A figure of this process in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def added(work: Callable[[], object], stages: Report) -> int:
    """Bytes of resident memory at the peak of `work`, beyond what there was before it.

    stages: where the pipeline keeps its own peaks; Linux's is reset each time one is read.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return max(status("VmHWM"), *(record.peak_bytes for record in stages.records)) - before


def warm_up() -> None:
    """Load the libraries that the stages' kernels come from, and let them take the buffers that they keep."""
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))(torch.zeros(1, 3, dtype=torch.long))
    x = torch.randn(1, 8, 512, 64)
    torch.nn.functional.conv3d(x[None], torch.randn(8, 1, 3, 3, 3).expand(-1, 1, -1, -1, -1), padding=1)
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
    torch.nn.functional.linear(torch.randn(1, 2048, 768), torch.randn(3072, 768), torch.randn(3072))
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(1j)


def mochi(pipe: MochiPipeline, stage: str, height: int, width: int, frames: int) -> Callable[[], object]:
    shape = pipe._latent_shape(height, width, frames)
    if stage == "text":
        return lambda: pipe.encode_text({0: "a red circle moves " * 99}, pipe.config.text_tokens, True)
    if stage == "decode":
        return lambda: pipe.decode(draw_noise(shape, 0), DecodeOptions("exact", 2))
    text = (torch.randn(1, pipe.config.text_tokens, pipe.config.text_dim), None)
    return lambda: pipe._sample(draw_noise(shape, 0), {0: text, 1: (None, None)}, [1.0, 0.0], [1.0])


def cogvideox(pipe: CogVideoXPipeline, stage: str, height: int, width: int, frames: int) -> Callable[[], object]:
    run = pipe.generation(height, width, frames, 1, 1.0)
    if stage == "decode":
        latents = draw_noise((1, pipe.config.out_channels, run.size[0] - run.padding, *run.size[1:]), 0)
        return lambda: pipe.decode(latents, DecodeOptions("exact"))
    text = {0: torch.randn(1, pipe.config.text_length, pipe.config.text_dim)}
    generator = torch.Generator().manual_seed(0)
    return lambda: pipe._sample(pipe.start(run, None, None, generator), text, run)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    model, given, stage, offload, *numbers = sys.argv[1:]
    folder, (height, width, frames) = Path(given), map(int, numbers)
    warm_up()
    options = {"dtype": "fp32", "text_dtype": "bf16", "offload": offload, "report": Report()}
    if model == "mochi":
        pipe = MochiPipeline(folder, **options)
        measured = added(mochi(pipe, stage, height, width, frames), pipe.report)
        workload = mochi_workload
    else:
        pipe = CogVideoXPipeline(folder, **options)
        measured = added(cogvideox(pipe, stage, height, width, frames), pipe.report)
        workload = cogvideox_workload
    work = workload(folder, Size(width, height, frames, 1, guided=False), Mesh(), torch.float32)
    counted = Estimator(work, Mesh(), PRECISION, "cpu", DecodeOptions("exact", 2))
    print(measured, counted.estimate(Placement(offload)).stages[stage].total)


if __name__ == "__main__":
    main()
