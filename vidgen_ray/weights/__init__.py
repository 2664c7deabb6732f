"""Where weights are: a folder, a snapshot of a hub already on disk, in the package, or built on the spot. No downloads.

A reference is a path, `hub:OWNER/NAME@REVISION[:SUBFOLDER]`, or `builtin:NAME`.
"""

import os
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path

from filelock import FileLock

from vidgen_ray.cache_dir import cache_dir
from vidgen_ray.errors import SetupError
from vidgen_ray.weights import demo_family


def _recipe(name: str, module: str = "tiny_diffusion") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        recipes = import_module(f"vidgen_ray.weights.{module}")
        getattr(recipes, f"build_{name}")(folder)

    return build


def _realesrgan(folder: Path) -> None:
    from vidgen_ray.weights import realesrgan

    realesrgan.build(folder)


BUILTIN: dict[str, tuple[int | Callable[[], str], Callable[[Path], None]]] = {
    "tiny/flux": (1, _recipe("flux")),
    "tiny/flux-schnell": (1, _recipe("flux_schnell")),
    "tiny/lora.safetensors": (1, _recipe("lora")),
    "tiny/infusenet": (1, _recipe("infusenet", "tiny_identity")),
    "tiny/sdxl": (1, _recipe("sdxl", "tiny_identity")),
    "tiny/instantid-sdxl": (1, _recipe("instantid_sdxl", "tiny_identity")),
    "tiny/hunyuandit": (1, _recipe("hunyuandit")),
    "tiny/svd": (1, _recipe("svd")),
    "tiny/antelopev2": (1, _recipe("antelopev2", "tiny_faces")),
    "tiny/ir_se50.pth": (1, _recipe("ir_se50", "tiny_faces")),
    "realesrgan": (1, _realesrgan),
    "demo/hunyuandit": (partial(demo_family.digest, "hunyuandit"), _recipe("hunyuandit", "demo_family")),
    "demo/svd": (partial(demo_family.digest, "svd"), _recipe("svd", "demo_family")),
}
"""Name -> (version of the recipe, or what gives that of its ingredients; what builds it at a path).

It is a folder, or a file where the name has an ending."""


def resolve(reference: str, relative_to: Path | None = None) -> Path:
    """The local path of a reference. A relative path is taken from the folder `relative_to`.

    Raises SetupError, saying what to do, where nothing is there.
    """
    if reference.startswith("builtin:"):
        return _built(reference.removeprefix("builtin:"))
    if reference.startswith("hub:"):
        return _from_hub(reference.removeprefix("hub:"))
    # os.path, for it leaves the home of an unknown user as it is.
    path = (relative_to or Path()) / os.path.expanduser(reference)
    try:
        there = path.exists()
    except OSError:
        there = False
    if not there:
        raise SetupError(f"weights {reference!r}: nothing at {path.absolute()}; give an existing file or folder")
    return path.absolute()


def _built(name: str) -> Path:
    if name in (shipped := demo_family.shipped_models()):
        return shipped[name]
    if name not in BUILTIN:
        raise SetupError(f"weights 'builtin:{name}': no such name; there are {', '.join((*BUILTIN, *shipped))}")
    told, build = BUILTIN[name]
    version = told() if callable(told) else told
    stem, ending = os.path.splitext(name)
    place = cache_dir() / "builtin" / f"{stem.replace('/', '-')}-{version}-torch{_torch_version()}{ending}"
    if place.exists():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot write {place.parent} ({error.strerror}); set VIDGEN_CACHE to a folder that can be") from None
    with FileLock(f"{place}.lock"):
        if place.exists():
            return place
        with tempfile.TemporaryDirectory(dir=place.parent) as tmp:
            fresh = Path(tmp) / place.name
            if not ending:
                fresh.mkdir()
            build(fresh)
            fresh.rename(place)
    return place


@lru_cache(maxsize=1)
def _torch_version() -> str:
    # Another torch may draw other random weights from the same seed.
    from importlib.metadata import version

    return version("torch").split("+")[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, rest = name.partition("@")
    revision, _, subfolder = rest.partition(":")
    if not revision:
        raise SetupError(f"weights 'hub:{name}': no revision; write hub:{repo}@COMMIT so that a run can be repeated")
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise SetupError(f"weights 'hub:{name}': must be hub:OWNER/NAME@REVISION ({error})") from None
    except LocalEntryNotFoundError:
        raise SetupError(
            f"weights 'hub:{name}': not on this machine and nothing is downloaded while rendering; "
            f"run `hf download {repo} --revision {revision}` first, on every node or into a shared HF_HOME"
        ) from None
    path = snapshot / subfolder if subfolder else snapshot
    if not path.exists():
        raise SetupError(f"weights 'hub:{name}': the snapshot has no {subfolder!r}")
    return path
