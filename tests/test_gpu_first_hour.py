"""The steps of tools/gpu_first_hour.sh on a CPU, and what tools/gpu_results.py makes of their files."""

import json

import pytest

from benchmarks import gpu_steps
from benchmarks.gpu_steps import UNFINISHED, Rows
from tools import gpu_results
from vidgen_ray.planner import load_calibration
from vidgen_ray.stages import speed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the files of two steps."""
    folder = tmp_path_factory.mktemp("first-hour")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
        for number, step in enumerate(("bench", "swap"), 1):
            gpu_steps.main([step, str(folder / f"0{number}-{step}.json"), "--profile", "tiny"])
    return folder


def rows_of(file):
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


def test_steps_become_a_page_and_calibrations(folder, tmp_path, monkeypatch):
    rows = rows_of(folder / "01-bench.json")
    assert {name: row["problem"] for name, row in rows.items()} == dict.fromkeys(("svd", "flux", "lora", "hunyuan"))
    (swapped,) = rows_of(folder / "02-swap.json").values()
    assert (len(swapped["calls"]), [move["to"] for move in swapped["moves"]]) == (5, ["cpu", "cpu"] * 2)
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    gpu_results.main([str(folder), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    seconds = rows["svd"]["measurement"]["seconds_of_reference"]
    assert f"| svd | 128x64x5 | {seconds:.3g} |" in page
    assert "## flux text_encoder: swapped: moves" in page
    assert "Not measured" not in page
    calibration = load_calibration("tiny", "cpu")
    assert calibration.keys() == {"svd", "flux", "lora", "hunyuan"}
    assert calibration["svd"].seconds_of_reference == seconds
    assert calibration["svd"].measurements[0].random_weights


def test_step_that_was_cut_off_measures_the_missing_rows(tiny, tmp_path):
    file, measured = tmp_path / "rows.json", []

    def case(name, error=None):
        def run():
            measured.append(name)
            if error:
                raise error
            return {"value": 1}

        return run

    with pytest.raises(KeyboardInterrupt):
        Rows(file, "s", tiny).measure({"a": case("a"), "b": case("b", KeyboardInterrupt()), "c": case("c")})
    assert {name: row["problem"] for name, row in rows_of(file).items()} == {"a": None, "b": UNFINISHED}
    Rows(file, "s", tiny).measure({"a": case("a"), "b": case("b", ValueError("no memory")), "c": case("c")})
    assert measured == ["a", "b", "c", "b"]
    rows = rows_of(file)
    assert {name: row["problem"] for name, row in rows.items()} == {"a": None, "b": "ValueError: no memory", "c": None}
    assert rows["a"]["value"] == 1


def test_page_states_gains_shares_failures_and_counts_tests():
    size = {"size": "1024x576x25", "step_s": 0.5, "fixed_s": 1.0, "warmup_s": 2.0, "peak_gb": 14.0}
    measured = [
        {
            "name": name,
            "problem": None,
            "stage": "svd",
            "is_calibration": name == "svd",
            "measurement": {**size, "seconds_of_reference": seconds},
            "planned_gb": 15.5,
            "peak_share": 0.4,
        }
        for name, seconds in (("svd", 20.0), ("svd compile: full", 10.0))
    ]
    machine = {"gpu": "a card", "cpu": "a CPU", "python": "3.12", "packages": {"torch": "2.11", "torchao": None}}
    rows = [
        *measured,
        {"name": "tests/a.py::a", "problem": None},
        {"name": "tests/a.py::b", "problem": "failed: a | b"},
        {"name": "speeds", "problem": None, "tflop_per_s": 700.0, "gb_per_s": 3000.0, "link_gb_per_s": 50.0},
    ]
    page = gpu_results.page([{"machine": machine, "card": "H100", "profile": "gpu-80gb", "rows": rows}])
    assert "| svd | 1024x576x25 | 20 |  | 40% | 0.5 | 1 | 2 | 14 | 15.5 |" in page
    assert "| svd compile: full | 1024x576x25 | 10 | 2 | 40% |" in page
    assert "1 of 2 passed" in page
    assert "| tests/a.py::b | failed: a \\| b |" in page
    assert "| 16 bits, TFLOP/s | 700 | 989 |" in page


def test_results_of_a_cpu_or_of_several_cards_are_not_documented(folder, tmp_path):
    with pytest.raises(SystemExit, match="was measured on a CPU"):
        gpu_results.main([str(folder)])
    for number, card in enumerate(("H100", "L40S")):
        (tmp_path / f"{number}.json").write_text(json.dumps({"profile": "gpu", "card": card, "rows": []}))
    with pytest.raises(SystemExit, match="must be those of one profile on one kind of GPU"):
        gpu_results.main([str(tmp_path), "--page", str(tmp_path / "page.md")])
