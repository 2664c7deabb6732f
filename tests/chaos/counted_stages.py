"""The real stages, always on the CPU, with a log of every call."""

import json
import os
import time

from vidgen_ray.graph import STAGES

LOG = "VIDGEN_CHAOS_LOG"
"""Environment variable with the path of the log."""


def log_call(stage, work):
    """Append a line with a single write, so that lines are complete and never interleaved."""
    line = json.dumps({"stage": stage, "work": work, "pid": os.getpid(), "at": time.time()}) + "\n"
    file = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


class Counted:
    """Mixin that logs calls. It comes before the real stage in the base classes."""

    def __init__(self, params):
        super().__init__(params.model_copy(update={"device": "cpu"}))

    def __call__(self, item):
        result = super().__call__(item)
        log_call(self.name, [item.shot.id])
        return result

    def run_chunk(self, shot, frames, chunk=None):
        result = super().run_chunk(shot, frames, chunk)
        log_call(self.name, len(frames))
        return result


COUNTED = {stage.name: type(f"Counted{stage.__name__}", (Counted, stage), {"__module__": __name__}) for stage in STAGES}
globals().update({stage.__name__: stage for stage in COUNTED.values()})  # pickle finds classes by their module attribute
