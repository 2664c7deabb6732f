"""Stages without models that do what the prompt says; see `tests/fake_stages.py`.

Beside what those obey, a prompt may count steps: `steps N stop at K PIPE` waits in step K until somebody opens the named pipe,
and notes every step beside it. `hang` hangs in the stage of faces, where the shot
has one.
"""

import os
import re

import numpy as np

from tests.fake_stages import FAKES, FakeFlux, FakeInstantID, FakeStage, obey
from vidgen_ray.stages.flux_refine import FluxRefineStage
from vidgen_ray.stages.progress import report_progress

STEPS = re.compile(r"steps (\d+) stop at (\d+) (\S+)")


class HangingFace(FakeInstantID):
    def one(self, shot, artefacts):
        if shot.prompt.startswith("hang"):
            obey(shot.prompt)
        return super().one(shot, artefacts)


class FakeRefine(FakeStage, FluxRefineStage):
    def one(self, shot, artefacts):
        return {"image": artefacts["image"]}


class SteppingFlux(FakeFlux):
    def one(self, shot, artefacts):
        told = STEPS.fullmatch(shot.prompt)
        if told is None:
            return super().one(shot, artefacts)
        steps, stop, pipe = int(told[1]), int(told[2]), told[3]
        for step in range(1, steps + 1):
            note(f"{pipe}.steps", step)
            if step == stop:
                open(pipe).close()
            report_progress(self.name, step, steps)
        return {"image": np.zeros((shot.height, shot.width, 3), np.uint8)}


def note(path, what):
    """One write, so that a killed process leaves whole lines."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what}\n".encode())
    os.close(file)


OBEDIENT = {**FAKES, "instantid": HangingFace, "refine": FakeRefine, "flux": SteppingFlux}
