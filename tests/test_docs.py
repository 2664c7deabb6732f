"""Documentation: links resolve, named modules exist, commands have the documented options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vidgen_ray.cli.app import app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vidgen_ray"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def modules_in_table(package: str) -> set[str]:
    """Return the names in the first column of the table of a package in architecture.md."""
    table = ARCHITECTURE.split(f"| module of `{package}/` |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}


def test_generated_tables_are_current():
    subprocess.run([sys.executable, ROOT / "docs" / "field_tables.py", "--check"], cwd=ROOT, check=True)


@each_page
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text())
    paths = [link or source for link, source in targets if not (link or source).startswith(("http", "#"))]
    assert [path for path in paths if not (page.parent / path.split("#")[0]).exists()] == []


@each_page
def test_named_repository_paths_exist(page):
    paths = re.findall(r"`((?:vidgen_ray|tests|training|benchmarks|serve_configs|jobs|packaging)/[\w./-]+)`", page.read_text())
    # Files that CONTRIBUTING.md adds in its worked example.
    examples = {"vidgen_ray/stages/colours.py"}
    assert [path for path in paths if path not in examples and not (ROOT / path).exists()] == []


@each_page
def test_named_tests_exist(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []


@each_page
def test_named_commands_and_options_exist(page):
    known = typer.main.get_command(app).commands
    for line in re.findall(r"(?:^|`)(vidgen [^`\n]*)", page.read_text(), re.MULTILINE):
        if not (words := shlex.split(line, comments=True)[1:]) or words[0].startswith("-"):
            continue
        command = known[words[0]]
        if hasattr(command, "commands") and len(words) > 1:
            command = command.commands[words[1]]
        accepted = {option for parameter in command.params for option in parameter.opts}
        options = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert options <= accepted, line


def test_architecture_tree_lists_every_top_level_module():
    tree = ARCHITECTURE.split("```")[1]
    listed = {name.rstrip("/") for name in re.findall(r"^  ([\w./]+)", tree, re.MULTILINE)}
    present = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert {name for name in listed if "/" not in name} == present


@pytest.mark.parametrize("package", ["batch", "online"])
def test_architecture_tables_list_every_module(package):
    present = {path.stem for path in (PACKAGE / package).iterdir() if not path.name.startswith("__")}
    assert modules_in_table(package) == present
