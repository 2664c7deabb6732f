"""Files of a folder of weights that are loaded. Other files, such as a README, do not change a result."""

import json
import re
from pathlib import Path

PIPELINE_INDEX = "model_index.json"
NEVER_LOADED = {".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".mp4"}
"""File endings of documentation and examples."""
NEVER_LOADED_NAMES = {"LICENSE", "NOTICE"}
OTHER_FORMATS = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".tflite", ".xml"}
"""File endings of weights that are not loaded from a folder with a model in safetensors."""
VARIANT = re.compile(r"(?P<stem>[^.]+)\.[^.]+?(?P<shard>-\d{5}-of-\d{5})?\.safetensors")
"""Name of weights of another precision: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`."""
VARIANT_INDEX = re.compile(r".+\.safetensors\.index\.[^.]+\.json")


def loaded_files(folder: Path) -> list[Path]:
    """Return the files in `folder` and its subfolders that a result may depend on, sorted by path.

    Of a diffusers pipeline these are its index and the folders of its components, without weights in other formats than
    safetensors and without variants such as fp16. Of other folders these are all files but documentation, pictures and hidden
    files.
    """
    components = _components(folder)
    roots = [folder] if components is None else [folder / name for name in components]
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    if components is not None:
        files.append(folder / PIPELINE_INDEX)
    candidates = [file for file in files if _is_candidate(file.relative_to(folder))]
    return sorted(file for folder_files in _by_folder(candidates) for file in _loaded(folder_files))


def _components(folder: Path) -> list[str] | None:
    """Return the component folders of a diffusers pipeline. `None` for other folders."""
    try:
        index = json.loads((folder / PIPELINE_INDEX).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(index, dict):
        return None
    # A component that the pipeline does not have is listed as [null, null].
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def _is_candidate(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() not in NEVER_LOADED and path.stem.upper() not in NEVER_LOADED_NAMES


def _by_folder(files: list[Path]) -> list[list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    return list(folders.values())


def _loaded(files: list[Path]) -> list[Path]:
    """Return the files of one folder without unused formats and variants of a model."""
    names = {file.name for file in files}
    is_model = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    return [file for file in files if not (is_model and _is_unused_weights(file.name))]


def _is_unused_weights(name: str) -> bool:
    return Path(name).suffix in OTHER_FORMATS or bool(VARIANT.fullmatch(name) or VARIANT_INDEX.fullmatch(name))
