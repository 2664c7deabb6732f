"""The trained models shipped with the package: file sizes, precision, formats and the shared autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from vidgen_ray.weights import resolve
from vidgen_ray.weights.demo_family import SHIPPED, WITHOUT_AUTOENCODER

MAX_BYTES = 32_000_000


def test_shipped_weights_are_at_most_25_mb() -> None:
    sizes = {path.relative_to(SHIPPED): path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= MAX_BYTES, sizes


@pytest.mark.parametrize("file", sorted(SHIPPED.rglob("*.safetensors")), ids=lambda file: str(file.relative_to(SHIPPED)))
def test_shipped_tensors_are_float16(file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # not a dict
    assert kinds == {"F16"}


@pytest.mark.parametrize("name", WITHOUT_AUTOENCODER)
def test_shared_autoencoder_is_added_to_the_model(name: str) -> None:
    folder = resolve(f"builtin:demo/{name}")
    shipped = SHIPPED / "flux" / "vae" / "diffusion_pytorch_model.safetensors"
    assert (folder / "vae" / shipped.name).read_bytes() == shipped.read_bytes()
    assert not (SHIPPED / name / "vae").exists()
    for file in (path for path in (SHIPPED / name).rglob("*") if path.is_file()):
        assert (folder / file.relative_to(SHIPPED / name)).read_bytes() == file.read_bytes()


def test_only_weights_published_as_pickles_are_pickles() -> None:
    pickles = {path.name for path in SHIPPED.rglob("*") if path.suffix in (".pth", ".bin", ".pt")}
    assert pickles == {"ir_se50.pth", "image_proj_model.bin"}
