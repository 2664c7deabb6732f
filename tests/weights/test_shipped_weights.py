"""The trained models shipped with the package: file sizes, precision, formats and the shared autoencoder."""

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from training.ship import compact
from vidgen_ray.weights import resolve
from vidgen_ray.weights.builtin import COMPACT_WEIGHTS, SHARED_WITH_FLUX, SHIPPED, WHOLE_WEIGHTS, whole


def test_shipped_weights_are_at_most_33_mb():
    sizes = {path.relative_to(SHIPPED): path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 33_000_000, sizes


def test_shipped_tensors_are_float16_or_compact():
    for file in SHIPPED.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # not a dict
        assert kinds == ({"F16", "I8"} if file.name == COMPACT_WEIGHTS else {"F16"}), file
    pickles = {path.name for path in SHIPPED.rglob("*") if path.suffix in (".pth", ".bin", ".pt")}
    assert pickles == {"ir_se50.pth", "image_proj_model.bin"}


def test_shared_parts_are_added_to_the_models():
    for model, parts in SHARED_WITH_FLUX.items():
        folder = resolve(f"builtin:demo/{model}")
        for part, of_flux in parts.items():
            assert not (SHIPPED / model / part).exists()
            for file in (SHIPPED / "flux" / of_flux).iterdir():
                assert (folder / part / file.name).read_bytes() == file.read_bytes()
    folder = resolve("builtin:demo/wan")
    for part, kind in (("transformer", WanTransformer3DModel), ("vae", AutoencoderKLWan)):
        shapes = {name: tensor.shape for name, tensor in kind.from_config(kind.load_config(folder / part)).state_dict().items()}
        assert {name: tensor.shape for name, tensor in load_file(folder / part / WHOLE_WEIGHTS).items()} == shapes


def test_compact_weights_are_within_half_a_step_of_the_originals():
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 7), "patches": (4, 3, 1, 2, 2), "frames": (4, 3, 3, 1, 1), "pixels": (4, 3, 3, 3, 3), "bias": (6,)}
    weights = {name: torch.randn(shape, generator=generator) * 3 for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="pixels: only the last step in time"):
        compact(weights)
    weights["pixels"][:, :, :-1] = 0
    restored = whole(compact(weights))
    assert restored.keys() == weights.keys()
    for name, tensor in weights.items():
        largest = tensor.flatten(1).abs().amax(dim=1) if tensor.dim() > 1 else tensor.abs()
        off = (restored[name].float() - tensor).abs()
        assert (off.flatten(1).amax(dim=1) if tensor.dim() > 1 else off).le(largest * (0.5 / 127 + 2e-3)).all()
    assert not restored["pixels"][:, :, :-1].any()


def test_cached_weights_are_found_without_importing_torch():
    """Every process of a run resolves its weights. Importing torch and diffusers takes ten seconds of a CPU."""
    resolve("builtin:tiny/flux")
    code = "import sys; from vidgen_ray.weights import resolve; resolve('builtin:tiny/flux'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
