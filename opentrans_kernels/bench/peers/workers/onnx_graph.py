"""``trunk.onnx`` from the neutral graph, for every engine that reads ONNX."""

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
    nodes, constants = [], []
    for entry in operations:
        if entry["kind"] == "output":
            nodes.append(helper.make_node("Identity", entry["inputs"], ["features"]))
            continue
        name, inputs = entry["name"], list(entry["inputs"])
        if entry["kind"] == "conv":
            for part in ("weight", "bias"):
                constants.append(
                    numpy_helper.from_array(tensors[f"{name}.{part}"], f"{name}.{part}")
                )
                inputs.append(f"{name}.{part}")
            size = tensors[f"{name}.weight"].shape[-1]
            attributes = {
                "kernel_shape": [size, size],
                "strides": [entry["stride"]] * 2,
                "pads": [entry["padding"]] * 4,
            }
            nodes.append(helper.make_node("Conv", inputs, [name], name=name, **attributes))
        elif entry["kind"] == "avg_pool":
            window = {"kernel_shape": [entry["size"]] * 2, "strides": [entry["size"]] * 2}
            nodes.append(helper.make_node("AveragePool", inputs, [name], name=name, **window))
        else:
            kind = {"relu": "Relu", "add": "Add"}[entry["kind"]]
            if kind == "Add" and len(inputs) == 1:
                inputs = inputs * 2
            nodes.append(helper.make_node(kind, inputs, [name], name=name))
    shape = list(tensors["image"].shape)
    graph = helper.make_graph(
        nodes,
        "trunk",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 6  # the version of opset 11's time, which every runtime reads
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    path = folder / "trunk.onnx"
    onnx.save(model, str(path))
    return path
