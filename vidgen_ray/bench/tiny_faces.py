"""Builder of `builtin:tiny/antelopev2`: a detector that finds skin colour, and a recogniser, with antelopev2's interfaces."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vidgen_ray.nets.faces import FACE_EMBEDDING

STRIDES = (8, 16, 32)
ANCHORS = 2
"""Anchors per cell. Only the first one produces detections."""
BOX_HALF = 1.6
"""Half the side of a box, in strides."""
POINTS = ((-0.55, -0.45), (0.55, -0.45), (0.0, 0.1), (-0.45, 0.65), (0.45, 0.65))
"""Eyes, nose and corners of the mouth, in strides from the centre of the box."""
OPSET, IR_VERSION = 17, 9


def build_face_models(folder: Path) -> None:
    """Write `scrfd_10g_bnkps.onnx` and `glintr100.onnx`, as in antelopev2."""
    onnx.save(_detector(), folder / "scrfd_10g_bnkps.onnx")
    onnx.save(_recogniser(), folder / "glintr100.onnx")


class _Graph:
    """ONNX graph builder. `constant` and `node` return the name of their output."""

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
    """Return a model with SCRFD's interface.

    The input is (RGB - 127.5) / 128. The outputs are scores (N, 1), boxes (N, 4) and points (N, 10) for each of the strides 8,
    16 and 32. N is cells times anchors. Boxes and points are in strides from the corner of the cell.
    """
    graph = _Graph()
    outputs: dict[str, list[onnx.ValueInfoProto]] = {"score": [], "bbox": [], "kps": []}
    box = np.array([BOX_HALF - 0.5, BOX_HALF - 0.5, BOX_HALF + 0.5, BOX_HALF + 0.5], np.float32)
    points = (np.array(POINTS) + 0.5).ravel().astype(np.float32)
    for stride in STRIDES:
        cells = graph.node("AveragePool", "input.1", kernel_shape=[stride, stride], strides=[stride, stride])
        zeros = graph.constant(np.zeros((ANCHORS, 3, 1, 1), "f4"))
        score = _skin_peaks(graph, cells) if stride == STRIDES[-1] else graph.node("Conv", cells, zeros)
        for kind, value, width in (
            ("score", score, 1),
            ("bbox", _same_in_every_cell(graph, cells, box), 4),
            ("kps", _same_in_every_cell(graph, cells, points), 10),
        ):
            rows = graph.node("Transpose", value, perm=[0, 2, 3, 1])
            name = graph.node("Reshape", rows, graph.constant(np.array([-1, width], "i8")), output=f"{kind}_{stride}")
            outputs[kind].append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"n{stride}", width]))
    return graph.model("tiny_scrfd", [1, 3, "h", "w"], [o for kind in outputs.values() for o in kind])


def _skin_peaks(graph: _Graph, cells: str) -> str:
    """Return scores (1, 2, H, W), nonzero at local peaks of the blurred map of skin colour (warm, unsaturated, not dark)."""
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
    # A thin edge between two colours may have the colour of skin, too. A face fills its neighbourhood.
    excess = graph.node("Sub", blurred, graph.constant(np.array(4.5, "f4")))
    score = graph.node("Sigmoid", graph.node("Mul", excess, graph.constant(np.array(4.0, "f4"))))
    peaks = graph.node("Mul", score, is_peak)
    second_anchor = graph.node("Mul", peaks, graph.constant(np.array(0.0, "f4")))
    return graph.node("Concat", peaks, second_anchor, axis=1)


def _same_in_every_cell(graph: _Graph, cells: str, values: NDArray[np.float32]) -> str:
    """Return the same values for all cells and anchors."""
    bias = np.tile(values, ANCHORS)
    weights = graph.constant(np.zeros((len(bias), 3, 1, 1), "f4"))
    return graph.node("Conv", cells, weights, graph.constant(bias))


def _recogniser() -> onnx.ModelProto:
    """Return a model with ArcFace's interface: faces (B, 3, 112, 112) as (RGB - 127.5) / 127.5 -> embeddings (B, 512)."""
    graph = _Graph()
    inputs = 3 * (112 // 8) ** 2
    projection = np.random.default_rng(0).standard_normal((inputs, FACE_EMBEDDING)) / inputs**0.5
    pooled = graph.node("AveragePool", "input.1", kernel_shape=[8, 8], strides=[8, 8])
    graph.node("MatMul", graph.node("Flatten", pooled), graph.constant(projection.astype("f4")), output="683")
    outputs = [helper.make_tensor_value_info("683", TensorProto.FLOAT, ["b", FACE_EMBEDDING])]
    return graph.model("tiny_arcface", ["b", 3, 112, 112], outputs)
