#!/usr/bin/env bash
# Write out/gpu-bundle.tar.xz: this project and the packages that tools/gpu_first_hour.py needs, for a machine with a GPU that has
# Python, torch and numpy, and no network. Fails if it is larger than 60 MiB. Run it in the environment of `make setup`.
#
#   tools/make_gpu_bundle.sh [PYTHON] [TORCH]      # of that machine, default: 3.12 2.11
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-3.12} torch=${2:-2.11} work=out/gpu-bundle run=${PYTHON_HERE:-.venv/bin/python}
# The closure of what the stages, `bench` and the tests marked gpu import, without what torch requires.
packages="accelerate annotated-doc annotated-types anyio cachetools certifi charset-normalizer click diffusers einops filelock fsspec
  ftfy h11 httpcore2 httpx2 huggingface-hub idna importlib-metadata lazy-importer markdown-it-py mdurl more-itertools packaging peft
  pillow protobuf psutil pydantic pydantic-core pygments pyyaml regex requests rich safetensors sentencepiece shellingham spandrel
  tokenizers torchao torchvision tqdm transformers truststore typer typing-extensions typing-inspection urllib3 wcwidth zipp
  execnet iniconfig pluggy pytest<9.2 pytest-timeout pytest-xdist"
rm -rf "$work" && mkdir -p "$work/wheels"
"$run" - "$work" "$torch" $packages <<'PYTHON'
"""Write two files of requirements: those of the lock file with their hashes, and the others."""
import re, sys
from pathlib import Path

work, torch, *names = sys.argv[1:]
lock = Path("packaging/requirements.lock").read_text()
locked = {block.split("==")[0]: re.sub(r"^(\S+==\S+) ;.*\\", r"\1 \\", block) for block in re.split(r"\n(?=\S)", lock)}
# torchvision fits one release of torch.
locked.pop("torchvision")
others = [f"torchvision==0.{int(torch.split('.')[1]) + 15}.*" if name == "torchvision" else name for name in names if name not in locked]
Path(work, "locked.txt").write_text("\n".join(locked[name] for name in names if name in locked) + "\n")
Path(work, "others.txt").write_text("\n".join(others) + "\n")
PYTHON
for list in locked others; do
    "$run" -m pip download --quiet --no-deps --only-binary :all: --python-version "$python" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform linux_x86_64 --dest "$work/wheels" -r "$work/$list.txt"
done
"$run" - "$work" <<'PYTHON'
"""Pack the wheels, the project without demo models, images and fonts, and the weights that its tests use."""
import subprocess, sys, tarfile, tomllib, zipfile
from pathlib import Path

from vidgen_ray.weights import resolve

LIMIT = 60 << 20
work = Path(sys.argv[1])
files = subprocess.run(["git", "ls-files", "-z", "benchmarks", "examples/faces", "packaging", "pyproject.toml", "tests", "tools", "vidgen_ray",
    ":!vidgen_ray/weights/demo", ":!vidgen_ray/film", ":!tests/meaning"], capture_output=True, check=True, text=True).stdout.split("\0")[:-1]
for wheel in (work / "wheels").iterdir():
    zipfile.ZipFile(wheel).extractall(work / ("if-missing" if wheel.name.startswith("torchvision") else "site"))
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
info = work / "site" / "vidgen_ray-0.dist-info"
info.mkdir()
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: vidgen-ray\nVersion: 0\n")
(info / "entry_points.txt").write_text("".join(f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
    for group, entries in project["entry-points"].items()))
upscalers, rife = resolve("builtin:realesrgan"), resolve("builtin:rife")
members = {**{Path(file): file for file in files}, work / "site": "site", work / "if-missing": "if-missing",
    upscalers / "animevideov3.safetensors": "weights/realesrgan/animevideov3.safetensors", rife / "flownet.safetensors": "weights/rife/flownet.safetensors"}
archive = Path("out/gpu-bundle.tar.xz")
with tarfile.open(archive, "w:xz", preset=2) as tar:
    for path, name in members.items():
        tar.add(path, name)
size = archive.stat().st_size
print(f"{archive}: {size / 2**20:.1f} MiB")
if size > LIMIT:
    sys.exit(f"{archive}: is larger than {LIMIT >> 20} MiB")
PYTHON
rm -rf "$work"
