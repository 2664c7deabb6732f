"""Events that the core of an engine takes, and commands that it gives. All are plain values, so a run is a list of events."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple, get_args

from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import WorkerSpec

OUTPUT = "output"
"""Stage of encoders: write and commit the files of a shot."""
LOADING = "loading"
"""Failure stage of a process that could not load its weights."""


class Kind(StrEnum):
    """Kind of a failed attempt."""

    INPUT = "refused"
    """The stage refused the shot or its files, with an error for the user. Repeated once elsewhere to confirm it."""
    MEMORY = "out of memory"
    """The shot does not fit into the GPU memory of the process, also with the lowest-memory settings. Repeated on larger GPUs,
    if there are any, otherwise once elsewhere."""
    WRITE = "write failed"
    """A file could not be written. The cause is the storage if nothing else can write to it either, otherwise the process."""
    DISK_FULL = "disk full"
    """A file could not be written, because the disk or a quota is full."""
    ERROR = "error"
    """Any other error, a timeout, or a crash that no other call can have caused."""
    NODE = "node error"
    """Ray could not store the result on the node, such as on a full disk. The process is quarantined, so the attempt does not
    count against the shot."""
    SHARED_CRASH = "shared crash"
    """The process crashed or hung with several calls in progress. Each is repeated alone, so that one line costs no other
    line."""
    FOREIGN = "foreign"
    """The inputs of the call are lost, or those of another shot. The shot runs again."""
    NOT_RUN = "not run"
    """The call is not the cause: it was never started, or the process was restarted for another reason."""


class Call(NamedTuple):
    """One call that a shot needs."""

    id: int
    order: float
    """Sequence number of the shot, larger for the lowest priority. Smaller is older."""
    shot: str
    """Id of the shot, for logs."""
    stages: tuple[str, ...]
    """The first one is the stage in whose queue the call waits."""
    keys: tuple[str, ...] = ()
    """Content key of each stage's result, as planned. Empty for a commit."""
    costs: tuple[float, ...] = ()
    """Cost of each stage, relative to the reference shot; see `graph.durations`."""
    timeout_s: float = 3600.0
    """Timeout, as far as the profile and the plan say."""
    load: float = 1.0
    """Load that the call adds to a worker. 1 for a whole shot."""
    adapters: tuple[str, ...] = ()
    """LoRAs of the shot, sorted."""
    near: str | None = None
    """Process that has the inputs. It is preferred among equally loaded ones, then processes on its node."""
    near_load: float = 0.0
    """Load that a process near the inputs may have more than another one and still be preferred."""
    is_shared: bool = False
    """Calls with the same keys are computed once."""
    is_checked: bool = False
    """The call makes whole images or clips: another worker can repeat it to check this one."""
    is_prefetched: bool = True
    """A busy process may get the call early. If not, calls of a higher priority can still pass it."""

    @property
    def stage(self) -> str:
        return self.stages[0]


class StepTime(NamedTuple):
    """Seconds of one step of a call."""

    stage: str
    key: str
    seconds: float | None
    """`None` if the result came from the stage cache."""


class Result(NamedTuple):
    """Result of a call. The artefacts stay in Ray's object store; `data` refers to them, and is opaque to the core."""

    steps: tuple[StepTime, ...] = ()
    device: str = ""
    """GPU and driver of the worker. Empty on a CPU."""
    is_usual: bool = False
    """All images were computed, with the settings of the profile: another worker must make the same ones."""
    differences: tuple[float, ...] = ()
    """Only of a repetition: largest difference from each output that it was compared with, 0 to 255."""
    data: Any = None


class Repetition(NamedTuple):
    """Check of a worker: a call of another worker is repeated, and the outputs are compared."""

    of: Result
    others: tuple[Result, ...]
    """Results with whose outputs the new one is compared."""


# Events. `life` is the number of the process that fills a row of the table: events of earlier processes are ignored.


class Added(NamedTuple):
    """The fleet has created a worker or an encoder. Its process may still start."""

    process: str
    spec: WorkerSpec


class Removed(NamedTuple):
    """The fleet has removed a worker for good. `released`: it is well, ends its calls, and is not needed any more."""

    process: str
    released: bool = False


class Unplaceable(NamedTuple):
    """The cluster is too small for the layout: another one is needed."""

    reason: str


class Asked(NamedTuple):
    call: Call


class Withdrawn(NamedTuple):
    """A shot does not need this call any more."""

    call: int


class Placed(NamedTuple):
    """A process responds."""

    process: str
    life: int
    node: str
    pid: int


class Ready(NamedTuple):
    """A process has loaded its weights."""

    process: str
    life: int


class LoadFailed(NamedTuple):
    """A process could not load its weights, or crashed meanwhile."""

    process: str
    life: int
    failure: Failure


class Progressed(NamedTuple):
    """A load has progressed, or, with a number, the session of an encoder: its call starts, or, if it `waits`, has ended."""

    process: str
    life: int
    number: int | None = None
    waits: bool = False


class Returned(NamedTuple):
    """A call has ended with a result."""

    process: str
    life: int
    number: int
    result: Result


class Failed(NamedTuple):
    """A call has failed."""

    process: str
    life: int
    number: int
    kind: Kind
    failure: Failure
    is_broken: bool = False
    """Every further call to this process would fail: it must be replaced."""
    is_unloaded: bool = False
    """The process has no weights: it must load them again, or say why it cannot."""


class Died(NamedTuple):
    """A process has crashed, or Ray has replaced it. `suspects`: calls that may be the cause."""

    process: str
    life: int
    suspects: tuple[int, ...]
    reason: str


class Silent(NamedTuple):
    """A process does not respond to pings."""

    process: str
    life: int
    seconds: float


class StorageChecked(NamedTuple):
    """The output folder can be written. `was_down`: it could not when the write of this call failed."""

    call: int
    was_down: bool


class Tick(NamedTuple):
    """The time of the last `WaitUntil` has come."""


Event = (
    Added | Removed | Unplaceable | Asked | Withdrawn | Placed | Ready | LoadFailed | Progressed | Returned | Failed | Died
    | Silent | StorageChecked | Tick
)  # fmt: skip

# Commands


class Start(NamedTuple):
    """Wait until the process of this life responds, let it load its weights, then ping it. Ray starts it by itself."""

    process: str
    life: int
    is_first: bool = False


class Kill(NamedTuple):
    """Kill the process of a row. Ray starts the next one."""

    process: str


class Release(NamedTuple):
    """The row has left the table."""

    process: str


class Send(NamedTuple):
    """Send a call to a process. Calls to one process arrive in order."""

    process: str
    life: int
    number: int
    call: Call
    repetition: Repetition | None = None


class Cancel(NamedTuple):
    """Stop a call: its result is not needed. No `Ended` follows."""

    process: str
    number: int


class Ended(NamedTuple):
    """An attempt has ended, for logs. `kind` and `failure` are `None` if it has succeeded."""

    number: int
    kind: Kind | None
    failure: Failure | None
    outcome: str = ""
    """Outcome of a repetition."""


class Finish(NamedTuple):
    """A call has succeeded. `is_first`: otherwise another shot has asked for the same call before, and it counts as cached."""

    call: int
    result: Result
    process: str
    is_first: bool = True


class Fail(NamedTuple):
    """A call has failed for good."""

    call: int
    kind: Kind
    failure: Failure


class Retried(NamedTuple):
    """A failed call is tried again, for metrics."""

    stage: str


class CheckStorage(NamedTuple):
    """Find out whether the output folder can be written, and answer with `StorageChecked` as soon as it can."""

    call: int
    kind: Kind
    reason: str


class WaitUntil(NamedTuple):
    """Send a `Tick` at this time. Replaces the last such command."""

    time: float


class Report(NamedTuple):
    """A process is quarantined, killed or given up, for users."""

    process: str
    """Its name and node."""
    reason: str


Command = Start | Kill | Release | Send | Cancel | Ended | Finish | Fail | Retried | CheckStorage | WaitUntil | Report
EVENTS: dict[str, type[Any]] = {event.__name__: event for event in get_args(Event)}
"""Name -> event, for recordings."""
