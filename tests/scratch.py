"""Copies of the project that tests may change, and the steps of CONTRIBUTING.md applied to them."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("vidgen_ray", "tests", "examples", "docs", "pyproject.toml")
STEP = re.compile(r'<!-- (create|insert) (\S+)(?: after "([^\n]*?)")? -->\n```\w+\n(.*?)```', re.DOTALL)


class ScratchProject:
    """A copy of the project under `folder`. Commands run in it import the copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)

    def create(self, path: str, text: str) -> None:
        assert not (self.folder / path).exists(), f"{path} exists already"
        (self.folder / path).write_text(text)

    def insert(self, path: str, after: str, text: str) -> None:
        """Insert text behind the one line that begins with `after`. Below a line ending in ":" it is indented by two."""
        lines = (self.folder / path).read_text().splitlines(keepends=True)
        (number,) = [number for number, line in enumerate(lines) if line.startswith(after)]
        indent = "  " if after.endswith(":") else after[: len(after) - len(after.lstrip())]
        lines.insert(number + 1, textwrap.indent(textwrap.dedent(text), indent))
        (self.folder / path).write_text("".join(lines))

    def apply_steps(self, document: str) -> list[str]:
        """Apply the marked code blocks of a document. Returns the changed paths, each once."""
        steps = STEP.findall(document)
        for action, path, after, text in steps:
            if action == "create":
                self.create(path, text)
            else:
                self.insert(path, after, text)
        return list(dict.fromkeys(path for _, path, _, _ in steps))

    def run(self, *command: str, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python COMMAND...` and fail with its output if it fails."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder)}
