"""Documentation: links resolve, named modules exist, commands have the documented options, plans the documented numbers."""

import ast
import json
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from benchmarks import accuracy, memory_report, rivals
from tests.conftest import ASTRONAUT, SYNTHETIC
from tools.check_names import defined_names
from vidgen_ray.cli.app import app, run_command
from vidgen_ray.planner.cluster import CARDS
from vidgen_ray.profile import load_profile
from vidgen_ray.weights import resolve

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/*.md", "benchmarks/README.md", "clients/python/README.md", ".github/ISSUE_TEMPLATE/*.yml")
TEXTS = {page: page.read_text() for pattern in PAGES for page in sorted(ROOT.glob(pattern))}


def test_generated_tables_are_current():
    tables = runpy.run_path(str(ROOT / "docs" / "field_tables.py"))
    assert tables["main"](check=True) == 0


def test_names_in_the_reference_exist():
    for name in re.findall(r"\.\. auto\w+:: (\S+)", (ROOT / "docs" / "reference.md").read_text()):
        pkgutil.resolve_name(name)


def test_names_in_the_glossary_are_those_of_the_code():
    defined = {name for path in (ROOT / "vidgen_ray").rglob("*.py") for name in defined_names(ast.parse(path.read_text()))}
    named = re.findall(r"^- .*\((.*)\)$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(named) > 20
    assert {name for cell in named for name in re.findall(r"`(\w+)`", cell)} <= defined


def test_relative_links_resolve():
    missing = []
    for page, text in TEXTS.items():
        targets = [link or source for link, source in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)]
        paths = [target.split("#")[0] for target in targets if not target.startswith(("http", "#"))]
        missing += [(page, path) for path in paths if not (page.parent / path).exists()]
    assert missing == []


def test_named_repository_paths_and_tests_exist():
    folders = "vidgen_ray|tests|training|benchmarks|serve_configs|packaging|clients"
    # The file that CONTRIBUTING.md adds in its worked example.
    examples = {"vidgen_ray/stages/ltx95.py"}
    missing = []
    for page, text in TEXTS.items():
        paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)
        missing += [(page, path) for path in paths if path not in examples and not (ROOT / path).exists()]
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
        missing += [(page, name) for file, name in tests if f"def {name}(" not in (ROOT / file).read_text()]
    assert missing == []


def test_named_commands_have_these_options_and_those_in_blocks_of_code_can_be_parsed():
    vidgen = typer.main.get_command(app)
    for page, text in TEXTS.items():
        for inline, line in re.findall(r"(^|`)(vidgen [^`\n]*)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            if not words or words[0].startswith("-"):
                continue
            words = words[: words.index(">")] if ">" in words else words
            command = vidgen.get_command(None, words.pop(0))
            if hasattr(command, "commands") and words:
                command = command.commands[words.pop(0)]
            accepted = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= accepted, (page, line)
            try:
                inline or command.make_context(line, words)
            except Exception as error:
                pytest.fail(f"{page.name}: {line}: {error}")


def test_first_page_is_short_and_moves():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    file = ROOT / "docs" / "images" / "front.webp"
    with Image.open(file) as picture:
        assert picture.n_frames > 24
    assert file.stat().st_size <= 1_000_000


RUN = {"shot", "validate", "plan", "slurm"}
"""Commands of the README's starts that run without a GPU, downloads and Ray. Of the others only the words are checked."""


@pytest.mark.parametrize("start", [pytest.param("A CPU", marks=pytest.mark.slow), "One GPU", "A cluster"])
def test_starts_of_the_readme(start, tmp_path, monkeypatch, capsys):
    block = (ROOT / "README.md").read_text().split(f"**{start}")[1].split("```\n")[1]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    # Without the Slurm of this machine.
    monkeypatch.setenv("PATH", str(tmp_path))
    run = []
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "echo":
            Path(words[-1]).write_text(words[0])
        elif words[0] in RUN:
            assert run_command(words) == 0, line
            run.append(words[0])
    assert {"A CPU": ["shot", "validate"], "One GPU": ["plan"], "A cluster": ["plan", "slurm"]}[start] == run
    if start == "A CPU":
        assert list(Path("out/first/shots").glob("*/*/hd.mp4"))


TYPED_PAGES = ("README.md", "docs/library.md", "docs/ray-data.md", "docs/safety.md", "docs/client.md")
"""Pages with code for the packages of this project."""
MODELS = """
from typing import Any
from vidgen_ray import Shot, read_manifest
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.planner import parse_gpus
from vidgen_ray.profile import ActorProfile, ProvenanceSettings
from vidgen_ray.safety import Consent, SafetyChecker
from vidgen_ray.shot import LoraRef, VideoLora

consent = Consent(subject="a", basis="self")
shot = Shot(prompt="x", width=64, lora=(LoraRef(path="a"), VideoLora(path="b", weight=0.5)), consent=consent)
ProvenanceSettings(metadata="private"), ProvenanceSettings(), ActorProfile(), RenderOptions(cluster=parse_gpus("6x80GB"))
"""
MYPY = """
[mypy]
strict = True
plugins =
mypy_path = {root}:{root}/clients/python
follow_imports = silent
disable_error_code = import-untyped
[mypy-ray.*,torch.*,diffusers.*,transformers.*,pyarrow.*,av.*,cv2.*,scipy.*,spandrel.*]
ignore_missing_imports = True
follow_imports = skip
"""


@pytest.mark.slow
def test_documented_code_has_types_that_mypy_accepts_without_plugins(tmp_path):
    """Users need no plugin of pydantic, and pyright has none. Blocks of a page follow one another."""
    for page in TYPED_PAGES:
        code = "".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))
        assert "import" in code
        (tmp_path / f"{Path(page).stem.replace('-', '_')}.py").write_text(code)
    (tmp_path / "models.py").write_text(MODELS + "checker: SafetyChecker\nfrom safety import make\nchecker = make()\n")
    # A function of the script from which this page quotes.
    with (tmp_path / "ray_data.py").open("r+") as file:
        code = file.read()
        file.seek(0)
        file.write(
            code.replace("\nideas =", "\ndef describe_clip(row: dict[str, Any]) -> dict[str, Any]:\n    return row\nideas =", 1)
        )
    (tmp_path / "mypy.ini").write_text(MYPY.format(root=ROOT))
    cache = ROOT / ".pytest_cache" / "mypy"
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(cache), *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_of_the_rivals_are_the_stored_results():
    rows = json.loads(rivals.STORED.read_text())["rows"]
    assert rivals.CHART.read_text() == rivals.chart(rows)
    assert "\n".join(rivals.published_table(rows)) in (ROOT / "benchmarks" / "README.md").read_text()


def test_accuracy_page_has_the_plans_of_today(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    text = accuracy.PAGE.read_text()
    assert accuracy.page(text) == text, "run python -m benchmarks.accuracy --write"
    without_figure = re.findall(r"No public figure of these models:\*\* (.*)\.", text)[0].split(", ")
    with_figure = {row["card"] for row in accuracy.figures()["seconds"]}
    assert {*without_figure, *with_figure} >= {card.name for card in CARDS if card.name != "GH200 144 GB"}
    assert not with_figure & set(without_figure)


def test_memory_of_the_models_is_that_of_the_plan():
    table = (ROOT / "docs" / "models.md").read_text().split("| slot | choice |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    documented = {row[3]: row[5] for row in rows}
    face_pack_gb = f"{load_profile('gpu-80gb').actors['instantid'].memory_gb:g}"
    face_packs = dict.fromkeys(("antelopev2", "AuraFace, CenterFace"), face_pack_gb)
    assert documented == {**memory_report.model_cells(), **face_packs}


NAMED = {"A100, 80 GB": "A100-80GB", "H100 with `-p open`": "H100"}
OPEN = {"width": 1280, "height": 704, "num_frames": 81, "lora": None}
OTHER_FIELDS = {"RTX 4080, 16 GB": {"lora": None}, "H100 with `-p open`": OPEN}


@pytest.mark.parametrize(
    "card", [*OTHER_FIELDS, "RTX 4090, 24 GB", "RTX 5090, 32 GB", "L40S, 48 GB", "A100, 80 GB", "H100, 80 GB"]
)
def test_documented_plans_are_current(tmp_path, monkeypatch, capsys, card):
    """The plan in planning.md, and the seconds of a clip in the README."""
    name = NAMED.get(card, card.partition(",")[0].replace(" ", "-"))
    arguments = ["plan", "script.jsonl", "--gpus", f"1x{name}", *(["-p", "open"] if "open" in card else [])]
    shutil.copy(resolve("builtin:tiny/lora.safetensors"), tmp_path / "lora.safetensors")
    shutil.copy(ASTRONAUT, tmp_path / "face.jpg")
    shot = {"face_image": "face.jpg", "lora": "lora.safetensors", "consent": SYNTHETIC, "num_frames": 25, "scale": 4}
    shot = {key: value for key, value in {"width": 1024, "height": 576, **shot, **OTHER_FIELDS.get(card, {})}.items() if value}
    lines = [json.dumps({"prompt": f"shot {number}", **shot}) for number in range(100)]
    (tmp_path / "script.jsonl").write_text("\n".join(lines))
    # Without measurements of this machine.
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 0
    plan, _, licences = capsys.readouterr().out.partition("\nweights ")
    assert licences
    seconds = round(3600 / float(re.findall(r"^rate +([\d.]+) shots per hour", plan, re.MULTILINE)[0]))
    assert f"| {card} | {seconds} |" in (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "planning.md").read_text()
    documented_plans = page.split(f"$ vidgen {' '.join(arguments)}\n")[1:]
    assert len(documented_plans) == (name == "RTX-4090")
    for documented in documented_plans:
        expected = plan.partition("\nconsidered ")[0].strip()
        assert [line.rstrip() for line in expected.splitlines()] == documented.split("\n```")[0].splitlines()
