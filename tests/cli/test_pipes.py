"""Output that programs read: through a pipe, by its reader, also in a terminal that can show nothing but ASCII."""

import json
import os
import subprocess
import sys

import pytest
import typer

from vidgen_ray.cli.app import PIPE_CLOSED, app
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter

ONE = "import sys; from vidgen_ray.cli import run_process; sys.exit(run_process())"
ALL = """
import json, sys
from vidgen_ray.cli import main
for words in json.load(sys.stdin):
    code = main(words)
    print(f"\\0{code}\\0", end="", flush=True)
"""
"""Runs commands one after another. The output of each ends with its exit code."""
PLAIN = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "NO_COLOR": "1"}


def check_bash(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


READ = {
    **dict.fromkeys(("schema", "schema manifest"), json.loads),
    "slurm SCRIPT -o OUT --gpus 1x80GB --time 600 -p demo": check_bash,
    **dict.fromkeys(
        (
            *("validate SCRIPT --json", "plan SCRIPT -p demo --json", "models list --json", "models check demo --json"),
            *("status OUT --json", "verify OUT --json", "gc OUT --json", "prune OUT --json", "retry OUT -p demo --json"),
            *("diff OUT OUT --json", "query OUT SQL --json", "score OUT --json", "doctor -p demo --json"),
            *("keys c2pa --out KEY --json", "keys new --tenant ada --file KEYS --json"),
        ),
        json.loads,
    ),
}
"""Command -> reader, which raises for output that it cannot read."""
READ_BY_OTHER_TESTS = {
    *("bench", "caption", "compare", "demo", "export", "film", "identity remove", "identity show", "logs", "models pull"),
    *("render", "review", "selftest", "shot", "show", "stage", "upscale"),
}
"""Commands with `--json` that render or need clips."""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Words of commands: a script, and an output folder with a finished shot, whose files are missing."""
    folder = tmp_path_factory.mktemp("pipes")
    script = folder / "s.jsonl"
    script.write_text(json.dumps({"prompt": "a café by the sea"}) + "\n", encoding="utf-8")
    writer = ManifestWriter(OutputFolder(folder / "out"), "r1", "s.txt")
    writer.add(ManifestRow(run="r1", script="s.txt", id="a", line=1, status="done", prompt="a café by the sea"))
    writer.close()
    files = {"SCRIPT": "s.jsonl", "OUT": "out", "KEY": "c2pa.pem", "KEYS": "keys.yaml"}
    return {**{name: str(folder / file) for name, file in files.items()}, "SQL": "SELECT id, prompt FROM clips"}


def words_of(command, names):
    return [names.get(word, word) for word in command.split()]


def test_output_is_read_by_programs(names):
    commands = [words_of(command, names) for command in READ]
    run = subprocess.run(
        [sys.executable, "-c", ALL], input=json.dumps(commands).encode(), capture_output=True, env={**os.environ, **PLAIN}
    )
    printed = run.stdout.decode("ascii").split("\0")
    wrong = {}
    for command, text, code in zip(READ, printed[::2], printed[1::2], strict=False):
        try:
            assert int(code) == command.startswith("verify")
            READ[command](text)
        except Exception as error:
            wrong[command] = f"{code} {error!r} {text[:300]}"
    assert wrong == {}
    assert len(printed) == 2 * len(READ) + 1, run.stderr.decode()[-1000:]
    assert "caf\\u00e9" in printed[2 * list(READ).index("query OUT SQL --json")]


def with_json(command, path=()):
    """Yield the names of commands with an option `--json`."""
    if isinstance(command, typer.core.TyperGroup):
        for name in command.list_commands(None):
            yield from with_json(command.get_command(None, name), (*path, name))
    elif any("--json" in each.opts for each in command.params):
        yield " ".join(path)


def test_every_command_with_json_is_read():
    tried = {name for name in with_json(typer.main.get_command(app)) for command in READ if command.startswith(f"{name} ")}
    assert set(with_json(typer.main.get_command(app))) == tried | READ_BY_OTHER_TESTS


def test_closed_reader_is_no_failure_with_a_traceback(names):
    """Run a command as in `vidgen COMMAND | head -0`."""
    read, write = os.pipe()
    os.close(read)
    running = {
        command: subprocess.Popen(
            [sys.executable, "-c", ONE, *words_of(command, names)],
            stdout=write,
            stderr=subprocess.PIPE,
            env={**os.environ, **PLAIN},
        )
        for command in ("schema", "status OUT --json", "slurm --help", "--version")
    }
    os.close(write)
    wrong = {}
    for command, process in running.items():
        _, messages = process.communicate(timeout=120)
        if process.returncode != PIPE_CLOSED or b"Traceback" in messages or b"Exception ignored" in messages:
            wrong[command] = f"{process.returncode} {messages.decode()[-300:]}"
    assert wrong == {}
