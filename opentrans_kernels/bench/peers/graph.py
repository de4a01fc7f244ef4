"""A network or operator as a list of ONNX operations on disk, from which any peer builds its own.

``graph.json`` lists operations of opset 11 in execution order: ``op``, ``inputs``, ``output`` and
``attributes``. ``tensors.npz`` holds what they read besides ``input``; the last one's output is
``output``. PyTorch's own tracer lists what is called, :mod:`.onnx_operations` says it in ONNX.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from ...errors import OpenTransError
from .onnx_operations import OPERATIONS, Writer

_CONSTANT = ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")


def write_graph(module: nn.Module, x: torch.Tensor, folder: Path) -> None:
    """Write ``graph.json`` and ``tensors.npz`` of an eval-mode module into ``folder``.

    Args:
        module: one tensor in, one tensor out. x: float32 example input, whose shape the graph has.

    Raises:
        OpenTransError: the module cannot be traced, or calls an operation that has no entry.
    """
    try:
        with torch.no_grad():
            exported = torch.export.export(module, (x,), strict=False)
            # Nothing is taken apart; operations that write to their input become ones that do not.
            exported = exported.run_decompositions({})
    except Exception as error:  # the model's own code
        first = str(error).strip().partition("\n")[0][:200]
        raise OpenTransError(
            f"torch.export cannot follow this network ({type(error).__name__}: {first}), so other "
            "engines get no graph of it. Leave them out of --peers."
        ) from error
    writer = Writer()
    held = {**exported.state_dict, **exported.constants}
    given = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = given[node.name]
            constant = spec.kind.name in _CONSTANT and spec.target is not None
            writer.values[node] = held[spec.target].detach() if constant else "input"
        elif node.op == "call_function":
            _call(writer, node)
        elif node.op == "output":
            (found,) = node.args[0]
            writer.emit("Identity", [found], "output")
    (folder / "graph.json").write_text(json.dumps(writer.operations, indent=1), encoding="utf-8")
    np.savez(folder / "tensors.npz", **writer.tensors)


def _call(writer: Writer, node: fx.Node) -> None:
    """Write the operation of a node, or compute it where nothing depends on the input."""
    known = [writer.values[one] for one in node.all_input_nodes]
    if all(isinstance(value, torch.Tensor) for value in known):
        arguments, options = fx.node.map_arg((node.args, node.kwargs), writer.values.__getitem__)
        with torch.no_grad():
            writer.values[node] = node.target(*arguments, **options)
        return
    write = OPERATIONS.get(str(node.target))
    if write is None:
        raise OpenTransError(
            f"the network calls {node.target}, which the graph for other engines has no operation "
            f"for; it has {', '.join(_known())}. Leave them out of --peers."
        )
    writer.values[node] = write(writer, node)


def _known() -> list[str]:
    return sorted({name.split(".")[1] for name in OPERATIONS if name.startswith("aten.")})
