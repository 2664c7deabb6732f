"""Divide the work of one shot among several processes, each with a GPU of its own: every process computes a part of the tokens
and, with classifier-free guidance, one of the two passes of a step.

All processes run the same stage for the same item, so they make the same noise, text embeddings and pixels. Only the calls of
the transformer are divided. Results differ from those of one process in the last bits, because sums have another order.
Source: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509; diffusers `ContextParallelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import SetupError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


ATTENTION_BACKENDS = ("native", "_native_cudnn")
"""Backends of torch that diffusers can divide."""


@dataclass
class _Group:
    """The processes of which this is one."""

    parallel: Any
    """diffusers' ParallelConfig, which all divided networks share."""
    over_all: Mapping[str, Any]
    """Attributes of its ContextParallelConfig with which all processes compute the same pass."""
    over_half: Mapping[str, Any]
    """The same for each half of the processes computing a pass of its own."""
    counterparts: ProcessGroup
    """This process and the one of the other half with the same tokens."""
    own_pass: int
    """Pass that this process computes if there are two: 0 or 1."""
    guided: bool = False
    """Each step has two passes."""
    first: torch.Tensor | None = None
    """Output of the first pass of the current step. Of the other half's, its place, filled in during the second pass."""

    @property
    def tokens(self) -> Any:
        """ContextParallelConfig of the current call of a pipeline."""
        return self.parallel.context_parallel_config


_group: _Group | None = None


def join_group(rank: int, processes: int, meeting: Path, device: str) -> None:
    """Make this process number `rank` of `processes`, a power of two above 1. Waits for the others. Stages load afterwards.

    `meeting`: path of a new file by which these processes of one machine find each other.
    """
    import torch
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    global _group
    # If there is no GPU, loading the stages says so.
    kind = torch.device(device).type if torch.cuda.is_available() else "cpu"
    # The lengths of unequal parts are exchanged without waiting for the GPU.
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=processes)
    everyone = init_device_mesh(kind, (1, processes), mesh_dim_names=("ring", "ulysses"))
    halves = init_device_mesh(kind, (2, 1, processes // 2), mesh_dim_names=("pass", "ring", "ulysses"))

    def tokens_over(mesh: Any) -> Any:
        config = ContextParallelConfig(ulysses_degree=processes)
        # The constructor refuses 1, with which each half is one process.
        config.ulysses_degree = mesh["ulysses"].size()
        config.setup(rank, processes, torch.device(kind), mesh)
        return config

    current = tokens_over(everyone)
    _group = _Group(
        ParallelConfig(context_parallel_config=current),
        dict(vars(current)),
        dict(vars(tokens_over(halves))),
        halves["pass"].get_group(),
        halves["pass"].get_local_rank(),
    )


def begin_call(*, guided: bool) -> None:
    """Prepare for a call of a diffusers pipeline. `guided`: each step calls the transformer twice, for two prompts."""
    if _group is not None:
        _group.guided, _group.first = guided, None
        vars(_group.tokens).update(_group.over_half if guided else _group.over_all)


def own_part(tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Return this process' part along a dimension of a tensor, all of it if there is only one process."""
    if _group is None:
        return tokens
    mesh = _group.tokens._ulysses_mesh
    own: torch.Tensor = tokens.tensor_split(mesh.size(), dim=dim)[mesh.get_local_rank()]
    return own


def divide(network: Any, inputs: Mapping[str, int] | None = None) -> None:
    """Divide the calls of a diffusers transformer if this process is one of a group.

    `inputs`: name -> dimension of the tokens, for a network that adds to one that denoises. Its outputs are not gathered.
    `None`: the network denoises, and diffusers knows its inputs. Raises SetupError if its attention heads cannot be divided.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.context_parallel import apply_context_parallel

    if _group is None:
        return
    heads, processes = network.config.num_attention_heads, _group.over_all["ulysses_degree"]
    if heads % processes:
        raise SetupError(f"{type(network).__name__} has {heads} attention heads, which {processes} GPUs cannot divide evenly")
    if inputs is None:
        # Not `enable_parallelism`, which needs a GPU.
        plan = {name: part for name, part in network._cp_plan.items() if name != LAST_LAYER}
        apply_context_parallel(network, _group.tokens, plan)
    HookRegistry.check_if_exists_or_initialize(network).register_hook(_division(network, _group, inputs), "division")


LAST_LAYER = "proj_out"
"""Layer of FLUX and Wan after which the tokens are gathered. Not by diffusers' hook: a LoRA of this layer encloses it."""


def _division(network: Any, group: _Group, own_inputs: Mapping[str, int] | None) -> Any:
    """Return the hook of a divided network, which encloses those of diffusers' context parallelism."""
    import torch
    import torch.distributed as dist
    from diffusers.hooks import ModelHook

    processors = [module.processor for module in network.modules() if hasattr(module, "processor")]

    class Division(ModelHook):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
        def new_forward(self, module: Any, **inputs: Any) -> Any:
            degree, lengths = group.tokens.ulysses_degree, _lengths(module, inputs)
            group.tokens.ulysses_anything = any(length % degree for length in lengths)
            for processor in processors:
                processor._parallel_config = group.parallel if degree > 1 else None
            if own_inputs is not None:
                parts = {name: own_part(inputs[name], dim) for name, dim in own_inputs.items()}
                return self.fn_ref.original_forward(**{**inputs, **parts})
            if not group.guided:
                return self.one_pass(module, inputs, lengths[0])
            number = int(group.first is not None)
            own = self.one_pass(module, inputs, lengths[0])[0] if number == group.own_pass else _like_output(module, inputs)
            if group.first is None:
                group.first = own
                return (own,)
            computed = own if group.own_pass else group.first
            outputs = [torch.empty_like(computed) for _ in range(2)]
            dist.all_gather(outputs, computed.contiguous(), group=group.counterparts)
            # The pipeline has the place of the other half's first pass already.
            group.first.copy_(outputs[0])
            group.first = None
            return (outputs[1],)

        def one_pass(self, module: Any, inputs: Mapping[str, Any], length: int) -> Any:
            last = getattr(module, LAST_LAYER).register_forward_hook(lambda _, __, part: _gathered(part, length, group))
            try:
                return self.fn_ref.original_forward(**inputs)
            finally:
                last.remove()

    return Division()


def _gathered(part: torch.Tensor, length: int, group: _Group) -> torch.Tensor:
    """Return all tokens (B, length, channels), of which this process has computed a part."""
    import torch
    import torch.distributed as dist

    lengths = [len(each) for each in torch.empty(length).tensor_split(group.tokens.ulysses_degree)]
    # gloo gathers tensors of one shape only.
    padded = torch.nn.functional.pad(part, (0, 0, 0, max(lengths) - part.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group.tokens._ulysses_mesh.get_group())
    return torch.cat([each[:, :own] for each, own in zip(parts, lengths, strict=True)], dim=1)


def _lengths(network: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Return the numbers of tokens that are divided."""
    latents, text = inputs["hidden_states"], inputs.get("encoder_hidden_states")
    if latents.ndim == 5:
        # Wan: (B, channels, frames, H, W). The text is not divided.
        return [latents[0, 0].numel() // prod(network.config.patch_size)]
    return [latents.shape[1]] if text is None else [latents.shape[1], text.shape[1]]


def _like_output(network: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor of the shape of the output, (B, channels, frames, H, W) or (B, tokens, channels), with any values."""
    latents: torch.Tensor = inputs["hidden_states"]
    shape = list(latents.shape)
    shape[1 if latents.ndim == 5 else 2] = network.config.out_channels or network.config.in_channels
    return latents.new_empty(shape)
