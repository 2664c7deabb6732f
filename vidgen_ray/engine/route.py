"""Route of a shot: its calls, the chunks of its clip and their timeouts. Decided once, before the shot starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.graph import STAGE_BY_NAME, durations, is_chunked
from vidgen_ray.planner.layout import Layout
from vidgen_ray.render.step_runner import chunk_unit, clip_chunks
from vidgen_ray.shot import Shot

CHUNK_BYTES = 128 << 20
"""Largest result of a chunk in raw frames per GPU, if one call of the network does not make more: 4 frames of 4096x2304."""
CHUNK_LOAD = 0.25
"""Load of one chunk of frames to upscale."""
COMMIT_LOAD = 0.0625
"""Load of a clip that is written on its encoder, which can write several at a time: they wait for their chunks."""


@dataclass(frozen=True, slots=True)
class RouteCall:
    """One call to a worker."""

    stages: tuple[str, ...]
    keys: tuple[str, ...]
    costs: tuple[float, ...]
    """Cost of each stage for the whole clip; see `graph.durations`. Empty for servers: how long a job waits is not known."""
    timeout_s: float
    load: float
    adapters: tuple[str, ...]

    @property
    def chunked(self) -> tuple[str, ...]:
        """Stages that work on the whole clip at the end of the call."""
        return tuple(stage for stage in self.stages if is_chunked(stage))

    @property
    def keeps_result(self) -> bool:
        """Later shots with the same inputs may use the result, such as the features of a face."""
        return STAGE_BY_NAME[self.stages[-1]].shared


@dataclass(frozen=True, slots=True)
class Route:
    """The calls of a shot, in order."""

    calls: tuple[RouteCall, ...]
    """Calls for whole images and clips."""
    chunk_calls: tuple[RouteCall, ...]
    """Calls for each chunk, one after another. Empty if the last call has also processed the clip."""
    chunks: tuple[slice, ...]
    """Frames of each chunk."""
    commit_timeout_s: float
    """Timeout of each call of an encoder."""


class Routes:
    """Finds the routes of shots through the workers of a layout."""

    def __init__(self, config: EngineConfig, layout: Layout, chunk_frames: Mapping[str, int]) -> None:
        """`chunk_frames`: chunked stage -> frames per call of its network."""
        self._config = config
        self._chunk_frames = chunk_frames
        self._places = layout.server_places
        self._group_size = layout.group_size
        # Every shot asks, and the layout looks at all its workers.
        self._can_fuse = cache(layout.can_fuse)
        self._only_together = cache(layout.only_together)

    def __call__(self, plan: ShotPlan) -> Route:
        shot = plan.shot
        whole = _grouped(
            [step for step in plan.steps if not is_chunked(step.stage)], self._can_fuse, lambda step: _ends_call(step, shot)
        )
        chunked = _grouped([step for step in plan.steps if is_chunked(step.stage)], self._can_fuse, lambda _: False)
        # The GPUs of a group share the calls of a network for a chunk.
        gpus = self._group_size
        chunks = clip_chunks(shot, gpus * chunk_unit(shot, self._chunk_frames), gpus * CHUNK_BYTES) if chunked else []
        if whole and self._runs_in_one_call(shot, whole[-1], chunked, len(chunks)):
            whole[-1] += chunked.pop()
            chunks = []
        return Route(
            calls=tuple(self._call(shot, steps) for steps in whole),
            chunk_calls=tuple(self._call(shot, steps, CHUNK_LOAD) for steps in chunked),
            chunks=tuple(chunks),
            commit_timeout_s=self._config.commit_timeout_s(shot),
        )

    def _runs_in_one_call(self, shot: Shot, last: tuple[Step, ...], chunked: Sequence[tuple[Step, ...]], n_chunks: int) -> bool:
        """Return whether the chunked steps run in the call of the `last` other steps.

        They do so if the clip is a single chunk, which no other worker can share, and if no worker would have less to do.
        """
        # A clip whose likeness is too low is not processed.
        if len(chunked) != 1 or n_chunks > 1 or shot.min_identity is not None:
            return False
        return self._only_together(*(step.stage for step in (*last, *chunked[0])))

    def _call(self, shot: Shot, steps: tuple[Step, ...], load: float | None = None) -> RouteCall:
        names = tuple(step.stage for step in steps)
        at_server = names[0] in self._places
        costs = durations(shot, names)
        adapters = {lora.path for name in names for lora in STAGE_BY_NAME[name].active_loras(shot)}
        return RouteCall(
            stages=names,
            keys=tuple(step.key for step in steps),
            costs=() if at_server else tuple(costs[name] for name in names),
            timeout_s=self._config.timeout_s(shot, costs),
            load=1 / self._places.get(names[0], 1) if load is None or at_server else load,
            adapters=tuple(sorted(adapters)) if load is None else (),
        )


def _grouped(steps: Sequence[Step], can_fuse: Callable[..., bool], ends_call: Callable[[Step], bool]) -> list[tuple[Step, ...]]:
    """Group steps into calls, with as many steps per call as possible.

    `can_fuse(first, *others)` tells whether every process that holds stage `first` also takes the other stages.
    """
    groups: list[list[Step]] = []
    for step in steps:
        if groups and not ends_call(groups[-1][-1]) and can_fuse(*(member.stage for member in groups[-1]), step.stage):
            groups[-1].append(step)
        else:
            groups.append([step])
    return [tuple(group) for group in groups]


def _ends_call(step: Step, shot: Shot) -> bool:
    """Return whether a call ends after this step: other shots use its result, too, or a likeness check follows."""
    stage = STAGE_BY_NAME[step.stage]
    return stage.shared or (shot.min_identity is not None and "image_likeness" in stage.writes)
