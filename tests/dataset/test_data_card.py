"""The data card: what it says, how it escapes, and what the libraries of the hub and of Croissant read in it."""

import json
import re
import shlex
import shutil
from itertools import pairwise, product
from xml.etree import ElementTree

import duckdb
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from markdown_it import MarkdownIt
from obstore.store import MemoryStore
from PIL import Image as PILImage

from tests.batch.conftest import command, in_process, without_ray  # noqa: F401  # fixtures
from tests.conftest import ASTRONAUT
from tests.dataset.conftest import make_folder, moving, texture
from vidgen_ray.dataset import data_card
from vidgen_ray.dataset.data_card import ROWS, STATE, write_card
from vidgen_ray.dataset.measurements import PixelScorer
from vidgen_ray.dataset.tables import open_tables
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.outputs.object_storage import ObjectStorage
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.provenance.record import read_provenance

NASTY = 'a | b `c` *d* <script>alert(1)</script>\n# e\t"f" [g](http://h.i) $j$ @k :l: www.m.n \u202eo & שלום 🎬'
SHOWN = " ".join(NASTY.replace("\u202e", "").split())
"""The same on one line, without the mark of direction."""
LICENCES = (
    {"weights": "hub:black-forest-labs/FLUX.1-dev", "licence": "FLUX.1 [dev] Non-Commercial License", "commercial_use": "no"},
    {"weights": "builtin:rife", "licence": "MIT", "commercial_use": "yes", "url": "https://example.com/a_(b)"},
)
STATE_OF_EXPORT = {
    "format": "videofolder",
    "files": "clip",
    "columns": {"file_name": "string", "prompt": "string", "fps": "double", "seed": "int64", "ai_generated": "bool"},
    "where": "seed < 9",
    "best": None,
    "cleared": "commercial",
    "caption": "{prompt}",
    "splits": {"train": 0.8, "val": 0.2},
    "split_by": ["prompt", "character"],
    "trainer": None,
    "command": "vidgen export /home/me/out /home/me/dest --where 'seed < 9'",
    "versions": {"duckdb": "2.0"},
    "counts": {"added": 1, "changed": 2, "removed": 1, "unchanged": 3},
    "removed": [{"id": "gone", "reason": "the output folder does not have the shot"}],
    "refused": [{"id": "bad", "reason": NASTY}, {"id": "worse", "reason": NASTY}],
    "missing": [],
}
EXPORTED = """
SELECT {all}, if(seed = 8, 'val', 'train') AS split, split || '/' || id || '.mp4' AS file, NULL::VARCHAR AS sample,
    prompt AS caption, coalesce(video_bytes, image_bytes) AS exported_bytes, width AS exported_width, height AS exported_height,
    fps::DOUBLE AS exported_fps, num_frames AS exported_num_frames, duration_s AS exported_duration_s, {columns}
FROM clips WHERE {rows} ORDER BY id"""


def export_state(dest, source, columns="NULL::DOUBLE AS empty_score", all="*", exported="status = 'done'", **changes):
    """Write what an export leaves for its card, and the card."""
    with open_tables(source) as database:
        rows = database.sql(EXPORTED.format(columns=columns, all=all, rows=exported)).to_arrow_table()
    with dest.new_file(ROWS) as path:
        pyarrow.parquet.write_table(rows, path)
    dest.write(STATE, json.dumps(STATE_OF_EXPORT | changes))
    write_card(dest, source)
    return rows.to_pylist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six clips: of two persons with two values of a factor, of a text with all kinds of signs, and of no person."""
    root = tmp_path_factory.mktemp("source")
    clips = []
    for seed, (name, strength) in enumerate(product(("ada", "bob"), (0.5, 1.0))):
        face = root / f"{name}.png"
        PILImage.fromarray(texture(64, 64, seed=seed // 2)).save(face)
        fields = {"id": f"{name}-{strength}", "prompt": f"{name} walks", "face_image": [str(face)], "seed": seed}
        fields["metadata"] = {"matrix": {"lora_strength": strength}}
        if name == "ada":
            fields["consent"] = {"subject": SHOWN, "basis": "written", "reference": "a|b.pdf"}
        clips.append((fields, moving(seed=seed)))
    clips += [({"id": "nasty", "prompt": NASTY, "seed": 8}, moving(px=1)), ({"id": "plain", "licences": LICENCES}, moving())]
    storage = make_folder(root / "out", clips).storage
    with open_tables(storage) as database:
        scores = database.sql("SELECT clip_sha256, min(seed) / 2 AS sharpness FROM clips GROUP BY ALL").to_arrow_table()
    schema = pyarrow.schema([("clip_sha256", pyarrow.string()), PixelScorer.columns["sharpness"].named("sharpness")])
    with storage.new_file("scores/pixels@1/1.parquet") as path:
        pyarrow.parquet.write_table(scores.cast(schema), path)
    return storage


@pytest.fixture(scope="module")
def card(source, tmp_path_factory):
    """Folder of an export with scores, reviews and costs."""
    root = tmp_path_factory.mktemp("card")
    scores = "seed > 1 AS has_face, 0 AS cuts, 'text' AS phash, [1.0] AS each_frame, NULL::DOUBLE AS empty"
    rest = """* REPLACE (if(seed = 1, 'accept', NULL) AS verdict, if(seed = 1, 5, NULL) AS stars,
        if(seed = 1, ended_at, NULL) AS reviewed_at, 0.5::DOUBLE AS cost, 'USD' AS currency)"""
    export_state(storage_at(root), source, f'{scores}, seed + 1.5::DOUBLE AS "na|me<&"', all=rest)
    return root


def front_matter(root):
    return yaml.safe_load((root / "README.md").read_text().split("---\n")[1])


def croissant(root):
    import mlcroissant

    return mlcroissant.Dataset(jsonld=str(root / "croissant.json")).metadata


def tables(root):
    """Return the tables of the page as a Markdown renderer reads them: lists of rows, rows are lists of texts."""
    content = (root / "README.md").read_text().split("---\n", 2)[2]
    found, tokens = [], MarkdownIt("commonmark").enable("table").parse(content)
    for opened, inline in pairwise(tokens):
        if opened.type == "table_open":
            found.append([])
        elif opened.type == "tr_open":
            found[-1].append([])
        elif opened.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(part.content for part in inline.children))
            assert {part.type for part in inline.children} <= {"text", "code_inline", "link_open", "link_close", "text_special"}
    by_head: dict[tuple[str, ...], list[list[str]]] = {}
    for head, *rows in found:
        by_head.setdefault(tuple(head), []).extend(rows)
    return by_head


def test_card_states_counts_persons_factors_and_changes(card):
    found = tables(card)
    splits = found["Split", "Clips", "Length", "Size", "Persons", "Prompts"]
    assert [(row[0], row[1], row[2], row[4], row[5]) for row in splits] == [
        ("train", "5", "5.6 s", "2", "3"),
        ("val", "1", "1.1 s", "", "1"),
    ]
    persons = found["Person", "Clips", "Length", "Size", "Subject", "Basis", "Reference"]
    consent = [f"\u2068{SHOWN}\u2069", "written", "a|b.pdf"]
    assert [row[:2] + row[4:] for row in persons] == [["ada", "2", *consent], ["bob", "2", "", "", ""]]
    assert [row[:2] for row in found["Value", "Clips", "Length", "Size"]] == [["0.5", "2"], ["1.0", "2"]]
    assert found["Stars", "Clips"] == [["5", "2"]]
    assert found["Currency", "Total", "Per clip", "Per accepted clip"] == [["USD", "3", "0.5", "1.5"]]
    (scores,) = (rows for head, rows in found.items() if head[0] == "Score")
    assert ["sharpness", "6", "0", "0.5", "1.17", "4", PixelScorer.columns["sharpness"].description] in scores
    models = {row[0]: row[1:] for row in found["Weights", "Licence", "Commercial use", "Condition"]}
    assert models["hub:black-forest-labs/FLUX.1-dev"] == ["FLUX.1 [dev] Non-Commercial License", "no", ""]
    text = (card / "README.md").read_text()
    assert "1 added, 2 changed, 1 removed, 3 unchanged." in text
    assert "People reviewed 2 clips and accepted 2." in text
    assert "GPU hours of these clips: 0.00333." in text
    assert "/home/me" not in text
    assert "vidgen export OUT DEST --where 'seed < 9'\n" in text
    assert "vidgen render script.jsonl --out OUT\n" in text
    about = front_matter(card)
    assert (about["license"], about["license_name"]) == ("other", "flux.1-dev-non-commercial-license-and-mit")
    assert (about["task_categories"], about["size_categories"]) == (["text-to-video"], ["n<1K"])
    assert about["tags"] == ["ai-generated", "synthetic", "vidgen-ray"]
    metadata = croissant(card)
    assert metadata.personal_sensitive_information[0].startswith("Shows 2 persons")
    loaded = {"train": "train", "val": "validation"}
    files = [{"split": loaded[name], "path": [f"{name}/metadata.parquet", f"{name}/*.mp4"]} for name in loaded]
    assert about["configs"][0]["data_files"] == files
    keywords = pytest.importorskip("datasets.data_files").SPLIT_KEYWORDS
    assert {name: str(split) for split, names in keywords.items() for name in names} == data_card.HUB_SPLITS


def test_printed_command_reproduces_the_shots_of_a_script(command, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "my files"
    folder.mkdir()
    for name in ("ada.jpg", "start.jpg"):
        shutil.copy(ASTRONAUT, folder / name)
    (folder / "people.yaml").write_text("ada: {face_image: ada.jpg, consent: {subject: Ada, basis: written}}\n")
    (folder / "prompts.csv").write_text("Bild-Nr.,text,source\nB1,a boat's sail,web\nB2,a kite,book\n")
    given = ["--map", "Bild-Nr.=id", "--map", "text=prompt", "--keep-columns", "--set", "character=ada", "--set", "width=64"]
    given += ["--set", "generate_video=false", "--set", f"image={folder / 'start.jpg'}", "--characters", folder / "people.yaml"]
    given += ["--seed", "7", "--private", "--label", "A I"]
    outs = tmp_path / "out", tmp_path / "again"
    code, _ = command("render", folder / "prompts.csv", "-o", outs[0], "-p", "tiny", *given)
    assert code == 0, command.messages
    storage = storage_at(outs[0])
    storage.write("seeds.json", '{"B2": [1, 2]}')
    reproduction = data_card._reproduction({"scripts": ["prompts.csv"]}, STATE_OF_EXPORT, storage)
    assert reproduction["settings"][-1]["Value"].startswith("1 shot. Copy seeds.json of the rendered folder to OUT")
    printed = reproduction["commands"].splitlines()[0]
    assert "/" not in printed
    assert "--map Bild-Nr.=id" in printed
    words = shlex.split(printed)
    monkeypatch.chdir(folder)
    assert words[-2:] == ["--out", "OUT"]
    assert command(*words[1:-1], outs[1])[0] == 0, command.messages
    first, second = ({row.id: (row.key, row.metadata) for row in read_manifest(out)} for out in outs)
    assert first == second
    assert first.keys() == {"B1", "B2"}
    # With the same content key, the marks of the files are those of the command.
    records = [(out / shot_path("B1") / "image.png").read_bytes() for out in outs]
    assert records[0] == records[1]


def test_text_of_rows_cannot_change_the_page(card):
    found = tables(card)
    isolated = f"\u2068{SHOWN}\u2069"
    assert isolated in [row[-1] for row in found["Frame", "Person", "Prompt"]]
    assert [isolated, "2", "bad, worse"] in found["Reason", "Shots", "Such as"]
    assert "<script>" not in (card / "README.md").read_text()
    (picture,) = (card / "card").glob("na-me-*.svg")
    texts = [each.text for each in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["na|me<&", "1.5", "2.5", "9.5"]


def test_samples_show_each_person_and_then_each_factor_and_histograms_the_scores(card):
    persons = [row[1] for row in tables(card)["Frame", "Person", "Prompt"]]
    assert persons == ["ada", "bob", "", "ada", "bob", ""]
    with PILImage.open(card / "card/samples.webp") as image:
        assert image.size == (4 * 244 - 4, 2 * 164 - 4)
    assert read_provenance(card / "card/samples.webp").known_type == "trainedAlgorithmicMedia"
    names = sorted(path.stem.rpartition("-")[0] for path in (card / "card").glob("*.svg"))
    assert names == ["has-face", "na-me-", "sharpness"]


def test_histogram_shows_all_values():
    values = np.repeat(np.arange(data_card.BINS), np.arange(1, data_card.BINS + 1)) * 1.0
    with duckdb.connect() as database:
        database.register("clips", pyarrow.table({"motion": values}))
        picture = data_card._histogram(database, "motion", {})
    bars = re.findall(r"M([0-9.]+) 124v-([0-9.]+)", picture["svg"])
    assert [round(float(height) * data_card.BINS / 90) for _, height in bars] == list(range(1, data_card.BINS + 1))


def test_same_rows_give_the_same_bytes_in_an_object_store(card, source):
    store = ObjectStorage("s3://bucket/data")
    store._store = MemoryStore()
    store.write(ROWS, (card / ROWS).read_bytes())
    store.write(STATE, json.dumps(STATE_OF_EXPORT | {"command": "vidgen export x y --where 'seed < 9'"}))
    write_card(store, source)
    written = [str(path.relative_to(card)) for path in card.rglob("*") if path.is_file() and ".vidgen" not in path.parts]
    assert len(written) == 6
    for path in written:
        assert store.read(path) == (card / path).read_bytes(), path


NOTHING = {"removed": [], "refused": [], "where": None, "cleared": None, "splits": {"train": 1.0}, "files": "image"}
PATTERNS = {
    "videofolder": ["train/metadata.parquet", "train/*.png"],
    "webdataset": ["train-*.tar"],
    "parquet": ["train-*.parquet"],
    "lance": ["train.lance/**"],
    "captions": ["train/*.png"],
}


def test_card_of_images_in_each_format(tmp_path):
    """Three images without persons, of which one is damaged, and then none."""
    images = make_folder(tmp_path / "out", [({"id": name}, texture(64, 96, seed)) for seed, name in enumerate("abc")]).storage
    next((tmp_path / "out").glob("shots/*/c/image.png")).write_bytes(b"")
    dest = storage_at(tmp_path / "dest")
    dest.write("card/old-123456.svg", "")
    for format, patterns in PATTERNS.items():
        export_state(dest, images, all="* REPLACE (0.0 AS gpu_seconds)", format=format, **NOTHING)
        about = front_matter(tmp_path / "dest")
        assert about["configs"][0]["data_files"] == [{"split": "train", "path": patterns}]
        assert (about["license"], about["task_categories"]) == ("mit", ["text-to-image"])
        metadata = croissant(tmp_path / "dest")
        assert not metadata.ctx.issues.errors
        assert patterns[-1:] in [each.includes for each in metadata.file_sets]
        names = [field.name for field in metadata.record_sets[0].fields]
        assert names == (["file_name", "caption"] if format == "captions" else [*STATE_OF_EXPORT["columns"]])
    text = (tmp_path / "dest/README.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    expected = "# script, ## Contents, ### Sizes, ## Models and licences, ## Last change, ## Reproduce, ## Columns"
    assert ", ".join(headings) == expected
    assert "\n\n\n" not in text
    assert len(tables(tmp_path / "dest")["Frame", "Prompt"]) == 2
    assert dest.files("card").keys() == {"samples.webp"}
    export_state(dest, images, exported="false", **NOTHING)
    assert "0 images, of 0 prompts." in (tmp_path / "dest/README.md").read_text()
