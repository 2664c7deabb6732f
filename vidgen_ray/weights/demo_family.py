"""The small trained models that are shipped with the package. They were trained by `training/`.

FLUX, HunyuanDiT and Stable Video Diffusion share one autoencoder, which is stored once, with FLUX. HunyuanDiT and Stable Video
Diffusion are copied together with it before use.
"""

import hashlib
import shutil
from pathlib import Path

from vidgen_ray import cache_dir

SHIPPED = Path(__file__).parent / "demo"
AUTOENCODER = SHIPPED / "flux" / "vae"
WITHOUT_AUTOENCODER = ("hunyuandit", "svd")


def shipped_models() -> dict[str, Path]:
    """Return the models that are usable as shipped: name -> folder or file."""
    return {f"demo/{path.name}": path for path in sorted(SHIPPED.iterdir()) if path.name not in WITHOUT_AUTOENCODER}


def digest(name: str) -> str:
    """Return a digest of the model's files and of the autoencoder. It changes when either is retrained."""
    parts = cache_dir.digest(SHIPPED / name), cache_dir.digest(AUTOENCODER)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_hunyuandit(folder: Path) -> None:
    """Write HunyuanDiT with the shared autoencoder."""
    _copy_with_autoencoder("hunyuandit", folder)


def build_svd(folder: Path) -> None:
    """Write Stable Video Diffusion with the shared autoencoder."""
    _copy_with_autoencoder("svd", folder)


def _copy_with_autoencoder(name: str, folder: Path) -> None:
    shutil.copytree(SHIPPED / name, folder, dirs_exist_ok=True)
    shutil.copytree(AUTOENCODER, folder / "vae")
