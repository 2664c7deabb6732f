"""Import and load networks without the packages that diffusers and transformers import for what no stage does on a CPU.

torch's compiler, distributed tensors, sympy and scipy are more than half of the time in which a pipeline is imported.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions
from types import ModuleType
from typing import Any

DEFERRED = (
    "boto3",
    "onnxruntime",
    "scipy.integrate",
    "scipy.optimize",
    "scipy.stats",
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
    "torchvision.datasets",
    "torchvision.models",
)
"""Packages that are imported when something of them is called."""
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of `torch._dynamo`. They matter to compiled functions only."""
GUARDS: Mapping[str, Callable[..., bool]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true"), bool),
    "is_nested_int": lambda _: False,
    "sym_eq": lambda one, other: one == other if isinstance(one, int) else [*one] == [*other],
}
"""What functions of `symbolic_shapes`, which imports sympy, do with sizes that are numbers."""
IMPORTED_OBJECTS = 100_000
"""New objects after which Python looks for garbage while packages are imported."""
_lock = threading.RLock()
_thresholds: list[tuple[int, int, int]] = []
"""Thresholds of Python at the begin of each block of `rare_garbage_collection`."""
_thresholds_lock = threading.Lock()


class _DeferredModule(ModuleType):
    """Module or function of a deferred package. What it has are such modules, and classes without instances."""

    def __getattr__(self, attribute: str) -> Any:
        name = self.__name__
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if (name, attribute) == ("torch._dynamo", "is_compiling") and name not in sys.modules:
            return lambda: False  # asked by Qwen's transformer in each call
        if not finder.defers(name):
            return getattr(importlib.import_module(name), attribute)
        if name.endswith("symbolic_shapes") and attribute in GUARDS:
            return GUARDS[attribute]
        if name == "torch._dynamo" and attribute in MARKS:
            return lambda function=None, *_, **__: function or (lambda decorated: decorated)
        if attribute[0].isupper():

            def make(_: type, *arguments: Any, **named: Any) -> Any:
                return _real(f"{name}.{attribute}")(*arguments, **named)

            return type(attribute, (), {"__new__": make})
        return _DeferredModule(f"{name}.{attribute}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _real(self.__name__)(*arguments, **named)


def _real(path: str) -> Any:
    """Import what has a path in a deferred package, which is imported as usual from now on."""
    name, _, attribute = path.rpartition(".")
    for package in DEFERRED:
        if _is_in(name, package):
            finder.drop(package)
    return getattr(importlib.import_module(name), attribute)


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class _Finder(MetaPathFinder, Loader):
    """Finds modules of deferred packages."""

    def __init__(self) -> None:
        self.packages = set[str]()

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if self.defers(name) else None

    def defers(self, name: str) -> bool:
        return any(_is_in(name, each) for each in self.packages)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...

    def drop(self, package: str) -> None:
        """Import the package as usual from now on. Modules that refer to its deferred ones import these on use."""
        self.packages.discard(package)
        for name, module in [*sys.modules.items()]:
            if type(module) is _DeferredModule and _is_in(name, package):
                del sys.modules[name]


finder = _Finder()


class _Distributions(Mapping[str, list[str]]):
    """Package -> its distributions, as `packages_distributions` returns them. The first use reads them, in 0.2 s."""

    @cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return packages_distributions()

    def __getitem__(self, package: str) -> list[str]:
        return self._found[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _is_compiled_module(module: object) -> bool:
    """Return what diffusers' function of this name returns. That one imports the compiler if nothing is compiled."""
    compiler = sys.modules.get("torch._dynamo")
    return compiler is not None and isinstance(module, compiler.eval_frame.OptimizedModule)


def _unless_meta(initialise: Callable[..., Any], tensor: Any, *arguments: Any, **named: Any) -> Any:
    return tensor if tensor.is_meta else initialise(tensor, *arguments, **named)


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Look for garbage less often in the block. What is imported and loaded stays: the search takes a sixth of the time."""
    with _thresholds_lock:
        _thresholds.append(gc.get_threshold())
        gc.set_threshold(IMPORTED_OBJECTS)
    try:
        yield
    finally:
        with _thresholds_lock:
            # Blocks of several threads end in any order.
            before = _thresholds.pop()
            if not _thresholds:
                gc.set_threshold(*before)


@contextmanager
def deferred_packages() -> Iterator[None]:
    """Do not import the packages of `DEFERRED` in the block. Other threads must not import them meanwhile."""
    with _lock, rare_garbage_collection():
        finder.packages = {each for each in DEFERRED if each not in sys.modules}
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for package in [*finder.packages]:
                finder.drop(package)


@contextmanager
def deferred_imports(device: str, *, compiles: bool = False) -> Iterator[None]:
    """Import networks of diffusers in the block without the packages of `DEFERRED` and torch's distributed tensors.

    `device`, `compiles`: where networks run, and whether they are compiled. Has no effect on GPUs and for compiled networks.
    Other threads must not import these packages meanwhile.
    """
    if device != "cpu" or compiles:
        yield
        return
    # It imports asyncio and ssl, which commands without networks do not need.
    from unittest.mock import patch

    with deferred_packages():
        import torch.distributed

        # For transformers, a torch that was built without distributed tensors.
        without_tensors = patch.object(torch.distributed, "is_available", return_value=False)
        # Networks are built without memory first. Their random numbers would be those of a compiler, in Python.
        skipped = patch.object(torch.nn.init, "normal_", partial(_unless_meta, torch.nn.init.normal_))
        with without_tensors, skipped, patch.object(importlib.metadata, "packages_distributions", _Distributions):
            import diffusers.utils.torch_utils

            diffusers.utils.torch_utils.is_compiled_module = _is_compiled_module
            yield
