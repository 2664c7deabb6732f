"""The lock file installs what both distributions ask for, from any index, with plain versions and hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "packaging" / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, list[Requirement]]:
    """Return name -> its entries, one for each version or marker."""
    found: dict[str, list[Requirement]] = {}
    for entry in re.split(r"\n(?=\S)", LOCK.strip()):
        requirement = Requirement(entry.split("\\")[0].strip())
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", entry), requirement
        found.setdefault(canonical(requirement.name), []).append(requirement)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


EXTRAS = PROJECT["optional-dependencies"] | CLIENT["optional-dependencies"]


def test_requirements_are_locked_to_versions_that_they_allow():
    extras = [each for name in ("postgres", "mcp") for each in EXTRAS[name]]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *CLIENT["dependencies"], *extras]):
        for entry in locked()[canonical(requirement.name)]:
            (pin,) = entry.specifier
            assert pin.operator == "==", entry
            assert requirement.specifier.contains(pin.version), f"{entry} is not {requirement}; run `make lock`"


def test_lock_names_no_index_no_local_version_and_no_second_onnxruntime():
    assert "://" not in LOCK
    assert "--index" not in LOCK
    assert "--find-links" not in LOCK
    assert not re.search(r"^[^ ]+==[^ ;]*\+", LOCK, re.MULTILINE)
    names = locked()
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names, "both own the folder onnxruntime/"
