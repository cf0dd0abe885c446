"""Makes the two small ONNX files of consisid-xdit's demo. Needs the package onnx; the files come with the program.

demo_scrfd.onnx: SCRFD's nine outputs; a face is where the mean red over 288 pixels is high, its box and landmarks
always the same around it. demo_arcface.onnx: 112 x 112 pixels to 512 numbers by random weights.

    python tools/demo/consisid_onnx.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TARGET = Path(__file__).resolve().parents[2] / "consisid_xdit"
WINDOW = 288
# Box and landmarks around a face's middle, in cells of 32 pixels at the detector's 640.
BOX = (5.4, 7.0, 5.4, 7.0)
LANDMARKS = (-2.2, -1.4, 2.2, -1.4, 0.0, 0.8, -1.8, 3.2, 1.8, 3.2)


class Graph:
    def __init__(self, size: int | None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        shape = [1, 3, size or "height", size or "width"]
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def give(self, name: str, width: int) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))

    def save(self, path: Path) -> None:
        graph = helper.make_graph(self.nodes, path.stem, [self.input], self.outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def scrfd() -> Graph:
    graph = Graph(None)
    heads = {"score": (1, (-9.0,)), "bbox": (4, BOX), "kps": (10, LANDMARKS)}
    for kind, (width, values) in heads.items():
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            coarse = kind == "score" and stride == 32
            pad = (WINDOW - stride) // 2 if coarse else 0
            kernel = WINDOW if coarse else stride
            pooled = graph.add(
                "AveragePool",
                ["x"],
                f"{name}.pool",
                kernel_shape=[kernel] * 2,
                strides=[stride] * 2,
                pads=[pad] * 4,
                count_include_pad=1,
            )
            matrix = np.zeros((2 * width, 3, 1, 1), np.float32)
            bias = np.tile(np.array(values, np.float32), 2)
            if coarse:  # only the first of the two sizes fires
                matrix[0, 0], bias[0] = 20.0, -20 * 0.45
            inputs = [pooled, graph.weight(f"{name}.w", matrix), graph.weight(f"{name}.b", bias)]
            maps = graph.add("Conv", inputs, f"{name}.maps", kernel_shape=[1, 1])
            rows = graph.add("Transpose", [maps], f"{name}.rows", perm=[2, 3, 0, 1])
            shape = graph.weight(f"{name}.shape", np.array([-1, width], np.int64))
            last = graph.add("Reshape", [rows, shape], f"{name}.flat" if kind == "score" else name)
            if kind == "score":
                graph.add("Sigmoid", [last], name)
            graph.give(name, width)
    return graph


def arcface() -> Graph:
    graph, rng = Graph(112), np.random.default_rng(0)
    kernel = graph.weight("w", (rng.normal(size=(8, 3, 8, 8)) / 14).astype(np.float32))
    maps = graph.add("Conv", ["x", kernel], "maps", kernel_shape=[8, 8], strides=[8, 8])
    mean = graph.add("GlobalAveragePool", [graph.add("Tanh", [maps], "tanh")], "mean")
    matrix = graph.weight("m", rng.normal(size=(8, 512)).astype(np.float32))
    graph.add("MatMul", [graph.add("Flatten", [mean], "flat"), matrix], "embedding")
    graph.give("embedding", 512)
    return graph


if __name__ == "__main__":
    scrfd().save(TARGET / "demo_scrfd.onnx")
    arcface().save(TARGET / "demo_arcface.onnx")
