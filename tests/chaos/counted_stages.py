"""The real stages, on a CPU whatever the profile says, each of whose calls leaves a line in a log: what was computed, where."""

import json
import os
import time

from vidgen_ray.graph import STAGES

LOG = "VIDGEN_CHAOS_LOG"
"""Environment variable: the log's path."""


def note(stage, work):
    """One write, so that lines of several processes do not mix and a killed process leaves whole ones."""
    line = json.dumps({"stage": stage, "work": work, "pid": os.getpid(), "at": time.time()}) + "\n"
    file = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


class Counted:
    """Comes before the real stage among the bases of each."""

    def __init__(self, params):
        super().__init__(params.model_copy(update={"device": "cpu"}))

    def __call__(self, items):
        given = super().__call__(items)
        note(self.name, [item.shot.id for item in items])
        return given

    def run_chunk(self, shot, frames, lookahead=None):
        result = super().run_chunk(shot, frames, lookahead)
        note(self.name, len(frames))
        return result


COUNTED = {stage.name: type(f"Counted{stage.__name__}", (Counted, stage), {"__module__": __name__}) for stage in STAGES}
globals().update({stage.__name__: stage for stage in COUNTED.values()})  # where pickle looks for them
