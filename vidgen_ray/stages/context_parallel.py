"""Divide the work of one shot among several processes, each with a GPU of its own: every process computes a part of the tokens
or of the columns of pixels and, with classifier-free guidance, one of the two passes of a step.

All processes run the same stage for the same item, so they make the same noise, text embeddings and pixels. Only calls of
networks are divided. Results differ from those of one process in the last bits, because sums have another order.
Source: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509; diffusers `ContextParallelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
DOUBLING_GAIN = 1.65
"""Factor by which twice as many GPUs compute a step faster; they exchange tokens in every block. From xDiT's FLUX.1-dev on 1, 2
and 4 H100: 4.30, 2.68 and 1.63 s compiled, of which decoding takes 0.1. Not compiled it takes 6.71, 4.38 and 4.24 s, see
`STEP_LAUNCH_S` of FLUX."""


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
            # torch cannot compile the exchange of unequal parts.
            stance = "force_eager" if group.tokens.ulysses_anything else "default"
            with torch.compiler.set_stance(stance):
                return self.own_calls(module, inputs, lengths)

        def own_calls(self, module: Any, inputs: dict[str, Any], lengths: Sequence[int]) -> Any:
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
            lengths = _parts(length, group.tokens.ulysses_degree)
            mesh = group.tokens._ulysses_mesh.get_group()
            last = getattr(module, LAST_LAYER).register_forward_hook(lambda _, __, part: _gathered(part, lengths, 1, mesh))
            try:
                return self.fn_ref.original_forward(**inputs)
            finally:
                last.remove()

    return Division()


def _parts(length: int, processes: int) -> list[int]:
    """Return the lengths of the parts of so many numbers, as `tensor_split` makes them."""
    return [length // processes + (rank < length % processes) for rank in range(processes)]


def _gathered(part: torch.Tensor, lengths: Sequence[int], dim: int, processes: ProcessGroup | None = None) -> torch.Tensor:
    """Return a tensor of which each process has a part with `lengths` numbers along a dimension. `None`: all processes."""
    import torch
    import torch.distributed as dist

    # gloo gathers tensors of one shape only.
    missing = max(lengths) - part.shape[dim]
    padded = torch.nn.functional.pad(part, (0, 0) * (part.ndim - 1 - dim) + (0, missing)).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=processes)
    return torch.cat([each.narrow(dim, 0, own) for each, own in zip(parts, lengths, strict=True)], dim)


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


def divide_passes(network: Any) -> None:
    """Have each half of the processes compute one of the two passes that SVD's UNet gets as a batch, if there is a group.

    Compile the network before.
    """
    if _group is None:
        return
    group, whole = _group, network._compiled_call_impl or network._call_impl

    def call(sample: torch.Tensor, timestep: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        if len(sample) != 2:
            return whole(sample, timestep, **inputs)  # type: ignore[no-any-return]  # a tuple
        own = {name: each[[group.own_pass]] if hasattr(each, "shape") else each for name, each in inputs.items()}
        (output,) = whole(sample[[group.own_pass]], timestep, **own)
        return (_gathered(output, (1, 1), 0, group.counterparts),)

    # A hook would become a part of the compiled network.
    network._compiled_call_impl = call


def divide_columns(network: Any) -> None:
    """Have each process compute a part of the columns of diffusers' encoder or decoder of Wan, if there is a group.

    Convolutions get the columns beside the part from the processes that have them, attention gets all of them.
    """
    import torch
    import torch.distributed as dist
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock

    if _group is None:
        return
    rank, processes = dist.get_rank(), dist.get_world_size()
    unit = 2 ** sum(isinstance(module, torch.nn.ZeroPad2d) for module in network.modules())
    """Columns of the input that become one of the encoder's output."""
    parts: list[int] = []
    """Numbers of such units that the processes have in the current call. Empty if it is not divided."""

    def own(whole: torch.Tensor) -> torch.Tensor:
        size = whole.shape[-1] // sum(parts)
        return whole.narrow(-1, sum(parts[:rank]) * size, parts[rank] * size)

    def gathered(part: torch.Tensor) -> torch.Tensor:
        return _gathered(part, [each * part.shape[-1] // parts[rank] for each in parts], part.ndim - 1)

    def begin(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        columns = inputs[0].shape[-1]
        is_divided = columns % unit == 0 and columns // unit >= processes
        parts[:] = _parts(columns // unit, processes) if is_divided else ()
        return (own(inputs[0]),) if parts else inputs

    def end(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        whole = gathered(output) if parts else output
        parts.clear()
        return whole

    def widened(part: torch.Tensor | None, *, left: bool = True) -> torch.Tensor | None:
        """Return a part with a column more on the right and, unless it is the first one, on the left."""
        if part is None or not parts:
            return part
        edges = torch.stack((part[..., :1], part[..., -1:]))
        others = [torch.empty_like(edges) for _ in parts]
        dist.all_gather(others, edges)
        before = [others[rank - 1][1]] if rank and left else []
        return torch.cat([*before, part, *(each[0] for each in others[rank + 1 : rank + 2])], -1)

    def cropped(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output[..., rank > 0 : output.shape[-1] - (rank + 1 < processes)] if parts else output

    for module in network.modules():
        if isinstance(module, WanAttentionBlock):
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(gathered, inputs)) if parts else inputs)
            module.register_forward_hook(lambda _, __, whole: own(whole) if parts else whole)
        elif isinstance(module, torch.nn.Sequential) and isinstance(module[0], torch.nn.ZeroPad2d):
            # Halves the columns, from each pair and the column on its right.
            module.register_forward_pre_hook(lambda _, inputs: tuple(widened(each, left=False) for each in inputs))
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and module.kernel_size[-1] == 3 and module.stride[-1] == 1:
            # The second input, if any, is the frames before.
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(widened, inputs)))
            module.register_forward_hook(cropped)
    network.register_forward_pre_hook(begin)
    network.register_forward_hook(end)
