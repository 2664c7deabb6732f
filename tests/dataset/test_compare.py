"""Comparison of clips: factors, pairs, intervals, and the page."""

import io
import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import browser_page
from tests.dataset.conftest import digest_of, done_shot, make_folder, moving, write_scores
from tests.test_gallery import problems
from vidgen_ray.cli import main
from vidgen_ray.dataset.compare import MAX_GROUPS, compare_clips, interval, tick_texts
from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.shot import Shot

Row = tuple[int, Mapping[str, Any], Mapping[str, float]]
"""Line, fields of the shot, scores."""


def _folder(out: Path, rows: Iterable[Row]) -> OutputFolder:
    """Write the manifest and the scores of shots without files. `seconds` of the scores is a column of the manifest."""
    outputs = OutputFolder(out)
    writer, scored = ManifestWriter(outputs, "1-run", "s.jsonl"), []
    for line, fields, scores in rows:
        scores = dict(scores)
        shot = Shot(**{"prompt": f"prompt {line}", "seed": 1, **fields})
        writer.add(ManifestRow.of_shot("1-run", "s.jsonl", shot, line, done_shot(shot, scores.pop("seconds", 1.0)), "rendered"))
        scored.append({"clip_sha256": digest_of(shot.id), **scores})
    writer.close()
    write_scores(outputs.storage, "made@1", {name: [row.get(name) for row in scored] for name in {}.fromkeys(chain(*scored))})
    return outputs


def _swept(line: int, strength: float, seed: int = 1, **scores: float) -> Row:
    matrix = {"identity_strength": strength, "seed": seed}
    fields = {"id": f"{line}-{strength}-{seed}", "identity_strength": strength, "seed": seed, "metadata": {"matrix": matrix}}
    return line, fields, scores


def _compare(*folders: OutputFolder, names: tuple[str, ...] = (), reference: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the factors by name, each with its levels by name."""
    factors = compare_clips([folder.storage for folder in folders], names, reference)["factors"]
    for factor in factors:
        factor["levels"] = {level["level"]: level for level in factor["levels"]}
    return {factor["name"]: factor for factor in factors}


def test_means_and_paired_differences_are_those_by_hand(tmp_path: Path) -> None:
    rises = [1.0, 2.0, 3.0, 4.0, 5.0]
    rows = [_swept(line, 0.8, motion=10 * line + rise, seconds=3.0) for line, rise in enumerate(rises)]
    rows += [_swept(line, 0.2, motion=10 * line, seconds=2.0) for line in range(5)]
    rows += [_swept(7, 0.8, motion=99.0), _swept(0, 0.2, seed=2, motion=50.0)]
    factor = _compare(_folder(tmp_path, rows), reference="0.2")["identity_strength"]
    assert (list(factor["levels"]), factor["numeric"], factor["paired_by"]) == (["0.2", "0.8"], True, "prompt and seed")
    low, high = factor["levels"].values()
    assert (low["clips"], low["measures"]["motion"]["mean"]) == (6, 25.0)
    assert (high["clips"], high["measures"]["seconds"]["mean"]) == (6, pytest.approx(16 / 6, rel=1e-5))
    assert (high["unpaired"], high["differences"]["motion"]["pairs"]) == (2, 5)
    assert high["differences"]["motion"]["mean"] == 3.0
    # All five pairs, one per prompt: the interval is that of their differences.
    assert high["differences"]["motion"]["low"] == pytest.approx(interval(np.array(rises), np.ones(5))[0], rel=1e-5)
    assert high["differences"]["seconds"] == {"pairs": 5, "mean": 1.0, "low": 1.0, "high": 1.0}
    rise, *_ = factor["extremes"]["motion"]
    assert (rise["difference"], [clip["id"] for clip in rise["clips"]]) == (5.0, ["4-0.2-1", "4-0.8-1"])


def test_interval_is_that_of_scipy_at_the_widened_level() -> None:
    from scipy import stats

    values = np.random.default_rng(5).exponential(size=12)
    tail = stats.norm.cdf(-np.sqrt(12 / 11) * stats.t.ppf(0.975, 11))
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, confidence_level=1 - 2 * tail, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    # 5,000 resamples leave an error of a few percent of the width.
    assert interval(values, np.ones(12)) == pytest.approx(tuple(reference), abs=0.05 * (reference.high - reference.low))
    # The values of a prompt are drawn together.
    assert interval(4 * values, np.full(12, 4.0)) == pytest.approx(interval(values, np.ones(12)))
    # Many prompts are drawn in blocks, of which 500 may err by 10%.
    values = np.random.default_rng(2).normal(size=20 * MAX_GROUPS)
    low, high = interval(values, np.ones(len(values)))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(len(values)), rel=0.1)


def test_choices_are_factors_and_prompts_of_a_line_belong_together(tmp_path: Path) -> None:
    rows = []
    for line in range(6):
        for number, (sky, size) in enumerate(product(("sun", "rain"), ("small", "big"))):
            metadata = {"choices": {"sun|rain": sky, "small|big": size}, "matrix_number": number}
            fields = {"id": f"{line}-{sky}-{size}", "prompt": f"a {size} boat {line}, {sky}", "metadata": metadata}
            rows.append((line + 1, fields, {"score": line + (sky == "rain")}))
    factors = _compare(_folder(tmp_path, rows))
    # The first of the script is the reference.
    assert {name: factor["reference"] for name, factor in factors.items()} == {"sun|rain": "sun", "small|big": "small"}
    rain = factors["sun|rain"]["levels"]["rain"]
    assert (rain["differences"]["score"]["pairs"], rain["differences"]["score"]["mean"], rain["prompts"]) == (12, 1.0, 6)


def test_settings_that_differ_within_prompts_are_factors(tmp_path: Path) -> None:
    """LoRA and its strength always change together, so they are one factor. The width differs between prompts only."""
    rows = []
    for line in range(5):
        for steps in (4, 8):
            for name, strength in (("a", 0.5), ("b", 0.7)):
                fields = {
                    "id": f"{line}-{steps}-{name}",
                    "steps": {"flux": steps},
                    "lora": [{"path": f"loras/{name}.safetensors"}],
                    "lora_strength": strength,
                    "width": 128 * (line + 1),
                }
                rows.append((line, fields, {"score": steps + 100 * strength}))
    factors = _compare(_folder(tmp_path, rows))
    assert {name: list(factor["levels"]) for name, factor in factors.items()} == {"lora": ["a", "b"], "steps.flux": ["4", "8"]}
    assert factors["lora"]["also_differ"] == ["lora_strength"]
    assert factors["steps.flux"]["levels"]["8"]["differences"]["score"]["mean"] == 4.0
    assert factors["lora"]["levels"]["b"]["differences"]["score"]["mean"] == pytest.approx(20)


def test_two_folders_are_paired_by_prompt_and_seed_or_by_id(tmp_path: Path) -> None:
    def rendered(name: str, seed: int, lora_strength: float, score: float) -> OutputFolder:
        fields = [{"id": f"s{line}", "seed": seed + line, "lora_strength": lora_strength if line else 0.5} for line in range(5)]
        return _folder(tmp_path / name, [(line, each, {"score": score + line}) for line, each in enumerate(fields)])

    old, new, other_seed = rendered("old", 1, 0.6, 1.0), rendered("new", 1, 0.8, 3.0), rendered("seed", 50, 0.6, 2.0)
    factor = _compare(old, new)["folder"]
    assert (list(factor["levels"]), factor["paired_by"]) == (["old", "new"], "prompt and seed")
    assert factor["also_differ"] == ["lora_strength 0.6 -> 0.8"]
    assert factor["levels"]["new"]["differences"]["score"]["mean"] == 2.0
    assert main(["compare", str(old.root), str(new.root)]) == 0
    assert re.search(r' src="\.\./new/shots/\w\w/s\d/video\.mp4"', (old.root / "compare.html").read_text())
    factor = _compare(old, other_seed)["folder"]
    assert (factor["paired_by"], factor["levels"]["seed"]["differences"]["score"]["mean"]) == ("id", 1.0)


def test_clips_with_seeds_of_their_own_are_paired_by_prompt(tmp_path: Path) -> None:
    rows = []
    for number, (line, strength, variant) in enumerate(product(range(5), (0.2, 0.8), range(2))):
        fields = {"id": f"s{number}", "seed": number, "metadata": {"matrix": {"identity_strength": strength}}}
        rows.append((line, fields, {"score": strength * 10 + variant}))
    factor = _compare(_folder(tmp_path, rows))["identity_strength"]
    assert factor["paired_by"] == "prompt, as means over seeds"
    score = factor["levels"]["0.8"]["differences"]["score"]
    assert (score["pairs"], score["mean"]) == (5, 6.0)


def test_pairs_of_several_persons_with_one_prompt_and_seed_are_counted_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_swept(line, strength, score=strength * line) for line in range(6) for strength in (0.0, 1.0)]
    rows = [(line, {**fields, "prompt": f"prompt {line % 3}"}, scores) for line, fields, scores in rows]
    rows[-1][1]["metadata"]["matrix"]["seed"] = 9
    folder = _folder(tmp_path, rows)
    write_scores(folder.storage, "other@1", {"clip_sha256": [digest_of("0-0.0-1")], "flicker": [1.0]})
    factor = _compare(folder)["identity_strength"]
    level = factor["levels"]["1"]
    assert (factor["paired_by"], level["unpaired"], level["differences"]["score"]["mean"]) == ("line and seed", 2, 2.0)
    assert main(["compare", str(folder.root)]) == 0
    printed, page = capsys.readouterr(), (tmp_path / "compare.html").read_text()
    assert "no interval (5 pairs of 3 prompts; an interval needs 5 prompts). Pairs by line and seed." in printed.out
    assert "5 pairs of 3 prompts by line and seed, equal in all other factors" in page
    assert all("11 of 12 clips have no scores of other; run: vidgen score" in text for text in (printed.err, page))


def test_terminal_without_utf8_shows_plain_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path / "é→", [_swept(0, 0.2, likeness=0.5, motion=1.0), _swept(0, 0.8, likeness=0.3, motion=1.0)])
    for encoding, place in (("latin-1", "é->/compare.html"), ("ascii", "\\xe9->/compare.html")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["compare", str(folder.root)]) == 0
        stdout.flush()
        printed = stdout.buffer.getvalue().decode(encoding)
        assert "-0.2" in printed
        assert printed.rstrip().endswith(place)


def test_few_prompts_have_no_interval(tmp_path: Path) -> None:
    rows = [_swept(line, strength, seed, score=strength) for line in (0, 1) for seed in (0, 1) for strength in (0.0, 1.0)]
    (_, level) = _compare(_folder(tmp_path, rows))["identity_strength"]["levels"].values()
    reason = "4 pairs of 2 prompts; an interval needs 5 prompts"
    assert level["differences"]["score"] == {"pairs": 4, "mean": 1.0, "low": None, "high": None, "reason": reason}


def test_levels_that_another_exceeds_are_named_and_measures_without_a_difference_are_left_out(tmp_path: Path) -> None:
    points = {0.2: (0.3, 3.0), 0.4: (0.5, 2.0), 0.6: (0.4, 1.0), 0.8: (0.5, 2.0)}
    rows = [_swept(line, level, likeness=face, motion=px, cuts=2.0) for line in (0, 1) for level, (face, px) in points.items()]
    rows[0][2]["score"] = 1.0
    folder = _folder(tmp_path, rows)
    factor = _compare(folder)["identity_strength"]
    assert factor["pareto"]["measures"] == factor["measures"] == ["likeness", "motion"]
    assert factor["pareto"]["exceeded_by"] == {"0.2": [], "0.4": [], "0.6": ["0.4", "0.8"], "0.8": []}
    assert factor["left_out"]["score"] == "has values for 1 of 4 levels"
    assert main(["compare", str(folder.root)]) == 0
    page = (tmp_path / "compare.html").read_text()
    assert "The same for all clips: cuts 2, seconds 1, file bytes 1 kB." in page
    text = " 0.6: 0.4 is higher in one of the two and not lower in the other. Left to choose from: 0.2, 0.4, 0.8."
    assert text in " ".join(page.split())


def test_measures_are_ranked_by_their_difference_and_those_without_one_are_folded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).normal(size=(4, 16))
    rises = {"luma": 3.0, "flicker": 0.0, "cuts": 30.0, "likeness": 0.0}
    rows = []
    for line, strength in product(range(8), (0.2, 0.8)):
        number = 2 * line + (strength == 0.8)
        scores = {name: noise[each, number] + rise * strength for each, (name, rise) in enumerate(rises.items())}
        rows.append(_swept(line, strength, **scores))
    folder = _folder(tmp_path, rows)
    factor = _compare(folder)["identity_strength"]
    assert (factor["measures"], factor["equal"]) == (["cuts", "luma", "likeness", "flicker"], ["flicker"])
    assert main(["compare", str(folder.root)]) == 0
    assert "Other measures that differ most: cuts, luma." in capsys.readouterr().out
    shown, folded = (tmp_path / "compare.html").read_text().split("Measures without a clear difference: 1")
    assert re.findall(r'<th scope="row">(\w+)', shown) == ["cuts", "luma", "likeness"]
    assert re.findall(r'<th scope="row">(\w+)', folded) == ["flicker"]


def test_numbers_of_an_axis_differ() -> None:
    for ticks in ([22_120, 22_140, 22_160], [0.00001234, 0.00001235], [1000.25, 1000.5], [22_000, 23_000]):
        texts = [text for _, text in tick_texts(ticks, "file_bytes" if ticks[0] > 2000 else "motion")]
        assert len(set(texts)) == len(ticks), texts
    assert texts == ["22 kB", "23 kB"]


def test_unknown_factors_and_levels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path / "swept", [_swept(0, strength, score=1.0) for strength in (0.2, 0.8)])
    with pytest.raises(UsageError, match=r"--factor lora: must be one of identity_strength"):
        _compare(folder, names=("lora",))
    with pytest.raises(UsageError, match=r"--reference 0.3: must be a level \(identity_strength: 0.2, 0.8\)"):
        _compare(folder, reference="0.3")
    _folder(tmp_path / "one", [_swept(0, 0.2, score=1.0)])
    assert main(["compare", str(tmp_path / "one")]) == UsageError.exit_code
    assert "differ in no setting" in capsys.readouterr().err


HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_page_shows_plots_and_clips_that_play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = []
    for number, (person, strength) in enumerate(product(("ada", HOSTILE), (0.2, 0.8))):
        metadata = {"matrix": {"identity_strength": strength, "character": person}}
        fields = {"id": f"clip-{number}", "prompt": f"a boat {HOSTILE}", "identity_strength": strength, "metadata": metadata}
        clips.append((fields, moving(3, px=number, size=(64, 64))))
    folder = make_folder(tmp_path / "an out", clips)
    digests = [row.video_sha256 for row in sorted(read_manifest(folder.root), key=lambda row: row.id)]
    scores = {"clip_sha256": digests, "likeness": [0.2, 0.6, 0.3, 0.5], "motion": [3.0, 1.0, 2.0, 1.0]}
    write_scores(folder.storage, "made@1", scores)
    report = tmp_path / "report"
    assert main(["compare", str(folder.root), "--out", str(report), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((report / "compare.json").read_text())
    assert main(["compare", str(folder.root), "--factor", "identity_strength"]) == 0
    assert "Below the means: difference to 0.2, no interval (2 pairs of 1 prompt" in capsys.readouterr().out
    with browser_page(1280, 900) as page:
        page.goto((report / "compare.html").as_uri())
        assert page.locator("h2").all_inner_texts() == ["identity strength", "character"]
        assert HOSTILE in page.locator("main").inner_text()
        pair = page.locator(".pair").first
        pair.get_by_role("button", name="Play both").click()
        page.wait_for_function("[...document.querySelectorAll('.pair')][0].querySelectorAll('video')[1].currentTime > 0")
        assert pair.locator("figcaption").all_inner_texts()[0].startswith("0.2: 0.2\n")
        assert page.locator("svg[role=img]").count() >= 4
        assert page.evaluate("performance.getEntriesByType('resource').every(each => each.name.startsWith('file:'))")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for details in page.locator("details").all():
            details.evaluate("details => { details.open = true; }")
        assert [each for each in problems(page) if "inside a word" not in each] == []
