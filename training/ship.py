"""Copy trained weights into the package, in half precision (Wan in 8 bits), with a single copy of shared parts.

python -m training.ship --from out/training
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxControlNetModel, FluxPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.wan import pipeline
from vidgen_ray.dataset import demo_captioner
from vidgen_ray.nets.identity_networks import NET_FOLDER, PROJECTION, PROJECTION_FILE
from vidgen_ray.weights.builtin import COMPACT_WEIGHTS, SCALE, SHARED_WITH_FLUX, SHIPPED, WHOLE_WEIGHTS, is_spatial, per_channel

LORAS = ("ada.safetensors", "sketch.safetensors")
AS_THEY_ARE = {
    "recogniser/ir_se50.pth": SHIPPED,
    "recogniser/glintr100.onnx": SHIPPED / "antelopev2",
    "detector/scrfd_10g_bnkps.onnx": SHIPPED / "antelopev2",
    f"classifier/{demo_captioner.CAPTIONER_FILE.name}": SHIPPED,
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
    for name, shared in SHARED_WITH_FLUX.items():
        if (folder := made / name / "pipeline").exists():
            _fresh(SHIPPED / name)
            shutil.copytree(folder, SHIPPED / name, ignore=shutil.ignore_patterns(*shared))
    if (wan := made / "wan" / "transformer").exists() and (vae := made / "wan_autoencoder" / "vae").exists():
        nets = {"transformer": WanTransformer3DModel.from_pretrained(wan), "vae": AutoencoderKLWan.from_pretrained(vae)}
        _fresh(SHIPPED / "wan")
        pipeline(nets["transformer"], nets["vae"], FluxPipeline.from_pretrained(SHIPPED / "flux")).save_pretrained(
            SHIPPED / "wan"
        )
        for part in SHARED_WITH_FLUX["wan"]:
            _fresh(SHIPPED / "wan" / part)
        for part, net in nets.items():
            (SHIPPED / "wan" / part / WHOLE_WEIGHTS).unlink()
            save_file(compact(net.state_dict()), SHIPPED / "wan" / part / COMPACT_WEIGHTS)
    for name, folder in AS_THEY_ARE.items():
        if (made / name).exists():
            shutil.copy(made / name, folder)
    for pattern in ("config.json", "model_index.json"):
        for config in SHIPPED.rglob(pattern):
            _without_place(config)
    return 0


def compact(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as they are stored in `COMPACT_WEIGHTS`. Those with one number per output channel stay in half precision.

    Raises ValueError if another than the last step in time of a kernel over pixels and frames is not zero.
    """
    stored = {}
    for name, tensor in weights.items():
        if is_spatial(tensor):
            if tensor[:, :, :-1].any():
                raise ValueError(f"{name}: only the last step in time may be other than zero")
            tensor = tensor[:, :, -1:]
        if len(tensor) in (1, tensor.numel()):
            stored[name] = tensor.half()
            continue
        scale = (tensor.float().flatten(1).abs().amax(dim=1) / 127).clamp(min=1e-7).half()
        steps = (tensor.float() / per_channel(scale, tensor)).round().clamp(-127, 127)
        stored |= {name: steps.char().contiguous(), name + SCALE: scale}
    return stored


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
