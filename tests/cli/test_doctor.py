"""`vidgen doctor`: each check with a good and a bad machine."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import RLIM_INFINITY
from types import SimpleNamespace

import av
import grpc
import pytest

from vidgen_ray.cli import doctor as checks
from vidgen_ray.cli import main
from vidgen_ray.errors import SetupError
from vidgen_ray.nets.faces import open_session
from vidgen_ray.nets.weight_files import library_errors
from vidgen_ray.planner import cluster
from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.profile import load_profile
from vidgen_ray.stages import speed
from vidgen_ray.weights.ledger import licence_of

H100, OLD = ([[driver, "NVIDIA H100 80GB HBM3", "81559"]] for driver in ("570.86", "515.105"))
GB10 = [["580.126", "NVIDIA GB10", "[N/A]"]]


def disk(total_gb, free_gb):
    return lambda folder: SimpleNamespace(total=total_gb * 10**9, free=free_gb * 10**9)


def torch(cuda="12.8", gpus=1, archs=("sm_80", "sm_90"), capability=(9, 0)):
    found = SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        get_arch_list=lambda: list(archs),
        get_device_capability=lambda n: capability,
    )
    return SimpleNamespace(__version__="2.9", version=SimpleNamespace(cuda=cuda), cuda=found)


def failing_session(*_):
    raise SetupError("a test model runs on CPUExecutionProvider, the profile asks for CUDAExecutionProvider")


def machine(*gpus):
    return Cluster((Node(gpus, 16, 128),))


HERE, NOWHERE = Path(__file__), Path("/nowhere")
GPU_24GB, GPU_80GB = map(load_profile, ("gpu-24gb", "gpu-80gb"))
FLUX = licence_of("hub:black-forest-labs/FLUX.1-dev")
CASES = [
    (checks.check_python((3, 10)), "fail", "Python 3.10", "use Python 3.11, 3.12 or 3.13"),
    (checks.check_driver(True, "12.8", lambda: H100, [HERE]), "pass", "driver 570.86: NVIDIA H100 80GB HBM3 (80 GB)", None),
    (checks.check_driver(True, "13.0", lambda: GB10, [HERE]), "pass", "driver 580.126: NVIDIA GB10 (memory N/A)", None),
    (checks.check_driver(True, "13.0", lambda: H100, [HERE]), "fail", "NVIDIA driver 580", "torchvision for CUDA 12:"),
    (checks.check_driver(True, "12.8", lambda: OLD, [HERE]), "fail", "needs the NVIDIA driver 525", "for CUDA 11:"),
    (checks.check_driver(False, "13.0", lambda: H100, [HERE]), "warn", "driver 580 or newer", "update it"),
    (checks.check_driver(True, "13.0", lambda: H100, [NOWHERE]), "fail", "no GPU: none of /nowhere", "driver 580 or newer;"),
    (checks.check_driver(False, None, lambda: None, [NOWHERE]), "pass", "this profile needs none", None),
    (checks.check_driver(True, "13.0", lambda: None, [HERE]), "fail", "nvidia-smi shows no GPU", "nvidia-smi"),
    (checks.check_torch(True, torch()), "pass", "CUDA 12.8, 1 GPUs", None),
    (checks.check_torch(True, torch(cuda=None)), "fail", "built for the CPU", "pip install"),
    (checks.check_torch(True, torch(gpus=0)), "fail", "finds no GPU", "driver 525 or newer"),
    (checks.check_torch(True, torch(capability=(12, 0))), "fail", "compute capability 12.0", "torch release"),
    (checks.check_torch(True, torch(archs=["compute_90"], capability=(12, 0))), "pass", "1 GPUs", None),
    (checks.check_torch(True, torch(archs=["sm_90"], capability=(8, 9))), "fail", "only sm_90", "torch release"),
    (checks.check_onnxruntime({"onnxruntime": "99.0", "onnxruntime-gpu": "1.31.1"}), "pass", "onnxruntime-gpu 1.31.1", None),
    (checks.check_onnxruntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}), "fail", "are both installed", "pip"),
    (checks.check_onnxruntime({"onnxruntime": "1.32.0"}), "fail", "not installed", "pip uninstall -y onnxruntime"),
    (checks.check_provider("cuda", failing_session), "fail", "asks for CUDAExecutionProvider", "pip uninstall"),
    (checks.check_cuda_pair("cuda", "13.0", "12.8"), "fail", "torch for CUDA 12.8", "device: cpu"),
    (checks.check_cuda_pair("cuda", None, "12.8"), "warn", "CUDA unknown", "by hand"),
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
    (checks.check_plan(GPU_80GB, machine(23.6), None), "fail", "the largest GPU has 23.6", "use a profile for this machine"),
    (checks.check_plan(GPU_24GB, machine(23.6), 30), "fail", "the nodes have 30 GB", "docker run --memory"),
    (checks.check_plan(GPU_80GB, machine(), None), "fail", "there is no GPU", "such as demo"),
    (checks.check_ray_version("2.9.3"), "fail", "Ray 2.9.3", "pip install"),
    (checks.check_ray_version("2.60.1"), "pass", "Ray 2.60.1", None),
    (checks.check_ray_version("3.0.0.dev0"), "warn", "Ray 3.0.0.dev0 is newer", "ray[serve,data]>=2.60,<2.61"),
    (checks.check_ray_token({"RAY_AUTH_MODE": "disabled"}), "warn", "anyone who reaches", "RAY_AUTH_MODE=token"),
    (checks.check_ray_token({}, NOWHERE), "pass", "no token", None),
    (checks.check_ray_token({"RAY_AUTH_MODE": "token"}, NOWHERE), "fail", "but no /nowhere", "ray get-auth-token --generate"),
    (checks.check_licences("p", [FLUX, None], set()), "warn", "not accepted on this machine: FLUX.1-dev", "pull p"),
    (checks.check_licences("p", [FLUX], {"flux-1-dev"}), "pass", "1 restricted licences", None),
]  # fmt: skip


def test_checks():
    for finding, status, text, fix in CASES:
        assert (finding.status, text in finding.text, bool(finding.fix)) == (status, True, status != "pass"), finding
        assert fix is None or fix in finding.fix, finding


@pytest.mark.parametrize(("check", "package"), [(lambda: checks.check_provider("cpu"), "onnx"), (checks.check_video, "av")])
def test_missing_package_is_a_finding(monkeypatch, check, package):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    finding = check()
    assert (finding.status, finding.text) == ("fail", f"the package {package} is not installed")
    assert finding.fix == f"pip install {package}"


def test_doctor_encodes_and_decodes_a_clip(monkeypatch):
    assert checks.check_video().status == "pass"
    changed = TypeError("open() got an unexpected keyword argument 'metadata_errors'")
    open_av = av.open

    def open_of_another_version(*files, **options):
        if "w" in files:
            return open_av(*files, **options)
        raise changed

    monkeypatch.setattr(av, "open", open_of_another_version)
    finding = checks.check_video()
    assert (finding.status, finding.fix) == ("fail", checks.REINSTALL_AV)
    assert "cannot encode and decode a clip" in finding.text
    assert "metadata_errors" in finding.text


@pytest.mark.parametrize(("answer", "status"), [("UNAUTHENTICATED", "pass"), ("OK", "fail"), ("UNAVAILABLE", "warn")])
def test_running_ray_must_refuse_a_call_without_the_token(answer, status):
    def check_alive(request, context):
        if answer != "OK":
            context.abort(grpc.StatusCode[answer], "")
        return b""

    service = {"CheckAlive": grpc.unary_unary_rpc_method_handler(check_alive)}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", service)])
    environment = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"}
    server.start()
    try:
        assert checks.check_ray_refuses(environment).status == status
    finally:
        server.stop(None)
    assert checks.check_ray_refuses({**environment, "RAY_AUTH_MODE": ""}) is None
    assert checks.check_ray_refuses({**environment, "RAY_ADDRESS": "ray://head:10001"}) is None


def test_container_limit_is_read_from_both_versions_of_control_groups(tmp_path):
    limits = {"memory.max": 16, "memory/memory.limit_in_bytes": 64}
    for file, gb in limits.items():
        folder = tmp_path / str(gb)
        (folder / file).parent.mkdir(parents=True)
        assert checks.memory_limit_gb(folder) is None
        (folder / file).write_text(f"{gb * 2**30}\n")
        assert checks.memory_limit_gb(folder) == gb
    (tmp_path / "16/memory.max").write_text("max\n")
    assert checks.memory_limit_gb(tmp_path / "16") is None


def test_compile_needs_a_c_compiler_and_the_headers_of_python(tmp_path, monkeypatch):
    compiling = GPU_80GB.actors["svd"].model_copy(update={"options": {"compile": True}})
    profile = GPU_80GB.model_copy(update={"actors": {"svd": compiling}})
    monkeypatch.setattr(speed, "COMPILE_BACKEND", "inductor")
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    monkeypatch.setattr(speed.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert checks.check_compiler(profile).fix == "pip install triton"
    monkeypatch.setattr(speed, "find_spec", lambda name: name)
    assert checks.check_compiler(profile).fix == "apt-get install gcc libc6-dev, or set CC"
    (tmp_path / "gcc").touch(mode=0o755)
    assert "python3-dev" in checks.check_compiler(profile).fix
    (tmp_path / "Python.h").touch()
    assert checks.check_compiler(profile).status == "pass"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert checks.check_compiler(profile).text == "compile needs a C compiler on a GPU"
    assert checks.check_compiler(GPU_80GB.model_copy(update={"actors": {}})) is None


def test_wsl2_needs_its_own_device_file(tmp_path, monkeypatch):
    kernel, device = tmp_path / "version", tmp_path / "dxg"
    kernel.write_text("Linux version 6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    card = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=24 * 2**30, is_integrated=False)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda n: card)
    monkeypatch.setattr(cluster, "GPU_DEVICES", (NOWHERE, device))
    assert [checks.check_wsl(needed, kernel, device, tmp_path).status for needed in (True, False)] == ["fail", "warn"]
    assert cluster.this_machine().gpus == ()
    device.touch()
    assert checks.check_wsl(True, kernel, device, NOWHERE).status == "warn"
    assert checks.check_wsl(True, kernel, device, tmp_path).status == "pass"
    assert (cluster.this_machine().gpus, cluster.this_machine().card) == ((24,), "RTX 4090")
    kernel.write_text("Linux version 6.8.0-generic")
    assert checks.check_wsl(True, kernel, device, tmp_path) is None


def test_token_must_be_readable_only_by_its_owner(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    assert checks.check_ray_token({"RAY_AUTH_MODE": "token"}, tmp_path).fix == f"chmod 600 {token}"
    token.chmod(0o600)
    assert checks.check_ray_token({"RAY_AUTH_MODE": "token"}, tmp_path).status == "pass"
    assert checks.check_ray_token({}, tmp_path).fix == "export RAY_AUTH_MODE=token"


def test_doctor_prints_findings_and_exits_with_4_if_weights_are_missing(capsys):
    assert main(["doctor", "-p", "gpu-80gb", "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    missing = [finding for finding in report["findings"] if finding["check"] == "weights" and finding["status"] == "fail"]
    assert [finding["fix"] for finding in missing] == ["vidgen models pull gpu-80gb"] * 5
    assert report["failed"] >= len(missing)
    assert any("not here, and not needed by the default chain" in finding["text"] for finding in report["findings"])
    assert main(["doctor", "-p", "tiny"]) in (0, 4)
    out = capsys.readouterr().out
    assert "builtin:tiny/flux: built in" in out
    assert "sessions run on CPUExecutionProvider" in out
    counts, summary = out.strip().splitlines()[-2:]
    assert counts.endswith("passed")
    assert summary.startswith("This machine can render clips of 8 frames and 256x128 pixels with tiny, at ")


def test_message_of_nvidia_smi_is_no_gpu(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: "nvidia-smi")
    monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="No devices were found\n"))
    assert checks.query_driver() == []


def test_missing_library_of_the_system_is_named_by_doctor_and_by_faces(monkeypatch):
    missing = "libGL.so.1: cannot open shared object file: No such file or directory"

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "cv2":
                raise ImportError(missing, name="cv2")

    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    finding = checks.check_images()
    assert (finding.status, finding.text) == ("fail", f"the package cv2 cannot be loaded ({missing})")
    assert finding.fix == "sudo apt-get install libgl1 libglib2.0-0"
    with pytest.raises(SetupError, match=r"^the package cv2 cannot be loaded \(libGL.*Debian: apt-get install libgl1"):
        open_session(b"", "cpu", 1, "a face pack")
    with pytest.raises(SetupError, match=r"^the package cv2 cannot be loaded"), library_errors("the file is damaged"):
        import cv2  # noqa: F401
