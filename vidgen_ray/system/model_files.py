"""Files of a folder of weights that are loaded. Other files, such as a README, do not change a result."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from vidgen_ray.errors import SetupError

PIPELINE_INDEX = "model_index.json"
NEVER_LOADED = {".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".mp4"}
"""File endings of documentation and examples."""
NEVER_LOADED_NAMES = {"LICENSE", "NOTICE"}
_OTHER_FORMATS = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".tflite", ".xml"}
"""File endings of weights that are not loaded from a folder with a model in safetensors."""
VARIANT = re.compile(r"(?P<stem>[^.]+)\.[^.]+?(?P<shard>-\d{5}-of-\d{5})?\.safetensors")
"""Name of weights of another precision: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`."""
SHARD_INDEX = ".safetensors.index.json"
VARIANT_INDEX = re.compile(r".+\.safetensors\.index\.[^.]+\.json")


def check_pipeline_folder(folder: Path, allowed: Sequence[str]) -> None:
    """Raise SetupError if the folder does not hold a diffusers pipeline of one of these classes, by its index alone."""
    names = " or ".join(allowed)
    try:
        kind = json.loads((folder / PIPELINE_INDEX).read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SetupError(f"{folder}: no {PIPELINE_INDEX}, must be the diffusers folder of a {names}") from None
    # diffusers would load components of the same name from the folder of another pipeline.
    if kind not in allowed:
        raise SetupError(f"{folder}: holds a {kind}, must be a {names}")


def rife_file(weights: Path) -> Path:
    """Return RIFE's weights: a file, or `flownet.safetensors` or `flownet.pkl` of a folder. Raises SetupError without one."""
    files = [weights] if not weights.is_dir() else [weights / f"flownet{ending}" for ending in (".safetensors", ".pkl")]
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise SetupError(f"rife: {weights} must be RIFE's flownet.pkl or flownet.safetensors, or a folder with one of them")
    return found


def loaded_files(folder: Path) -> list[Path]:
    """Return the files in `folder` and its subfolders that a result may depend on, sorted by path.

    Of a diffusers pipeline these are its index and the folders of its components, without weights in other formats than
    safetensors and without variants such as fp16. Of other folders these are all files but documentation, pictures, hidden
    files, and the same weights a second time: safetensors beside a subfolder with a network.
    """
    components = _components_of(folder)
    roots = [folder] if components is None else [folder / name for name in components]
    files = [PurePosixPath(file.relative_to(folder)) for root in roots for file in root.rglob("*") if file.is_file()]
    if components is not None:
        files.append(PurePosixPath(PIPELINE_INDEX))
    return [folder / file for file in select_loaded(files, components)]


def select_loaded(files: Iterable[PurePosixPath], components: Collection[str] | None) -> list[PurePosixPath]:
    """Return those of a folder's files that are loaded, see `loaded_files`. Paths are relative to the folder.

    `components`: folders of a pipeline's components, see `pipeline_components`. `None` for other folders.
    """
    if components is not None:
        files = [file for file in files if file.parts[0] in components or str(file) == PIPELINE_INDEX]
    folders: dict[PurePosixPath, list[PurePosixPath]] = {}
    for file in filter(_is_candidate, files):
        folders.setdefault(file.parent, []).append(file)
    root = PurePosixPath()
    networks = [folder for folder, inside in folders.items() if _is_network(inside)]
    if networks and root not in networks:
        folders[root] = [file for file in folders.get(root, ()) if ".safetensors" not in file.name]
    return sorted(file for folder_files in folders.values() for file in _loaded(folder_files))


def pipeline_components(index: str) -> list[str] | None:
    """Return the component folders that the text of a `model_index.json` names. `None` if it is not the index of a pipeline."""
    try:
        content = json.loads(index)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    # A component that the pipeline does not have is listed as [null, null].
    return [name for name, value in content.items() if isinstance(value, list) and value and value[0] is not None]


def missing_files(folder: Path) -> list[str]:
    """Return what the folder's own indexes name and what is not on disk: component folders and shards, sorted.

    A link to a file that is gone counts as missing, as after an interrupted download.
    """
    components = _components_of(folder)
    missing = [name for name in components or () if not any((folder / name).glob("*"))]
    roots = [folder] if components is None else [folder / name for name in components]
    names = {PurePosixPath(path.relative_to(folder)) for root in roots for path in root.rglob("*") if not path.is_dir()}
    for name in select_loaded(names, components):
        path = folder / name
        if not path.exists():
            missing.append(str(name))
        elif name.name.endswith(SHARD_INDEX):
            missing += [str(name.parent / shard) for shard in _shards(path) if not (path.parent / shard).is_file()]
    return sorted(set(missing))


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _components_of(folder: Path) -> list[str] | None:
    try:
        return pipeline_components((folder / PIPELINE_INDEX).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _is_candidate(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() not in NEVER_LOADED and path.stem.upper() not in NEVER_LOADED_NAMES


def _is_network(files: Sequence[PurePosixPath]) -> bool:
    """Return whether a folder with these files holds a network in safetensors."""
    return any(file.name == "config.json" for file in files) and any(file.suffix == ".safetensors" for file in files)


def _loaded(files: Sequence[PurePosixPath]) -> Sequence[PurePosixPath]:
    """Return the files of one folder without unused formats and variants of a model."""
    if not _is_network(files):
        return files
    variants = {file for file in files if VARIANT.fullmatch(file.name) or VARIANT_INDEX.fullmatch(file.name)}
    return [file for file in files if file.suffix not in _OTHER_FORMATS and file not in variants]
