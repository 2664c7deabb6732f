"""Data sets for LoRA trainers: the group of each clip, the configuration of the trainer, and what it does with each clip.

The rules of the trainers are in `vidgen_ray/trainers.py`.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from vidgen_ray.dataset.export_rows import ENCODED
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.trainers import Clip, Target, described, fit_cost

USED = "used.json"
SHAPE = ", ".join(Clip._fields)


def apply_rules(database: duckdb.DuckDBPyConnection, target: Target, *, fit: bool) -> None:
    """Move clips of `new` that the trainer would drop to `missing`, and set `_group` and `_encoded` of the others.

    Creates the table `uses`: a row per shape of clips, with what happens to it.
    """
    rows = []
    for shape in database.execute(f"SELECT DISTINCT {SHAPE} FROM new").fetchall():
        clip = Clip(*shape)
        encoded = target.fitted(clip) if fit else None
        kept = encoded or clip
        use = target.use(kept)
        what = f"{described(kept, target)}{f'; {fit_cost(clip, encoded)}' if encoded else ''}"
        group = f"{use.width}x{use.height}-{use.frames}f-{kept.fps:g}fps"
        to_s = round(use.frames / target.model.fps * use.speed, 6)
        rows.append((*clip, use.problem, what, group, encoded and encoded._asdict(), use.status, use.frames, use.seen, to_s))
    names = (*Clip._fields, "problem", "what", "_group", "_encoded", "status", "frames", "of_frames", "to_s")
    kinds = ("BIGINT", "DOUBLE", "BIGINT", "BIGINT", "TEXT", "TEXT", "TEXT", ENCODED, "TEXT", "BIGINT", "BIGINT", "DOUBLE")
    database.execute(f"CREATE TABLE uses ({', '.join(map(' '.join, zip(names, kinds, strict=True)))})")
    if rows:
        database.executemany(f"INSERT INTO uses VALUES ({', '.join('?' * len(names))})", rows)
    database.execute(f"CREATE TABLE all_shapes AS SELECT id, {SHAPE} FROM new")
    dropped = f"FROM new JOIN uses USING ({SHAPE}) WHERE problem IS NOT NULL"
    database.execute(f"INSERT INTO missing SELECT id, problem {dropped}")
    for table in ("new", "chosen"):
        database.execute(f"DELETE FROM {table} WHERE id IN (SELECT id FROM missing)")
    same = " AND ".join(f"new.{name} = uses.{name}" for name in Clip._fields)
    database.execute(
        f"""UPDATE new SET _group = uses._group || '/', _encoded = uses._encoded,
            _signature = sha256(concat(_signature, uses._group, uses._encoded)) FROM uses WHERE {same}"""
    )


def groups_in_words(database: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Return what happens to each group of equal clips, the largest group first."""
    found = database.execute(
        f"SELECT count(*) AS clips, {SHAPE}, what FROM all_shapes JOIN uses USING ({SHAPE}) GROUP BY ALL ORDER BY ALL DESC"
    )
    return [{"clips": clips, "each": str(Clip(*shape)), "what": what} for clips, *shape, what in found.fetchall()]


class Group(NamedTuple):
    """Clips of a split in one folder, which the trainer uses alike."""

    folder: str
    """Absolute path."""
    width: int
    height: int
    frames: int
    fps: float


class UsedClip(NamedTuple):
    """A clip of a split."""

    file: str
    caption: str


def write_trainer_files(
    database: duckdb.DuckDBPyConnection, dest: Storage, trainer: str, target: Target, splits: Iterable[str]
) -> None:
    """Write the configuration of each split, and `used.json`. `trainer`: name of the target. Raises OSError."""
    root, name = Path(str(dest.local)).resolve(), trainer.partition(":")[0]
    used = database.execute(
        f"""SELECT id, split, file, caption, status, frames, of_frames, to_s, what, exported_fps
        FROM done JOIN new USING (id) JOIN uses USING ({SHAPE}) ORDER BY _place"""
    ).fetchall()
    entries: list[dict[str, Any]] = []
    groups: dict[str, dict[Group, None]] = {split: {} for split in splits}
    clips: dict[str, list[UsedClip]] = {split: [] for split in splits}
    for id_, split, file, caption, status, frames, of_frames, to_s, what, fps in used:
        width, height = map(int, Path(file).parent.name.split("-")[0].split("x"))
        groups[split][Group(str(root / Path(file).parent), width, height, frames, fps)] = None
        clips[split].append(UsedClip(file, caption))
        times = {"frames": frames, "of_frames": of_frames, "from_s": 0.0, "to_s": to_s}
        entries.append({"id": id_, "status": status, "split": split, "file": file, **times, "reason": what})
    missing = database.execute("SELECT id, reason FROM missing ORDER BY id").fetchall()
    entries += [{"id": id_, "status": "dropped", "reason": reason} for id_, reason in missing]
    for split in splits:
        for ending, text in CONFIGURATIONS[name](root, split, [*groups[split]], clips[split], target).items():
            dest.write(f"{split}{ending}", text) if clips[split] else dest.delete(f"{split}{ending}")
    about = {"for": trainer, "rule": target.trainer.source, "counts": Counter(each["status"] for each in entries)}
    listed = ",\n".join(json.dumps(each, ensure_ascii=False) for each in entries)
    dest.write(USED, f'{json.dumps(about)[:-1]}, "clips": [\n{listed}\n]}}\n')


# Configurations: ending of a file -> its text.


def _toml(table: str, entries: Iterable[Mapping[str, Any]]) -> str:
    """Return an array of tables. Strings, numbers and lists of numbers are written as in JSON."""
    blocks = [
        "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in each.items()) for each in entries
    ]
    return "".join(f"\n[[{table}]]\n{block}\n" for block in blocks)


def _diffusion_pipe(
    root: Path, split: str, groups: Sequence[Group], clips: Sequence[UsedClip], target: Target
) -> dict[str, str]:
    # With several `size_buckets` in a directory, it can take that of another ratio.
    entries = ({"path": each.folder, "size_buckets": [[each.width, each.height, each.frames]]} for each in groups)
    return {".toml": f"# `dataset` of the training configuration.\n{_toml('directory', entries)}"}


def _musubi(root: Path, split: str, groups: Sequence[Group], clips: Sequence[UsedClip], target: Target) -> dict[str, str]:
    entries = (
        {
            "video_directory": each.folder,
            "cache_directory": f"{each.folder}/cache",
            "resolution": [each.width, each.height],
            "target_frames": [each.frames],
            "frame_extraction": "head",
            "source_fps": float(each.fps),
        }
        for each in groups
    )
    general = '[general]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
    return {".toml": f"# --dataset_config\n{general}{_toml('datasets', entries)}"}


def _simpletuner(root: Path, split: str, groups: Sequence[Group], clips: Sequence[UsedClip], target: Target) -> dict[str, str]:
    cache = f"{root}/cache"
    backends: list[dict[str, Any]] = [
        {
            "id": f"{split}-{Path(each.folder).name}",
            "type": "local",
            "dataset_type": "video",
            "instance_data_dir": each.folder,
            "caption_strategy": "textfile",
            # A caption of several lines would be several captions.
            "disable_multiline_split": True,
            "metadata_backend": "discovery",
            "crop": False,
            "resolution_type": "pixel",
            "resolution": min(each.width, each.height),
            "minimum_image_size": 0,
            "video": {"num_frames": each.frames, "min_frames": each.frames},
            "cache_dir_vae": f"{cache}/vae/{split}/{Path(each.folder).name}",
        }
        for each in groups
    ]
    texts = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": f"{cache}/text"}
    return {".json": json.dumps([*backends, texts], indent=1)}


def _finetrainers(root: Path, split: str, groups: Sequence[Group], clips: Sequence[UsedClip], target: Target) -> dict[str, str]:
    datasets = [
        {
            "data_root": each.folder,
            "dataset_type": "video",
            "video_resolution_buckets": [[each.frames, each.height, each.width]],
            "reshape_mode": "bicubic",
        }
        for each in groups
    ]
    return {".json": json.dumps({"datasets": datasets}, indent=1)}


def _diffsynth(root: Path, split: str, groups: Sequence[Group], clips: Sequence[UsedClip], target: Target) -> dict[str, str]:
    model, lines = target.model, (json.dumps({"video": clip.file, "prompt": clip.caption}) for clip in clips)
    options = {
        "dataset_base_path": shlex.quote(str(root)),
        "dataset_metadata_path": shlex.quote(f"{root}/{split}.jsonl"),
        "data_file_keys": "video",
        "num_frames": model.frames,
        "max_pixels": model.pixels,
        **({"frame_rate": model.fps} if model.frame_step == 8 else {}),
    }
    arguments = " ".join(f"--{name} {value}" for name, value in options.items())
    return {".jsonl": "".join(f"{line}\n" for line in lines), ".args": f"{arguments}\n"}


CONFIGURATIONS: Mapping[str, Callable[[Path, str, Sequence[Group], Sequence[UsedClip], Target], dict[str, str]]] = {
    "diffusion-pipe": _diffusion_pipe,
    "musubi": _musubi,
    "simpletuner": _simpletuner,
    "finetrainers": _finetrainers,
    "diffsynth": _diffsynth,
}
"""Name of a trainer -> function of the folder, the split and its groups and clips."""
