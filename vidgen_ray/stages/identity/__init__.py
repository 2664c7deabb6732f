"""The injectors that a profile can name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from vidgen_ray.errors import ProfileError
from vidgen_ray.stages.identity.base import FluxInjector

if TYPE_CHECKING:
    from vidgen_ray.stages.flux_model import FluxModel

INJECTORS = {
    "infusenet": ("infusenet", "InfuseNetInjector"),
}
"""Name -> (module of this package, class)."""

_in_this_process: WeakValueDictionary[tuple[str, FluxModel, Path], FluxInjector] = WeakValueDictionary()


def injector_class(name: str) -> type[FluxInjector]:
    if name not in INJECTORS:
        raise ProfileError(f"injector: got {name!r}, must be one of {', '.join(INJECTORS)}")
    module, class_name = INJECTORS[name]
    found: type[FluxInjector] = getattr(import_module(f"{__name__}.{module}"), class_name)
    return found


def shared_injector(name: str, model: FluxModel, weights: Path) -> FluxInjector:
    """The injector on this model: stages of one process that name the same weights get the same object."""
    key = (name, model, weights)
    injector = _in_this_process.get(key)
    if injector is None:
        injector = _in_this_process[key] = injector_class(name)(model, weights)
    return injector
