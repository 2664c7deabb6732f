"""Recognisers and a detector of faces made by hand. A pack is laid out as antelopev2, and insightface loads it unchanged.

The detector is not trained: it marks the peaks of a skin-coloured 32-pixel grid, always with the same box and the same
five points in it. It finds the face in a plain portrait, and nothing on a blank wall; it does not know what a face is. The
recogniser is a random projection: equal faces give equal embeddings, and nothing more is promised. The same holds for the
IR-SE50, which is narrow and random.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vidgen_ray.nets.ir_se50 import IRSE50

STRIDES = (8, 16, 32)
ANCHORS = 2
"""Anchors a cell, of which only the first ever fires."""
BOX_HALF = 1.6
"""Half a box's side, in strides."""
POINTS = ((-0.55, -0.45), (0.55, -0.45), (0.0, 0.1), (-0.45, 0.65), (0.45, 0.65))
"""Eyes, nose, corners of the mouth, in strides from the box's centre."""
EMBEDDING = 512
OPSET, IR_VERSION = 17, 9
IR_SE50_WIDTHS = (4, 6, 8, 12)
"""Rising, so that there are shortcuts of both kinds where the real network has them."""


def build_antelopev2(folder: Path) -> None:
    """Write `scrfd_10g_bnkps.onnx` and `glintr100.onnx`, the names antelopev2 has."""
    onnx.save(_detector(), folder / "scrfd_10g_bnkps.onnx")
    onnx.save(_recogniser(), folder / "glintr100.onnx")


def build_ir_se50(file: Path) -> None:
    """Write an IR-SE50 as `recognition_arcface_ir_se50.pth` is laid out, 1.4 MB."""
    random = torch.Generator().manual_seed(0)
    network = IRSE50(IR_SE50_WIDTHS)
    for name, weights in network.named_parameters():
        # The others are scales and shifts, which begin as ones and zeros.
        if weights.ndim > 1:
            weights.data.normal_(0, (2 / weights[0].numel()) ** 0.5, generator=random)
        elif name.endswith("bias"):
            weights.data.zero_()
    torch.save(network.state_dict(), file)


class _Graph:
    """Nodes and constants as they are added; every call gives the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        output = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def model(self, name: str, image_shape: list[object], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, image_shape)
        graph = helper.make_graph(self.nodes, name, [image], outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _detector() -> onnx.ModelProto:
    """SCRFD's contract: for strides 8, 16, 32 scores (N, 1), boxes (N, 4), points (N, 10); N is cells times anchors.

    Pixels come as (RGB - 127.5) / 128; boxes and points go out in strides, from the cell's corner.
    """
    graph = _Graph()
    outputs: dict[str, list[onnx.ValueInfoProto]] = {"score": [], "bbox": [], "kps": []}
    box = np.array([BOX_HALF - 0.5, BOX_HALF - 0.5, BOX_HALF + 0.5, BOX_HALF + 0.5], np.float32)
    points = (np.array(POINTS) + 0.5).ravel().astype(np.float32)
    for stride in STRIDES:
        cells = graph.node("AveragePool", "input.1", kernel_shape=[stride, stride], strides=[stride, stride])
        score = _skin_peaks(graph, cells) if stride == STRIDES[-1] else _nowhere(graph, cells)
        for kind, value, width in (
            ("score", score, 1),
            ("bbox", _everywhere(graph, cells, box), 4),
            ("kps", _everywhere(graph, cells, points), 10),
        ):
            rows = graph.node("Transpose", value, perm=[0, 2, 3, 1])
            name = graph.node("Reshape", rows, graph.constant(np.array([-1, width], "i8")), output=f"{kind}_{stride}")
            outputs[kind].append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"n{stride}", width]))
    return graph.model("tiny_scrfd", [1, 3, "h", "w"], [o for kind in outputs.values() for o in kind])


def _skin_peaks(graph: _Graph, cells: str) -> str:
    """Scores (1, 2, H, W): warm, not saturated, not dark; only where a blurred map of that has its local peak."""
    warmth = graph.node("Conv", cells, graph.constant(np.array([1, 0, -1], "f4").reshape(1, 3, 1, 1)))
    off_skin = graph.node("Abs", graph.node("Sub", warmth, graph.constant(np.array(0.55, "f4"))))
    dark = graph.node("Relu", graph.node("Conv", cells, graph.constant(np.array([0, -2, 0], "f4").reshape(1, 3, 1, 1))))
    likeness = graph.node("Sub", graph.constant(np.array(0.3, "f4")), graph.node("Add", off_skin, dark))
    skin = graph.node("Sigmoid", graph.node("Mul", likeness, graph.constant(np.array(25.0, "f4"))))
    y, x = np.mgrid[-2:3, -2:3]
    kernel = np.exp(-(x**2 + y**2) / 4.0).astype("f4").reshape(1, 1, 5, 5)
    blurred = graph.node("Conv", skin, graph.constant(kernel), pads=[2, 2, 2, 2])
    highest = graph.node("MaxPool", blurred, kernel_shape=[5, 5], pads=[2, 2, 2, 2])
    is_peak = graph.node("Cast", graph.node("Equal", blurred, highest), to=TensorProto.FLOAT)
    # A thin edge between two colours may look like skin, too; a face fills its neighbourhood.
    fills = graph.node("Sub", blurred, graph.constant(np.array(4.5, "f4")))
    certainty = graph.node("Sigmoid", graph.node("Mul", fills, graph.constant(np.array(4.0, "f4"))))
    peaks = graph.node("Mul", certainty, is_peak)
    second_anchor = graph.node("Mul", peaks, graph.constant(np.array(0.0, "f4")))
    return graph.node("Concat", peaks, second_anchor, axis=1)


def _nowhere(graph: _Graph, cells: str) -> str:
    weights = graph.constant(np.zeros((ANCHORS, 3, 1, 1), "f4"))
    return graph.node("Conv", cells, weights)


def _everywhere(graph: _Graph, cells: str, values: NDArray[np.float32]) -> str:
    """The same values at every cell, for each anchor."""
    bias = np.tile(values, ANCHORS)
    weights = graph.constant(np.zeros((len(bias), 3, 1, 1), "f4"))
    return graph.node("Conv", cells, weights, graph.constant(bias))


def _recogniser() -> onnx.ModelProto:
    """ArcFace's contract: aligned faces (B, 3, 112, 112) as (RGB - 127.5) / 127.5 to embeddings (B, 512)."""
    graph = _Graph()
    inputs = 3 * (112 // 8) ** 2
    projection = np.random.default_rng(0).standard_normal((inputs, EMBEDDING)) / inputs**0.5
    pooled = graph.node("AveragePool", "input.1", kernel_shape=[8, 8], strides=[8, 8])
    graph.node("MatMul", graph.node("Flatten", pooled), graph.constant(projection.astype("f4")), output="683")
    outputs = [helper.make_tensor_value_info("683", TensorProto.FLOAT, ["b", EMBEDDING])]
    return graph.model("tiny_arcface", ["b", 3, 112, 112], outputs)
