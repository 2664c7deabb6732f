"""Recordings of an engine: each event with its time, and the commands that followed. A replay must give the same commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from vidgen_ray.engine import messages as m
from vidgen_ray.engine.callbacks import guarded
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import WorkerSpec

_TYPES: dict[str, Any] = {
    **m.EVENTS,
    **{each.__name__: each for each in (m.Call, m.Result, m.StepTime, m.Repetition, WorkerSpec, Failure, m.Kind)},
}


class Recorder:
    """Writes a recording, a JSON object per line. Engines of one run follow each other in the same file.

    If the file cannot be written any more, such as on a full disk, the recording ends and the run continues.
    """

    def __init__(self, path: Path, on_message: Callable[[str], object] = lambda _: None) -> None:
        """Raises OSError if the file cannot be created."""
        self._path, self._on_message = path, guarded(on_message)
        self._file: TextIO | None = path.open("w", encoding="utf-8")

    def begin(self, core: Core) -> None:
        """Begin the recording of an engine."""
        self._write({"engine": core.settings})

    def add(self, now: float, event: m.Event, commands: Sequence[m.Command]) -> None:
        self._write({"at": now, "event": _encoded(event), "commands": [_encoded(each) for each in commands]})

    def close(self) -> None:
        self._try(lambda file: file.close())

    def _write(self, line: dict[str, Any]) -> None:
        self._try(lambda file: file.write(json.dumps(line) + "\n"))

    def _try(self, what: Callable[[TextIO], object]) -> None:
        if self._file is not None:
            try:
                what(self._file)
            except OSError as error:
                file, self._file = self._file, None
                with suppress(OSError):
                    file.close()
                self._on_message(f"--record: the recording ends, because {self._path} cannot be written: {error.strerror}")


def replay(path: Path) -> list[str]:
    """Give the recorded events to new cores. Return the lines whose commands differ, with what differs."""
    return list(_differences(path))


def _differences(path: Path) -> Iterator[str]:
    core: Core | None = None
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                # The driver was killed.
                return
            line = json.loads(text)
            if "engine" in line:
                core = _core(line["engine"])
                continue
            assert core is not None
            commands = [_encoded(each) for each in core.handle(_decoded(line["event"]), line["at"])]
            if commands != line["commands"]:
                yield f"line {number}: {commands} instead of {line['commands']}"


def _core(settings: dict[str, Any]) -> Core:
    return Core(**{**settings, "limits": CoreLimits(**settings["limits"])})


def _encoded(value: Any) -> Any:
    match value:
        case m.Kind():
            return {"": "Kind", "value": value.value}
        case WorkerSpec():
            return {"": "WorkerSpec", **{name: _encoded(each) for name, each in asdict(value).items()}}
        case Failure():
            return {"": "Failure", **value.model_dump()}
        case tuple() | list():
            names: tuple[str, ...] | None = getattr(value, "_fields", None)
            if names is None:
                return [_encoded(each) for each in value]
            # References to results are opaque to the core.
            fields = {name: _encoded(each) for name, each in zip(names, value, strict=True) if name != "data"}
            return {"": type(value).__name__, **fields}
    return value


def _decoded(value: Any) -> Any:
    match value:
        case dict():
            fields = {name: _decoded(each) for name, each in value.items() if name}
            return _TYPES[value[""]](**fields)
        case list():
            return tuple(_decoded(each) for each in value)
    return value
