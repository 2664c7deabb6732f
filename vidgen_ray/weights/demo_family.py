"""The trained small models that come with the package, made by `training/`: which are used as they lie, which are put together.

FLUX, HunyuanDiT and Stable Video Diffusion share one autoencoder, which is stored once, with FLUX.
"""

import hashlib
import shutil
from pathlib import Path

from vidgen_ray import cache_dir

SHIPPED = Path(__file__).parent / "demo"
AUTOENCODER = SHIPPED / "flux" / "vae"
WITHOUT_AUTOENCODER = ("hunyuandit", "svd")


def shipped_models() -> dict[str, Path]:
    """Name -> the folder or file."""
    return {f"demo/{path.name}": path for path in sorted(SHIPPED.iterdir()) if path.name not in WITHOUT_AUTOENCODER}


def digest(name: str) -> str:
    """Of the files that a model is put together from: one that was trained on is another model."""
    parts = cache_dir.digest(SHIPPED / name), cache_dir.digest(AUTOENCODER)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_hunyuandit(folder: Path) -> None:
    """Restyles pictures of the drawn world."""
    _with_autoencoder("hunyuandit", folder)


def build_svd(folder: Path) -> None:
    """Moves pictures of the drawn world."""
    _with_autoencoder("svd", folder)


def _with_autoencoder(name: str, folder: Path) -> None:
    shutil.copytree(SHIPPED / name, folder, dirs_exist_ok=True)
    shutil.copytree(AUTOENCODER, folder / "vae")
