"""The folded, masked trunk as a neutral graph on disk, from which any peer builds its own format.

``graph.json`` lists the operations in execution order; ``tensors.npz`` holds their weights, and the
example input as ``image``. No exporter is needed: a ResNet trunk has five kinds of operations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import OpenTransError
from ..part import TrunkModule
from ..subject import Subject
from ..variants import fold_batch_norms_


def write_graph(subject: Subject, image: torch.Tensor, folder: Path) -> None:
    """Write ``graph.json`` and ``tensors.npz`` of the masked trunk into ``folder``.

    image: float32 [N, 3, H, W]. Raises OpenTransError for an operation that has no entry here.
    """
    tower = subject.masked_copy()
    trunk = TrunkModule(tower).eval()
    fold_batch_norms_(tower)
    traced = torch.fx.symbolic_trace(trunk)
    modules = dict(traced.named_modules())
    tensors: dict[str, np.ndarray] = {"image": image.numpy()}
    operations: list[dict[str, Any]] = []
    alias: dict[str, str] = {}
    for node in traced.graph.nodes:
        inputs = [alias[one.name] for one in node.all_input_nodes]
        alias[node.name] = node.name
        if node.op == "placeholder":
            alias[node.name] = "image"
        elif node.op == "output":
            operations.append({"kind": "output", "inputs": inputs})
        elif node.op == "call_function" and node.target.__name__ in ("add", "iadd"):
            operations.append({"kind": "add", "inputs": inputs, "name": node.name})
        elif node.op == "call_module":
            entry = _module(modules[node.target], node.name, tensors)
            if entry is None:
                alias[node.name] = inputs[0]
            else:
                operations.append({**entry, "inputs": inputs, "name": node.name})
        else:
            raise OpenTransError(
                f"the trunk calls {node.target!r}, which the neutral graph has no operation for. "
                "Use a CLIP ResNet (RN50, RN101, RN50x4)."
            )
    (folder / "graph.json").write_text(json.dumps(operations, indent=1), encoding="utf-8")
    np.savez(folder / "tensors.npz", **tensors)


def _module(module: nn.Module, name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """The operation of a module; None for an identity."""
    if isinstance(module, nn.Conv2d):
        tensors[f"{name}.weight"] = module.weight.detach().numpy()
        if module.bias is None:
            raise OpenTransError(
                f"{name} has no bias after folding, so its batch norm was not found. Use a CLIP "
                "ResNet, whose convolutions all have one."
            )
        tensors[f"{name}.bias"] = module.bias.detach().numpy()
        return {"kind": "conv", "stride": module.stride[0], "padding": int(module.padding[0])}
    if isinstance(module, nn.ReLU):
        return {"kind": "relu"}
    if isinstance(module, nn.AvgPool2d):
        size = module.kernel_size if isinstance(module.kernel_size, int) else module.kernel_size[0]
        return None if size == 1 else {"kind": "avg_pool", "size": size}
    if isinstance(module, nn.Identity):
        return None
    raise OpenTransError(
        f"{name} is a {type(module).__name__}, which the neutral graph has no operation for. Use "
        "a CLIP ResNet (RN50, RN101, RN50x4)."
    )
