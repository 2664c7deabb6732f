"""The dependencies on aarch64, such as GH200 and GB10: resolved, not run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")


@pytest.mark.slow
@pytest.mark.skipif(not UV.exists(), reason="needs uv")
def test_dependencies_have_wheels_for_aarch64():
    platform = ["--python-version", "3.12", "--python-platform", "aarch64-manylinux_2_39", "--only-binary", ":all:"]
    command = [UV, "pip", "compile", "pyproject.toml", "--extra", "quantization", "--quiet", *platform]
    resolved = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "dns error" in resolved.stderr or "Failed to fetch" in resolved.stderr:
        pytest.skip("needs a package index")
    assert resolved.returncode == 0, resolved.stderr
    names = {line.partition("==")[0] for line in resolved.stdout.splitlines() if "==" in line}
    assert names >= {"torch", "onnxruntime-gpu", "ray", "av", "torchao"}
