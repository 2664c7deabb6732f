"""`vidgen doctor`: each check with a good and a bad machine."""

import json
import os
import sys
from collections import namedtuple
from pathlib import Path
from resource import RLIM_INFINITY
from types import SimpleNamespace

import pytest

from vidgen_ray.cli import doctor as checks
from vidgen_ray.cli import main
from vidgen_ray.cli.doctor import Finding
from vidgen_ray.errors import SetupError
from vidgen_ray.planner import Cluster, Node, cluster
from vidgen_ray.profile import load_profile
from vidgen_ray.stages import speed
from vidgen_ray.weights.inventory import LocalWeights
from vidgen_ray.weights.ledger import licence_of

Disk = namedtuple("Disk", "total free")
H100, OLD = ([[driver, "NVIDIA H100 80GB HBM3", "81559"]] for driver in ("570.86", "515.105"))
GB = 10**9


def disk(total_gb, free_gb):
    return lambda folder: Disk(total_gb * GB, free_gb * GB)


def torch(cuda="12.8", gpus=1, archs=("sm_80", "sm_90"), capability=(9, 0)):
    return SimpleNamespace(
        __version__="2.9",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_arch_list=lambda: list(archs),
            get_device_capability=lambda n: capability,
        ),
    )


def failing_session(*_):
    raise SetupError("a test model runs on CPUExecutionProvider, the profile asks for CUDAExecutionProvider")


def session(*_):
    return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])


def machine(*gpus):
    return Cluster((Node(gpus, 16, 128),))


HERE, NOWHERE = Path(__file__), Path("/nowhere")
GPU_24GB, GPU_80GB = map(load_profile, ("gpu-24gb", "gpu-80gb"))
FLUX = licence_of("hub:black-forest-labs/FLUX.1-dev")
CASES = [
    (checks.check_python((3, 12)), "pass", "Python 3.12", None),
    (checks.check_python((3, 10)), "fail", "Python 3.10", "use Python 3.11, 3.12 or 3.13"),
    (checks.check_driver(True, "12.8", lambda: H100, [HERE]), "pass", "driver 570.86: NVIDIA H100 80GB HBM3 (80 GB)", None),
    (checks.check_driver(True, "13.0", lambda: H100, [HERE]), "fail", "NVIDIA driver 580", "torchvision for CUDA 12:"),
    (checks.check_driver(True, "12.8", lambda: OLD, [HERE]), "fail", "needs the NVIDIA driver 525", "for CUDA 11:"),
    (checks.check_driver(False, "13.0", lambda: H100, [HERE]), "warn", "driver 580 or newer", "update it"),
    (checks.check_driver(True, "13.0", lambda: H100, [NOWHERE]), "fail", "no GPU: none of /nowhere", "driver 580 or newer;"),
    (checks.check_driver(True, None, lambda: H100, [NOWHERE]), "fail", "no GPU", "driver 580 or newer; in a container: docker"),
    (checks.check_driver(False, None, lambda: None, [NOWHERE]), "pass", "this profile needs none", None),
    (checks.check_driver(True, "13.0", lambda: None, [HERE]), "fail", "nvidia-smi shows no GPU", "nvidia-smi"),
    (checks.check_torch(True, torch()), "pass", "CUDA 12.8, 1 GPUs", None),
    (checks.check_torch(True, torch(cuda=None)), "fail", "built for the CPU", "pip install"),
    (checks.check_torch(True, torch(gpus=0)), "fail", "finds no GPU", "driver 525 or newer"),
    (checks.check_torch(True, torch(capability=(12, 0))), "fail", "compute capability 12.0", "torch release"),
    (checks.check_torch(True, torch(archs=["compute_90"], capability=(12, 0))), "pass", "1 GPUs", None),
    (checks.check_torch(True, torch(archs=["sm_90"], capability=(8, 9))), "fail", "only sm_90", "torch release"),
    (checks.check_torch(False, torch(cuda=None)), "pass", "CUDA none", None),
    (checks.check_onnxruntime({"onnxruntime": "99.0", "onnxruntime-gpu": "1.31.1"}), "pass", "onnxruntime-gpu 1.31.1", None),
    (checks.check_onnxruntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}), "fail", "are both installed", "pip"),
    (checks.check_onnxruntime({"onnxruntime": "1.32.0"}), "fail", "not installed", "pip uninstall -y onnxruntime"),
    (checks.check_provider("cpu", session), "pass", "CPUExecutionProvider", None),
    (checks.check_provider("cuda", failing_session), "fail", "asks for CUDAExecutionProvider", "pip uninstall"),
    (checks.check_cuda_pair("cuda", "13.0", "13.1"), "pass", "CUDA 13.0, torch for CUDA 13.1", None),
    (checks.check_cuda_pair("cuda", "13.0", "12.8"), "fail", "torch for CUDA 12.8", "device: cpu"),
    (checks.check_cuda_pair("cuda", None, "12.8"), "warn", "CUDA unknown", "by hand"),
    (checks.check_video(True, ["libx264"]), "pass", "libx264, decord", None),
    (checks.check_video(False, ["libx264"]), "pass", "without decord PyAV decodes", None),
    (checks.check_video(True, ["mpeg4"]), "fail", "no libx264", "pip install"),
    (checks.check_disk(HERE, usage=disk(1000, 200)), "pass", "200 GB free of 1000 GB", None),
    (checks.check_disk(HERE, usage=disk(1000, 19)), "warn", "19 GB free", "free 20 GB"),
    (checks.check_disk(HERE, usage=disk(10_000, 400)), "warn", "400 GB free", "free 20 GB"),
    (checks.check_disk(NOWHERE / "a", usage=disk(1000, 0.5)), "fail", "/nowhere/a", "free some space on the disk of /"),
    (checks.check_shared_memory(HERE.parent, disk(64, 64)), "pass", "59.6 GB", None),
    (checks.check_shared_memory(HERE.parent, disk(0.064, 0.064)), "warn", "0.1 GB", "--shm-size=8g"),
    (checks.check_shared_memory(NOWHERE), "warn", "no /nowhere", "tmpfs"),
    (checks.check_open_files((65_536, 65_536)), "pass", "65,536 open files", None),
    (checks.check_open_files((RLIM_INFINITY, RLIM_INFINITY)), "pass", "unlimited open files", None),
    (checks.check_open_files((1024, 4096)), "warn", "1,024 open files, at most 4,096", "ulimit -n 65536"),
    (checks.check_plan(GPU_24GB, machine(23.6), None), "pass", "can render clips of 25 frames and 4096x2304 pixels", None),
    (checks.check_plan(GPU_80GB, machine(23.6), None), "fail", "the largest GPU has 23.6", "use a profile for this GPU"),
    (checks.check_plan(GPU_80GB, machine(), None), "fail", "there is no GPU", "use a profile for this GPU"),
    (checks.check_plan(GPU_24GB, machine(23.6), 30), "fail", "the nodes have 30 GB", "docker run --memory"),
    (checks.check_ray_version("2.60.0"), "pass", "Ray 2.60.0", None),
    (checks.check_ray_version("2.9.3"), "fail", "Ray 2.9.3", "pip install"),
    (checks.check_ray_version("3.0.0.dev0"), "pass", "Ray 3.0.0.dev0", None),
    (checks.check_ray_token({"RAY_AUTH_MODE": "disabled"}), "warn", "anyone who reaches", "RAY_AUTH_MODE=token"),
    (checks.check_ray_token({}, NOWHERE), "pass", "no token", None),
    (checks.check_ray_token({"RAY_AUTH_MODE": "token"}, NOWHERE), "fail", "but no /nowhere", "ray get-auth-token --generate"),
    (checks.check_licences("p", [FLUX, None], set()), "warn", "not accepted on this machine: FLUX.1-dev", "pull p"),
    (checks.check_licences("p", [FLUX], {"flux-1-dev"}), "pass", "1 restricted licences", None),
]  # fmt: skip


@pytest.mark.parametrize(("finding", "status", "text", "fix"), CASES, ids=[f"{case[0].check}-{case[1]}" for case in CASES])
def test_check(finding, status, text, fix):
    assert finding.status == status
    assert text in finding.text
    assert (finding.fix is None) if fix is None else (fix in finding.fix)


@pytest.mark.parametrize(
    ("check", "package"), [(lambda: checks.check_provider("cpu"), "onnx"), (lambda: checks.check_video(), "av")]
)
def test_missing_package_is_a_finding(monkeypatch, check, package):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    finding = check()
    assert (finding.status, finding.text) == ("fail", f"the package {package} is not installed")
    assert finding.fix == f"pip install {package}"


def test_every_finding_that_is_not_a_pass_says_what_to_do():
    assert [finding for finding, *_ in CASES if finding.status != "pass" and not finding.fix] == []


def test_container_limit_is_read_from_both_versions_of_control_groups(tmp_path):
    assert checks.memory_limit_gb(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.memory_limit_gb(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{16 * 2**30}\n")
    assert checks.memory_limit_gb(tmp_path) == 16
    (tmp_path / "memory.max").rename(tmp_path / "unused")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(64 * 2**30))
    assert checks.memory_limit_gb(tmp_path) == 64


def test_compile_needs_a_c_compiler_and_the_headers_of_python(tmp_path, monkeypatch):
    compiling = GPU_80GB.actors["svd"].model_copy(update={"options": {"compile": True}})
    profile = GPU_80GB.model_copy(update={"actors": {"svd": compiling}})
    monkeypatch.setattr(speed, "COMPILE_BACKEND", "inductor")
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    assert checks.check_compiler(profile).fix == "pip install triton"
    monkeypatch.setattr(speed, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert checks.check_compiler(profile) == Finding(
        "compiler", "fail", "compile needs a C compiler on a GPU", "apt-get install gcc libc6-dev, or set CC"
    )
    for path in (tmp_path / "gcc", tmp_path / "Python.h"):
        path.touch(mode=0o755)
    monkeypatch.setattr(speed.sysconfig, "get_path", lambda name: str(tmp_path))
    assert checks.check_compiler(profile).status == "pass"
    (tmp_path / "Python.h").unlink()
    assert "python3-dev" in checks.check_compiler(profile).fix
    monkeypatch.setenv("CC", "no-such-compiler")
    assert checks.check_compiler(profile).text == "compile needs a C compiler on a GPU"
    assert checks.check_compiler(GPU_80GB.model_copy(update={"actors": {}})) is None


def test_wsl2_needs_its_own_device_file(tmp_path):
    kernel = tmp_path / "version"
    kernel.write_text("Linux version 6.6.87.2-microsoft-standard-WSL2")
    assert checks.check_wsl(True, kernel, HERE, HERE.parent).status == "pass"
    assert checks.check_wsl(True, kernel, HERE, NOWHERE).status == "warn"
    assert checks.check_wsl(True, kernel, NOWHERE, HERE.parent).status == "fail"
    assert checks.check_wsl(False, kernel, NOWHERE, HERE.parent).status == "warn"
    kernel.write_text("Linux version 6.8.0-generic")
    assert checks.check_wsl(True, kernel, HERE, HERE.parent) is None


def test_gpus_are_detected_on_wsl2(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: card)
    monkeypatch.setattr(cluster, "GPU_DEVICES", (NOWHERE, tmp_path / "dxg"))
    assert cluster.this_machine().gpus == ()
    (tmp_path / "dxg").touch()
    assert cluster.this_machine().gpus == (24,)
    assert cluster.this_machine().card == "RTX 4090"


def test_token_must_be_readable_only_by_its_owner(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    assert checks.check_ray_token({"RAY_AUTH_MODE": "token"}, tmp_path).fix == f"chmod 600 {token}"
    token.chmod(0o600)
    assert checks.check_ray_token({"RAY_AUTH_MODE": "token"}, tmp_path).status == "pass"
    assert checks.check_ray_token({}, tmp_path).fix == "export RAY_AUTH_MODE=token"


def test_missing_weights_name_the_command_to_download_them():
    weights = [
        LocalWeights("builtin:realesrgan", "built in", None, None, None),
        LocalWeights("hub:a/b", "missing", None, None, "weights 'hub:a/b': not on this machine; run something"),
    ]
    present, missing = checks.check_weights("gpu-80gb", weights, ["hub:a/b"])
    (_, unneeded) = checks.check_weights("gpu-80gb", weights, [])
    assert unneeded == Finding("weights", "pass", "hub:a/b: not here, and not needed by the default chain")
    assert (present.status, present.text) == ("pass", "builtin:realesrgan: built in")
    assert missing == Finding("weights", "fail", "weights 'hub:a/b': not on this machine", "vidgen models pull gpu-80gb")


def test_session_of_onnxruntime_is_opened_for_real():
    assert checks.check_provider("cpu").text == "sessions run on CPUExecutionProvider"
    if not os.path.exists("/dev/nvidiactl"):
        assert checks.check_provider("cuda").status == "fail"


def test_doctor_exits_with_4_if_weights_are_missing(capsys):
    assert main(["doctor", "-p", "gpu-80gb", "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    missing = [finding for finding in report["findings"] if finding["check"] == "weights" and finding["status"] == "fail"]
    assert [finding["fix"] for finding in missing] == ["vidgen models pull gpu-80gb"] * 5
    assert report["failed"] >= len(missing)


def test_doctor_prints_findings_of_a_cpu_profile(capsys):
    assert main(["doctor", "-p", "tiny"]) in (0, 4)
    out = capsys.readouterr().out
    assert "builtin:tiny/flux: built in" in out
    counts, summary = out.strip().splitlines()[-2:]
    assert counts.endswith("passed")
    assert summary.startswith("This machine can render clips of 8 frames and 256x128 pixels with tiny, at ")
