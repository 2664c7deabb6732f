"""Copy trained weights into the package, in half precision, with a single copy of the shared autoencoder.

The classifier goes to tests/meaning, which uses it.

python -m training.ship --from out/training
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxPipeline
from safetensors.torch import load_file, save_file

from vidgen_ray.nets.face_resampler import PROJECTION
from vidgen_ray.nets.infusenet import NET_FOLDER, PROJECTION_FILE
from vidgen_ray.weights.demo_family import SHIPPED, WITHOUT_AUTOENCODER

LORAS = ("ada.safetensors", "sketch.safetensors")
AS_THEY_ARE = {
    "recogniser/ir_se50.pth": SHIPPED,
    "recogniser/glintr100.onnx": SHIPPED / "antelopev2",
    "detector/scrfd_10g_bnkps.onnx": SHIPPED / "antelopev2",
    "classifier/classifier.safetensors": Path(__file__).parent.parent / "tests" / "meaning",
}
"""Files that already are in half precision -> target folder."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, default=Path("out/training"), metavar="FOLDER", dest="made")
    made: Path = parser.parse_args().made
    if (flux := made / "flux" / "pipeline").exists():
        pipe = FluxPipeline.from_pretrained(flux)
        # The decoder may have been trained further since FLUX was trained.
        if (vae := made / "vae").exists():
            pipe.vae = AutoencoderKL.from_pretrained(vae)
        _fresh(SHIPPED / "flux")
        pipe.to(torch.float16).save_pretrained(SHIPPED / "flux")
    if (infusenet := made / "infusenet" / "weights").exists():
        _fresh(SHIPPED / "infusenet")
        # Save under the class name of diffusers, as in the published weights.
        FluxControlNetModel.from_pretrained(infusenet / NET_FOLDER).half().save_pretrained(SHIPPED / "infusenet" / NET_FOLDER)
        resampler = torch.load(infusenet / PROJECTION_FILE, weights_only=True)[PROJECTION]
        half = {name: tensor.half() for name, tensor in resampler.items()}
        torch.save({PROJECTION: half}, SHIPPED / "infusenet" / PROJECTION_FILE)
    for name in LORAS:
        if (made / name).exists():
            save_file({key: tensor.half() for key, tensor in load_file(made / name).items()}, SHIPPED / name)
    for name in WITHOUT_AUTOENCODER:
        if (folder := made / name / "pipeline").exists():
            _fresh(SHIPPED / name)
            shutil.copytree(folder, SHIPPED / name, ignore=shutil.ignore_patterns("vae"))
    for name, folder in AS_THEY_ARE.items():
        if (made / name).exists():
            shutil.copy(made / name, folder)
    for pattern in ("config.json", "model_index.json"):
        for config in SHIPPED.rglob(pattern):
            _without_place(config)
    return 0


def _without_place(config: Path) -> None:
    """Remove the path of the source folder, which diffusers adds to the config."""
    told = json.loads(config.read_text())
    told.pop("_name_or_path", None)
    config.write_text(json.dumps(told, indent=2) + "\n")


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


if __name__ == "__main__":
    raise SystemExit(main())
