"""Output folders with clips that tests make on the spot, and clips of moving texture. No Ray and no models."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet

from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import write_png
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import last_number
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import RECORD, Failure, FileRecord, ShotRecord, StepRecord, key_path, shot_path
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames, Image
from vidgen_ray.system.cache_dir import sha256_of

# absl, which mlcroissant imports, closes the stream that is stderr at its import when uvicorn resets the handlers of logs. The
# stream of pytest must stay open.
with mock.patch.object(sys, "stderr", sys.__stderr__):
    import absl.logging  # noqa: F401

FAST = Mp4Settings(crf=10, preset="ultrafast", threads=1)
LICENCES = ({"weights": "builtin:test", "licence": "MIT", "commercial_use": "yes"},)
Result = Frames | Image | Callable[[Path], None] | None


def make_folder(
    path: Path, clips: Iterable[tuple[Mapping[str, Any], Result]], script: str = "script.jsonl", first_line: int = 1
) -> OutputFolder:
    """Add one run to the output folder `path`: shots with their files, records and manifest rows. Return the folder.

    `clips`: pairs of fields and frames (T, H, W, 3) of a clip, or a function that writes its file; an image (H, W, 3) is a shot
    without a clip, `None` a failed shot. Fields: those of a shot, with `id`; `hd` (frames of the upscaled clip); `seconds`,
    `likeness` and `licences` of its record. Most have defaults. The rows of a later call replace those with the same id.
    """
    outputs = OutputFolder(path)
    # Runs are named after their lease, so that later rows are newer.
    path.mkdir(parents=True, exist_ok=True)
    number = f"{int(last_number(outputs.storage)) + 1:06d}"
    (path / f".lease-{number}").touch()
    writer = ManifestWriter(outputs, f"{number}-test", script)
    for line, (fields, frames) in enumerate(clips, start=first_line):
        shot, result = _result(path, dict(fields), frames)
        last_run = "failed" if frames is None else "rendered"
        writer.add(ManifestRow.of_shot(f"{number}-test", script, shot, line, result, last_run))
    writer.close()
    return outputs


def _result(root: Path, fields: dict[str, Any], frames: Result) -> tuple[Shot, ShotRecord | Failure]:
    record = {name: fields.pop(name, None) for name in ("seconds", "likeness", "licences")}
    hd = fields.pop("hd", None)
    is_clip = callable(frames) or np.ndim(frames) == 4
    fields = {"prompt": f"a test of {fields['id']}", "seed": 1, "generate_video": is_clip, **fields}
    if frames is None:
        shot = Shot(**{**fields, "generate_video": True})
        return shot, Failure(stage="svd", error="RuntimeError", message="out of memory", attempts=2, worker="w")
    image = np.zeros((64, 64, 3), np.uint8) if callable(frames) else frames if frames.ndim == 3 else frames[0]
    height, width, _ = image.shape
    fields = {"upscale_video": hd is not None, "width": width, "height": height, **fields}
    if not callable(frames) and frames.ndim == 4:
        fields = {"num_frames": len(frames), "fps": 8, **fields}
    shot = Shot(**fields)
    folder = root / shot_path(shot.id)
    folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / "image.png", image)
    for name, content in {"video.mp4": frames, "hd.mp4": hd}.items():
        (folder / name).unlink(missing_ok=True)
        if callable(content):
            content(folder / name)
        elif content is not None and content.ndim == 4:
            with Mp4Writer(folder / name, content.shape[2], content.shape[1], shot.fps, FAST) as clip:
                clip.write(content)
    seconds = record["seconds"] or 2.0
    written = [folder / name for name in ("image.png", "video.mp4", "hd.mp4") if (folder / name).exists()]
    result = ShotRecord(
        key=hashlib.sha256(shot.model_dump_json().encode()).hexdigest(),
        shot=shot,
        tries=1,
        likeness=record["likeness"],
        seeds={},
        stages=(StepRecord(stage="svd", key="0" * 64, weights=(), seconds=seconds, gpu_seconds=seconds, cached=False),),
        files={file.name: FileRecord(sha256=sha256_of(file), bytes=file.stat().st_size) for file in written},
        software={},
        licences=LICENCES if record["licences"] is None else record["licences"],
        face_photos=tuple(sha256_of(Path(photo)) for photo in shot.face_image),
    )
    (folder / RECORD).write_text(result.model_dump_json(exclude={"committed_at"}))
    key = root / key_path(result.key)
    key.parent.mkdir(parents=True, exist_ok=True)
    key.write_text(shot.id)
    return shot, result.model_copy(update={"committed_at": (folder / RECORD).stat().st_mtime})


def digest_of(shot_id: str) -> str:
    """Return the digest that `done_shot` gives to a clip."""
    return shot_id.encode().hex().ljust(64, "0")


def done_shot(shot: Shot, seconds: float = 1.0) -> ShotRecord:
    """Return the result of a shot with a clip, without its files."""
    steps = (StepRecord(stage="svd", key="", weights=(), seconds=seconds, gpu_seconds=1.0, cached=False),)
    files = {"video.mp4": FileRecord(sha256=digest_of(shot.id), bytes=1000)}
    fields = {"tries": 1, "likeness": None, "seeds": {}, "software": {}, "committed_at": 1.0}
    return ShotRecord(key=shot.id, shot=shot, stages=steps, files=files, **fields)


def write_scores(storage: Storage, folder: str, columns: Mapping[str, Any], name: str = "1") -> None:
    with storage.new_file(f"scores/{folder}/{name}.parquet") as path:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)


def texture(height: int, width: int, seed: int = 0, coarseness: int = 8) -> Image:
    """Return smooth coloured noise (H, W, 3), whose patches are `coarseness` pixels wide and use the whole range."""
    small = np.random.default_rng(seed).uniform(0, 255, (height // coarseness + 2, width // coarseness + 2, 3))
    large = cv2.resize(small, None, fx=coarseness, fy=coarseness, interpolation=cv2.INTER_CUBIC)
    return large[:height, :width].clip(0, 255).astype(np.uint8)


def moving(frames: int = 9, px: int = 3, size: tuple[int, int] = (128, 192), seed: int = 0) -> Frames:
    """Return a clip (T, H, W, 3) of a texture that moves `px` pixels to the left per frame. `size`: height and width."""
    height, width = size
    wide = texture(height, width + abs(px) * frames, seed)
    return np.stack([wide[:, abs(px) * number :][:, :width] for number in range(frames)])
