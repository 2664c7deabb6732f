"""`vidgen doctor`: check this machine for what a profile needs, and say how to mend what is missing.

Each check looks at one thing and returns a finding. Its arguments are what it looks at, by default on this machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import typer
from rich.markup import escape

from vidgen_ray.cli.file_options import JsonOption
from vidgen_ray.cli.models import FACES, default_references, default_shot
from vidgen_ray.cli.options import ProfileOption
from vidgen_ray.errors import SetupError, VidgenError, import_problem
from vidgen_ray.graph import STAGES, clip_length, file_sizes, server_problems
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.nets.faces import check_opencv, import_onnxruntime, open_session
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import GB, GPU_DEVICES, Cluster, profile_for, this_machine
from vidgen_ray.planner.demand import demand_of, load_calibration
from vidgen_ray.profile import AUTO, Profile
from vidgen_ray.stages.speed import missing_compiler
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.console import stdout_console, table_of
from vidgen_ray.weights import REMOTE
from vidgen_ray.weights.inventory import LocalWeights, local_weights
from vidgen_ray.weights.ledger import WeightLicence, accepted_licences

_Status = Literal["pass", "warn", "fail"]
PYTHON_VERSIONS = ((3, 11), (3, 13))
RAY_VERSION = (2, 60)
"""Minor version of Ray whose private names this project uses."""
EMPTY_ONNXRUNTIME = "99.0"
"""Version of packaging/onnxruntime, the empty distribution that stands for onnxruntime-gpu."""
REINSTALL_ONNXRUNTIME = "pip uninstall -y onnxruntime && pip install --no-deps --force-reinstall onnxruntime-gpu"
REINSTALL_AV = "pip install --force-reinstall --only-binary :all: 'av>=18.1,<20'"
WSL_TOOLS = "/usr/lib/wsl/lib"
"""Folder of nvidia-smi on WSL2, which may not be on the path."""
LOWEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> lowest driver on Linux. Source: CUDA's release notes, minor version compatibility."""
RAY_ANSWER_S = 10
MIN_FREE_GB = 20
MIN_SHM_GB = 2
"""Ray's object store is in shared memory. With less, it uses the disk, which is slow."""
MIN_OPEN_FILES = 65_536
PLANNED_SHOTS = 100
"""Shots of the plan of the default chain: enough for all GPUs of a machine."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    status: _Status
    text: str
    """Sentence for the user: the state that was found."""
    fix: str | None = None
    """Advice, as a command if there is one. `None`: nothing to do."""


def check_python(found: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Python's version must be one that the dependencies support."""
    lowest, highest = PYTHON_VERSIONS
    text = f"Python {found[0]}.{found[1]} on {platform.machine()}"
    if lowest <= found <= highest:
        return Finding("python", "pass", text)
    return Finding("python", "fail", text, "use Python 3.11, 3.12 or 3.13, e.g. python3.12 -m venv .venv")


def query_driver() -> list[list[str]] | None:
    """Return driver version, name and memory in MiB of each GPU, by nvidia-smi. `None` if it does not work."""
    tool = shutil.which("nvidia-smi", path=f"{os.environ.get('PATH', '')}:{WSL_TOOLS}")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    # Some drivers print a message instead.
    return [[part.strip() for part in line.split(",")] for line in output.splitlines() if line.count(",") == 2]


def check_driver(
    needs_gpu: bool,
    cuda: str | None,
    query: Callable[[], list[list[str]] | None] = query_driver,
    devices: Iterable[Path] = GPU_DEVICES,
) -> Finding:
    """A GPU profile needs the device files of the driver, a working nvidia-smi, and a driver for the CUDA of torch."""
    problem: _Status = "fail" if needs_gpu else "warn"
    present = [str(device) for device in devices if device.exists()]
    if not present:
        text = f"no GPU: none of {', '.join(map(str, devices))} exists"
        if not needs_gpu:
            return Finding("driver", "pass", f"{text}; this profile needs none")
        return Finding("driver", "fail", text, f"install {_driver_for(cuda)}; in a container: docker run --gpus all ...")
    gpus = query()
    if not gpus:
        return Finding("driver", problem, f"{present[0]} exists, nvidia-smi shows no GPU", "sudo nvidia-smi")
    sizes = (f"{float(mib) / 1024:.0f} GB" if mib.isdigit() else f"memory {mib.strip('[]')}" for *_, mib in gpus)
    names = ", ".join(f"{name} ({size})" for (_, name, _), size in zip(gpus, sizes, strict=True))
    text, found = f"driver {gpus[0][0]}: {names}", int(gpus[0][0].split(".")[0])
    if cuda is None or found >= LOWEST_DRIVER.get(int(cuda.split(".")[0]), 0):
        return Finding("driver", "pass", text)
    older = [major for major, lowest in LOWEST_DRIVER.items() if lowest <= found]
    advice = f", or torch and torchvision for CUDA {older[-1]}: https://pytorch.org/get-started/locally" if older else ""
    return Finding("driver", problem, f"{text}; torch for CUDA {cuda} needs {_driver_for(cuda)}", f"update it{advice}")


def _driver_for(cuda: str | None) -> str:
    """Return `the NVIDIA driver 580 or newer`: what torch for this version of CUDA needs. `None`: the newest version."""
    newest = max(LOWEST_DRIVER)
    major = int(cuda.split(".")[0]) if cuda else newest
    return f"the NVIDIA driver {LOWEST_DRIVER.get(major, LOWEST_DRIVER[newest])} or newer"


def check_wsl(
    needs_gpu: bool, version_file: Path = Path("/proc/version"), device: Path = Path("/dev/dxg"), tools: Path = Path(WSL_TOOLS)
) -> Finding | None:
    """On WSL2 the GPU is /dev/dxg, and the driver is that of Windows. `None` on other machines."""
    try:
        is_wsl = "microsoft" in version_file.read_text().lower()
    except OSError:
        is_wsl = False
    if not is_wsl:
        return None
    if device.exists():
        if tools.is_dir():
            return Finding("wsl2", "pass", f"WSL2 with {device}")
        return Finding("wsl2", "warn", f"WSL2 with {device}, but without {tools}", "update the NVIDIA driver of Windows")
    advice = "install the NVIDIA driver in Windows, none in WSL2, then run wsl --update and wsl --shutdown in Windows"
    return Finding("wsl2", "fail" if needs_gpu else "warn", f"WSL2 without {device}", advice)


def check_torch(needs_gpu: bool, torch: Any = None) -> Finding:
    """The installed torch must be built for CUDA, find the GPUs and have code for them."""
    if torch is None:
        import torch
    build = torch.version.cuda
    text = f"torch {torch.__version__}, CUDA {build or 'none'}"
    if not needs_gpu:
        return Finding("torch", "pass", text)
    if build is None:
        fix = "pip install --force-reinstall torch torchvision, without a CPU index"
        return Finding("torch", "fail", f"{text}: built for the CPU", fix)
    if not torch.cuda.is_available():
        return Finding("torch", "fail", f"{text}: finds no GPU", f"install {_driver_for(build)}, or torch for your driver")
    known = torch.cuda.get_arch_list()
    for n in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(n)
        if not any(_runs_on(arch, major, minor) for arch in known):
            text = f"{text}: has no code for GPU {n} (compute capability {major}.{minor}), only {', '.join(known)}"
            return Finding("torch", "fail", text, "install a torch release that supports this GPU")
    return Finding("torch", "pass", f"{text}, {torch.cuda.device_count()} GPUs")


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Return whether code for `arch` runs: sm_XY on the same major version from minor Y, compute_XY on all newer GPUs."""
    kind, _, number = arch.partition("_")
    digits = "".join(c for c in number if c.isdigit())
    built = int(digits[:-1]), int(digits[-1])
    return built <= (major, minor) if kind == "compute" else built[0] == major and built[1] <= minor


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return name -> version of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_onnxruntime(versions: Mapping[str, str] | None = None) -> Finding:
    """onnxruntime-gpu must be installed without the CPU wheel `onnxruntime`, which owns the same folder."""
    found = installed_versions(["onnxruntime", "onnxruntime-gpu"]) if versions is None else versions
    cpu, gpu = found.get("onnxruntime"), found.get("onnxruntime-gpu")
    if gpu is None:
        return Finding("onnxruntime", "fail", "onnxruntime-gpu is not installed", REINSTALL_ONNXRUNTIME)
    if cpu is not None and cpu != EMPTY_ONNXRUNTIME:
        text = f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed; the last one wins, file by file"
        return Finding("onnxruntime", "fail", text, REINSTALL_ONNXRUNTIME)
    return Finding("onnxruntime", "pass", f"onnxruntime-gpu {gpu}")


def trial_model() -> bytes:
    """Return a model of ONNX that returns its input."""
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "test", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def check_provider(device: str, open_model: Callable[..., Any] = open_session) -> Finding:
    """A session of onnxruntime must use the provider that the profile's face stage asks for. Opens one."""
    try:
        session = open_model(trial_model(), device, 1, "a test model")
    except SetupError as error:
        return Finding("faces", "fail", str(error), REINSTALL_ONNXRUNTIME)
    except ImportError as error:
        return _not_installed("faces", error)
    return Finding("faces", "pass", f"sessions run on {session.get_providers()[0]}")


def _not_installed(check: str, error: ImportError) -> Finding:
    package = str(error.name).partition(".")[0]
    fix = f"pip install {package}" if isinstance(error, ModuleNotFoundError) else f"pip install --force-reinstall {package}"
    return Finding(check, "fail", import_problem(error), fix)


def check_images(check: Callable[[], None] = check_opencv) -> Finding:
    """OpenCV, which faces and scores need, must find the libraries of the system."""
    try:
        check()
    except SetupError as error:
        text, _, fix = str(error).partition("; Debian: ")
        return Finding("opencv", "fail", text, f"sudo {fix}")
    return Finding("opencv", "pass", f"opencv-python {version('opencv-python')}")


def onnxruntime_cuda() -> str | None:
    """Return the CUDA version that onnxruntime-gpu was built for. `None` if unknown."""
    # `check_provider` reports an installation that is damaged.
    with suppress(ImportError, SetupError):
        import_onnxruntime()
        from onnxruntime.capi import build_and_package_info

        return str(getattr(build_and_package_info, "cuda_version", "")) or None
    return None


def check_cuda_pair(device: str, runtime_cuda: str | None, torch_cuda: str | None) -> Finding | None:
    """onnxruntime on a GPU takes CUDA's libraries from torch, so both need the same major version. `None` for CPUs."""
    if not device.startswith("cuda"):
        return None
    text = f"onnxruntime-gpu for CUDA {runtime_cuda or 'unknown'}, torch for CUDA {torch_cuda or 'none'}"
    if runtime_cuda is None or torch_cuda is None:
        return Finding("cuda pair", "warn", text, "compare both versions by hand")
    if runtime_cuda.split(".")[0] == torch_cuda.split(".")[0]:
        return Finding("cuda pair", "pass", text)
    advice = "install torch for that CUDA version, an older onnxruntime-gpu, or set device: cpu for actors.instantid"
    return Finding("cuda pair", "fail", text, advice)


def check_video() -> Finding:
    """PyAV must encode and decode a clip, with the functions of a run."""
    try:
        import av
    except ImportError as error:
        return _not_installed("video", error)
    text, frames = f"PyAV {av.__version__}", np.full((2, 64, 64, 3), 128, np.uint8)
    try:
        with TemporaryDirectory(prefix="vidgen-") as folder:
            clip = Path(folder, "clip.mp4")
            with Mp4Writer(clip, 64, 64, 8, Mp4Settings()) as writer:
                writer.write(frames)
            with open_video(clip) as video:
                error_of_pixels = np.abs(video.frames(0, 2).astype(int) - frames).max()
    # PyAV may have changed in any way.
    except Exception as error:
        return Finding("video", "fail", f"{text} cannot encode and decode a clip: {error}", REINSTALL_AV)
    if error_of_pixels > 4:
        return Finding("video", "fail", f"{text} decodes other pixels than it encoded", REINSTALL_AV)
    return Finding("video", "pass", f"{text} encodes and decodes H.264")


def check_disk(folder: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> Finding:
    """The disks of weights and results need free space, and Ray stops spilling objects to a disk that is 95 % full."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    disk = usage(existing)
    text = f"{folder}: {disk.free / 1e9:.0f} GB free of {disk.total / 1e9:.0f} GB"
    if disk.free < 1e9:
        return Finding("disk", "fail", text, f"free some space on the disk of {existing}")
    if disk.free < MIN_FREE_GB * 1e9 or disk.free < disk.total * 0.05:
        return Finding("disk", "warn", text, f"free {MIN_FREE_GB} GB on the disk of {existing}")
    return Finding("disk", "pass", text)


def check_shared_memory(folder: Path = Path("/dev/shm"), usage: Callable[[Path], Any] = shutil.disk_usage) -> Finding:
    """Ray's object store needs shared memory. Containers get 64 MB by default."""
    if not folder.is_dir():
        fix = "mount a tmpfs there; in a container: docker run --shm-size=8g ..."
        return Finding("shared memory", "warn", f"no {folder}", fix)
    total_gb = usage(folder).total / GB
    fix = "docker run --shm-size=8g ...; in Kubernetes an emptyDir with medium: Memory"
    is_small = total_gb < MIN_SHM_GB
    return Finding("shared memory", "warn" if is_small else "pass", f"{folder}: {total_gb:.1f} GB", fix if is_small else None)


def check_open_files(limit: tuple[int, int] | None = None) -> Finding:
    """Ray and object stores open many files and sockets."""
    soft, hard = limit or resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} open files, at most {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        fix = f"ulimit -n {MIN_OPEN_FILES}; in a container: docker run --ulimit nofile=65536:65536 ..."
        return Finding("open files", "warn", text, fix)
    return Finding("open files", "pass", text)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def check_compiler(profile: Profile) -> Finding | None:
    """Stages with the option `compile` need a compiler. Those that only try it are run without. `None` if there is none."""
    stages = [stage for stage in STAGES if stage.actor in profile.actors]
    compiled = [stage for stage in stages if getattr(profile.options_of(stage), "compile", False)]
    devices = dict.fromkeys(profile.actor_of(stage).device for stage in compiled)
    missing = [text for device in devices if (text := missing_compiler(device)) is not None]
    tried = {section.device for section in profile.actors.values() if section.trial_options.get("compile")}
    untried = [text for device in tried if (text := missing_compiler(device)) is not None]
    if missing:
        text, fix = missing[0].split("; ")
        return Finding("compiler", "fail", f"compile needs {text}", fix)
    if untried:
        text, fix = untried[0].split("; ")
        return Finding("compiler", "warn", f"compile, which is faster, will not be used: it needs {text}", fix)
    return Finding("compiler", "pass", f"found, for {', '.join(stage.name for stage in compiled)}") if compiled else None


def check_plan(profile: Profile, machine: Cluster, limit_gb: float | None) -> Finding:
    """The default chain must fit the GPUs and the host memory of this machine.

    `limit_gb`: memory limit of the container. The text says what the machine can render.
    """
    shot, limit = default_shot(profile), math.inf if limit_gb is None else limit_gb
    machine = replace(
        machine, nodes=tuple(replace(each, memory_gb=min(limit, each.memory_gb or limit)) for each in machine.nodes)
    )
    try:
        measured = load_calibration(profile.name, machine.card)
        planned = plan_run(profile, demand_of([shot] * PLANNED_SHOTS), machine, calibration=measured)
    except VidgenError as error:
        reason = str(error).removeprefix(f"profile {profile.name}: ")
        advice = _advice_to_fit(profile, machine, limit_gb)
        return Finding("plan", "fail", f"this machine cannot render with {profile.name}: {reason}", advice)
    width, height = list(file_sizes(shot).values())[-1]
    what = f"clips of {clip_length(shot)[0]} frames and" if shot.generate_video else "images of"
    seconds = f"{3600 / planned.shots_per_hour:.3g} s each"
    return Finding("plan", "pass", f"this machine can render {what} {width}x{height} pixels with {profile.name}, at {seconds}")


def _advice_to_fit(profile: Profile, machine: Cluster, limit_gb: float | None) -> str:
    """Say what to do if a profile does not fit a machine. `limit_gb`: memory limit of the container."""
    needs_gpu = any(section.device == "cuda" for section in profile.actors.values())
    if needs_gpu and not machine.gpus:
        return "use a machine with a GPU, or a profile that needs none, such as demo"
    if limit_gb is None:
        return "use a profile for this machine, or one with more memory"
    return "use a profile for this machine, or more memory: docker run --memory 64g ..."


def memory_limit_gb(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the memory limit of the control group, version 2 or 1. `None` without a limit."""
    for file in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        try:
            return int(file.read_text()) / GB
        # The text "max" means no limit.
        except (OSError, ValueError):
            continue
    return None


def check_ray_version(found: str | None = None) -> Finding:
    """Ray must be of the minor version that this project is tested with. Those before 2.55 also have known vulnerabilities."""
    found = found or installed_versions(["ray"]).get("ray", "")
    major, minor = RAY_VERSION
    fix = f'pip install "ray[serve,data]>={major}.{minor},<{major}.{minor + 1}"'
    if not found:
        return Finding("ray", "fail", "Ray is not installed", fix)
    installed = tuple(int(part) for part in found.split(".")[:2])
    if installed > RAY_VERSION:
        return Finding("ray", "warn", f"Ray {found} is newer than what vidgen is tested with", fix)
    return Finding("ray", "pass", f"Ray {found}") if installed == RAY_VERSION else Finding("ray", "fail", f"Ray {found}", fix)


def check_ray_token(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Finding:
    """Anyone who can connect to Ray can run code: a cluster needs a token, and only its owner may read it."""
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        text = "RAY_AUTH_MODE=disabled: anyone who reaches Ray's ports can run code"
        return Finding("ray token", "warn", text, "export RAY_AUTH_MODE=token")
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if not token.is_file():
        if mode == "token" and not environment.get("RAY_AUTH_TOKEN"):
            return Finding("ray token", "fail", f"RAY_AUTH_MODE=token, but no {token}", "ray get-auth-token --generate")
        return Finding("ray token", "pass", "no token; Ray creates one when it starts on this machine")
    if token.stat().st_mode & 0o077:
        return Finding("ray token", "warn", f"{token} can be read by others", f"chmod 600 {token}")
    if mode != "token":
        return Finding("ray token", "warn", f"{token} exists, RAY_AUTH_MODE is not set", "export RAY_AUTH_MODE=token")
    return Finding("ray token", "pass", f"token authentication with {token}")


def check_ray_refuses(environment: Mapping[str, str] = os.environ) -> Finding | None:
    """A running Ray with token authentication must refuse a call without the token. `None` if none runs."""
    if environment.get("RAY_AUTH_MODE") != "token" or environment.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None
    from vidgen_ray.engine.ray_internals import call_without_token, started_address

    address = environment.get("RAY_ADDRESS") or started_address()
    if address is None or not re.fullmatch(r"[^/]+:\d+", address):
        return None
    answer = call_without_token(address, RAY_ANSWER_S).name
    if answer == "OK":
        text = f"Ray at {address} answers a call without the token: anyone who reaches it can run code"
        return Finding("ray token", "fail", text, "ray stop, then ray start with RAY_AUTH_MODE=token on every node")
    if answer != "UNAUTHENTICATED":
        return Finding("ray token", "warn", f"Ray at {address} does not answer ({answer})", "ray status")
    return Finding("ray token", "pass", f"Ray at {address} refuses a call without the token")


def check_weights(profile: str, weights: Iterable[LocalWeights], needed: Collection[str]) -> list[Finding]:
    """The weights of the default chain must be on this machine. Other lines need the others. `needed`: those of the chain."""
    findings = []
    for local in weights:
        if local.problem and local.reference in needed:
            findings.append(Finding("weights", "fail", local.problem.split(";")[0], f"vidgen models pull {profile}"))
        elif local.problem:
            findings.append(Finding("weights", "pass", f"{local.reference}: not here, and not needed by the default chain"))
        else:
            size = "" if local.size_bytes is None else f", {local.size_bytes / 1e9:.1f} GB"
            findings.append(Finding("weights", "pass", f"{local.reference}: {local.state}{size}"))
    return findings


def check_servers(profile: Profile) -> Iterator[Finding]:
    """A server of each stage that servers compute must respond, and have the model."""
    for stage in STAGES:
        if stage.actor not in profile.actors or not profile.actors[stage.actor].weights.startswith(REMOTE):
            continue
        try:
            profile.params(stage)
            yield Finding("servers", "pass", f"{stage.name}: a server responds and has the model")
            for problem in server_problems(profile):
                yield Finding("servers", "warn", problem, "start it, or take it out of `servers` in the profile")
        except VidgenError as error:
            yield Finding("servers", "fail", str(error), f"start the servers, or correct actors.{stage.actor} of the profile")


def check_licences(profile: str, licences: Iterable[WeightLicence | None], accepted: set[str]) -> Finding:
    """Licences that restrict the use of the weights must have been accepted."""
    restricted = {licence.id: licence for licence in licences if licence is not None and licence.needs_acceptance}
    missing = sorted(licence.name for id_, licence in restricted.items() if id_ not in accepted)
    if missing:
        text = f"not accepted on this machine: {', '.join(missing)}"
        return Finding("licences", "warn", text, f"vidgen models pull {profile} --accept-license")
    return Finding("licences", "pass", f"{len(restricted)} restricted licences, all accepted")


_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def doctor(profile: ProfileOption = AUTO, as_json: JsonOption = False) -> None:
    """Check whether this machine can run a profile.

    Checks driver, packages, limits, Ray, weights and licences, and plans the default chain. Each finding is pass, warn or fail,
    with the command that mends it. The last line says what the machine can render, or what is missing. Exits with code 4 if
    anything failed.
    """
    chosen = profile_for(profile)
    *findings, planned = [finding for finding in _findings(chosen, profile) if finding is not None]
    failed = [finding.check for finding in (*findings, planned) if finding.status == "fail"]
    missing = f", when these are mended: {', '.join(dict.fromkeys(failed))}" if failed and planned.status == "pass" else ""
    summary = f"{planned.text[0].upper()}{planned.text[1:]}{missing}."
    if as_json:
        rows = [asdict(finding) for finding in (*findings, planned)]
        typer.echo(json.dumps({"profile": chosen.name, "failed": len(failed), "findings": rows, "summary": summary}))
    else:
        _print([*findings, planned])
        warnings = sum(finding.status == "warn" for finding in findings)
        typer.echo(f"{len(failed)} failed, {warnings} warnings, {len(findings) + 1 - len(failed) - warnings} passed")
        typer.echo(summary)
    if failed:
        raise typer.Exit(SetupError.exit_code)


def _findings(profile: Profile, name: str) -> Iterator[Finding | None]:
    import torch
    from huggingface_hub import constants

    needs_gpu = any(actor.device == "cuda" for actor in profile.actors.values())
    faces = profile.actors[FACES].device if FACES in profile.actors else "cpu"
    folder = profile.source.parent if profile.source else None
    licences = profile.weight_licences(profile.actors)
    weights = [local_weights(reference, folder) for reference in licences]
    yield check_python()
    yield check_driver(needs_gpu, torch.version.cuda)
    yield check_wsl(needs_gpu)
    yield check_torch(needs_gpu, torch)
    yield check_onnxruntime()
    opencv = check_images()
    yield opencv
    if opencv.status == "pass":
        yield check_provider(faces)
    yield check_cuda_pair(faces, onnxruntime_cuda(), torch.version.cuda)
    yield check_video()
    for path in dict.fromkeys((Path.cwd(), cache_dir(), Path(constants.HF_HUB_CACHE))):
        yield check_disk(path)
    yield check_shared_memory()
    yield check_open_files()
    yield check_compiler(profile)
    yield check_ray_version()
    yield check_ray_token()
    yield check_ray_refuses()
    needed = default_references(profile)
    yield from check_weights(name, weights, needed)
    yield from check_servers(profile)
    yield check_licences(name, (licences[reference] for reference in needed), accepted_licences())
    yield check_plan(profile, this_machine(), memory_limit_gb())


def _print(findings: list[Finding]) -> None:
    table = table_of("", "", "")
    table.show_header = False
    for finding in findings:
        status = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(status, escape(finding.check), escape(finding.text))
        if finding.fix:
            table.add_row("", "", f"[bold]{escape(finding.fix)}[/]")
    stdout_console().print(table)
