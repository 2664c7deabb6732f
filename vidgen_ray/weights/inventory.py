"""Weights on this machine: present, incomplete or missing, and whether their keys and shapes fit the networks that load
them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.weight_files import silence_libraries
from vidgen_ray.system.model_files import PIPELINE_INDEX, loaded_files, missing_files
from vidgen_ray.weights import REMOTE, resolve

_State = Literal["present", "missing", "built in", "on a server"]


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """Weights of one reference, as they are on this machine."""

    reference: str
    state: _State
    """`built in`: shipped, or built on this machine when they are first needed."""
    path: Path | None
    """`None` unless present."""
    size_bytes: int | None
    """Size of the files that are loaded. `None` unless present."""
    problem: str | None
    """Why the weights are not present, and what to do."""


def local_weights(reference: str, relative_to: Path | None = None) -> LocalWeights:
    """Return the state of a reference as profiles write it. Nothing is downloaded or built."""
    if reference.startswith("builtin:"):
        return LocalWeights(reference, "built in", None, None, None)
    if reference.startswith(REMOTE):
        return LocalWeights(reference, "on a server", None, None, None)
    try:
        path = resolve(reference, relative_to)
    except SetupError as error:
        return LocalWeights(reference, "missing", None, None, str(error))
    files = [path] if path.is_file() else loaded_files(path)
    return LocalWeights(reference, "present", path, sum(file.stat().st_size for file in files), None)


_MAX_NAMED = 3
"""Number of keys that a message names."""
Shapes = dict[str, tuple[int, ...]]


def header_problems(path: Path) -> list[str]:
    """Return what is wrong with the weights at a path, one message per problem. Empty if nothing was found."""
    if path.is_file():
        return [] if path.suffix != ".safetensors" else _unreadable([path], path.parent)
    problems = [f"{name} is missing" for name in missing_files(path)]
    files = [file for file in loaded_files(path) if file.suffix == ".safetensors"]
    if unreadable := _unreadable(files, path):
        return problems + unreadable
    for folder, library, class_name in _networks(path):
        weights = [file for file in files if file.parent == folder]
        if weights:
            problems += [f"{folder.relative_to(path)}: {text}" for text in _compare(folder, library, class_name, weights)]
    return problems


def _networks(path: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield folder, library and class of each network in the folder."""
    index = _json(path / PIPELINE_INDEX)
    if index:
        for name, value in index.items():
            if isinstance(value, list) and len(value) == 2 and value[0] in ("diffusers", "transformers"):
                yield path / name, value[0], value[1]
        return
    for config in sorted(path.rglob("config.json")):
        if class_name := _json(config).get("_class_name"):
            yield config.parent, "diffusers", class_name


def _compare(folder: Path, library: str, class_name: str, files: list[Path]) -> list[str]:
    """Return the differences between the headers of the files and the network of this class."""
    import torch

    silence_libraries()
    found: Shapes = {key: shape for file in files for key, shape in _header(file).items()}
    network_class = getattr(importlib.import_module(library), class_name, None)
    if network_class is None:
        return [f"{class_name} is not a class of {library}"]
    # The loaders of both libraries rename keys of older files. They work on tensors, here without data.
    tensors = {key: torch.empty(shape, device="meta") for key, shape in found.items()}
    try:
        if library == "diffusers":
            missing, unexpected, shapes = _diffusers_differences(network_class, folder, tensors)
        else:
            missing, unexpected, shapes = _transformers_differences(network_class, folder, tensors)
    # Both libraries raise many exception types for a configuration of another model.
    except Exception as error:
        return [f"its config.json is not that of a {class_name}: {error}"]
    differences = (("missing tensors", missing), ("unexpected tensors", unexpected), ("tensors of another shape", shapes))
    return [f"{what}: {_named(keys)}" for what, keys in differences if keys]


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return ", ".join(keys[:_MAX_NAMED]) + more


Differences = tuple[list[str], list[str], list[str]]
"""Missing and unexpected keys, and keys with both shapes."""


def _diffusers_differences(network_class: Any, folder: Path, tensors: dict[str, Any]) -> Differences:
    import torch

    config = network_class.load_config(str(folder), local_files_only=True)
    with torch.device("meta"):
        network = network_class.from_config(config)
    network._fix_state_dict_keys_on_load(tensors)
    expected = network.state_dict()
    wrong = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    return sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys()), wrong


def _transformers_differences(network_class: Any, folder: Path, tensors: dict[str, Any]) -> Differences:
    config = network_class.config_class.from_pretrained(str(folder), local_files_only=True)
    _, info = network_class.from_pretrained(
        None, config=config, state_dict=tensors, device_map={"": "meta"}, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = [f"{key} {tuple(got)} for {tuple(needed)}" for key, got, needed in sorted(info["mismatched_keys"])]
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), wrong


def _unreadable(files: list[Path], folder: Path) -> list[str]:
    problems = []
    for file in files:
        try:
            _header(file)
        # The library raises an exception of its own, and OSError.
        except Exception as error:
            problems.append(f"{file.relative_to(folder)}: not an intact safetensors file ({error})")
    return problems


def _header(file: Path) -> Shapes:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        return {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118  # not a mapping


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
