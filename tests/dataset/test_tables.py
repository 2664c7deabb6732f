"""Tables of an output folder, queries and selections."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.dataset.conftest import digest_of, done_shot, write_scores
from vidgen_ray.cli import main
from vidgen_ray.dataset.tables import open_tables, run_query, select_ids
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import Failure, shot_path
from vidgen_ray.outputs.reviews import Review
from vidgen_ray.shot import Shot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two variants of a line with a quoted prompt, a failed line, a score and a review of the first variant."""
    out: Path = tmp_path_factory.mktemp("tables") / "out"
    storage = OutputFolder(out).storage
    writer = ManifestWriter(OutputFolder(out), "1-run", "s.jsonl")
    for number, seed in enumerate((7, 8)):
        metadata = {"character": "Ada", "matrix": {"seed": seed}, "choices": {"a|b": "a"}}
        shot = Shot(id=f"boat-{number}", prompt='He said "🚤, go"\tנו\n', seed=seed, metadata=metadata)
        writer.add(ManifestRow.of_shot("1-run", "s.jsonl", shot, 1, done_shot(shot), "rendered"))
    failure = Failure(stage="flux", error="StageError", message="no", attempts=1, worker="")
    writer.add(ManifestRow.of_shot("1-run", "s.jsonl", Shot(id="lost", prompt="a lake"), 2, failure, "failed"))
    writer.close()
    first, second = digest_of("boat-0"), digest_of("boat-1")
    for version, value in ((1, 0.1), (2, 0.9)):
        write_scores(storage, f"flow@{version}", {"clip_sha256": [first], "motion": [value], "seconds": [value]})
    for name in ("1", "2"):
        write_scores(storage, "frames@1", {"clip_sha256": [second], "sharpness": [3.0]}, name)
    review = Review(clip_sha256=first, id="boat-0", verdict="accept", stars=4, at=datetime(2026, 1, 2, tzinfo=UTC))
    older = review.model_copy(update={"verdict": "reject", "at": datetime(2026, 1, 1, tzinfo=UTC)})
    storage.write("reviews/1.jsonl", f"{review.model_dump_json()}\nnot JSON\n{older.model_dump_json()}\n")
    return out


def test_clips_joins_manifest_scores_and_newest_review(folder: Path) -> None:
    sql = "SELECT id, motion, flow_seconds, sharpness, verdict, stars, character, person, clip FROM clips ORDER BY id"
    with open_tables(OutputFolder(folder).storage) as database:
        rows = run_query(database, sql).read_all().to_pylist()
        siblings = run_query(database, "SELECT DISTINCT siblings, factors FROM clips WHERE status = 'done'").read_all()
    assert [tuple(row.values()) for row in rows] == [
        ("boat-0", 0.9, 0.9, None, "accept", 4, "Ada", "Ada", f"{shot_path('boat-0')}/video.mp4"),
        ("boat-1", None, None, 3.0, None, None, "Ada", "Ada", f"{shot_path('boat-1')}/video.mp4"),
        ("lost", None, None, None, None, None, None, None, None),
    ]
    assert siblings.column("factors").to_pylist() == ['{"a|b":"a"}']


def test_best_of_siblings_is_selected_and_a_shot_without_a_value_loses(folder: Path) -> None:
    storage = OutputFolder(folder).storage
    assert select_ids(storage) == ["boat-0", "boat-1", "lost"]
    assert select_ids(storage, best="seed") == ["boat-1"]
    assert select_ids(storage, best="stars -- a comment") == ["boat-0"]
    assert select_ids(storage, "motion > 0.5 or status = 'failed'") == ["boat-0", "lost"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "query . 'SELECT id FROM clips WHERE motion > 0.5'",
            "1 of 2 clips has no motion; run: vidgen score {folder}, with its --scorer",
        ),
        (
            "query . 'SELECT script FROM clips GROUP BY ALL HAVING max(motion + sharpness) > 1'",
            "has no motion, sharpness; run:",
        ),
        ("query . 'SELECT motion FROM clips WHERE seconds > 0'", None),
        (
            "query . 'SELECT id FROM clips WHERE neighbour_distance < 4'",
            "no clip has neighbour_distance yet; run: vidgen score {folder}\n",
        ),
        ("query . 'SELECT * FROM clips c WHERE c.likeness > 0'", "no clip has likeness yet; run: vidgen score {folder}\n"),
        ("prune . --where 'sharpness < 1' --dry-run", "1 of 2 clips has no sharpness; run:"),
        ("retry . --where 'sharpness < 1' --profile tiny", "1 of 2 clips has no sharpness; run:"),
        ("film . --where 'sharpness < 1'", "1 of 2 clips has no sharpness; run:"),
        ("film . --best motion", "1 of 2 clips has no motion; run:"),
        ("export . ../data --where 'motion > 1'", "1 of 2 clips has no motion; run:"),
    ],
)
def test_clips_without_the_score_of_a_condition_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, message: str | None
) -> None:
    monkeypatch.chdir(folder)
    main(shlex.split(arguments))
    printed = capsys.readouterr().err
    assert message.format(folder=folder) in printed if message else not printed


def test_query_reads_no_other_file(folder: Path) -> None:
    with open_tables(OutputFolder(folder).storage) as database:
        for sql in (
            "SELECT * FROM read_csv('/etc/passwd')",
            "SELECT * FROM 'x.parquet'",
            "COPY manifest TO '/tmp/manifest.csv'",
            "SET enable_external_access = true",
            "ATTACH '/tmp/other.db'",
        ):
            with pytest.raises(UsageError, match=r"disabled|locked"):
                run_query(database, sql)


def test_sql_errors_name_the_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sql in ("SELECT sharpnes FROM clips", "SELEC 1", "SELECT id::INT FROM clips"):
        assert main(["query", str(folder), sql]) == UsageError.exit_code
        message = capsys.readouterr().err
        assert "scores has the columns clip_sha256, motion, flow_seconds, sharpness" in message, sql
        assert "Traceback" not in message
    assert main(["query", str(folder), " "]) == UsageError.exit_code
    assert "must be a query" in capsys.readouterr().err


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    for name in ("tables", "dataset_commands"):
        monkeypatch.delitem(sys.modules, f"vidgen_ray.dataset.{name}", raising=False)
    assert main(["query", str(folder), "SELECT 1"]) == SetupError.exit_code
    assert "; pip install 'duckdb>=" in capsys.readouterr().err


def test_query_prints_csv_and_json_and_writes_parquet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT id, prompt, metadata, reviewed_at FROM clips WHERE id = 'boat-0';"
    assert main(["query", str(folder), sql, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["prompt"] == 'He said "🚤, go"\tנו\n'
    assert row["reviewed_at"].startswith("2026-01-02 00:00:00")
    assert main(["query", str(folder), sql, "--csv"]) == 0
    assert capsys.readouterr().out.startswith('id,prompt,metadata,reviewed_at\nboat-0,"He said ""🚤, go""\tנו\n"')
    assert main(["query", str(folder), sql, "--parquet", str(tmp_path / "rows.parquet")]) == 0
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").column("prompt").to_pylist() == [row["prompt"]]
    assert main(["query", str(folder), sql, "--csv", "--json"]) == UsageError.exit_code
