"""What a checkpoint holds once it is open: which of its dicts is the network or the masks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.files import open_checkpoint, shorten

# Where training code keeps the network, most telling first.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "backbone",
    "weights",
    "masks",
    "mask",
)


def tensors_of(content: Any, path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The flat name -> tensor dict inside a checkpoint, and notes about what was passed over.

    Descends into the usual containers ("state_dict", "model" ...). Raises CheckpointError if there
    is no dict with tensors, or several of equal standing.
    """
    notes: dict[str, str] = {}
    steps: list[str] = []
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__}, not a dict of name -> tensor. Save the "
                "masks or weights as a dict, for example with torch.save(model.state_dict(), FILE)."
            )
        found = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
        if found:
            if steps:
                notes["taken from entry"] = ".".join(steps)
            other = [str(k) for k in content if k not in found]
            if other:
                notes["entries that are not tensors"] = shorten(other)
            return {str(k): v for k, v in found.items()}, notes
        inner = [k for k, v in content.items() if isinstance(v, Mapping) and _has_tensors(v)]
        known = [k for k in CONTAINERS if k in inner]
        if not known and len(inner) != 1:
            what = f"several dicts with tensors ({shorten(inner)})" if inner else "no tensors"
            raise CheckpointError(
                f"{path} holds {what}, so it is not clear what to read. Save the one dict of name "
                "-> tensor that is meant, for example with torch.save(model.state_dict(), FILE)."
            )
        chosen = known[0] if known else inner[0]
        passed_over = [str(k) for k in inner if k != chosen]
        if passed_over:
            notes["entries passed over"] = shorten(passed_over)
        steps.append(str(chosen))
        content = content[chosen]


def _has_tensors(content: Mapping[Any, Any], depth: int = 0) -> bool:
    if depth > 8:  # a self-referencing dict would never end
        return False
    return any(
        isinstance(v, torch.Tensor) or (isinstance(v, Mapping) and _has_tensors(v, depth + 1))
        for v in content.values()
    )


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint file, as a plain state dict on the CPU.

    Reads the same files as the masks are read from, with the same care. A pair ``weight_orig``,
    ``weight_mask`` of ``torch.nn.utils.prune`` is folded into ``weight`` with exact zeros, so that
    a pruned checkpoint is never loaded as if its convolutions were missing.
    """
    file = open_checkpoint(path)
    tensors, _ = tensors_of(file.content, file.path)
    state = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition("_")
        if kind == "orig" and f"{stem}_mask" in tensors:
            state[stem] = tensor.masked_fill(tensors[f"{stem}_mask"] == 0, 0)
        elif not (kind == "mask" and f"{stem}_orig" in tensors):
            state[name] = tensor
    return state
