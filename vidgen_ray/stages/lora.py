"""LoRA files on the transformers of a diffusers pipeline: checked, loaded on first use, active for one call at a time."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import InputChanged, SetupError, StageError, short_reason
from vidgen_ray.nets.lora_files import layer_of, names_for_diffusers
from vidgen_ray.nets.weight_files import library_errors, not_finite
from vidgen_ray.shot import LocalLora, LoraRef, VideoLora
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.free_memory import is_out_of_memory

if TYPE_CHECKING:
    import torch


FEW_STEP_LORA = "few_step_lora"
"""Extra weights: a LoRA that distils a model to a few steps, merged when the model is loaded."""


class LoraAdapters:
    """LoRAs of one pipeline. Outside of `active` the weights are bitwise those without LoRAs."""

    def __init__(
        self,
        pipe: Any,
        kept: int,
        model: str,
        field: str = "lora",
        *,
        dtype: torch.dtype | None = None,
        is_compiled: bool = False,
    ) -> None:
        """`kept`: LoRAs that stay loaded, and the maximum per shot. `model`, `field`: names of the base model and of the shot
        field in error messages. `dtype`: that of the computation, if the weights are stored in another one.

        `is_compiled`: the network was compiled. The n-th LoRA of a shot then replaces the n-th one of the shot before it in
        place (hot swap), because a network with other adapters is compiled again. It still is if a LoRA has other layers or a
        higher rank.
        """
        self._pipe = pipe
        self._kept = kept
        self._model = model
        self._field = field
        self._dtype = dtype
        self._is_compiled = is_compiled
        # Adapter -> identity of the LoRA in it. Least recently used first.
        self._names: OrderedDict[str, str] = OrderedDict()
        self._scales: dict[str, dict[Any, float]] = {}
        """Adapter -> layer -> scale of its LoRA with weight 1. Only if compiled."""
        self._active: tuple[tuple[str, float], ...] = ()
        self._notes: list[str] = []
        self.loads = 0
        """Number of files that were loaded so far."""

    def take_notes(self) -> list[str]:
        """Return what a user should know about the files loaded since the last call."""
        notes, self._notes = self._notes, []
        return notes

    @property
    def active_in_text_encoder(self) -> tuple[tuple[str, float], ...]:
        """Names and weights of the active LoRAs, if one of them changes a text encoder."""
        adapters = self._pipe.get_list_adapters()
        active = {name for name, _ in self._active}
        changes_text = any(active & set(names) for part, names in adapters.items() if part.startswith("text_encoder"))
        return self._active if changes_text else ()

    @contextmanager
    def active(self, loras: Sequence[LoraRef]) -> Iterator[None]:
        """Run the block with exactly these LoRAs active."""
        if not loras:
            yield
            return
        if len(loras) > self._kept:
            raise StageError(f"{self._field}: got {len(loras)}, must be at most {self._kept}, the profile's adapters_kept")
        try:
            names, weights = [self._loaded(lora, n) for n, lora in enumerate(loras)], [lora.weight for lora in loras]
            self._pipe.enable_lora()
            if self._is_compiled:
                self._activate(names, weights)
            else:
                self._pipe.set_adapters(names, weights)
            self._active = tuple(zip(names, weights, strict=True))
            yield
        finally:
            self._active = ()
            if self._names:
                self._pipe.disable_lora()

    def _activate(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Activate these adapters. Their scales change in place: a compiled network is compiled again for other numbers."""
        for layer in self._layers():
            if list(layer.active_adapters) != list(names):
                layer.set_adapter(list(names))
            for name, weight in zip(names, weights, strict=True):
                if name in layer.scaling:
                    layer.scaling[name].fill_(self._scales[name][layer] * weight)

    def _layers(self) -> Iterator[Any]:
        """Yield the layers that have adapters."""
        for part in self._pipe.get_list_adapters():
            yield from (layer for layer in getattr(self._pipe, part).modules() if hasattr(layer, "lora_B"))

    def _loaded(self, lora: LoraRef, position: int) -> str:
        """Return the adapter name of the LoRA file at this position of the shot's, loaded on first use.

        Raises InputChanged if the file does not have the digest that the shot was planned with.
        """
        file = Path(lora.path)
        if file.suffix != ".safetensors" or not file.is_file():
            must = "must be an existing .safetensors file (other formats may run code)"
            raise StageError(f"{self._field}: got {str(file)!r}, {must}")
        sha256 = lora.sha256 if isinstance(lora, LocalLora) else digest(file)
        transformers = self._transformers_of(lora)
        identity = "/".join((str(file.resolve()), sha256, *transformers))
        name = f"lora_{position if self._is_compiled else hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        if self._names.get(name) == identity:
            self._names.move_to_end(name)
            return name
        while name not in self._names and len(self._names) >= self._kept:
            oldest, _ = self._names.popitem(last=False)
            self._unload(oldest)
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputChanged(file)
        with tempfile.TemporaryDirectory(prefix="vidgen-lora-") as folder:
            # diffusers reads a path. The copy has the bytes that were checked.
            copy = Path(folder) / file.name
            copy.write_bytes(content)
            del content
            try:
                self._load(copy, name, transformers)
            except BaseException:
                # A part of it may be loaded and active.
                self._unload(name)
                raise
        self.loads += 1
        self._names[name] = identity
        return name

    def _transformers_of(self, lora: LoraRef) -> tuple[str, ...]:
        """Return the parts of the pipeline that a LoRA is loaded into. Raises StageError for a part that it does not have."""
        if getattr(self._pipe, "transformer_2", None) is None:
            if isinstance(lora, VideoLora) and lora.expert == "low":
                raise StageError(f"{self._field}: got expert low, must be both or high: these weights have one transformer")
            return ("transformer",)
        expert = lora.expert if isinstance(lora, VideoLora) else "both"
        return {"both": ("transformer", "transformer_2"), "high": ("transformer",), "low": ("transformer_2",)}[expert]

    def _load(self, file: Path, name: str, transformers: Sequence[str]) -> None:
        import torch
        from diffusers.loaders import FluxLoraLoaderMixin

        pipe = self._pipe
        source = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        try:
            without_place = _rename_tensors(file, is_flux1=isinstance(pipe, FluxLoraLoaderMixin))
            factors = pipe.lora_state_dict(str(file.parent), **source)
            for part in transformers:
                _check_layers(getattr(pipe, part), factors)
            if (tensor := not_finite(factors)) is not None:
                raise ValueError(f"{tensor} has NaN or infinite values")
            # Stages run in inference mode, in which torchao's weights cannot be detached.
            with without_peft_warnings(), torch.inference_mode(False), torch.no_grad():
                if self._is_compiled:
                    self._swap(file, name, transformers, factors)
                else:
                    load_adapter(pipe, file, name, transformers)
        # diffusers' converters of LoRA formats raise many exception types.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = short_reason(error)
            raise StageError(f"lora {file.name}: cannot be loaded into these {self._model} weights: {reason}") from error
        if self._names:
            pipe.disable_lora()
        if self._is_compiled:
            self._scales[name] = {layer: float(layer.scaling[name]) for layer in self._layers() if name in layer.scaling}
        changed_parts = [part for part, names in pipe.get_list_adapters().items() if name in names]
        if self._dtype is not None and not self._is_compiled:
            for part in changed_parts:
                _set_factors(getattr(pipe, part), part, name, factors, self._dtype)
        if not any(_has_effect(getattr(pipe, part), name) for part in changed_parts):
            raise StageError(
                f"lora {file.name}: has no effect on these {self._model} weights; it was trained for another model, "
                "or not trained"
            )
        if ignored := sorted({*without_place, *_unknown_layers([getattr(pipe, part) for part in transformers], factors)}):
            self._notes.append(
                f"lora {file.name}: {len(ignored)} of its layers are ignored, because these {self._model} weights have no such "
                f"layers, the first is {ignored[0][:80]}"
            )

    def _swap(self, file: Path, name: str, transformers: Sequence[str], factors: Mapping[str, Any]) -> None:
        """Load a LoRA in place of the one in this adapter, which compiles nothing if it has no other layers and no higher rank.

        Source: peft's hot swap, by diffusers.
        """
        pipe = self._pipe
        wanted = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in factors if ".lora_" in key}
        rank = max((factor.shape[1] for key, factor in factors.items() if key.endswith("lora_B.weight")), default=1)
        ranks = [half.out_features for layer in self._layers() for half in layer.lora_A.values()]
        parts = [part for part, names in pipe.get_list_adapters().items() if name in names]
        fits = parts == list(transformers) and all(rank <= held for held in ranks)
        for part in parts:
            layers = getattr(pipe, part).named_modules()
            fits = fits and wanted <= {path for path, layer in layers if name in getattr(layer, "lora_B", ())}
        if not fits:
            self._unload(name)
            # Ranks of 16, 32, 64 and so on share their compiled network. All adapters of a network get the same rank.
            target_rank = max(16, 1 << (rank - 1).bit_length(), *ranks)
            for part in transformers:
                getattr(pipe, part).enable_lora_hotswap(target_rank=target_rank, check_compiled="ignore")
            load_adapter(pipe, file, name, transformers)
            for layer in self._layers():
                if self._dtype is not None and name in layer.lora_B:
                    for half in (layer.lora_A[name], layer.lora_B[name]):
                        half.to(self._dtype)
        # Also after loading: in the dtype of the computation, the factors have the values of the file.
        load_adapter(pipe, file, name, transformers, hotswap=True)

    def _unload(self, name: str) -> None:
        """Unload an adapter from all parts that have it."""
        self._names.pop(name, None)
        if any(name in names for names in self._pipe.get_list_adapters().values()):
            with without_peft_warnings():
                self._pipe.delete_adapters(name)


def load_adapter(pipe: Any, file: Path, name: str, transformers: Sequence[str], **options: Any) -> None:
    """Load a LoRA as an adapter of these parts of the pipeline."""
    for part in transformers:
        second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
        pipe.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name=name,
            use_safetensors=True,
            local_files_only=True,
            **second,
            **options,
        )


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Suppress peft's warnings about several adapters and about deleting an active adapter. Both are intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`|Adapter .* was active", UserWarning)
        yield


def _rename_tensors(file: Path, *, is_flux1: bool) -> list[str]:
    """Give the tensors of a LoRA file the names that diffusers reads. Return the layers without a place, which are left out."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
    new_names = names_for_diffusers(names, is_flux1=is_flux1)
    if any(name != new for name, new in new_names.items()):
        tensors = load_file(file)
        save_file({new: tensors[name] for name, new in new_names.items() if new}, file, metadata)
    return sorted({layer_of(name) for name, new in new_names.items() if new is None})


def _check_layers(transformer: Any, factors: Mapping[str, Any]) -> None:
    """Raise ValueError if the transformer has none of a LoRA's layers, or if factors do not match their layer.

    diffusers would resize the layer, for all shots.
    """
    unknown = _unknown_layers([transformer], factors)
    if unknown and len(unknown) == len(_layers_of(factors)):
        raise ValueError(
            f"they have none of its {len(unknown)} layers, the first is {unknown[0][:80]}; it was trained for another model"
        )
    layers = dict(transformer.named_modules())
    for key, factor in factors.items():
        name, dot, rest = key.removeprefix("transformer.").rpartition(".lora_")
        layer = layers.get(name)
        layer = getattr(layer, "base_layer", layer)
        if not dot or layer is None or rest not in ("A.weight", "B.weight"):
            continue
        # Quantised linear layers store their weight packed.
        is_linear = hasattr(layer, "in_features")
        shape = (layer.out_features, layer.in_features) if is_linear else tuple(layer.weight.shape)
        side = 1 if rest == "A.weight" else 0
        if factor.shape[side] != shape[side]:
            raise ValueError(f"{key} has shape {tuple(factor.shape)}, its layer {shape}")


def _unknown_layers(transformers: Sequence[Any], factors: Mapping[str, Any]) -> list[str]:
    """Return the layers of a LoRA, in diffusers' names such as `transformer.proj_out`, that no transformer has."""
    known = {f"transformer.{name}" for transformer in transformers for name, _ in transformer.named_modules()}
    return sorted(_layers_of(factors) - known)


def _layers_of(factors: Mapping[str, Any]) -> set[str]:
    """Return the layers of a LoRA's transformer, in diffusers' names."""
    return {key.rpartition(".lora_")[0] for key in factors if key.startswith("transformer.") and ".lora_" in key}


def _has_effect(module: Any, adapter: str) -> bool:
    """Return whether the second factor of any layer is nonzero. Training starts with zeros."""
    return any(
        bool(layer.lora_B[adapter].weight.any())
        for layer in module.modules()
        if hasattr(layer, "lora_B") and adapter in layer.lora_B
    )


def _set_factors(network: Any, part: str, adapter: str, factors: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Give an adapter the values of its file in `dtype`. peft creates it in that of the layers, maybe one for storage."""
    import torch

    for path, layer in network.named_modules():
        if not hasattr(layer, "lora_B") or adapter not in layer.lora_B:
            continue
        for factor, half in (("lora_A", layer.lora_A[adapter]), ("lora_B", layer.lora_B[adapter])):
            value = factors.get(f"{part}.{path}.{factor}.weight", half.weight)
            # peft fails to add further adapters beside tensors that were made in inference mode.
            with torch.inference_mode(False):
                half.weight.data = value.to(half.weight.device, dtype, copy=True)


def merge_lora(pipe: Any, file: Path, model: str, part: str = "transformer") -> None:
    """Add a LoRA to the weights of a part of the pipeline. Raises SetupError. `model`: its name in messages."""
    if file.suffix != ".safetensors":
        raise SetupError(f"{FEW_STEP_LORA}: got {str(file)!r}, must be a .safetensors file (other formats may run code)")
    with library_errors(f"{FEW_STEP_LORA} {file.name}: cannot be merged into these {model} weights"):
        load_adapter(pipe, file, FEW_STEP_LORA, (part,))
        pipe.fuse_lora(components=[part])
        pipe.unload_lora_weights()
