"""Fakes with a fault of the hardware: it depends on the GPU, the node or the process, not on the line."""

import os
from pathlib import Path

import ray

from tests.fake_stages import FAKES, FakeFlux


def gpu():
    """Return Ray's id of the GPU of this process."""
    return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]


def actor_name():
    return ray.get_runtime_context().get_actor_name()


def append(file: Path, text: str) -> int:
    """Append a line with a single write. Return the number of lines."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as log:
        log.write(f"{text}\n")
    return len(file.read_text().splitlines())


def stages(on_call=lambda shot: None, on_load=lambda: None):
    """Return fakes whose first stage also calls these functions, in its process."""

    class Faulty(FakeFlux):
        def load(self):
            on_load()
            super().load()

        def one(self, shot, artefacts):
            on_call(shot)
            return super().one(shot, artefacts)

    return {**FAKES, FakeFlux.name: Faulty}
