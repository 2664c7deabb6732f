"""Data sets for LoRA trainers: the group of each clip, the configuration of the trainer, and what it does with each clip."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb

from vidgen_ray.dataset.export_rows import ENCODED
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.trainers import SourceClip, TrainerTarget, fit_cost, parse_target, use_text

SET_PATHS = "set_paths.py"
"""Script in an export that sets the paths of the configuration after the folder was moved. It needs only Python."""
SHAPE = ", ".join(SourceClip._fields)
USES = f"""CREATE TABLE uses (num_frames BIGINT, fps DOUBLE, width BIGINT, height BIGINT, problem TEXT, what TEXT,
    _encoded {ENCODED}, _group TEXT, status TEXT, frames BIGINT, of_frames BIGINT, to_s DOUBLE, bucket BIGINT[])"""


def apply_rules(database: duckdb.DuckDBPyConnection, trainer: str, *, fit: bool) -> None:
    """Move clips of `new` that the trainer would drop to `missing`, and set `_group` and `_encoded` of the others.

    Creates the tables `uses`, with what happens to each shape of clips, and `shapes`, with the shape of each clip.
    """
    target = parse_target(trainer)
    database.execute(f"{USES}; CREATE TABLE shapes AS SELECT id, {SHAPE} FROM new")
    for shape in database.execute(f"SELECT DISTINCT {SHAPE} FROM shapes").fetchall():
        clip = SourceClip(*shape)
        encoded = target.fitted(clip) if fit else None
        kept = encoded or clip
        use, what = target.use(kept), use_text(kept, target)
        what = f"{what}; {fit_cost(clip, encoded)}" if encoded else what
        group = f"{use.width}x{use.height}-{use.frames}f-{kept.fps:g}fps/"
        to_s = round(use.frames / target.model.fps * use.speed, 6)
        row = [*clip, use.problem, what, encoded and encoded._asdict(), group, use.status, use.frames, use.seen, to_s]
        database.execute(f"INSERT INTO uses VALUES ({', '.join('?' * 13)})", [*row, [use.width, use.height, use.frames]])
    database.execute(f"INSERT INTO missing SELECT id, problem FROM shapes JOIN uses USING ({SHAPE}) WHERE problem IS NOT NULL")
    for table in ("new", "chosen"):
        database.execute(f"DELETE FROM {table} WHERE id IN (SELECT id FROM missing)")
    same = " AND ".join(f"new.{name} = uses.{name}" for name in SourceClip._fields)
    changed = "_signature = sha256(concat(_signature, uses._group, uses._encoded))"
    database.execute(f"UPDATE new SET _group = uses._group, _encoded = uses._encoded, {changed} FROM uses WHERE {same}")


def groups_in_words(database: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Return what happens to each group of equal clips, the largest group first."""
    grouped = f"SELECT count(*), {SHAPE}, what FROM shapes JOIN uses USING ({SHAPE}) GROUP BY ALL ORDER BY ALL DESC"
    found = database.execute(grouped).fetchall()
    return [{"clips": clips, "each": str(SourceClip(*shape)), "what": what} for clips, *shape, what in found]


def write_trainer_files(database: duckdb.DuckDBPyConnection, dest: Storage, trainer: str, splits: Iterable[str]) -> None:
    """Write the configuration of each split, and `used.json`. Raises OSError."""
    root, target = Path(str(dest.local)).resolve(), parse_target(trainer)
    clips = database.sql(f"""SELECT id, status, split, file, frames, of_frames, 0::DOUBLE AS from_s, to_s, what AS reason,
        caption, bucket, exported_fps AS fps FROM done JOIN new USING (id) JOIN uses USING ({SHAPE}) ORDER BY _place""")
    rows = clips.to_arrow_table().to_pylist()
    for split in splits:
        listed = [row for row in rows if row["split"] == split]
        for ending, text in _configuration(trainer.partition(":")[0], root, split, listed, target).items():
            dest.write(f"{split}{ending}", text) if listed else dest.delete(f"{split}{ending}")
    hidden = ("caption", "bucket", "fps")
    entries = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
    missing = database.execute("SELECT id, reason FROM missing ORDER BY id").fetchall()
    entries += [{"id": id_, "status": "dropped", "reason": reason} for id_, reason in missing]
    about = {
        "for": trainer,
        "rule": target.trainer.source,
        "folder": str(root),
        "counts": Counter(each["status"] for each in entries),
    }
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in entries)
    dest.write(SET_PATHS, resources.files("vidgen_ray.dataset").joinpath(SET_PATHS).read_bytes())
    dest.write("used.json", f'{json.dumps(about, ensure_ascii=False)[:-1]}, "clips": [\n{lines}\n]}}\n')


def _toml(table: str, entries: Iterable[Mapping[str, Any]]) -> str:
    """Return an array of tables. Strings, numbers and lists of numbers are written as in JSON."""
    lines = ([f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in each.items()] for each in entries)
    return "".join(f"\n[[{table}]]\n{''.join(block)}" for block in lines)


def _configuration(
    trainer: str, root: Path, split: str, clips: Sequence[Mapping[str, Any]], target: TrainerTarget
) -> dict[str, str]:
    """Return ending of a file -> its text. `clips`: those of the split."""
    groups = {str(root / Path(clip["file"]).parent): (*clip["bucket"], clip["fps"]) for clip in clips}
    each = [(folder, *group) for folder, group in groups.items()]
    if trainer == "diffusion-pipe":
        # With several `size_buckets` in a directory, it can take that of another ratio.
        folders: Iterable[dict[str, Any]] = ({"path": folder, "size_buckets": [[*bucket]]} for folder, *bucket, _ in each)
        return {".toml": f"# `dataset` of the training configuration.\n{_toml('directory', folders)}"}
    if trainer == "musubi":
        folders = (
            {
                "video_directory": folder,
                "cache_directory": f"{folder}/cache",
                "resolution": [width, height],
                "target_frames": [frames],
                "source_fps": float(fps),
            }
            for folder, width, height, frames, fps in each
        )
        general = '[general]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
        return {".toml": f"# --dataset_config\n{general}{_toml('datasets', folders)}"}
    if trainer == "simpletuner":
        backends: list[dict[str, Any]] = [
            {
                "id": f"{split}-{Path(folder).name}",
                "type": "local",
                "dataset_type": "video",
                "instance_data_dir": folder,
                "caption_strategy": "textfile",
                # A caption of several lines would be several captions.
                "disable_multiline_split": True,
                "metadata_backend": "discovery",
                "crop": False,
                "resolution_type": "pixel",
                "resolution": min(width, height),
                "minimum_image_size": 0,
                "video": {"num_frames": frames, "min_frames": frames},
                "cache_dir_vae": f"{root}/cache/vae/{split}/{Path(folder).name}",
            }
            for folder, width, height, frames, _ in each
        ]
        texts = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True}
        return {".json": json.dumps([*backends, {**texts, "cache_dir": f"{root}/cache/text"}], indent=1, ensure_ascii=False)}
    if trainer == "finetrainers":
        datasets = [
            {"data_root": folder, "dataset_type": "video", "video_resolution_buckets": [[frames, height, width]]}
            for folder, width, height, frames, _ in each
        ]
        return {".json": json.dumps({"datasets": datasets}, indent=1, ensure_ascii=False)}
    options = {
        "dataset_base_path": shlex.quote(str(root)),
        "dataset_metadata_path": shlex.quote(f"{root}/{split}.jsonl"),
        "data_file_keys": "video",
        "num_frames": target.model.frames,
        "max_pixels": target.model.pixels,
        **({"frame_rate": target.model.fps} if target.model.frame_step == 8 else {}),
    }
    lines = "".join(json.dumps({"video": clip["file"], "prompt": clip["caption"]}) + "\n" for clip in clips)
    return {".jsonl": lines, ".args": " ".join(f"--{name} {value}" for name, value in options.items()) + "\n"}
