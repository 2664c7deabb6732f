"""Post-processing of trained networks: batch norm statistics for averaged weights, and ONNX export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn


@torch.no_grad()
def gather_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the running statistics of all batch norms over the batches. Leaves the network in training mode.

    The statistics collected during training belong to the weights of each step, not to the averaged weights.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for batch in batches:
        network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train()


def export(network: nn.Module, file: Path, example: Tensor, outputs: Sequence[str], dynamic: dict[str, dict[int, str]]) -> None:
    """Write an ONNX file. Its input is `input.1`, as in face packs. `dynamic`: input or output -> axis -> name."""
    torch.onnx.export(
        network.eval(),
        (example,),
        str(file),
        dynamo=False,
        opset_version=17,
        input_names=["input.1"],
        output_names=list(outputs),
        dynamic_axes=dynamic,
    )
    onnx.save(halved(onnx.load(file)), file)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store the constants in half precision, with casts so that the model still computes in float32."""
    casts = []
    for constant in model.graph.initializer:
        if constant.data_type == TensorProto.FLOAT and constant.dims:
            name = constant.name
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant).astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"cast.{name}", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
