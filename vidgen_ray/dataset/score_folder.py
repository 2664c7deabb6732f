"""Score the clips of an output folder: find those without scores, measure them with Ray Data, write `scores/`.

Files are written as results come, so a call that was stopped or killed is resumed by the next. A clip that fails gets no row:
its columns are null, and the next call tries it again.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import ray
from numpy.typing import NDArray
from rich.progress import track

from vidgen_ray.batch.line_planner import own_context
from vidgen_ray.batch.progress import RunListener
from vidgen_ray.cli.commands import note
from vidgen_ray.dataset.measurements import SCORERS, HashScorer
from vidgen_ray.dataset.scorers import (
    NEED_CPU_S,
    WEIGHTS,
    ChosenScorer,
    Clip,
    Column,
    Networks,
    ScoreTable,
    choose_scorers,
    face_params,
)
from vidgen_ray.dataset.tables import DIGEST
from vidgen_ray.engine.ray_cluster import connected
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import MAX_MESSAGES, SetupError, VidgenError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import (
    FILE_COLUMNS,
    ManifestRow,
    check_has_manifest,
    manifest_batches,
    new_name,
    opened,
    parquet_files,
)
from vidgen_ray.outputs.records import SCORES as FOLDER
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.profile import Profile
from vidgen_ray.system.console import LINE_EVERY_S, Console
from vidgen_ray.system.quantities import amount_text, count, duration

_T = TypeVar("_T")
_COLUMNS = (
    *("id", "prompt", "negative_prompt", "seed", "metadata", "face_image", "face_index"),
    *("width", "height", "num_frames", "fps"),
)
"""Columns of the manifest that a scorer gets, beside `clip` (path in the folder), `clip_sha256` and `clip_bytes`."""
NEIGHBOURS: dict[str, Column] = {
    "neighbour_id": Column(pyarrow.string(), "Id of the most similar other clip of the folder, by `phash`."),
    "neighbour_distance": Column(pyarrow.int64(), "Bits of `phash` that differ from that clip, 0 to 192."),
}
NEIGHBOURS_FILE = f"{FOLDER}/neighbours@1/all.parquet"
PAIR_ROWS = 8
"""Clips that are compared with all others at once, so that intermediate results stay in the processor's cache."""
_PART_ROWS, _FLUSH_S = 2_000, 10.0
"""Rows from which a file is complete, and seconds between two writes."""
TASK_S, MAX_TASK_CLIPS = 10.0, 64
"""Seconds that a task of Ray Data should take, and its most clips."""
MAX_CRASHES = 2
START_S = 15.0
"""Seconds to start a process and load its networks: no process is started for less work."""


@dataclass
class ClipScores:
    """Scores of one clip."""

    id: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scorer -> its columns."""
    errors: list[str] = field(default_factory=list)
    is_fatal: bool = False
    """The process cannot score any clip."""


@dataclass
class FolderReport:
    """Result of a call: counts of clips, those that failed, and what servers were asked and are paid."""

    clips: int
    done: int = 0
    already_done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Id -> reason."""
    seconds: float = 0
    requests: int = 0
    cost: float | None = None

    def add(self, name: str, problem: str | None, missing: str) -> None:
        """Count a clip, and print why it has no `missing`, of the first ones."""
        if problem is None:
            self.done += 1
            return
        self.failed[name] = problem
        if len(self.failed) <= MAX_MESSAGES:
            note(f"{name} has no {missing}: {problem}")

    def summary(self, done: str) -> str:
        """Return the counts as text. `done`: participle of what was done."""
        counts = f"{self.done:,} {done}, {self.already_done:,} already {done}, {len(self.failed):,} failed"
        paid = "" if self.cost is None else f", {count(self.requests, 'request')} for {amount_text(self.cost)}"
        return f"{count(self.clips, 'clip')}: {counts} in {duration(self.seconds)}{paid}"


class Attempts:
    """Actor that counts the attempts of each clip that have begun and not ended: its process crashed."""

    def __init__(self) -> None:
        self._open = Counter[str]()

    def begin(self, clip: str) -> int:
        """Return the attempts that have not ended, with this one."""
        self._open[clip] += 1
        return self._open[clip]

    def end(self, clip: str) -> None:
        del self._open[clip]


class ClipScorer:
    """Scores clips in one process."""

    def __init__(
        self, chosen: Sequence[ChosenScorer], outputs: OutputFolder, profile: Profile | None, attempts: Any = None
    ) -> None:
        """`attempts`: handle of the actor `Attempts`, if Ray repeats the work of a process that crashes."""
        import torch

        # Each process has one CPU.
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._outputs, self._attempts, self._fatal = outputs, attempts, list[str]()
        try:
            self._networks = Networks(tuple({need for each in chosen for need in each.kind.needs}), profile)
            self._scorers = {each.name: (each.kind(each.weights), each.schema) for each in chosen}
        except Exception as error:  # a scorer may raise anything; Ray would start the process again
            self._fatal.append(f"a scorer cannot be loaded: {error if isinstance(error, VidgenError) else repr(error)}")

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Score a batch of Ray Data. A clip at which `MAX_CRASHES` processes crashed fails."""
        results = []
        for row in batch.to_pylist():
            if ray.get(self._attempts.begin.remote(row[DIGEST])) > MAX_CRASHES:
                scores = ClipScores(row["id"], errors=["the process that scored it crashed"])
            else:
                scores = self.score(row)
            self._attempts.end.remote(row[DIGEST])
            results.append(pickle.dumps(scores))
        return pyarrow.table({"scores": results})

    def score(self, row: dict[str, Any]) -> ClipScores:
        """Score a clip by the scorers that `row` names."""
        scores = ClipScores(row["id"], errors=[*self._fatal], is_fatal=bool(self._fatal))
        if scores.is_fatal:
            return scores
        try:
            with local_clip(self._outputs.storage, row) as path:
                clip = Clip(row, path, self._networks, self._outputs)
                for name in row["scorers"]:
                    try:
                        scorer, schema = self._scorers[name]
                        scores.values[name] = _checked(scorer.score(clip), schema) | {DIGEST: row[DIGEST]}
                    except Exception as error:
                        scores.errors.append(f"{name}: {type(error).__name__}: {error}")
        except Exception as error:  # decoders raise almost any exception
            scores.errors.append(str(error) or repr(error))
        return scores


def _checked(values: Any, schema: pyarrow.Schema) -> dict[str, Any]:
    """Return the values as Python objects of the types of the columns. Infinite numbers become null."""
    if unknown := [name for name in values if name not in schema.names or name == DIGEST]:
        raise ValueError(f"returned {', '.join(unknown)}, which is not in `columns`")
    row: dict[str, Any] = pyarrow.Table.from_pylist([dict(values)], schema=schema).to_pylist()[0]
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


class ScoreWriter:
    """Writes the scores of one call as they come. Two calls at the same time do not disturb each other."""

    def __init__(self, storage: Storage, chosen: Sequence[ScoreTable]) -> None:
        self._storage, self._chosen = storage, chosen
        self._rows = defaultdict[str, list[dict[str, Any]]](list)
        self._names = defaultdict[str, str](new_name)
        self._written_at = time.monotonic()

    def add(self, scores: ClipScores) -> None:
        """Add the scores of a clip. Raises OSError."""
        for name, row in scores.values.items():
            self._rows[name].append(row)
        if time.monotonic() - self._written_at > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write all rows. The last file of each scorer is rewritten until it has `_PART_ROWS`. Raises OSError."""
        for each in self._chosen:
            if rows := self._rows[name := each.name]:
                with self._storage.new_file(f"{FOLDER}/{each.folder}/{self._names[name]}.parquet") as path:
                    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=each.schema), path)
                if len(rows) >= _PART_ROWS:
                    del self._rows[name], self._names[name]
        self._written_at = time.monotonic()


def finished_clips(storage: Storage) -> list[dict[str, Any]]:
    """Return the clips of the finished shots, each digest once. Raises SetupError if the folder has no results."""
    check_has_manifest(storage)
    files = [f"{name}{end}" for name in FILE_COLUMNS for end in ("", "_sha256", "_bytes")]
    clips: dict[str, dict[str, Any]] = {}
    for batch in manifest_batches(storage, ["status", *_COLUMNS, *files]):
        for row in batch.filter(pyarrow.compute.equal(batch.column("status"), "done")).to_pylist():
            if (clip := clip_of(row)) is not None:
                known = clips.setdefault(clip[DIGEST], clip)
                known.setdefault("ids", []).append(clip["id"])
    return list(clips.values())


def clip_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a scorer gets of a manifest row. `None` if the shot has no file."""
    name = next((name for name in FILE_COLUMNS if row[name] is not None), None)
    if name is None:
        return None
    file = {"clip": row[name], DIGEST: row[f"{name}_sha256"], "clip_bytes": row[f"{name}_bytes"]}
    return {column: row[column] for column in _COLUMNS} | file


@contextmanager
def local_clip(storage: Storage, clip: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the file of a clip on this machine. Raises SetupError if it is missing or has another size than recorded."""
    try:
        with storage.local_copy(clip["clip"]) as path:
            if (size := path.stat().st_size) != clip["clip_bytes"]:
                raise SetupError(f"has {size} bytes instead of {clip['clip_bytes']}; run `vidgen verify`")
            yield path
    except FileNotFoundError:
        raise SetupError(f"{clip['clip']} is missing") from None


def _scored(storage: Storage, chosen: ChosenScorer) -> set[str]:
    """Return the digests of the clips whose newest row is by this version with these weights."""
    weights: dict[str, str] = {}
    for table in part_tables(storage, chosen.folder, [DIGEST]):
        weights |= dict.fromkeys(table[DIGEST].to_pylist(), (table.schema.metadata or {}).get(WEIGHTS, b"").decode())
    return {digest for digest, of in weights.items() if of == chosen.digest}


def part_tables(storage: Storage, folder: str, columns: list[str] | None = None) -> Iterator[pyarrow.Table]:
    """Yield the tables of a scorer, oldest first."""
    for name in parquet_files(storage, f"{FOLDER}/{folder}"):
        with opened(storage, name) as file:
            yield pyarrow.parquet.read_table(file, columns=columns)


def score_folder(
    outputs: OutputFolder, chosen: Sequence[ChosenScorer], profile: Profile | None, address: str | None
) -> FolderReport:
    """Score the clips that lack scores of a scorer, and find neighbours if hashes have changed.

    Prints progress and failures. Raises SetupError, and OSError if the storage fails.
    """
    started, storage = time.monotonic(), outputs.storage
    clips = finished_clips(storage)
    scored = {each.name: _scored(storage, each) for each in chosen}
    pending = [
        clip | {"scorers": missing} for clip in clips if (missing := [n for n in scored if clip[DIGEST] not in scored[n]])
    ]
    report = FolderReport(len(clips), already_done=len(clips) - len(pending))
    writer = ScoreWriter(storage, chosen)
    if pending:
        try:
            with connected(address, cpus=1):
                for scores in shown_progress(_scores_of(pending, chosen, outputs, profile), len(pending), "scoring"):
                    writer.add(scores)
                    report.add(scores.id, "; ".join(scores.errors) or None, "scores")
        finally:
            writer.flush()
    write_neighbours(storage, clips)
    report.seconds = round(time.monotonic() - started, 3)
    return report


def shown_progress(results: Iterable[_T], total: int, doing: str) -> Iterator[_T]:
    """Yield the results of `total` clips, with a bar on a terminal, otherwise with a line every `LINE_EVERY_S`."""
    console, shown = Console(stderr=True), time.monotonic()
    options: Any = {"total": total, "console": console, "disable": not console.is_terminal}
    for number, result in enumerate(track(results, doing, **options), 1):
        yield result
        if not console.is_terminal and time.monotonic() - shown >= LINE_EVERY_S:
            shown = time.monotonic()
            note(f"{doing}: {number:,} of {count(total, 'clip')}")


def _scores_of(
    pending: Sequence[dict[str, Any]], chosen: Sequence[ChosenScorer], outputs: OutputFolder, profile: Profile | None
) -> Iterator[ClipScores]:
    """Yield the scores of all clips as they come.

    Raises SetupError if a scorer cannot be loaded.
    """
    resources, n = ray.cluster_resources(), len(pending)
    names = {name for clip in pending for name in clip["scorers"]}
    used = [each.kind for each in chosen if each.name in names]
    needs = {need for kind in used for need in kind.needs}
    cpu_s_per_frame = sum(NEED_CPU_S[need] for need in needs) + sum(kind.cpu_s_per_frame for kind in used)
    seconds = cpu_s_per_frame * sum(clip["num_frames"] or 1 for clip in pending)
    num_gpus = min(1.0, sum(kind.num_gpus for kind in used))
    if resources.get("GPU", 0) < num_gpus:
        note(f"{', '.join(kind.name for kind in used if kind.num_gpus)}: Ray has no GPU, computing on CPUs")
        num_gpus = 0
    slots = max(1, int(min(resources.get("CPU", 1), resources["GPU"] // num_gpus if num_gpus else math.inf)))
    processes = min(slots, n, max(1, math.ceil(seconds / START_S)))
    task_clips = max(1, min(MAX_TASK_CLIPS, int(TASK_S / (seconds / n)), n // processes))
    note(f"scoring {count(n, 'clip')} with {count(processes, 'CPU')}, about {duration(seconds / processes + START_S)}")
    for kind in used:
        module = sys.modules[kind.__module__]
        # Other machines cannot import a module of the current folder.
        if Path(module.__file__ or "").parent == Path.cwd():
            ray.cloudpickle.register_pickle_by_value(module)
    chosen = [each for each in chosen if each.kind in used]
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    table = pyarrow.Table.from_pylist(pending)
    with own_context(ordered=False):
        dataset = ray.data.from_arrow([table.slice(begin, task_clips) for begin in range(0, n, task_clips)]).map_batches(
            ClipScorer,
            fn_constructor_args=(chosen, outputs, profile, attempts),
            batch_size=task_clips,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=processes),
            num_cpus=1,
            num_gpus=num_gpus,
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for scores in map(pickle.loads, batch["scores"].to_pylist()):
                if scores.is_fatal:
                    raise SetupError(scores.errors[0])
                yield scores


def write_neighbours(storage: Storage, clips: Sequence[dict[str, Any]]) -> None:
    """Write the nearest neighbour of each clip in the folder, unless the hashes are those of the last call."""
    hashes: dict[str, list[int]] = {}
    for table in part_tables(storage, f"{HashScorer.name}@{HashScorer.version}"):
        hashes |= dict(zip(table[DIGEST].to_pylist(), table["phash"].to_pylist(), strict=True))
    # Shots with the same bytes are neighbours.
    known = sorted((name, clip[DIGEST]) for clip in clips if hashes.get(clip[DIGEST]) for name in clip["ids"])
    if len(known) < 2:
        storage.delete(NEIGHBOURS_FILE)
        return
    content = [(name, digest, hashes[digest]) for name, digest in known]
    state = hashlib.sha256(repr(content).encode()).hexdigest()
    with suppress(FileNotFoundError), opened(storage, NEIGHBOURS_FILE) as file:
        if (pyarrow.parquet.read_schema(file).metadata or {}).get(b"vidgen.hashes") == state.encode():
            return
    nearest, distances = nearest_neighbours(np.array([each for _, _, each in content], np.int64).view(np.uint64))
    rows: dict[str, dict[str, Any]] = {}
    for (_, digest), position, distance in zip(known, nearest.tolist(), distances.tolist(), strict=True):
        rows.setdefault(digest, {DIGEST: digest, "neighbour_id": known[position][0], "neighbour_distance": distance})
    columns = [(DIGEST, pyarrow.string()), *(column.named(name) for name, column in NEIGHBOURS.items())]
    schema = pyarrow.schema(columns, {"vidgen.hashes": state})
    with storage.new_file(NEIGHBOURS_FILE) as path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows.values()], schema), path)


def nearest_neighbours(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each row of hashes (n, words) the other row with the fewest different bits, and their number.

    Every pair is compared. Of several nearest rows the first one counts. n is at least 2.
    """
    words = np.ascontiguousarray(hashes.T)
    nearest, distances = np.zeros((2, len(hashes)), np.int64)
    for begin in range(0, len(hashes), PAIR_ROWS):
        block = words[:, begin : begin + PAIR_ROWS, None]
        bits = np.stack([np.bitwise_count(some ^ others) for some, others in zip(block, words, strict=True)]).sum(0, np.uint8)
        rows = np.arange(len(bits))
        bits[rows, begin + rows] = 255
        nearest[begin + rows] = best = bits.argmin(1)
        distances[begin + rows] = bits[rows, best]
    return nearest, distances


_BACKGROUND = {"env_vars": {"VIDGEN_BACKGROUND": "score"}}
"""Runtime environment of tasks during a run. Ray gives processes of it to no other tasks: their priority stays low."""


@lru_cache(maxsize=1)
def _background_scorer(arguments: bytes) -> ClipScorer:
    """Return the scorers that a process keeps for its next task."""
    os.nice(19)
    return ClipScorer(*pickle.loads(arguments))


def _score_in_background(arguments: bytes, clip: dict[str, Any]) -> ClipScores:
    return _background_scorer(arguments).score(clip)


class ScoringListener:
    """Listener of a run that scores finished clips on CPUs that are idle, and the rest after the run.

    Passes all events on to another listener. A clip whose score fails during the run is scored after it.
    """

    def __init__(self, listener: RunListener, outputs: OutputFolder, profile: Profile, address: str | None) -> None:
        self._listener = listener
        found = faces_of(lambda: profile)
        self._chosen = choose_scorers(SCORERS, (), (), found)
        self._score_rest = partial(score_folder, outputs, self._chosen, found, address)
        self._arguments = pickle.dumps((self._chosen, outputs, found))
        self._writer = ScoreWriter(outputs.storage, self._chosen)
        self._task: Any = ray.remote(num_cpus=1, max_retries=0, runtime_env=_BACKGROUND)(_score_in_background)
        self._waiting = deque[dict[str, Any]]()
        self._running: list[Any] = []
        self.on_rejected, self.on_lines = listener.on_rejected, listener.on_lines
        self.on_message = listener.on_message

    def on_finished(self, row: ManifestRow) -> None:
        self._listener.on_finished(row)
        if row.status == "done" and (clip := clip_of(vars(row))) is not None:
            self._waiting.append(clip | {"scorers": [each.name for each in self._chosen]})

    def on_status(self, snapshot: Snapshot) -> None:
        self._listener.on_status(snapshot)
        if not (self._waiting or self._running) or not ray.is_initialized():
            return
        # A score is not worth the run. A failed one is computed after it.
        with suppress(ray.exceptions.RayError, OSError):
            ready, self._running = (
                ray.wait(self._running, num_returns=len(self._running), timeout=0) if self._running else ([], [])
            )
            for reference in ready:
                self._writer.add(ray.get(reference))
            idle = int(ray.available_resources().get("CPU", 0))
            for _ in range(min(idle, len(self._waiting))):
                self._running.append(self._task.remote(self._arguments, self._waiting.popleft()))

    def finish(self) -> None:
        """Score what is left, after the run. Raises SetupError and OSError."""
        self._writer.flush()
        note(self._score_rest().summary("scored"))


def faces_of(find: Callable[[], Profile], *, required: bool = False) -> Profile | None:
    """Return the profile of the face models, or `None` with a note if there is none, or its weights are missing.

    `required` raises the error instead.
    """
    try:
        profile = find()
        face_params(profile)
        return profile
    except VidgenError as error:
        if required:
            raise
        note(f"faces are not measured: {error}")
        return None
