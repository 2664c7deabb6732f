"""Gallery: `OUT/index.html` with the clip, the prompt and the result of every shot.

Works offline; `vidgen watch` serves it while a run fills the folder. Its reader can review the clips, see outputs/reviews.py.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import lru_cache
from mimetypes import guess_type
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image as PILImage
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vidgen_ray.errors import UsageError, allowed_of, explain
from vidgen_ray.graph import STAGES, file_sizes
from vidgen_ray.outputs.manifest import REPLACED, check_has_manifest, manifest_batches, opened, score_files
from vidgen_ray.outputs.manifest_writer import failed_lines
from vidgen_ray.outputs.records import IMAGE_FILE, RECORD, SHOTS
from vidgen_ray.outputs.reviews import (
    Imported,
    Opinion,
    ReviewSession,
    clip_digest,
    parse_reviews,
    read_reviews,
    reviewable_clips,
)
from vidgen_ray.outputs.run_log import read_status
from vidgen_ray.outputs.storage import REQUESTS_AT_ONCE, Storage, no_results, storage_at
from vidgen_ray.report.shot_text import (
    DEFAULTS,
    dimensions_text,
    length_text,
    place_in_script,
    settings_text,
    short_names,
    value_text,
)
from vidgen_ray.script.expansion import CHOSEN
from vidgen_ray.shot import IMAGE_FIELDS, LORA_FIELDS, MATRIX, NESTED_FIELDS, Shot
from vidgen_ray.stages.instantid import sampled_frames
from vidgen_ray.system.quantities import amount_text, duration, money

_MAX_SHOTS = 10_000
"""Maximum number of shots in the gallery."""
_KEPT = (stage.debug_file for stage in STAGES if stage.debug_file and stage.debug_file.endswith(".png"))
_CHAIN = (*dict.fromkeys(_KEPT), IMAGE_FILE)
"""Images of a shot, in the order in which the stages make them. The first ones exist with `--keep stages`."""
FILE_AXES = frozenset((*IMAGE_FIELDS, "face_image", *LORA_FIELDS))
"""Fields of a `matrix` whose values are files."""
_NUMBERS = (pyarrow.types.is_floating, pyarrow.types.is_integer, pyarrow.types.is_boolean)
"""Types of scores that the gallery shows."""
_TEXTS = {"caption": "Caption of what is seen", "missing": "Not shown", "caption_error": "No caption"}
"""Texts of `vidgen caption` that the gallery shows -> their labels."""
_LABELS = ("character", "style", "scene")
"""Names in the metadata of a line that the gallery shows."""


class GalleryRows(NamedTuple):
    """Rows and counts of a gallery."""

    rows: list[dict[str, Any]]
    """Failures first, then in the order of the script. `order`: place in the script of a shot with a `matrix`."""
    counts: dict[str, int]
    """Status -> number of shots, including those that are not shown."""
    scores: list[str]
    """Names of the values in `scores` of a row: of `vidgen score`, those that differ between clips."""


NO_FACE = -1.0
"""`likeness` of a row if a face was looked for and none was found."""


def gallery_rows(storage: Storage, limit: int = _MAX_SHOTS) -> GalleryRows:
    """Return the rows of a gallery, at most `limit`. Reads one small file per finished shot. Raises OSError."""
    counts: Counter[str] = Counter(done=0, failed=0)
    chosen: list[dict[str, Any]] = []
    for batch in manifest_batches(storage):
        counts.update(batch.column("status").to_pylist())
        rows = [row for row in batch.to_pylist() if row["status"] != REPLACED]
        for row in rows:
            row["metadata"] = _object(row["metadata"])
        chosen = heapq.nsmallest(limit, [*chosen, *rows], key=lambda row: (row["status"] != "failed", place_in_script(row)))
    failed_fields = _failed_fields(storage, {row["id"] for row in chosen if row["status"] == "failed"})
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as reading:
        shown = list(reading.map(lambda row: _row(storage, row, failed_fields), chosen))
    for order, number in enumerate(sorted(range(len(shown)), key=lambda number: place_in_script(chosen[number]))):
        if "axes" in shown[number]:
            shown[number]["order"] = order
    _shorten_names(shown)
    _add_reviews(storage, chosen, shown)
    return GalleryRows(shown, dict(counts), _add_scores(storage, shown))


def _axes(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a line's `matrix` by field."""
    matrix = row["metadata"].get(MATRIX)
    return {name: value_text(value) for name, value in matrix.items()} if isinstance(matrix, dict) else {}


def _row(storage: Storage, row: Mapping[str, Any], failed_fields: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    shown = {name: row[name] for name in ("id", "status", "prompt", "image", "video", "hd_video", "seconds")}
    shown |= {name: str(row["metadata"][name]) for name in _LABELS if row["metadata"].get(name)}
    place = f"{row['script']}, line {row['line']}" if row["line"] else row["script"]
    shown |= {"place": place, "axes": _axes(row), "likeness": _likeness(row)}
    if shown["likeness"] == NO_FACE or (shown["likeness"] is not None and row["image_likeness"] is None):
        shown["no_face"] = True
    size = (row["hd_width"] or row["width"], row["hd_height"] or row["height"])
    shown["aspect"] = size[0] / size[1] if size[0] and size[1] else None
    about = {"Prompt": row["prompt"], "Script": place, "Scene": shown.get("scene"), "Caption": row["metadata"].get("caption")}
    if row["status"] == "failed":
        shown["failure"] = f"{row['failure_stage']}: {row['failure_message']}"
        details = _details(failed_fields.get(row["id"], {}))
    else:
        folder = str(PurePosixPath(row["image"]).parent) if row["image"] else ""
        details = _recorded_details(storage, folder, row["ended_at"]) if folder else {}
        length = length_text(row["duration_s"]) if row["duration_s"] else None
        worst = shown["likeness"]
        likeness = None if worst is None else "no face found" if worst == NO_FACE else f"likeness {worst:.2f}"
        cost = f"cost {amount_text(row['cost'])} {row['currency'] or ''}".rstrip() if row["cost"] else None
        shown["facts"] = [part for part in (length, dimensions_text(*size) if size[0] else None, likeness, cost) if part]
        about |= {"Length": length, "Likeness at rendering": likeness_text(row)}
        about["Rendered in"] = duration(row["seconds"]) if row["seconds"] is not None else None
        about["Cost"] = money(row["cost"], row["currency"]) if row["cost"] else None
    about = {name: text for name, text in about.items() if text}
    shown |= details | {"settings": [*about.items(), *details.get("settings", ())]}
    return {name: value for name, value in shown.items() if value not in (None, [], {})}


def _shorten_names(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the paths of LoRAs and of other files in filters and axes by short names."""
    texts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        texts["loras"].update(row.get("loras", ()))
        for name in FILE_AXES & row.get("axes", {}).keys():
            texts[name].add(row["axes"][name])
    names = {name: short_names(each) for name, each in texts.items()}
    for row in rows:
        if "loras" in row:
            row["loras"] = [names["loras"][path] for path in row["loras"]]
        if "axes" in row:
            row["axes"] |= {name: names[name][row["axes"][name]] for name in FILE_AXES & row["axes"].keys()}


def _add_reviews(storage: Storage, rows: Sequence[Mapping[str, Any]], shown: Sequence[dict[str, Any]]) -> None:
    """Add `clip`, the digest by which a clip is reviewed, `review`, and `siblings` to the shown rows.

    `siblings` is a number that the shots of a line have which differ only in their seed, as in `dataset/tables.py`.
    """
    reviews, groups = read_reviews(storage), defaultdict[str, list[dict[str, Any]]](list)
    for row, each in zip(rows, shown, strict=True):
        if row["status"] != "done" or (digest := clip_digest(row)) is None:
            continue
        each["clip"] = digest
        if (review := reviews.get(digest)) is not None:
            each["review"] = review.model_dump(mode="json", exclude={"clip_sha256", "id"})
        parts = (row["metadata"].get(name) for name in (MATRIX, CHOSEN))
        factors = {name: value for part in parts if isinstance(part, dict) for name, value in part.items() if name != "seed"}
        groups[json.dumps([row["script"], row["line"] or row["id"], factors])].append(each)
    for number, group in enumerate(group for group in groups.values() if len(group) > 1):
        for each in group:
            each["siblings"] = number


def _add_scores(storage: Storage, shown: Sequence[dict[str, Any]]) -> list[str]:
    """Add `scores` to the rows of measured clips. Return the names of the values. A damaged file has none."""
    scores: dict[str, dict[str, float]] = {row["clip"]: {} for row in shown if "clip" in row}
    said = defaultdict[str, dict[str, str | None]](dict)
    values = defaultdict[str, set[float]](set)
    for path in (path for paths in score_files(storage).values() for path in paths):
        with suppress(OSError, pyarrow.ArrowException, KeyError), opened(storage, path) as file:
            table = pyarrow.parquet.read_table(file)
            numbers = [field.name for field in table.schema if any(is_number(field.type) for is_number in _NUMBERS)]
            texts = [name for name in _TEXTS if name in table.schema.names]
            for row in table.select(["clip_sha256", *texts, *numbers]).to_pylist():
                if (known := scores.get(clip := row.pop("clip_sha256"))) is not None:
                    said[clip] |= {name: row.pop(name) for name in texts}
                    # JSON has no infinite numbers.
                    found = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
                    known |= {name: float(f"{value:.4g}") for name, value in found.items()}
    for each in scores.values():
        for name, value in each.items():
            values[name].add(value)
    names = sorted(name for name, each in values.items() if len(each) > 1)
    for row in shown:
        if own := scores.get(row.get("clip", "")):
            row["scores"] = [own.get(name) for name in names]
        if texts_of := {name: text for name, text in said[row.get("clip", "")].items() if text}:
            row |= texts_of
            row["settings"] = [*((_TEXTS[name], text) for name, text in texts_of.items()), *row.get("settings", ())]
    return names


def _likeness(row: Mapping[str, Any]) -> float | None:
    """Return the worst likeness of the clip, otherwise that of the image. `None` without a face, -1 if none was found."""
    if row["frames_without_face"] is None:
        return None
    worst = row["image_likeness"] if row["num_frames"] is None else row["clip_likeness_worst"]
    return NO_FACE if worst is None else round(worst, 3)


def likeness_text(row: Mapping[str, Any]) -> str | None:
    """Return `face 0.62, clip 0.58, worst 0.51; 1 of 5 frames without a face`. `None` for a shot without a face."""
    missing, image, mean = (row[name] for name in ("frames_without_face", "image_likeness", "clip_likeness_mean"))
    if missing is None:
        return None
    text = "no face found in the image" if image is None else f"face {image:.2f}"
    if row["num_frames"] is None:
        return text
    if mean is None:
        return f"{text}, no face found in the clip"
    text += f", clip {mean:.2f}, worst {row['clip_likeness_worst']:.2f}"
    return f"{text}; {missing} of {len(sampled_frames(row['num_frames']))} frames without a face" if missing else text


def _details(fields: Mapping[str, Any], record: Mapping[str, Any] = {}, folder: str = "") -> dict[str, Any]:
    """Return what the fields and the record of a shot add to its row.

    `chain`: images of its stages. `fields`: those that differ from the defaults, for a script line. `loras`: their paths.
    """
    chain = [f"{folder}/{name}" for name in _CHAIN if name in (record.get("files") or {})]
    own = {name: value for name, value in fields.items() if value != DEFAULTS.get(name) and value not in (None, [], {})}
    own |= {name: {key: each for key, each in own[name].items() if each is not None} for name in NESTED_FIELDS if name in own}
    details = {"chain": chain, "fields": own}
    try:
        shot = Shot.model_validate(fields)
    except ValidationError:  # a rejected line
        return details
    paths = [lora.path for lora in shot.all_loras]
    settings = settings_text(shot, list(file_sizes(shot).values())[-1], short_names(paths))
    return {**details, "loras": paths, "settings": list(settings)}


@lru_cache(_MAX_SHOTS)
def _recorded_details(storage: Storage, folder: str, ended_at: datetime) -> dict[str, Any]:
    """Read shot.json. `ended_at` of the row tells the records of a shot apart, for `vidgen watch`."""
    record = _object(storage.read(f"{folder}/{RECORD}") or b"{}")
    return _details(record.get("shot") or {}, record, folder)


def _failed_fields(storage: Storage, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of failed lines by their id."""
    fields = {}
    for text in failed_lines(storage, ids) if ids else ():
        line = _object(text)
        fields[line.pop("failure")["id"]] = line
    return fields


def _object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Anything else gives an empty one."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}


_FOLDER = "thumbnails"
_SIDE_PX = 320
"""Longest side."""
_QUALITY = 75


def add_thumbnails(root: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Make the missing thumbnails of the rows and set their `thumbnail`, a path relative to `root`.

    An image that cannot be read has no thumbnail.
    """
    missing = []
    for row in rows:
        if "image" in row:
            row["thumbnail"] = _place(row)
            if not _is_current(root, row):
                missing.append(row)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, is_made in zip(missing, pool.map(lambda row: _make(root, row), missing), strict=True):
            if not is_made:
                del row["thumbnail"]


def _place(row: Mapping[str, Any]) -> str:
    shot = PurePosixPath(row["image"]).parent
    return f"{_FOLDER}/{shot.parent.name}/{shot.name}.webp"


def _is_current(root: Path, row: Mapping[str, Any]) -> bool:
    with suppress(OSError):
        return os.stat(root / row["thumbnail"]).st_mtime >= os.stat(root / row["image"]).st_mtime
    return False


def _make(root: Path, row: Mapping[str, Any]) -> bool:
    try:
        with PILImage.open(root / row["image"]) as image:
            image.thumbnail((_SIDE_PX, _SIDE_PX))
            target = root / row["thumbnail"]
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced at once, but not flushed to disk: a lost thumbnail is made again.
            unfinished = target.with_suffix(".unfinished")
            image.convert("RGB").save(unfinished, "WEBP", quality=_QUALITY)
            unfinished.replace(target)
    except OSError:
        return False
    return True


_FILE = "index.html"
MARK = b'name="generator" content="vidgen"'
"""In every gallery."""
FILM_SUFFIX = ".mp4"


def check_no_other_page(out: str | Path) -> None:
    """Raise UsageError if the folder has an `index.html` that vidgen has not written."""
    storage = storage_at(out)
    page = storage.read(_FILE)
    if page is not None and MARK not in page:
        raise UsageError(f"{storage.place(_FILE)}: exists and is not from vidgen; move it, or choose another output folder")


def write_gallery(out: str | Path) -> Path | str:
    """Write the gallery, and thumbnails if the folder is on a disk. Return its path or URL. Raises OSError."""
    storage = storage_at(out)
    storage.write(_FILE, page_of(gallery_data(storage)))
    return storage.place(_FILE)


def update_gallery(out: str | Path) -> None:
    """Write the gallery again if the folder has one. Raises OSError."""
    page = storage_at(out).read(_FILE)
    if page is not None and MARK in page:
        write_gallery(out)


def gallery_data(storage: Storage) -> dict[str, Any]:
    """Return what the page shows, as JSON data. Makes the missing thumbnails. Raises OSError."""
    rows, counts, scores = gallery_rows(storage)
    if storage.local is not None:
        add_thumbnails(storage.local, rows)
    total = sum(counts.values()) - counts.get(REPLACED, 0)
    return {"rows": rows, "counts": counts, "total": total, "scores": scores, "films": film_names(storage)}


def film_names(storage: Storage) -> list[str]:
    """Return the names of the films that are directly in the folder."""
    return sorted(name for name in storage.files("") if name.endswith(FILM_SUFFIX) and not name.startswith("."))


LOOK = "look/look.css", "look/clips.js"
"""Stylesheet and script that the gallery shares with the server's page."""


def page_of(data: Mapping[str, Any]) -> str:
    """Return the page that shows the data, one HTML file with style and script."""
    environment = Environment(loader=PackageLoader("vidgen_ray.report", "."), autoescape=True)
    # The axes of a matrix keep their order.
    environment.policies["json.dumps_kwargs"] = {}
    style, shared, own = (
        Markup(environment.loader.get_source(environment, name)[0])  # type: ignore[union-attr]  # own files
        for name in (*LOOK, "gallery.js")
    )
    return environment.get_template("gallery.html").render(data=data, style=style, script=shared + own)


PAGE_REFRESH_S, STORE_REFRESH_S = 3, 15
"""Seconds between two requests of an open page for new rows, from a disk and from an object store."""
SHOWN = (SHOTS, _FOLDER)
"""Folders whose files are served, besides films."""
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
MAX_REVIEW_BYTES = 64 * 1024


def gallery_app(out: str | Path, reviewer: str | None = None) -> Starlette:
    """Return an application that serves the gallery of a folder and the status of its run, and stores reviews.

    `reviewer`: the person who reviews. Raises SetupError if the folder does not exist, and OSError if an object store does not
    answer.
    """
    storage = storage_at(out)
    if storage.local is not None and not storage.local.is_dir():
        raise no_results(storage)
    root = storage.local and storage.local.resolve()
    refresh_s = PAGE_REFRESH_S if root else STORE_REFRESH_S
    session, clips = ReviewSession(storage, reviewer), dict[str, str]()

    def data() -> dict[str, Any]:
        status = read_status(storage)
        run = None if status is None or status.ended else status.model_dump(mode="json")
        return {**gallery_data(storage), "run": run, "refresh_s": refresh_s}

    def page(request: Request) -> Response:
        return HTMLResponse(page_of(data()), headers=_HEADERS)

    def rows(request: Request) -> Response:
        return JSONResponse(data(), headers=_HEADERS)

    def store(opinion: Opinion) -> Response:
        try:
            if opinion.clip_sha256 not in clips:
                clips.update(reviewable_clips(storage))
            if (shot_id := clips.get(opinion.clip_sha256)) is None:
                return Response("the folder has no such clip, it may have been rendered again", 404)
            session.add(opinion, shot_id)
        except OSError as error:
            return Response(f"the folder cannot be written: {error.strerror or error}", 503)
        return Response(status_code=204)

    async def add_review(request: Request) -> Response:
        if not _is_from_own_page(request):
            return Response("reviews are accepted from the page of vidgen watch only, opened on this machine", 403)
        body = b""
        async for part in request.stream():
            if len(body := body + part) > MAX_REVIEW_BYTES:
                return Response(f"must have at most {MAX_REVIEW_BYTES} bytes", 413)
        try:
            opinion = Opinion.model_validate_json(body)
        except ValidationError as error:
            field, got, allowed = explain(error.errors(include_url=False)[0], Opinion.model_fields)
            return Response(f"{field or 'review'}: got {got}, {allowed}", 422)
        return await asyncio.to_thread(store, opinion)

    def file(request: Request) -> Response:
        path = PurePosixPath(request.path_params["path"])
        is_shown = ".." not in path.parts and (path.parts[0] in SHOWN or str(path) in film_names(storage))
        with ExitStack() as stack:
            copy = None
            if is_shown:
                with suppress(FileNotFoundError):
                    copy = stack.enter_context(storage.local_copy(str(path)))
            if copy is None or (root and not copy.resolve().is_relative_to(root)):
                return Response("Not found", 404)
            end = BackgroundTask(stack.pop_all().close)
            return FileResponse(copy, headers=_HEADERS, media_type=guess_type(path.name)[0], background=end)

    read_status(storage)
    reviews = Route("/reviews", add_review, methods=["POST"])
    return Starlette(routes=[Route("/", page), Route("/rows.json", rows), reviews, Route("/{path:path}", file)])


def _is_from_own_page(request: Request) -> bool:
    """Return whether no page of another site sends the request. Any page in a browser can send some to this machine."""
    headers = request.headers
    host, origin = headers.get("host", ""), headers.get("origin")
    return (
        headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        # Another name may be that of a site whose address was changed to this machine's.
        and LOCAL_HOST.fullmatch(host) is not None
        and origin in (None, f"http://{host}", f"https://{host}")
        and headers.get("sec-fetch-site", "same-origin") == "same-origin"
    )


def import_reviews(out: str | Path, path: Path, reviewer: str | None) -> Imported:
    """Store the reviews of a file that the page has saved, and update the gallery of the folder.

    `reviewer`: the person who has made those without a name. Raises UsageError if it is not such a file, SetupError if the
    folder has no clips, and OSError.
    """
    storage = storage_at(out)
    check_has_manifest(storage)
    try:
        reviews = parse_reviews(path.read_bytes(), storage)
    except FileNotFoundError:
        raise UsageError(f"FILE: got {str(path)!r}, must be a file that the gallery has saved") from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"])) or "the file"
        raise UsageError(f"{path}, {place}: {allowed_of(detail)}; must be a file that the gallery has saved") from None
    except ValueError as error:
        raise UsageError(f"{path}: is not JSON ({error}); must be a file that the gallery has saved") from None
    imported = ReviewSession(storage, reviewer).add_all(reviews)
    update_gallery(out)
    return imported
