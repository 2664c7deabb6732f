"""What a shot's `identity` may be, and the injectors among that: the methods by which a face steers FLUX."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from vidgen_ray.errors import StageError
from vidgen_ray.shot import INSTANTID_SDXL, NO_IDENTITY
from vidgen_ray.stages.identity.base import FluxInjector

if TYPE_CHECKING:
    from vidgen_ray.stages.flux_model import FluxModel

INJECTORS = {
    "infusenet": ("infusenet", "InfuseNetInjector"),
}
"""Name -> (module of this package, class). A new method is one new file and one line here."""

_in_this_process: WeakValueDictionary[tuple[str, FluxModel, Path], FluxInjector] = WeakValueDictionary()


def identities() -> tuple[str, ...]:
    """All that a shot's `identity` may be."""
    return (*INJECTORS, INSTANTID_SDXL, NO_IDENTITY)


def injector_class(name: str) -> type[FluxInjector]:
    if name not in INJECTORS:
        raise StageError(f"identity: got {name!r}, FLUX is steered by {', '.join(INJECTORS)}")
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
