"""``network.onnx`` from the graph on disk, for every engine that reads ONNX."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 11


def build_onnx(folder):
    """The ONNX model of the graph in ``folder``, checked, as a path."""
    operations = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    tensors = np.load(folder / "tensors.npz")
    nodes = [
        helper.make_node(
            one["op"], one["inputs"], [one["output"]], name=one["output"], **one["attributes"]
        )
        for one in operations
    ]
    constants = [numpy_helper.from_array(tensors[name], name) for name in tensors.files]
    shape = list(np.load(folder / "input.npy", mmap_mode="r").shape)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 6  # the version of opset 11's time, which every runtime reads
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    path = folder / "network.onnx"
    onnx.save(model, str(path))
    return path
