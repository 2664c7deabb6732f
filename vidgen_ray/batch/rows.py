"""A shot on its way as a row of Ray Data: one flat set of columns, pictures and clips as uint8 tensors.

Every column is there in every row; an absent tensor has no elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from vidgen_ray.graph import ShotPlan
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.outputs.stage_cache import face_from_json, face_to_json
from vidgen_ray.stages.base import Artefacts

Batch = dict[str, NDArray[Any]]
"""A batch of one row: column -> array whose first axis has length 1."""

TENSORS = {"pose": (0, 1, 3), "image": (0, 1, 3), "frames": (0, 1, 1, 3)}
"""Column -> shape of the absent tensor."""
_records = TypeAdapter(tuple[StepRecord, ...])


@dataclass(frozen=True, slots=True)
class Parcel:
    """A shot between two actors: what is to be done, what was done, what was made, or why it failed."""

    plan: ShotPlan
    records: tuple[StepRecord, ...] = ()
    artefacts: Artefacts = field(default_factory=lambda: Artefacts())
    failure: Failure | None = None
    result: ShotRecord | None = None
    """Of a shot that was committed."""


def pack(parcel: Parcel) -> Batch:
    if unknown := set(parcel.artefacts) - {*TENSORS, "face"}:
        raise ValueError(f"artefacts that rows have no columns for: {', '.join(unknown)}")
    texts = {
        "plan": parcel.plan.model_dump_json(),
        "records": _records.dump_json(parcel.records).decode(),
        "failure": parcel.failure.model_dump_json() if parcel.failure else "",
        "result": parcel.result.model_dump_json() if parcel.result else "",
        "face": face_to_json(parcel.artefacts["face"]) if "face" in parcel.artefacts else "",
    }
    row: Batch = {name: np.array([text], dtype=object) for name, text in texts.items()}
    for name, absent in TENSORS.items():
        tensor = parcel.artefacts.get(name)
        row[name] = np.zeros((1, *absent), np.uint8) if tensor is None else np.asarray(tensor)[None]
    return row


def unpack(row: Batch) -> Parcel:
    """Tensors are read-only views of the object store. A row may lack all columns but `plan`: nothing was done yet."""
    plan = ShotPlan.model_validate_json(row["plan"][0])
    if len(row) == 1:
        return Parcel(plan)
    artefacts: dict[str, Any] = {name: row[name][0] for name in TENSORS if row[name][0].size}
    if face := row["face"][0]:
        artefacts["face"] = face_from_json(face)
    return Parcel(
        plan=plan,
        records=_records.validate_json(row["records"][0]),
        artefacts=Artefacts(**artefacts),  # type: ignore[typeddict-item]  # the names are those of Artefacts
        failure=Failure.model_validate_json(row["failure"][0]) if row["failure"][0] else None,
        result=ShotRecord.model_validate_json(row["result"][0]) if row["result"][0] else None,
    )
