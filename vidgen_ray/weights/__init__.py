"""Resolve weight references to local paths. Nothing is downloaded.

A reference is a path, `hub:OWNER/NAME[@REVISION][:SUBFOLDER]` for a Hugging Face snapshot that is already on disk,
`builtin:NAME` for weights that are shipped with the package or built on first use, or `remote:NAME` for a model of a server.
"""

import os
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib.metadata import entry_points
from pathlib import Path

from vidgen_ray.errors import SetupError
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.model_files import missing_files
from vidgen_ray.weights import builtin

DEFAULT_REVISION = "main"
REMOTE = "remote:"
"""Begin of the reference of a model that a server has. It has no files."""
NO_WEIGHTS = "none:"
"""Reference of a stage without weights. It has no files."""


BUILDER_VERSION = "1"
"""Part of the cached path. Raise it when a builder writes other weights."""

BUILTIN: dict[str, Callable[[Path], None]] = {
    "realesrgan": builtin.build_realesrgan,
    "rife": builtin.build_rife,
    "demo/hunyuandit": partial(builtin.build_demo, "hunyuandit"),
    "demo/svd": partial(builtin.build_demo, "svd"),
    "demo/wan": partial(builtin.build_demo, "wan"),
}
"""Name -> builder, which writes a file if the name has a suffix, else into a folder.

Packages add names `GROUP/NAME` by an entry point `GROUP` of `vidgen.weights`: a mapping of names to builders."""


@lru_cache(maxsize=1)
def _builders() -> dict[str, Callable[[Path], None]]:
    """Return all builders, with those of entry points."""
    found = dict(BUILTIN)
    for group in entry_points(group="vidgen.weights"):
        found |= {f"{group.name}/{name}": build for name, build in group.load().items()}
    return found


def resolve(reference: str, relative_to: Path | None = None) -> Path:
    """Return the local path of a reference. Relative paths are relative to the folder `relative_to`.

    Raises SetupError if nothing exists at that path.
    """
    if reference.startswith("builtin:"):
        return _resolve_builtin(reference.removeprefix("builtin:"))
    if reference.startswith("hub:"):
        return _resolve_hub(reference.removeprefix("hub:"))
    if reference.startswith((REMOTE, NO_WEIGHTS)):
        return Path(reference)
    # Path.expanduser raises for the home of an unknown user. os.path leaves it unchanged.
    path = (relative_to or Path()) / os.path.expanduser(reference)
    try:
        exists = path.exists()
    except OSError:
        exists = False
    if not exists:
        raise SetupError(f"weights {reference!r}: nothing at {path.absolute()}; use an existing file or folder")
    return path.absolute()


def _resolve_builtin(name: str) -> Path:
    """Return the path of shipped or built weights. Builds them if they are not in the cache."""
    if name.startswith("demo/") and name in (shipped := builtin.shipped_models()):
        return shipped[name]
    path = built_path(name)
    if path.exists():
        return path
    # Importing the builders of other packages takes seconds.
    builders = BUILTIN if name in BUILTIN else _builders()
    suffix = os.path.splitext(name)[1]
    if name not in builders:
        known = [each for each in (*builders, *builtin.shipped_models()) if os.path.splitext(each)[1] == suffix]
        names = get_close_matches(name, known, 3) or known
        raise SetupError(f"weights 'builtin:{name}': unknown name, must be one of {', '.join(names)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot write {path.parent} ({error.strerror}); set VIDGEN_CACHE to a writable folder") from None
    from filelock import FileLock

    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            unfinished = Path(tmp) / path.name
            if not suffix:
                unfinished.mkdir()
            builders[name](unfinished)
            unfinished.rename(path)
    return path


def built_path(name: str) -> Path:
    """Return where the cache keeps built weights."""
    is_demo = name in BUILTIN and name.startswith("demo/")
    version = builtin.demo_digest(name.removeprefix("demo/")) if is_demo else BUILDER_VERSION
    stem, suffix = os.path.splitext(name)
    return cache_dir() / "builtin" / f"{stem.replace('/', '-')}-{version}-torch{_torch_version()}{suffix}"


@lru_cache(maxsize=1)
def _torch_version() -> str:
    # torch versions may draw different random weights from the same seed.
    from importlib.metadata import version

    return version("torch").split("+")[0]


def with_commit(reference: str) -> str:
    """Return a `hub:` reference with the commit that its branch or tag means on this machine. Others are returned unchanged.

    A snapshot that is not on this machine is left as it is, so that only shots that need it fail.
    """
    if not reference.startswith("hub:"):
        return reference
    repo, _, subfolder = parse_hub(reference.removeprefix("hub:"))
    try:
        commit = _snapshot(reference.removeprefix("hub:")).name
    except SetupError:
        return reference
    return f"hub:{repo}@{commit}{f':{subfolder}' if subfolder else ''}"


def _resolve_hub(name: str) -> Path:
    """Return the path in a Hugging Face snapshot on disk. `name` is OWNER/NAME[@REVISION][:SUBFOLDER]."""
    snapshot, (_, _, subfolder) = _snapshot(name), parse_hub(name)
    path = snapshot / subfolder if subfolder else snapshot
    if not path.exists():
        raise SetupError(f"weights 'hub:{name}': the snapshot has no {subfolder!r}; {_pull(name)}")
    if missing := missing_files(path):
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise SetupError(f"weights 'hub:{name}': {missing[0]}{more} missing; {_pull(name)}")
    return path


def _pull(name: str) -> str:
    return f"run `vidgen models pull hub:{name}` first, on every node or into a shared HF_HOME"


def parse_hub(name: str) -> tuple[str, str, str]:
    """Return repository, revision and subfolder of OWNER/NAME[@REVISION][:SUBFOLDER]. The subfolder may be empty."""
    before, _, subfolder = name.partition(":")
    repo, _, revision = before.partition("@")
    return repo, revision or DEFAULT_REVISION, subfolder


def _snapshot(name: str) -> Path:
    """Return the folder of a snapshot, which is named by its commit. Raises SetupError if it is not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, revision, _ = parse_hub(name)
    try:
        # No pattern: huggingface_hub would reject a snapshot without the files that are not loaded.
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except HFValidationError as error:
        raise SetupError(f"weights 'hub:{name}': must be hub:OWNER/NAME[@REVISION][:SUBFOLDER] ({error})") from None
    except LocalEntryNotFoundError:
        raise SetupError(
            f"weights 'hub:{name}': not on this machine, and nothing is downloaded while rendering; {_pull(name)}"
        ) from None
