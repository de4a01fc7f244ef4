"""Weights and structure of an ONNX file. Nothing in it is run; only tensors and names are read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.lazy import optional_module

__all__ = ["Graph", "read_onnx"]

LARGEST = 1 << 30  # bytes; of the files read here the largest has a tenth


@dataclass(frozen=True)
class Graph:
    """Nodes in order, float tensors by name, and the nodes that read a name."""

    nodes: list[Any]
    tensors: dict[str, Tensor]
    readers: dict[str, list[Any]]

    def of_kind(self, kind: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type == kind]

    def constant(self, node: Any) -> Tensor | None:
        """The stored tensor among a node's inputs; None if there is not exactly one."""
        found = [self.tensors[name] for name in node.input if name in self.tensors]
        return found[0] if len(found) == 1 else None

    def chain(self, node: Any, passed: tuple[str, ...], count: int) -> list[Any]:
        """The next ``count`` nodes behind ``node``, those of the kinds ``passed`` left out.

        Ends early where a result has no or several readers.
        """
        found: list[Any] = []
        while len(found) < count:
            after = self.readers.get(node.output[0], [])
            if len(after) != 1:
                break
            node = after[0]
            if node.op_type not in passed:
                found.append(node)
        return found


def attributes(node: Any) -> dict[str, Any]:
    """By name; lists of whole numbers as tuples."""
    found: dict[str, Any] = {}
    for each in node.attribute:
        found[each.name] = tuple(each.ints) if each.ints else each.i
    return found


def read_onnx(path: str | os.PathLike[str]) -> Graph:
    """Read a file whose float32 tensors lie in it.

    Raises CheckpointError if it is no ONNX file, is larger than 1 GiB, or a tensor does not have
    the bytes that its shape needs; OpenTransError if onnx is missing.
    """
    onnx = optional_module("onnx", "the weights are an ONNX file")
    try:
        if Path(path).stat().st_size > LARGEST:
            raise CheckpointError(f"{path} has more than {LARGEST} bytes. Fetch it again.")
        # Tensors in files beside it would be read from wherever the file says.
        graph = onnx.load(os.fspath(path), load_external_data=False).graph
    except CheckpointError:
        raise
    except Exception as error:  # the parser raises its own kinds
        raise CheckpointError(
            f"{path} cannot be read as an ONNX file ({error}). Fetch it again."
        ) from error
    nodes = [node for node in graph.node if node.output]
    tensors = {}
    for stored in graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT:
            tensors[stored.name] = _tensor(path, stored, onnx)
    for node in nodes:  # names for the same tensor
        if node.op_type == "Identity" and node.input and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return Graph(nodes, tensors, readers)


def _tensor(path: str | os.PathLike[str], stored: Any, onnx: Any) -> Tensor:
    shape = tuple(stored.dims)
    outside = stored.data_location == onnx.TensorProto.EXTERNAL
    raw = stored.raw_data
    if outside or min(shape, default=0) < 0 or len(raw) != 4 * math.prod(shape):
        raise CheckpointError(
            f"{path}: tensor {stored.name} of shape {shape} has {len(raw)} bytes in the file. "
            "Fetch it again."
        )
    if not raw:
        return torch.empty(shape)
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(shape)
