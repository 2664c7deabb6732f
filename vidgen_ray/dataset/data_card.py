"""Data card of an export: `README.md` as the Hugging Face Hub reads it, `croissant.json`, histograms and a grid of samples.

It is computed with DuckDB from the rows and the state of the export, so memory stays flat. The same rows give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import mimetypes
import posixpath
import re
import shlex
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Any
from urllib.parse import quote

import duckdb
import pyarrow.parquet
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image as PILImage

from vidgen_ray.dataset.scorers import WEIGHTS
from vidgen_ray.dataset.tables import (
    CAPTION,
    DIGEST,
    MEMORY_LIMIT,
    NUMBERS,
    OWN_COLUMNS,
    REVIEWS_SCHEMA,
    SAME_PROMPT,
    builtin_scores,
    columns_of,
    quoted,
)
from vidgen_ray.errors import MediaError
from vidgen_ray.licences import UsedWeights
from vidgen_ray.media.decode import open_foreign_video
from vidgen_ray.media.images import cover_crop, read_image
from vidgen_ray.outputs.manifest import LIKENESS_COLUMNS, SCHEMA, ManifestRow, opened, parquet_files
from vidgen_ray.outputs.manifest_writer import SCRIPTS
from vidgen_ray.outputs.new_seeds import SEEDS_FILE, read_seeds
from vidgen_ray.outputs.records import RECORD, SCORES
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.provenance.record import ProvenanceRecord
from vidgen_ray.report.shot_text import short_names
from vidgen_ray.safety import Consent
from vidgen_ray.script.lines import PATH_FIELDS, parse_field
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Image
from vidgen_ray.system.quantities import count, duration, size

DEMO_CAPTIONER = "demo captioner"
"""Model of captions that needs no server."""
ROWS, STATE = ".vidgen/rows.parquet", ".vidgen/export.json"
FOLDER, GRID = "card", "card/samples.webp"
SAMPLES, GRID_COLUMNS, TILE_WIDTH_PX, _GAP_PX = 12, 4, 240, 4
BINS = 24
TABLE_ROWS, _LISTED, TEXT_LENGTH = 50, 20, 300
"""Rows of a table, names in a line, and characters of a text. The rest is counted, or cut."""
_TAGS = ("ai-generated", "synthetic", "vidgen-ray")
HUB_LICENCES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0")
"""Identifiers of the hub that are the SPDX identifier in small letters."""
HUB_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Folder of a split -> the name under which `datasets` loads it without a card. The card gives it the same one."""
HUB_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
EXPORT_COLUMNS = re.compile("split|file|sample|caption|signature|content|exported_.*")
"""Columns of the rows that `clips` does not have."""
DESCRIPTIONS = {
    **{
        name: field.description
        for name, field in (*Shot.model_fields.items(), *ManifestRow.model_fields.items())
        if field.description
    },
    **{f"consent_{name}": field.description for name, field in Consent.model_fields.items()},
    "caption": "Text for training.",
    "file_name": "File of the clip.",
    "split": "Split of the data set.",
    "width": "Width in pixels.",
    "height": "Height in pixels.",
    "num_frames": "Number of frames.",
    "fps": "Frames per second.",
    "bytes": "Size in bytes.",
    "sha256": "Digest of the file before it was signed.",
    "ai_generated": "Always true.",
    "script": "File name of the script.",
    "factors": "Values that differ between the shots of its line besides the seed, as JSON.",
    "verdict": "accept, from a review. Null without one.",
    "stars": "1 to 5, from a review.",
}


def _patterns(state: Mapping[str, Any], split: str) -> dict[str, str]:
    """Return name -> pattern of the files of a split. The first ones have the columns."""
    folder = f"{split}/*" if state["trainer"] else split
    media = f"{folder}/*.{'png' if state['files'] == 'image' else 'mp4'}"
    patterns = {
        "videofolder": {"metadata": f"{split}/metadata.parquet", "files": media},
        "webdataset": {"shards": f"{split}-*.tar"},
        "parquet": {"shards": f"{split}-*.parquet"},
        "lance": {"tables": f"{split}.lance/**"},
        "captions": {"captions": f"{folder}/*.txt", "files": media},
    }
    return patterns[state["format"]]


def write_card(dest: Storage, source: Storage) -> None:
    """Write the card of the export `dest`, which has `ROWS` and `STATE`. `source`: the output folder. Raises OSError."""
    state = json.loads(dest.read(STATE) or b"")
    with (
        tempfile.TemporaryDirectory(prefix="vidgen-card-") as folder,
        dest.local_copy(ROWS) as rows,
        # Sums of several threads would differ in the last bit.
        duckdb.connect(Path(folder, "card.duckdb"), config={"memory_limit": MEMORY_LIMIT, "threads": 1}) as database,
    ):
        database.read_parquet(str(rows)).create_view("clips")
        files = _files(database, state, source)
    for name in dest.files(FOLDER):
        if f"{FOLDER}/{name}" not in files:
            dest.delete(f"{FOLDER}/{name}")
    for path, content in files.items():
        dest.write(path, content)


def _files(database: duckdb.DuckDBPyConnection, state: Mapping[str, Any], source: Storage) -> dict[str, str | bytes]:
    """Return the files of the card by path."""
    (totals,) = _dicts(database, TOTALS)
    splits = sorted(_dicts(database, SPLITS), key=lambda row: [*state["splits"]].index(row["Split"]))
    names = _person_names(database)
    used, captioned = _used_weights(database, source), _captioned(database, source)
    meanings = _meanings(source)
    known = {*SCHEMA.names, *REVIEWS_SCHEMA.names, *OWN_COLUMNS} - {*LIKENESS_COLUMNS}
    drawn = [
        _histogram(database, name, meanings)
        for name, kind in columns_of(database, "clips").items()
        if NUMBERS.fullmatch(kind) and name not in known and not EXPORT_COLUMNS.fullmatch(name)
    ]
    samples, grid = _samples(database, source, names)
    facts = {
        "title": _clean(", ".join(posixpath.splitext(script)[0] for script in totals["scripts"])) or "Clips",
        "state": state,
        "noun": "image" if state["files"] == "image" else "clip",
        "totals": totals,
        "splits": splits,
        # All clips may have been removed.
        "split_names": [row["Split"] for row in splits] or [*state["splits"]],
        "samples": samples,
        "histograms": [each for each in drawn if each is not None],
        "models": used,
        "licences": sorted({each.licence or "unknown" for each in used} or {name or "unknown" for name in totals["licences"]}),
        "meanings": meanings,
        "captioned": captioned,
        **_reproduction(totals, state, source, captioned),
        **_tables(database, names),
    }
    return {
        "README.md": TEMPLATES.get_template("data_card.jinja").render(facts, front_matter=Markup(_front_matter(facts))),
        "croissant.json": _croissant(facts),
        **({GRID: grid} if samples else {}),
        **{f"{FOLDER}/{each['file']}": each["svg"] for each in facts["histograms"] if each["svg"]},
    }


def _dicts(database: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = database.sql(sql).to_arrow_table().to_pylist()
    return rows


TOTALS = f"""
SELECT
    count(*) AS clips, sum(exported_duration_s) AS seconds, sum(exported_bytes)::BIGINT AS bytes,
    count(DISTINCT person) AS persons, count(DISTINCT {SAME_PROMPT}) AS prompts,
    count(*) FILTER (start_image IS NOT NULL OR continue_from IS NOT NULL) AS from_images, sum(gpu_seconds) / 3600 AS gpu_hours,
    coalesce(list_sort(list(DISTINCT script)), []) AS scripts,
    coalesce(list_sort(list_distinct(flatten(list(licences)))), []) AS licences, max(ended_at) AS ended_at,
    count(reviewed_at) AS reviewed, count(*) FILTER (verdict = 'accept') AS accepted
FROM clips"""
COUNTED = 'count(*) AS "Clips", sum(exported_duration_s) AS "Length", sum(exported_bytes)::BIGINT AS "Size"'
SPLITS = f"""
SELECT split AS "Split", {COUNTED}, nullif(count(DISTINCT person), 0) AS "Persons", count(DISTINCT {SAME_PROMPT}) AS "Prompts"
FROM clips GROUP BY split"""


def _tables(database: duckdb.DuckDBPyConnection, names: Mapping[str, str]) -> dict[str, Any]:
    """Return tables of counts, costs and consents."""
    factors = defaultdict[str, list[dict[str, Any]]](list)
    values = f"""SELECT each.key, each.value->>'$' AS "Value", {COUNTED} FROM clips, json_each(factors) each
    GROUP BY ALL ORDER BY each.key, "Clips" DESC, "Value" """
    for row in _dicts(database, values):
        factors[row.pop("key")].append(row)
    tables = {
        "sizes": f"""SELECT exported_width || ' × ' || exported_height AS "Pixels",
            exported_fps AS "Frames per second", exported_num_frames AS "Frames", {COUNTED} FROM clips
            GROUP BY ALL ORDER BY "Clips" DESC, 1, 2, 3""",
        "people": f"""SELECT person AS "Person", {COUNTED}, consent.subject AS "Subject", consent.basis AS "Basis",
            consent.reference AS "Reference" FROM clips WHERE person IS NOT NULL GROUP BY ALL ORDER BY 2 DESC, 1, 5, 6, 7""",
        "stars": """SELECT stars AS "Stars", count(*) AS "Clips" FROM clips WHERE stars > 0 GROUP BY ALL ORDER BY 1""",
        "uses": """SELECT coalesce(commercial_use, 'unknown') AS "Commercial use", count(*) AS "Clips" FROM clips GROUP BY ALL
            ORDER BY 1""",
        "costs": """SELECT currency AS "Currency", sum(cost) AS "Total", avg(cost) AS "Per clip",
            sum(cost) / nullif(count(*) FILTER (verdict = 'accept'), 0) AS "Per accepted clip"
            FROM clips WHERE cost IS NOT NULL GROUP BY ALL ORDER BY 1""",
    }
    found = {name: _dicts(database, sql) for name, sql in tables.items()}
    for row in found["people"]:
        row["Person"] = names[row["Person"]]
    return {**found, "factors": factors}


def _person_names(database: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Return the name to show of each person. Face photos are shown without their folders."""
    persons = [row["person"] for row in _dicts(database, "SELECT DISTINCT person FROM clips WHERE person IS NOT NULL")]
    photos = short_names({photo for person in persons for photo in person.split("+")})
    return {person: "+".join(photos[photo] for photo in person.split("+")) for person in persons}


def _used_weights(database: duckdb.DuckDBPyConnection, source: Storage) -> list[UsedWeights]:
    """Return the weights behind the clips, from the record of one clip of each combination of models."""
    found = _dicts(
        database,
        """SELECT min(clip) AS clip FROM clips GROUP BY run, licences, commercial_use, mode, image_model, identity, pose,
        len(face_image) > 0, use_hunyuan_style, style_model, generate_video, video_model, interpolation > 1, upscale_video,
        scale, upscaler, list_transform(lora, lambda each: each.path), list_transform(video_lora, lambda each: each.path),
        continue_from IS NULL ORDER BY 1""",
    )
    used = dict[str, UsedWeights]()
    for content in source.read_each(f"{posixpath.dirname(row['clip'])}/{RECORD}" for row in found):
        for entry in json.loads(content or b"{}").get("licences", ()):
            used[entry["weights"]] = UsedWeights.model_validate(entry)
    return [used[name] for name in sorted(used)]


def _reproduction(
    totals: Mapping[str, Any], state: Mapping[str, Any], source: Storage, captioned: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the settings of the render and the export, and their command lines without the places of the folders.

    `captioned`: models of captions.
    """
    run, scripts = (json.loads(source.read(name) or b"{}") for name in ("run.json", SCRIPTS))
    profile = run.get("profile", {}).get("name")
    versions = sorted((run.get("software", {}) | state["versions"]).items())
    digests = {name: scripts.get(name, {}).get("sha256", "unknown") for name in totals["scripts"][:_LISTED]}
    settings = {
        **{f"Script {name}": f"sha256 {digest}" for name, digest in digests.items()},
        "Profile of the last run": profile,
        "Versions": ", ".join(f"{name} {number}" for name, number in versions),
    }
    if seeds := read_seeds(source):
        settings["Seeds chosen by vidgen retry"] = (
            f"{count(len(seeds), 'shot')}. Copy {SEEDS_FILE} of the rendered folder to OUT before the commands below, or set "
            f"the seeds in {ROWS} in the script."
        )
    words = shlex.split(state["command"])
    of_script = ["--profile", profile] if profile else []
    renders = [
        [*_without_folders(scripts.get(name, {}).get("command") or ["vidgen", "render", name, *of_script]), "--out", "OUT"]
        for name in digests
    ]
    commands = "\n".join(map(shlex.join, [*renders, *_measuring(state, captioned), [*words[:2], "OUT", "DEST", *words[4:]]]))
    return {"settings": [{"Setting": name, "Value": value} for name, value in settings.items() if value], "commands": commands}


def _measuring(state: Mapping[str, Any], captioned: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the commands that give the scores and captions which the export selects by, or writes."""
    names = {name for _, name, *_ in Formatter().parse(state["caption"]) if name}
    for sql in (state["where"], state["best"]):
        names.update(re.findall(r"\w+", (sql or "").lower()))
    scorers = {scorer for column, scorer in builtin_scores().items() if column in names}
    commands: list[list[str]] = [["vidgen", "score", "OUT"]] if scorers - {CAPTION} else []
    if CAPTION in scorers:
        most = max(captioned, key=lambda row: row["Clips"], default={"Model": DEMO_CAPTIONER})
        of_server = [] if most["Model"] == DEMO_CAPTIONER else ["--server", "URL", "--model", str(most["Model"])]
        template = ["--template", "FILE"] if most.get("Template") else []
        commands.append(["vidgen", "caption", "OUT", *of_server, *template])
    return commands


def _without_folders(words: Sequence[str]) -> list[str]:
    """Return the words of a recorded command with file names instead of paths on a machine. URLs stay."""

    def name_of(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(name_of, value)]
        if isinstance(value, dict):
            return {key: name_of(each) for key, each in value.items()}
        return posixpath.basename(value) if isinstance(value, str) and not re.match("[a-z0-9]+:", value) else value

    shown = [*words[:2]]
    for option, word in pairwise(words[1:]):
        field, _, text = word.partition("=")
        if option == "--set" and field in PATH_FIELDS:
            value = name_of(parse_field(field, text))
            shown.append(f"{field}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
        elif option == "--consent":
            shown.append(re.sub("(reference=)[^,]*/", r"\1", word))
        else:
            is_file = option in ("--characters", "--profile") or not option.startswith("--")
            shown.append(word if word.startswith("--") or not is_file else name_of(word))
    return shown


# Pictures.

_CHOSEN = f"""
WITH in_group AS (
    SELECT id, clip, prompt, caption, person, factors,
        row_number() OVER (PARTITION BY person, factors ORDER BY {DIGEST}, id) AS number
    FROM clips),
in_person AS (SELECT *, row_number() OVER (PARTITION BY person, number ORDER BY factors, id) AS variant FROM in_group)
SELECT clip, prompt AS "Prompt", nullif(caption, prompt) AS "Caption", person AS "Person" FROM in_person
ORDER BY number, variant, person, id LIMIT {SAMPLES * 4}"""
"""Candidates for the samples: first a clip of each person and each combination of factors, then another one of each."""


def _samples(
    database: duckdb.DuckDBPyConnection, source: Storage, names: Mapping[str, str]
) -> tuple[list[dict[str, Any]], bytes]:
    """Return person and prompt of the samples, and an image of their middle frames. Leaves out clips that cannot be read."""
    shown, tiles = list[dict[str, Any]](), list[Image]()
    for row in _dicts(database, _CHOSEN):
        if len(tiles) < SAMPLES:
            with suppress(MediaError, OSError), source.local_copy(row["clip"]) as path:
                tiles.append(_middle_frame(path))
                texts = {name: row[name] for name in ("Prompt", "Caption")}
                shown.append({"Frame": len(tiles), "Person": names.get(row["Person"]), **texts})
    return shown, _grid(tiles) if tiles else b""


def _middle_frame(path: Path) -> Image:
    if path.suffix == ".png":
        return read_image(path)
    with open_foreign_video(path) as video:
        frame: Image = video.frames_at([video.frame_count // 2])[0]
        return frame


def _grid(tiles: Sequence[Image]) -> bytes:
    """Return a WebP image, marked as AI-generated, with the tiles cropped to the shape of the first one."""
    width = TILE_WIDTH_PX
    height = round(width * min(2, max(0.5, tiles[0].shape[0] / tiles[0].shape[1])))
    columns = min(GRID_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    grid = PILImage.new("RGBA", (columns * (width + _GAP_PX) - _GAP_PX, rows * (height + _GAP_PX) - _GAP_PX))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        grid.paste(PILImage.fromarray(cover_crop(tile, width, height)), (column * (width + _GAP_PX), row * (height + _GAP_PX)))
    content = io.BytesIO()
    mark = ProvenanceRecord(source_type="trainedAlgorithmicMedia").metadata()
    grid.save(content, "WEBP", quality=80, xmp=mark.xmp.encode())
    return content.getvalue()


def _meanings(source: Storage) -> dict[str, str]:
    """Return the descriptions of columns. Those of scores are in their files."""
    known: dict[str, str] = {name: Markup(text) for name, text in DESCRIPTIONS.items()}
    for folder in sorted(source.folders(SCORES)):
        for name in parquet_files(source, f"{SCORES}/{folder}")[-1:]:
            with opened(source, name) as file:
                fields = pyarrow.parquet.read_schema(file)
            known |= {field.name: field.metadata[b"description"].decode() for field in fields if field.metadata}
    return known


def _captioned(database: duckdb.DuckDBPyConnection, source: Storage) -> list[dict[str, Any]]:
    """Return the models of captions with their counts, and templates that were used last."""
    if "caption_model" not in columns_of(database, "clips"):
        return []
    templates = dict[str, str]()
    for folder in source.folders(SCORES):
        for name in parquet_files(source, f"{SCORES}/{folder}") if folder.startswith(f"{CAPTION}@") else ():
            with opened(source, name) as file:
                settings = json.loads(pyarrow.parquet.read_schema(file).metadata[WEIGHTS])
            templates[settings["model"]] = settings["template"]
    rows = _dicts(
        database,
        """SELECT caption_model AS "Model", count(*) AS "Clips", avg(agrees) AS "Mean agreement" FROM clips
        WHERE caption_model IS NOT NULL GROUP BY ALL ORDER BY 1""",
    )
    return [row | {"Template": templates.get(row["Model"]) or None} for row in rows]


def _histogram(database: duckdb.DuckDBPyConnection, name: str, meanings: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the picture of a score, its file name, its text and its row of the table. `None` if the score has no values."""
    column = quoted(name)
    values = f"(SELECT {column}::DOUBLE AS value FROM clips WHERE isfinite({column}::DOUBLE))"
    (found,) = _dicts(
        database,
        f"""SELECT count(*) AS "Clips", quantile_disc(value, 0.05) AS "5 %", quantile_disc(value, 0.5) AS "Median",
        avg(value) AS "Mean", quantile_disc(value, 0.95) AS "95 %", min(value) AS low, max(value) AS high FROM {values}""",
    )
    if not found["Clips"]:
        return None
    low, median, high = found.pop("low"), found["Median"], found.pop("high")
    step = (high - low) / BINS or 1.0
    sql = (
        f"SELECT least(floor((value - {low!r}) / {step!r}), {BINS - 1})::INTEGER, count(*) FROM {values} GROUP BY 1 ORDER BY 1"
    )
    bins = dict(database.execute(sql).fetchall())
    bars = (f"M{17.75 + 11.5 * number} 124v{-90 * count / max(bins.values()):.2f}" for number, count in bins.items())
    line = f"M{12 + 11.5 * (median - low) / step:.2f} 30V124"
    picture = {"title": name, "bars": Markup("".join(bars)), "line": line, "low": low, "median": median, "high": high}
    return {
        # A score that is the same everywhere needs no picture.
        "svg": TEMPLATES.get_template("histogram.svg").render(picture) if low < high else None,
        "file": f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.svg",
        "alt": f"{name} from {_number(low)} to {_number(high)}, median {_number(median)}",
        "row": {"Score": name, **found, "Meaning": meanings.get(name)},
    }


# Metadata for machines.


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Return the YAML that the hub and `datasets` read."""
    state, totals = facts["state"], facts["totals"]
    spdx = [name.lower() for name in facts["licences"]]
    one = len(spdx) == 1 and spdx[0] in HUB_LICENCES
    listed = "-and-".join(re.sub("[^a-z0-9.]+", "-", name).strip("-") for name in spdx) or "unknown"
    text, images = totals["clips"] - totals["from_images"], totals["from_images"]
    tasks = [task for task, count in (("text-to-video", text), ("image-to-video", images)) if count]
    # The captions of trainers are no format of `datasets`, which reads their clips only.
    skipped = ("captions",) if state["format"] == "captions" else ()
    names = [HUB_SPLITS.get(split, split) for split in facts["split_names"]]
    names = names if len({*names}) == len(names) else facts["split_names"]
    data_files = [
        {"split": name, "path": [pattern for name, pattern in _patterns(state, split).items() if name not in skipped]}
        for name, split in zip(names, facts["split_names"], strict=True)
    ]
    content = {
        "pretty_name": facts["title"],
        **({"license": spdx[0]} if one else {"license": "other", "license_name": listed}),
        "task_categories": ["text-to-image"] if state["files"] == "image" else tasks,
        "size_categories": [next((name for limit, name in HUB_SIZES if totals["clips"] < limit), "10M<n<100M")],
        "tags": list(_TAGS),
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def _croissant(facts: Mapping[str, Any]) -> str:
    """Return the Croissant metadata: the files of the format, and a record per clip."""
    # It takes seconds to import.
    import mlcroissant as mlc

    state, totals, persons = facts["state"], facts["totals"], facts["totals"]["persons"]
    context = mlc.Context(conforms_to="http://mlcommons.org/croissant/1.1")
    of = mlc.DataType
    types = {"string": of.TEXT, "int64": of.INTEGER, "double": of.FLOAT, "bool": of.BOOL}

    def file_set(name: str, includes: list[str], container: str | None = None) -> Any:
        kind, _ = mimetypes.guess_type(includes[0])
        if includes[0].endswith(".parquet"):
            kind = "application/x-parquet"  # the name that mlcroissant reads
        kinds, inside = [kind or "application/octet-stream"], [container] if container else []
        return mlc.FileSet(ctx=context, id=name, name=name, contained_in=inside, encoding_formats=kinds, includes=includes)

    def field(name: str, kind: str, extract: Any) -> Any:
        source = mlc.Source(file_set=records, extract=extract)
        about = facts["meanings"].get(name)
        return mlc.Field(ctx=context, id=f"clips/{name}", name=name, description=about, data_types=[types[kind]], source=source)

    sets = {name: [_patterns(state, split)[name] for split in facts["split_names"]] for name in _patterns(state, "")}
    distribution = [file_set(name, includes) for name, includes in sets.items()]
    records = next(iter(sets))
    if state["format"] == "webdataset":
        distribution.append(file_set("records", ["*.json"], records))
        records = "records"
    if state["format"] == "captions":
        properties = {"file_name": mlc.FileProperty.filename, "caption": mlc.FileProperty.content}
        fields = [field(name, "string", mlc.Extract(file_property=each)) for name, each in properties.items()]
    else:
        by = "json_path" if state["format"] == "webdataset" else "column"
        path = "$." if state["format"] == "webdataset" else ""
        fields = [field(name, kind, mlc.Extract(**{by: f"{path}{name}"})) for name, kind in state["columns"].items()]
    metadata = mlc.Metadata(
        ctx=context,
        name=facts["title"],
        description=f"{totals['clips']:,} AI-generated {facts['noun']}s, rendered with vidgen-ray. See README.md.",
        keywords=list(_TAGS),
        license=[f"https://spdx.org/licenses/{name}" if name.lower() in HUB_LICENCES else name for name in facts["licences"]],
        date_created=totals["ended_at"],
        data_collection="Models rendered everything from text prompts. README.md lists them with their licences.",
        personal_sensitive_information=[
            f"Shows {persons} persons, from face photos or as characters. README.md has their consents."
            if persons
            else "No face photo was used."
        ],
        distribution=distribution,
        record_sets=[mlc.RecordSet(ctx=context, id="clips", name="clips", fields=fields)],
    )
    return json.dumps(metadata.to_json(), indent=1, ensure_ascii=False) + "\n"


# Text of the page. Every value is escaped, unless it is Markup.

DIRECTION_MARKS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SPECIAL = re.compile(r"""[\\`*_{}\[\]<>&"#|~$:@!^=]|(?<=www)[.]""")
"""Signs of Markdown, HTML, TeX, mentions and links inside a line."""


def _clean(text: str) -> str:
    """Return a text on one line, without control characters and marks of direction, cut to `TEXT_LENGTH`."""
    line = " ".join(DIRECTION_MARKS.sub("", text).split())
    line = "".join(sign for sign in line if unicodedata.category(sign) not in ("Cc", "Cs"))
    return line if len(line) <= TEXT_LENGTH else f"{line[:TEXT_LENGTH]}…"


def _markdown(value: Any) -> Markup:
    """Return a value as Markdown that shows it as it is: special signs are entities."""
    if isinstance(value, Markup):
        return value
    text = "" if value is None else _clean(value) if isinstance(value, str) else _number(value)
    escaped = SPECIAL.sub(lambda sign: f"&#{ord(sign[0])};", text)
    if any(unicodedata.bidirectional(sign) in ("R", "AL") for sign in text):
        # Right-to-left text does not reorder what is around it.
        escaped = f"\u2068{escaped}\u2069"
    return Markup(escaped)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


_UNITS: dict[str, Callable[[float], str]] = {"Length": duration, "Size": size}
"""Column of a table -> how its values are shown."""


def _link(text: str | None, url: str | None) -> Markup:
    label = _markdown(text or "unknown")
    is_link = url and url.startswith(("https://", "http://"))
    return Markup(f"[{label}]({quote(url or '', safe=':/?=&%#')})") if is_link else label


def _fence(text: str) -> Markup:
    """Return a command line as a block of code, which the text cannot end."""
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", text)), 0)
    return Markup(f"{fence}sh\n{DIRECTION_MARKS.sub('', text)}\n{fence}")


def _table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return rows as a table, without the columns that are empty in all of them."""
    shown = rows[:TABLE_ROWS]
    columns = [name for name in (shown[0] if shown else ()) if any(row[name] is not None for row in shown)]
    numbers = [all(isinstance(row[name], int | float | None) for row in shown) for name in columns]
    lines: list[list[str]] = [[_markdown(name) for name in columns], ["---:" if is_number else "---" for is_number in numbers]]
    for row in shown:
        lines.append([_markdown(_UNITS[name](row[name]) if name in _UNITS and row[name] else row[name]) for name in columns])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Markup(text + (f"\n\n{len(rows) - TABLE_ROWS:,} more." if len(rows) > TABLE_ROWS else ""))


TEMPLATES = Environment(
    loader=PackageLoader("vidgen_ray.dataset", "."),
    autoescape=True,
    finalize=_markdown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.globals.update(table=_table, fence=_fence, link=_link, duration=duration, size=size)
