"""The first measurements on a GPU, on a CPU: rows, steps, processes of tools/gpu_first_hour.py, and tools/gpu_results.py."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from benchmarks import gpu_memory_steps, gpu_state, gpu_steps
from benchmarks.gpu_encoding import NVENC, NVENC_OPTIONS, encoding_rates
from benchmarks.gpu_rows import CASE_S, CRASHES, CUT_OFFS, TIME_IS_OVER, TIMEOUT, UNFINISHED, AlarmRang, Rows, TimeIsOver, alarm
from tools import gpu_first_hour, gpu_results
from vidgen_ray.engine.trials import TIMEOUT_S
from vidgen_ray.planner.cluster import GB
from vidgen_ray.planner.demand import load_calibration
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.stages import speed

ROOT = Path(__file__).parent.parent
CHAIN = ("flux with a face", "svd", "animevideov3", "lora with a face", "flux without a face", "chain in one process")


def rows_of(file):
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the files of two steps."""
    folder = tmp_path_factory.mktemp("first-hour")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
        for number, step in enumerate(("kernels", "chain"), 1):
            assert gpu_steps.main([step, str(folder / f"0{number}-{step}.json"), "--profile", "tiny"]) == 0
    return folder


def test_steps_become_a_page_and_calibrations(folder, tmp_path, monkeypatch):
    assert all(Rows(file).is_complete for file in folder.glob("*.json"))
    rows = rows_of(folder / "02-chain.json")
    assert {name: row["problem"] for name, row in rows.items()} == dict.fromkeys(("allocator", *CHAIN))
    assert [call["stage"] for call in rows["chain in one process"]["calls"]] == ["flux", "lora", "svd", "realesrgan"] * 4
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    gpu_results.main([str(folder), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    seconds = rows["svd"]["measurement"]["seconds_of_reference"]
    [written] = re.findall(r"^\| svd \| 128x64x5 \| ([^ ]+) \|", page, re.MULTILINE)
    assert float(written) == pytest.approx(seconds, rel=0.01)
    assert "## chain in one process: calls" in page
    assert "## linear layers: rates" in page
    assert "Not measured" not in page
    calibration = load_calibration("tiny", "cpu")
    assert calibration.keys() == {"svd", "flux", "lora", "realesrgan"}
    assert calibration["svd"].seconds_of_reference == seconds
    assert calibration["svd"].measurements[0].random_weights


SHORT_STEPS = ("machine", "swap", "bytes", "memory", "drill", "worker", "compile")
LONG_STEPS = ("profile", "upscaler", "wan", "options", "small", "others", "group")


@pytest.mark.parametrize(
    "steps",
    [pytest.param(SHORT_STEPS, marks=pytest.mark.slow), pytest.param(LONG_STEPS, marks=pytest.mark.very_slow)],
    ids=["short", "long"],
)
def test_other_steps_run_on_a_cpu(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
    missing = {"pinned memory", "encoding", "wan attention_backend: _native_cudnn", "flux attention_backend: _native_cudnn"}
    missing |= {"animevideov3 dense_kernel: True", "animevideov3 dense_kernel: True, tile_px: 512"}
    for step in steps:
        file = tmp_path / f"{step}.json"
        assert gpu_steps.main([step, str(file), "--profile", "tiny"]) == 0
        problems = {name for name, problem in Rows(file).problems.items() if problem and "fp8" not in name}
        assert problems <= missing, json.loads(file.read_text())


def test_upscaler_is_measured_with_its_own_kernel_and_in_tiles(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(Rows, "measure", lambda rows, cases, limits_s=None: names.extend(cases))
    monkeypatch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
    gpu_steps.main(["upscaler", str(tmp_path / "rows.json"), "--profile", "tiny"])
    kernel = {
        f"animevideov3 {options}" for options in ("dense_kernel: True", "tile_px: 512", "dense_kernel: True, tile_px: 512")
    }
    assert kernel <= {*names}


def test_small_card_has_room_for_the_context_of_cuda(monkeypatch):
    fractions = []
    card = SimpleNamespace(total_memory=80 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    gpu_memory_steps.limit_to_small_card()
    assert fractions == [pytest.approx((23.6 - CONTEXT_GB) / 80)]


@pytest.fixture
def measure_row(tmp_path, monkeypatch):
    """Return a function that runs a step on a CPU, but only one of its measurements, and returns its row."""
    measure = Rows.measure

    def run(step, name, *arguments):
        def only(rows, cases, limits_s=None):
            measure(rows, {own: case for own, case in cases.items() if own == name}, limits_s)

        file = tmp_path / f"{step}.json"
        file.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "measure", only)
            patch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
            gpu_steps.main([step, str(file), "--profile", "tiny", *arguments])
        return rows_of(file)[name]

    return run


def test_memory_above_the_plan_is_a_problem(measure_row, monkeypatch):
    row = measure_row("memory", "memory realesrgan")
    assert (row["problem"], [peak["outcome"] for peak in row["peaks"]]) == (None, ["done"] * 3)

    def without_memory(stage, item):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_memory_steps, "run_once", without_memory)
    assert measure_row("memory", "memory realesrgan")["problem"] is None, "there is no GPU on which it should fit"
    monkeypatch.setattr(gpu_memory_steps, "total_gpu_gb", lambda: 80.0)
    row = measure_row("memory", "memory realesrgan")
    assert row["problem"] == "more than planned: 128x64x5, 128x64x5, 128x64x5"


def test_lora_of_the_user_changes_an_image(measure_row, monkeypatch):
    name = "builtin:tiny/lora.safetensors"
    row = measure_row("lora", f"LoRA {name}", "--lora", name)
    assert row["problem"] is None
    assert row["changes"] > 1
    assert "run the step lora with --lora" in measure_row("lora", "LoRA from elsewhere")["problem"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert measure_row("lora", "LoRA no/one", "--lora", "no/one")["problem"].startswith("OfflineModeIsEnabled: ")


def test_compilation_is_measured_at_three_sizes(measure_row):
    row = measure_row("compile", "compilation of flux and infusenet")
    assert row["problem"] is None
    assert [(each["size"], each["graphs"] > 0) for each in row["compiled"]] == [
        ("128x64x5", True),
        ("128x128x5", True),
        ("128x192x5", False),
    ]


@pytest.mark.parametrize("is_damaged", [False, True], ids=["same bytes", "other bytes"])
def test_bytes_are_compared_after_the_gpu_was_full(measure_row, monkeypatch, is_damaged):
    is_full, calls = [False], []

    @contextmanager
    def full_gpu():
        is_full[0] = True
        yield
        is_full[0] = False

    def run(stage, item):
        if is_full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        calls.append(stage.name)
        return np.full((2, 2, 3), len(calls) if is_damaged else 1, np.uint8)

    monkeypatch.setattr(gpu_memory_steps, "full_gpu", full_gpu)
    monkeypatch.setattr(gpu_memory_steps, "run_once", run)
    row = measure_row("drill", "drill realesrgan")
    assert [outcome["on a full GPU"] for outcome in row["outcomes"]] == ["out of memory"] * 2
    assert row["problem"] == ("other bytes after: call, swap" if is_damaged else None)


def test_stages_take_turns_on_a_small_card(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_memory_steps, "measure_cases", lambda run, cases: None)
    monkeypatch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
    gpu_steps.main(["small", str(tmp_path / "rows.json"), "--profile", "tiny"])
    row = rows_of(tmp_path / "rows.json")["24 GB: stages take turns"]
    assert row["problem"] is None
    assert [call["stage"] for call in row["calls"]] == ["flux", "lora", "svd", "realesrgan"] * 2
    assert all(call["turn_s"] > 0 for call in row["calls"])


def test_encoders_are_compared_at_the_same_size():
    x264, *others, at_same_size = encoding_rates(False, "libx264", {"preset": "medium", "threads": "4"})["rates"]
    assert [row["bytes"] for row in others] == sorted((row["bytes"] for row in others), reverse=True)
    assert all(row["same_bytes"] for row in (x264, *others))
    assert at_same_size["psnr_db"] == pytest.approx(x264["psnr_db"], abs=0.5), "it is the same encoder"


@pytest.mark.skipif(NVENC not in av.codecs_available, reason="needs PyAV with NVENC")
def test_encoder_of_a_gpu_knows_its_options():
    """It reads them before it looks for the driver."""
    wrong = [encoding_rates(False, NVENC, {**NVENC_OPTIONS, name: "unknown"})["problem"] for name in NVENC_OPTIONS]
    assert wrong == ["h264_nvenc: Invalid argument"] * len(NVENC_OPTIONS)
    assert encoding_rates(False).get("problem") not in wrong


def case(measured, name, error=None):
    def run():
        measured.append(name)
        if error:
            raise error
        return {"value": 1}

    return run


def test_step_that_was_cut_off_measures_the_missing_rows(tmp_path):
    file, measured = tmp_path / "rows.json", []
    with pytest.raises(KeyboardInterrupt):
        Rows(file).measure({"a": case(measured, "a"), "b": case(measured, "b", KeyboardInterrupt()), "c": case(measured, "c")})
    assert Rows(file).problems == {"a": None, "b": UNFINISHED}
    Rows(file).add_exit("step", "exit code -11: Segmentation fault")
    Rows(file).measure({"a": case(measured, "a"), "b": case(measured, "b", ValueError("no memory")), "c": case(measured, "c")})
    assert measured == ["a", "b", "c", "b"]
    assert Rows(file).problems == {"a": None, "b": "ValueError: no memory", "c": None}
    Rows(file).measure({"b": case(measured, "b")})
    assert len(measured) == 4, "an error is a result"


def test_case_that_crashes_twice_is_not_repeated(tmp_path):
    file, measured = tmp_path / "rows.json", []
    for _ in range(CRASHES):
        with pytest.raises(KeyboardInterrupt):
            Rows(file).measure({"a": case(measured, "a", KeyboardInterrupt())})
        Rows(file).add_exit("step", "exit code -9: Killed")
    Rows(file).measure({"a": case(measured, "a")})
    assert len(measured) == CRASHES
    assert Rows(file).problems == {"a": f"{UNFINISHED}: exit code -9: Killed"}


def test_step_that_is_killed_at_the_end_of_calls_continues_while_it_adds_rows(tmp_path):
    """Each call runs some of the tests."""
    file = tmp_path / "rows.json"
    for name in ("a", "b", "c"):
        Rows(file).add(name, None)
        Rows(file).add_exit("tests", TIMEOUT)
        assert not Rows(file).is_complete
    Rows(file).add_exit("tests", TIMEOUT)
    assert Rows(file).is_complete
    assert Rows(file).problems == {**dict.fromkeys("abc"), "tests: exit": f"{UNFINISHED}: {TIMEOUT}"}


def test_case_is_not_begun_or_is_cut_off_at_the_end_of_the_time(tmp_path, monkeypatch):
    file, measured = tmp_path / "rows.json", []
    with pytest.raises(TimeIsOver):
        Rows(file, until=time.monotonic() + 1).measure({"a": case(measured, "a")})
    assert measured == []
    monkeypatch.setattr("benchmarks.gpu_rows.MIN_CASE_S", 0.2)
    with pytest.raises(TimeIsOver):
        Rows(file, until=time.monotonic() + 0.4).measure({"a": lambda: time.sleep(5)})
    assert Rows(file).problems == {"a": UNFINISHED}
    monkeypatch.setattr("benchmarks.gpu_rows.CASE_S", 0.1)
    Rows(file).measure({"a": lambda: time.sleep(5)})
    assert Rows(file).problems == {"a": "took longer than 0.1 s"}
    Rows(file).measure({"b": lambda: time.sleep(0.3) or {}, "c": lambda: time.sleep(5)}, {"b": 60.0})
    assert Rows(file).problems["b"] is None, "it has a limit of its own"
    assert Rows(file).problems["c"] == "took longer than 0.1 s"
    with pytest.raises(AlarmRang), alarm(0.05), suppress(Exception):
        time.sleep(5)
    compiled = torch.compile(lambda x: x * 2, backend=lambda graph, inputs: time.sleep(5))
    with pytest.raises(AlarmRang), alarm(0.05):
        compiled(torch.ones(3))


def test_case_that_needs_more_than_a_call_is_given_up_after_some_calls(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_rows.MIN_CASE_S", 0.2)
    file = tmp_path / "rows.json"
    cases = {"a": lambda: time.sleep(5), "b": dict}
    for _ in range(CUT_OFFS):
        assert Rows(file).problems.get("a", UNFINISHED) == UNFINISHED
        with pytest.raises(TimeIsOver):
            Rows(file, until=time.monotonic() + 0.4).measure(cases, {"a": 60.0})
    Rows(file).measure(cases)
    assert Rows(file).problems == {
        "a": f"the end of {CUT_OFFS} calls cut it off; give a call more time with --limit-s",
        "b": None,
    }


STUCK = """
import signal, sys
from pathlib import Path
from benchmarks import gpu_rows

gpu_rows.CASE_S, gpu_rows.GRACE_S = 0.1, 0.1
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
gpu_rows.Rows(Path(sys.argv[1])).measure({"a": signal.pause})
"""


def test_case_that_never_returns_to_python_ends_the_process(tmp_path):
    file = tmp_path / "rows.json"
    result = subprocess.run([sys.executable, "-c", STUCK, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "Timeout (" in result.stderr
    assert Rows(file).problems == {"a": UNFINISHED}


def test_trials_have_as_long_as_in_a_worker(tmp_path, monkeypatch):
    limits = {}
    monkeypatch.setattr(speed, "COMPILE_BACKEND", speed.COMPILE_BACKEND)
    monkeypatch.setattr(
        Rows, "measure", lambda rows, cases, own=None: limits.update(dict.fromkeys(cases, CASE_S) | (own or {}))
    )
    for step in ("options", "upscaler", "chain"):
        gpu_steps.main([step, str(tmp_path / f"{step}.json"), "--profile", "tiny"])
    compiled = {name: limit_s for name, limit_s in limits.items() if "compile" in name}
    assert len(compiled) > 5
    assert set(compiled.values()) == {TIMEOUT_S}
    assert limits["svd"] == CASE_S


NVIDIA_SMI = """#!/bin/sh
case "$2" in
*clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2;;
*clocks.sm*) echo "1230, 699.5, [N/A], 81, 0x0000000000000024";;
*) echo 0x0000000000000001;;
esac
"""


def test_rows_have_the_clock_and_the_power_of_the_gpu(tmp_path, monkeypatch):
    file = tmp_path / "nvidia-smi"
    file.write_text(NVIDIA_SMI)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    rows = tmp_path / "rows.json"
    Rows(rows).measure({"a": dict, "b": case([], "b", ValueError("no memory"))})
    state = {"clock_mhz": 1230.0, "power_w": 699.5, "power_limit_w": None, "temperature_c": 81.0}
    assert [row["gpu"] for row in rows_of(rows).values()] == [{**state, "limited_by": "power limit, temperature"}] * 2
    for broken in ("exit 9", "echo 12, 34", "echo a; kill -9 $$"):
        file.write_text(f"#!/bin/sh\n{broken}\n")
        Rows(rows).measure({broken: dict})
        assert rows_of(rows)[broken]["gpu"] == {}
    file.unlink()
    monkeypatch.setattr(gpu_state.shutil, "which", lambda name: None)
    Rows(rows).measure({"c": dict})
    assert rows_of(rows)["c"] == {**rows_of(rows)["c"], "gpu": {}, "problem": None}


def test_process_that_lost_its_gpu_leaves_the_other_measurements_to_the_next_one(tmp_path, monkeypatch):
    file, measured = tmp_path / "rows.json", []
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize():
        raise lost

    cases = {"a": case(measured, "a", lost), "b": case(measured, "b")}
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(TimeIsOver):
            Rows(file).measure(cases)
    Rows(file).measure(cases)
    assert measured == ["a", "b"]
    assert Rows(file).problems == {"a": f"RuntimeError: {lost}", "b": None}


PROGRAM = """
import json, os, sys, time
step, file = sys.argv[1:3]
begun = json.load(open(file))["rows"] if os.path.exists(file) else []
{body}
"""


@pytest.fixture
def own_steps(tmp_path, monkeypatch):
    """Return a function that replaces the process of a step by a program, and runs the command."""
    real = gpu_first_hour.subprocess.Popen

    def run(body, *arguments, step="machine"):
        def start(command, **options):
            return real([sys.executable, "-c", PROGRAM.format(body=body), *command[3:]], **options)

        monkeypatch.setattr(gpu_first_hour.subprocess, "Popen", start)
        return gpu_first_hour.main([step, "--results", str(tmp_path / "results"), *arguments])

    monkeypatch.setattr(gpu_first_hour, "package_folders", lambda: [str(ROOT)])
    return run


def test_process_that_cannot_start_has_a_row_with_its_exit_code(own_steps, tmp_path):
    assert own_steps("import no_such_package", "--out", str(tmp_path / "out")) == 0
    (row,) = rows_of(tmp_path / "out" / "01-machine.json").values()
    assert row["problem"] == f"{UNFINISHED}: exit code 1: ModuleNotFoundError: No module named 'no_such_package'"
    assert row["crashes"] == CRASHES
    with pytest.raises(SystemExit, match="got the results of no step"):
        gpu_results.main([str(tmp_path / "out"), "--page", str(tmp_path / "page.md")])


def test_process_that_does_not_end_is_killed_and_the_call_continues_later(own_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first_hour, "EXIT_S", 0.1)
    begun = time.monotonic()
    assert own_steps("time.sleep(60)", "--limit-s", "2") == TIME_IS_OVER
    assert time.monotonic() - begun < 20
    (row,) = rows_of(tmp_path / "results" / "01-machine.json").values()
    assert "killed at the end of the time of the call" in row["problem"]
    finish = 'json.dump({"complete": True, "rows": begun}, open(file, "w"))'
    # An empty folder gets the results of earlier calls, too.
    assert own_steps(finish, "--out", str(tmp_path / "empty")) == 0
    assert rows_of(tmp_path / "empty" / "01-machine.json").keys() == {row["name"]}


def test_results_and_compiled_kernels_are_in_a_relative_folder(own_steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = (
        'caches = [os.environ[name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")];'
        'json.dump({"complete": True, "rows": [{"name": name, "problem": None} for name in caches]}, open(file, "w"))'
    )
    assert own_steps(body, "--results", "relative") == 0
    caches = rows_of(tmp_path / "relative" / "01-machine.json")
    assert [Path(cache).is_relative_to(tmp_path / "relative") for cache in caches] == [True, True]


def test_each_lora_has_results_of_its_own(own_steps, tmp_path, monkeypatch):
    """Only one that is no file may be downloaded."""
    monkeypatch.chdir(tmp_path)
    body = (
        'row = {"name": sys.argv[-1], "problem": None, "offline": os.environ["HF_HUB_OFFLINE"]};'
        'json.dump({"complete": True, "rows": [row]}, open(file, "w"))'
    )
    (tmp_path / "own.safetensors").touch()
    for lora in ("own.safetensors", "owner/name"):
        assert own_steps(body, "--lora", lora, step="lora") == 0
    names = {}
    for file in (tmp_path / "results").glob("*-lora-*.json"):
        names |= {name: (file.name.partition("-")[2], row["offline"]) for name, row in rows_of(file).items()}
    assert names == {
        str(tmp_path / "own.safetensors"): ("lora-own.safetensors.json", "1"),
        "owner/name": ("lora-owner-name.json", "0"),
    }


@pytest.mark.slow
def test_tests_are_collected_without_ray_and_have_rows(tmp_path):
    """As on a machine with the packages of a bundle alone."""
    missing = "('ray', 'pyarrow', 'onnxruntime', 'cv2')"
    # On one CPU: each further process imports all tests.
    changes = f"import os, sys; sys.modules.update(dict.fromkeys({missing})); os.cpu_count = lambda: 1"
    (tmp_path / "sitecustomize.py").write_text(changes)
    file, path = tmp_path / "tests.json", os.pathsep.join((str(tmp_path), str(ROOT)))
    command = [sys.executable, "-m", "benchmarks.gpu_steps", "tests", str(file), "--profile", "tiny"]
    code = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    ).returncode
    rows = rows_of(file)
    assert (code, rows.pop("pytest -k 'not compile'")["problem"]) == (0, None)
    assert len([name for name in rows if "test_gpu.py::" in name]) > 15


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
            "gpu": {"clock_mhz": 1980.0, "power_w": 650.0, "limited_by": "power limit"},
        }
        for name, seconds in (("svd", 20.0), ("svd compile: full", 10.0))
    ]
    machine = {"gpu": "a card", "cpu": "a CPU", "python": "3.12", "packages": {"torch": "2.11", "torchao": None}}
    rows = [
        *measured,
        {"name": "tests/a.py::a", "problem": None},
        {"name": "tests/a.py::b", "problem": "failed: a | b"},
        {"name": "speeds", "problem": None, "tflop_per_s": 700.0, "gb_per_s": 3000.0, "link_gb_per_s": 50.0},
        {"name": "flux compile: True", "problem": None, "trial": {"speedup": 1.5, "error": ""}, "rejected": ""},
        {"name": "worker svd", "problem": None, "worker": {"start_s": 4.5, "first_s": 30.0}},
        {"name": "bytes svd", "problem": "other bytes: swapped", "levels": {"again": 0.0, "swapped": 0.25}},
    ]
    page = gpu_results.page([{"machine": machine, "card": "H100", "profile": "gpu-80gb", "rows": rows}])
    assert "| svd | 1024x576x25 | 20 |  | 40% | 0.5 | 1 | 2 | 14 | 15.5 | 1980 | 650 | power limit |" in page
    assert "| worker svd | 4.5 | 30 |" in page
    assert "| svd compile: full | 1024x576x25 | 10 | 2 | 40% |" in page
    assert "1 of 2 passed" in page
    assert "| tests/a.py::b | failed: a \\| b |" in page
    assert "| 16 bits, TFLOP/s | 700 | 989 |" in page
    assert "| flux compile: True | 1.5 |  | used |" in page
    assert "| bytes svd | again 0, swapped 0.25 |" in page


def test_results_of_a_cpu_or_of_several_cards_are_not_documented(folder, tmp_path):
    with pytest.raises(SystemExit, match="was measured on a CPU"):
        gpu_results.main([str(folder)])
    for number, card in enumerate(("H100", "L40S")):
        (tmp_path / f"{number}.json").write_text(json.dumps({"profile": "gpu", "card": card, "rows": []}))
    with pytest.raises(SystemExit, match="must be those of one profile on one kind of GPU"):
        gpu_results.main([str(tmp_path), "--page", str(tmp_path / "page.md")])
