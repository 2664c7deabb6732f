"""Values of a shot's `identity`, and the registry of injectors, which condition FLUX on a face."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from vidgen_ray.errors import StageError
from vidgen_ray.shot import INSTANTID_SDXL, NO_IDENTITY, REFERENCE
from vidgen_ray.stages.identity.base import FluxInjector

if TYPE_CHECKING:
    from vidgen_ray.stages.flux_model import FluxModel

INJECTORS = {
    "infusenet": "vidgen_ray.stages.identity.infusenet:InfuseNetInjector",
}
"""Name -> module and class. A new injector is one new file and one line here."""

_instances: WeakValueDictionary[tuple[str, FluxModel, Path], FluxInjector] = WeakValueDictionary()


def identities() -> tuple[str, ...]:
    """Return all values of a shot's `identity`."""
    return (*INJECTORS, INSTANTID_SDXL, REFERENCE, NO_IDENTITY)


def injector_class(name: str) -> type[FluxInjector]:
    """Return the class of an injector. Raises StageError for unknown names."""
    if name not in INJECTORS:
        raise StageError(f"identity: got {name!r}, must be one of {', '.join(INJECTORS)}")
    injector: type[FluxInjector] = resolve_name(INJECTORS[name])
    return injector


def shared_injector(name: str, model: FluxModel, weights: Path) -> FluxInjector:
    """Return the injector of this model, loaded on first use. Stages of one process with the same weights share it."""
    key = (name, model, weights)
    injector = _instances.get(key)
    if injector is None:
        injector = _instances[key] = injector_class(name)(model, weights)
    return injector
