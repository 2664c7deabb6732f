"""`vidgen selftest`: render fixed shots with the demo models and compare their pixels with stored ones. Does not need Ray."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import typer

from vidgen_ray.cli.commands import interruptible
from vidgen_ray.cli.doctor import installed_versions
from vidgen_ray.cli.file_options import DETAILS_PANEL, JsonOption
from vidgen_ray.cli.options import example
from vidgen_ray.errors import SetupError, UsageError, VidgenError
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import read_image
from vidgen_ray.outputs.records import HD_FILE, IMAGE_FILE, VIDEO_FILE
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.stages.base import Frames, torch_threads
from vidgen_ray.system.console import stdout_console, table_of
from vidgen_ray.version import __version__

_REFERENCES = Path(str(resources.files("vidgen_ray"))) / "cli" / "selftest_references"
"""Files of the items, as the kind of device that made them wrote them, and `kinds.json`: the results of each kind of device."""
_KINDS = "kinds.json"
_SHOTS: Mapping[str, Mapping[str, Any]] = {
    "quality": {
        "prompt": "a portrait of a person in a blue shirt by the sea on a sunny day",
        "face_image": "faces/ada.png",
        "lora": "builtin:demo/ada.safetensors",
        "use_hunyuan_style": True,
        "style_prompt": "a pencil sketch",
        "num_frames": 4,
        "scale": 2,
    },
    "fast": {
        "prompt": "a red boat by the sea at sunset",
        "mode": "fast",
        "video_model": "wan",
        "num_frames": 5,
        "interpolation": 2,
        "upscale_video": False,
    },
}
_UPSCALED = "upscaled"
_ITEMS = (*_SHOTS, _UPSCALED)
_FILES = IMAGE_FILE, VIDEO_FILE, HD_FILE
"""In the order in which they are made: the first one that differs is nearest to the cause."""
_PHOTO = "faces/astronaut.jpg"
"""The camera of the clip that is upscaled moves over it."""
_MAX_MEAN = 2.0
"""Mean difference in levels of 255 that kinds of devices may have. Measured between instruction sets of a CPU: at most 0.8."""
_THREADS = 2
"""Threads of torch, which may change bits."""
_LIBRARIES = "torch", "onnxruntime-gpu", "opencv-python", "av"
"""Distributions whose version may change bits."""
_OTHER_LIBRARIES = "diffusers", "transformers", "numpy", "ray"
_Status = Literal["equal", "different", "unknown"]


@dataclass(frozen=True, slots=True)
class _FileResult:
    """Comparison of one file with its reference."""

    file: str
    """Item and name, as below the references."""
    result: _Status
    """unknown: no results of this kind of device are stored, and the difference is one that kinds of devices may have."""
    largest: int
    """Largest difference of a value in levels of 255. 255 if the size or the number of frames differs. The same for `mean`."""
    mean: float
    sha256: str
    """Digest of the decoded frames."""


class _Stored(NamedTuple):
    """Stored results of a kind of device."""

    sha256: dict[str, str]
    """File -> digest."""
    seconds: dict[str, float]
    """Item -> seconds."""


def _profile(device: str) -> Profile:
    """Return the demo profile on a device, without options that trials on this machine have chosen."""
    profile = load_profile("demo")
    actors = {name: actor.model_copy(update={"device": device}) for name, actor in profile.actors.items()}
    return profile.model_copy(update={"actors": actors})


def _kind_of_device(device: str) -> str:
    """Name what decides the bits of results: the GPU, or the maker and instruction set of the CPU, and library versions."""
    import torch

    if device == "cuda":
        hardware = torch.cuda.get_device_name(0)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        maker = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(\S+)", text, re.MULTILINE)
        units = [name for name in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", text)]
        capability = torch.backends.cpu.get_cpu_capability()
        hardware = " ".join([platform.machine(), *([maker[1]] if maker else []), capability, *units])
    versions = (f"{name} {'.'.join(text.split('.')[:2])}" for name, text in installed_versions(_LIBRARIES).items())
    return ", ".join([hardware, *versions])


def _render(profile: Profile, folder: Path) -> Iterator[tuple[str, float, list[Path]]]:
    """Render the items. Yield the name, seconds and files of each."""
    pipeline = VideoGenerationPipeline(profile, folder)
    for item in _ITEMS:
        begin = time.perf_counter()
        if item == _UPSCALED:
            source, out, photo = folder / "source.mp4", folder / VIDEO_FILE, read_image(example(_PHOTO))
            with Mp4Writer(source, 96, 72, 6, Mp4Settings(preset="veryfast", threads=1)) as clip:
                for left in range(60, 78, 3):
                    clip.write(photo[None, 20 : 20 + 72, left : left + 96])
            pipeline.upscale(source, out=out, scale=2)
            files = [out]
        else:
            fields: dict[str, Any] = {
                name: str(example(value)) if name == "face_image" else value for name, value in _SHOTS[item].items()
            }
            result = pipeline.generate_video(**fields, id=item, seed=1)
            files = [Path(pipeline.outputs.place(item, name)) for name in _FILES if name in result.record.files]
        yield item, time.perf_counter() - begin, files


def _pixels(path: Path) -> Frames:
    """Return the frames of a clip, or the one of an image, (T, H, W, 3)."""
    if path.suffix == ".png":
        return read_image(path)[None]
    with open_video(path) as video:
        return video.frames(0, video.frame_count)


def _compared(name: str, path: Path, references: Mapping[str, Frames], kind: str, kinds: Mapping[str, _Stored]) -> _FileResult:
    """Compare a file with the digest of this kind of device, and with the reference."""
    got = _pixels(path)
    expected = references.get(name, got[:0])
    sha256 = hashlib.sha256(repr(got.shape).encode() + got.tobytes()).hexdigest()
    largest, mean = 255, 255.0
    if got.shape == expected.shape:
        difference = np.abs(got.astype(np.int16) - expected)
        largest, mean = int(difference.max()), round(float(difference.mean()), 3)
    known = [kinds[kind]] if kind in kinds else list(kinds.values())
    is_equal = any(stored.sha256.get(name) == sha256 for stored in known)
    result: _Status = "equal" if is_equal else "different" if kind in kinds or mean > _MAX_MEAN else "unknown"
    return _FileResult(name, result, largest, mean, sha256)


def _read_references() -> tuple[dict[str, _Stored], dict[str, Frames]]:
    """Return the results of each kind of device, and file -> frames. Raises SetupError if a file is missing or damaged."""
    try:
        stored = json.loads((_REFERENCES / _KINDS).read_text())
        kinds = {kind: _Stored(**results) for kind, results in stored.items()}
        names = {name for each in kinds.values() for name in each.sha256}
        return kinds, {name: _pixels(_REFERENCES / name) for name in names}
    except (OSError, AttributeError, TypeError, ValueError, VidgenError) as error:
        raise SetupError(f"the stored results of the self-test are damaged; install vidgen-ray again: {error}") from error


def _write(results: Mapping[Path, _FileResult], kind: str, kinds: dict[str, _Stored], seconds: dict[str, float]) -> None:
    """Add this kind of device. If its results are different, replace the references and forget the other kinds."""
    if any(each.result == "different" for each in results.values()):
        kinds = {}
        shutil.rmtree(_REFERENCES)
        for path, each in results.items():
            (_REFERENCES / each.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, _REFERENCES / each.file)
    kinds = {**kinds, kind: _Stored({each.file: each.sha256 for each in results.values()}, seconds)}
    stored = {name: each._asdict() for name, each in kinds.items()}
    (_REFERENCES / _KINDS).write_text(json.dumps(stored, indent=2) + "\n")


def selftest(
    device: Annotated[str | None, typer.Option("--device", metavar="cpu|cuda", help="Default: cuda if there is a GPU.")] = None,
    write: Annotated[
        bool,
        typer.Option("--write", rich_help_panel=DETAILS_PANEL, help="Store the results as those that are expected."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Render fixed shots with the demo models, and compare every pixel with stored results.

    Both modes, and an upscaled clip, in about half a minute, without Ray and network. Put the output into a bug report.
    Differences are in levels of 255. Exits with code 1 if a result is different.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {device!r}, must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("--device: got 'cuda', but torch finds no GPU; vidgen doctor says why")
    kind, (kinds, references) = _kind_of_device(device), _read_references()
    expected = kinds.get(kind) or next(iter(kinds.values()), _Stored({}, {}))
    libraries = installed_versions([*_LIBRARIES, *_OTHER_LIBRARIES])
    versions = {"vidgen": __version__, "python": platform.python_version(), **libraries}
    if not as_json:
        typer.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
        typer.echo(f"device: {kind}{'' if kind in kinds else ' (no results of this kind are stored)'}")
    results, seconds = dict[Path, _FileResult](), dict[str, float]()
    again = interruptible("Run the same command again.")
    # Libraries print to standard output while they load.
    with again, tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr), torch_threads(_THREADS):
        for item, item_s, files in _render(_profile(device), Path(folder)):
            seconds[item] = round(item_s, 1)
            results |= {path: _compared(f"{item}/{path.name}", path, references, kind, kinds) for path in files}
        if write:
            _write(results, kind, kinds, seconds)
    different = [each.file for each in results.values() if each.result == "different"]
    if as_json:
        report = {"device": kind, "is_known": kind in kinds, "versions": versions, "different": different}
        times = {"seconds": seconds, "expected_s": expected.seconds}
        typer.echo(json.dumps(report | times | {"files": [asdict(each) for each in results.values()]}))
    else:
        table = table_of("file", "result", "largest", "mean", "sha256", right=("largest", "mean"))
        for each in results.values():
            table.add_row(each.file, each.result, f"{each.largest}", f"{each.mean}", each.sha256[:16])
        stdout_console().print(table)
        times_s = (f"{item} {item_s} (expected {expected.seconds.get(item)})" for item, item_s in seconds.items())
        typer.echo(f"seconds: {', '.join(times_s)}")
        typer.echo(f"different: {', '.join(different)}" if different else "No result is different.")
    if different and not write:
        raise typer.Exit(1)
