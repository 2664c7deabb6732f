"""The trained models that come with the package: small, half precision, no pickles but those published as such, and whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from vidgen_ray.weights import resolve
from vidgen_ray.weights.demo_family import SHIPPED, WITHOUT_AUTOENCODER

MOST_BYTES = 25_000_000


def test_all_of_them_take_no_more_than_25_mb() -> None:
    sizes = {path.relative_to(SHIPPED): path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= MOST_BYTES, sizes


@pytest.mark.parametrize("file", sorted(SHIPPED.rglob("*.safetensors")), ids=lambda file: str(file.relative_to(SHIPPED)))
def test_tensors_are_of_half_precision(file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # it is no dict
    assert kinds == {"F16"}


@pytest.mark.parametrize("name", WITHOUT_AUTOENCODER)
def test_what_shares_the_autoencoder_is_put_together_with_it(name: str) -> None:
    folder = resolve(f"builtin:demo/{name}")
    shipped = SHIPPED / "flux" / "vae" / "diffusion_pytorch_model.safetensors"
    assert (folder / "vae" / shipped.name).read_bytes() == shipped.read_bytes()
    assert not (SHIPPED / name / "vae").exists()
    for own in (path for path in (SHIPPED / name).rglob("*") if path.is_file()):
        assert (folder / own.relative_to(SHIPPED / name)).read_bytes() == own.read_bytes()


def test_no_pickle_but_those_that_are_published_as_such() -> None:
    pickles = {path.name for path in SHIPPED.rglob("*") if path.suffix in (".pth", ".bin", ".pt")}
    assert pickles == {"ir_se50.pth", "image_proj_model.bin"}
