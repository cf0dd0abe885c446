"""A program with a pipeline of a few all-reduces instead of a model: for everything around the models.

Run as a script it is a command line program like the forks'. `--fault KIND@RANK` makes a rank misbehave at step 3.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import program
from common.checks import Rules
from common.options import Option
from common.request import Program

RULES = Rules(heads=4, width=32, height=32, num_frames=7, num_steps=8, cfg_scale=4.5, fps=8, default_prompt="a test")


class FakePipeline:
    def __init__(self, setup, mesh, stages):
        self.mesh, self.stages = mesh, stages
        kind, _, rank = (setup.extra["fault"] or "").partition("@")
        self.fault = kind if rank and int(rank) == mesh.world.rank else ""
        self.pause, self.pid_file = setup.extra["pause"], setup.extra["pids"]
        if self.fault == "setup":
            raise ValueError("no such kernel; use another")

    def __call__(self, video):
        import numpy as np
        import torch
        import torch.distributed as dist

        if self.pid_file:
            with open(self.pid_file, "a") as file:
                file.write(f"{self.mesh.world.rank} {os.getpid()}\n")
        total = torch.zeros(1)
        with self.stages.stage("sampling", total=video.num_steps) as step:
            for i in range(video.num_steps):
                if i == 2:
                    self.misbehave()
                time.sleep(self.pause)
                total += self.mesh.world.rank
                if self.mesh.world.group is not None:
                    dist.all_reduce(total)
                step()
        if self.mesh.is_main:
            video.latents_file.write_bytes(b"latents")
        if self.fault == "decode":
            raise RuntimeError("decoding went wrong")
        if self.fault == "second" and video.prompt == "two":
            raise RuntimeError("the second went wrong")
        if not self.mesh.is_main:
            return None
        size = (video.num_frames, video.height, video.width, 3)
        return np.random.default_rng(video.seed).integers(0, 256, size, dtype=np.uint8)

    def misbehave(self):
        if self.fault == "raise":
            raise ValueError("tensor x of file y\nis missing")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "watchdog":
            os.write(2, b"[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)\n")
            os.abort()
        if self.fault == "nan":
            raise FloatingPointError("the latents contain NaN after sampling step 3 of 8")
        if self.fault == "crash":
            os.write(2, b"terminate called after throwing\n")
            os.abort()


def generate(pipeline, video, setup, stages):
    return pipeline(video)


def transformer_files(model_dir):
    raise ValueError(f"{model_dir}: nothing to quantize")


PROGRAM = Program(
    name="fake-xdit",
    script=__file__,
    rules=lambda source: RULES,
    make_demo=lambda name: Path(),
    pipeline=FakePipeline,
    transformer=transformer_files,
    generate=generate,
    decode=generate,
    options=(
        Option(["--fault"], help="KIND@RANK"),
        Option(["--pause"], type=float, default=0.0, help="Seconds a step."),
        Option(["--pids"], help="Where each rank writes its process id."),
    ),
)

if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
