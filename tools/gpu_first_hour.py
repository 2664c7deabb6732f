"""First measurements on a machine with a GPU, the most valuable first. Run it again until it prints that all is measured.

It needs Python, torch and numpy, with the bundle of tools/make_gpu_bundle.sh (python3 -m tarfile -e gpu-bundle.tar.xz FOLDER),
or the environment of this project. No network, but for a --lora from Hugging Face. Each call ends within `--limit-s` seconds.

    python3 tools/gpu_first_hour.py                  # all steps, or some of those that --help lists
    python3 -m tools.gpu_results out/first-hour      # a page, and the seconds for later plans

Results are in out/first-hour, a JSON file per step, and copied to --out after each step; that folder may be empty at the start
of each call. On another machine, copy earlier results to out/first-hour first.
Exit codes: 0 all is measured, 3 run it again, 2 usage.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_rows import MIN_CASE_S, TIME_IS_OVER, TIMEOUT, Rows  # noqa: E402

STEPS = {
    "machine": 1,
    "chain": 9,
    "upscaler": 4,
    "memory": 6,
    "bytes": 5,
    "options": 34,
    "wan": 8,
    "swap": 3,
    "drill": 5,
    "small": 6,
    "tests": 4,
    "kernels": 2,
    "profile": 4,
    "worker": 5,
    "lora": 1,
    "others": 12,
    "compile": 9,
    "compile_tests": 6,
    "group": 12,
}
"""Step -> minutes on an H100, in the order of their value. Not measured: estimated from 15 to 40 s per load of a model, one to
two minutes per compilation, and the planned seconds of the stages. `group` needs two GPUs."""
STEPS_HELP = ", ".join(f"{step} ({minutes} min)" for step, minutes in STEPS.items())
RESULTS = Path("out/first-hour")
EXIT_S = 15.0
"""Seconds between the end of a step's time and that of its process."""
MAX_REASON = 300


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], metavar="STEP", help=f"default: all of them: {STEPS_HELP}")
    parser.add_argument("--out", type=Path, help="folder for a copy of the results")
    parser.add_argument("--results", type=Path, default=ROOT / RESULTS, help=f"default: {RESULTS} of the project")
    parser.add_argument("--profile", default="auto", help="default: auto; tiny on a CPU")
    parser.add_argument(
        "--lora",
        metavar="FILE_OR_REPOSITORY",
        help="LoRA for the step lora; OWNER/NAME is downloaded from Hugging Face",
    )
    parser.add_argument("--limit-s", type=float, default=510, help="longest call in seconds, e.g. 9000; default: 510")
    args = parser.parse_args(argv)
    # Steps run in another working folder.
    results = args.results.resolve()
    files = {step: results / f"{number:02}-{step}.json" for number, step in enumerate(STEPS, 1)}
    lora = None if args.lora is None else str(Path(args.lora).resolve()) if Path(args.lora).exists() else args.lora
    if lora:
        # Each LoRA has results of its own.
        files["lora"] = files["lora"].with_stem(f"{files['lora'].stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', args.lora)}")
    left = [step for step in STEPS if step in (args.steps or STEPS) and not Rows(files[step]).is_complete]
    if left:
        minutes = sum(STEPS[step] for step in left)
        print(f"left: {' '.join(left)}, about {minutes} minutes on an H100 (an estimate, not measured)", file=sys.stderr)
    until, is_over = time.monotonic() + args.limit_s, False
    for step in left:
        while not Rows(files[step]).is_complete and not is_over:
            # A process that crashed is started again, for the other measurements of the step.
            run_step(step, files[step], args.profile, lora, until)
            is_over = until - time.monotonic() < EXIT_S + MIN_CASE_S
            if args.out:
                shutil.copytree(results, args.out, dirs_exist_ok=True)
    print("run it again: there is more to measure" if is_over else "all is measured", file=sys.stderr)
    return TIME_IS_OVER if is_over else 0


def run_step(step: str, file: Path, profile: str, lora: str | None, until: float) -> None:
    """Run a step in a process of its own. How it ends is a row, unless it ends well."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_steps",
        step,
        str(file),
        "--profile",
        profile,
        "--until",
        str(until - EXIT_S),
        *(["--lora", lora] if lora else []),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0" if step == "lora" and lora and not Path(lora).exists() else "1",
        "PYTHONPATH": os.pathsep.join(package_folders()),
        "VIDGEN_CACHE": os.environ.get("VIDGEN_CACHE", str(ROOT / "out" / "cache")),
        # Results of the compilers, for the next call.
        "TORCHINDUCTOR_CACHE_DIR": str(file.parent / "inductor"),
        "TRITON_CACHE_DIR": str(file.parent / "inductor" / "triton"),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    log = file.with_suffix(".log")
    begin = log.stat().st_size if log.exists() else 0
    code: int | None = None
    with (
        log.open("ab") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            code = process.wait(until - time.monotonic())
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also processes that it has started.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    print(f"{step}: {'more to measure' if code in (None, TIME_IS_OVER) else f'exit code {code}'}, {file}", file=sys.stderr)
    if code not in (0, TIME_IS_OVER):
        lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()] or [
            "no output"
        ]
        # The traceback of a process that did not end follows.
        reason = next((line for line in lines if line.startswith("Timeout (")), lines[-1])
        how = TIMEOUT if code is None else f"exit code {code}"
        Rows(file).add_exit(step, f"{how}: {reason[:MAX_REASON]}")


@cache
def package_folders() -> list[str]:
    """Return the project, and the packages of its bundle that this Python lacks."""
    has_torchvision = (
        subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0
    )
    return [str(ROOT), str(ROOT / "site"), *([] if has_torchvision else [str(ROOT / "if-missing")])]


if __name__ == "__main__":
    sys.exit(main())
