"""Read a folder as a script: captioned images, or the Parquet files of a data set."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

from vidgen_ray.errors import FieldError, ScriptError
from vidgen_ray.script.columns import check_columns, nest_metadata, normal_name
from vidgen_ray.script.lines import NO_HEADER, Header, Line, Lines, UnreadableLine, file_error
from vidgen_ray.script.parquet_format import CAPTIONS, read_parquet
from vidgen_ray.script.text_formats import read_jsonl

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA_FILE = "metadata.jsonl"
"""File of a Hugging Face image folder: a `file_name` and a caption per line."""


def read_folder(path: Path) -> tuple[Header, Lines]:
    """Return a line for each row of the Parquet files, otherwise for each image of the folder, in the order of their names.

    The caption of NAME.png is in NAME.txt, or in metadata.jsonl. Raises ScriptError for a folder without either.
    """
    if tables := sorted(path.rglob("*.parquet")):
        return NO_HEADER, _numbered(chain.from_iterable(read_parquet(table)[1] for table in tables))
    if (path / METADATA_FILE).is_file():
        return NO_HEADER, _listed_images(path)
    images = sorted(each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise file_error(
            path, "a folder without scripts", "must have .parquet files, or images with a caption each in NAME.txt"
        )
    return NO_HEADER, _captioned_images(path, images)


def _numbered(lines: Any) -> Lines:
    """Number rows across files."""
    for number, (_, line) in enumerate(lines, start=1):
        if isinstance(line, Line):
            yield number, Line(number, line.fields, line.strict)
        else:
            yield number, line


def _captioned_images(path: Path, images: list[Path]) -> Lines:
    for number, image in enumerate(images, start=1):
        caption = image.with_suffix(".txt")
        try:
            prompt = " ".join(caption.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            error_of_line = FieldError(
                path.name, number, "prompt", f"no caption for {image.name}", f"must be in {caption.name} ({why})"
            )
            yield number, UnreadableLine(image.name, error_of_line)
            continue
        yield number, Line(number, {"id": _id_of(image.stem), "prompt": prompt, "image": image.name}, strict=True)


def _listed_images(path: Path) -> Lines:
    _, lines = read_jsonl(path / METADATA_FILE)
    for number, line in lines:
        if not isinstance(line, Line):
            yield number, line
            continue
        fields = {normal_name(name): value for name, value in line.fields.items() if name not in ("file_name", *CAPTIONS)}
        try:
            check_columns(path / METADATA_FILE, list(fields), with_prompt=False)
        except ScriptError as error:
            yield (
                number,
                UnreadableLine(
                    str(line.fields), FieldError(METADATA_FILE, number, None, error.errors[0].got, error.errors[0].allowed)
                ),
            )
            continue
        image = line.fields.get("file_name")
        caption = next((line.fields[name] for name in CAPTIONS if name in line.fields), None)
        given = {"id": _id_of(Path(str(image)).stem), "image": image, "prompt": caption}
        fields = {**{name: value for name, value in given.items() if value is not None}, **fields}
        yield number, Line(number, nest_metadata(fields), strict=True)


def _id_of(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:120] or "image"
