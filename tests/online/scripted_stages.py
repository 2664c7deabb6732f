"""Fake stages for the online tests. The prompt scripts their behaviour.

In addition to the failures of `tests/fake_stages.py`, the prompt `steps N pause at K PIPE` reports N steps, waits in step K
until the named pipe PIPE is opened for writing, and appends every step to `PIPE.steps`.
"""

import os
import re
from contextlib import contextmanager

from tests.fake_stages import FAKES, FakeFlux, FakeStage
from vidgen_ray.stages.base import report_progress
from vidgen_ray.stages.flux import FluxRefineStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage

STEPS = re.compile(r"steps (\d+) pause at (\d+) (\S+)")


class FakeRefine(FakeStage, FluxRefineStage):
    def one(self, shot, artefacts):
        return {"image": artefacts["image"]}


class FakeHunyuan(FakeStage, HunyuanDiTStage):
    def one(self, shot, artefacts):
        return {"image": 255 - artefacts["image"]}


class ScriptedFlux(FakeFlux):
    def one(self, shot, artefacts):
        match = STEPS.fullmatch(shot.prompt)
        if match is None:
            return super().one(shot, artefacts)
        steps, pause, pipe = int(match[1]), int(match[2]), match[3]
        for step in range(1, steps + 1):
            append_line(f"{pipe}.steps", step)
            if step == pause:
                open(pipe).close()
            report_progress(self.name, step, steps)
        return super().one(shot, artefacts)


def append_line(path, text):
    """Append a line with a single write, so that a killed process leaves complete lines."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{text}\n".encode())
    os.close(file)


SCRIPTED = {**FAKES, "refine": FakeRefine, "hunyuan": FakeHunyuan, "flux": ScriptedFlux}


@contextmanager
def pipes_open(*pipes):
    """Release all readers that wait on these named pipes, now and until the block ends.

    Opening a pipe for reading and writing never makes a reader wait. Opening it only for writing would release a single reader,
    which may be the thread of an abandoned process.
    """
    descriptors = [os.open(pipe, os.O_RDWR) for pipe in pipes]
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def steps_run(pipe):
    return [int(line) for line in pipe.with_name("pipe.steps").read_text().split()]
