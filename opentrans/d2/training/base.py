"""What all steps share: the tower, the rank, scalars, and masks in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.masks.packed import Provenance, pack_bits

from ..towers import Tower, find_tower, unwrap

__all__ = ["Step", "is_main", "masks_from_state", "masks_to_state", "world_size"]


class Step:
    """Base of what follows a trainer. tower: module path of the tower, "" to find it."""

    trainer: Any = None  # set when the hook is registered

    def __init__(self, tower: str = "") -> None:
        self._path = tower
        self._found: Tower | None = None

    @property
    def model(self) -> nn.Module:
        """The trainer's model without wrappers."""
        return unwrap(self.trainer.model)

    @property
    def tower(self) -> nn.Module:
        """The CLIP tower in the trainer's model."""
        if self._found is None:
            self._found = find_tower(self.model, self._path)
        return self._found.module

    @property
    def done(self) -> int:
        """Steps finished, as ``after_step`` sees it."""
        return int(self.trainer.iter) + 1

    def put(self, name: str, value: float) -> None:
        """A scalar for TensorBoard, under ``opentrans/``."""
        if math.isfinite(value):
            self.trainer.storage.put_scalar(f"opentrans/{name}", float(value), smoothing_hint=False)

    def only_one(self) -> None:
        """Raise if the trainer has two hooks of this class: it would save the state of one."""
        hooks = [h for h in getattr(self.trainer, "_hooks", ()) if type(h) is type(self)]
        if len(hooks) > 1:
            raise OpenTransError(
                f"the trainer has {len(hooks)} hooks of class {type(self).__name__}, and its "
                "checkpoints keep the state of one per class. Register it once."
            )

    def before_train(self) -> None:
        self.only_one()

    def before_step(self) -> None:
        """Before the forward of every step."""

    def after_backward(self) -> None:
        """Before the optimizer's step."""

    def after_step(self) -> None:
        """Behind the optimizer's step."""

    def after_train(self) -> None:
        """At the end, also of a run that failed."""

    def state_dict(self) -> dict[str, Any]:
        """What the trainer's checkpoints keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""


def world_size() -> int:
    """Processes of the run; 1 outside a distributed one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def masks_to_state(masks: MaskSet) -> dict[str, Any]:
    """Plain values and tensors for a checkpoint, one bit per weight."""
    return {
        "digest": masks.content_hash(),
        "synthetic": masks.source.synthetic,
        "shapes": {name: list(mask.shape) for name, mask in masks.masks.items()},
        "bits": {name: torch.from_numpy(pack_bits(mask)) for name, mask in masks.masks.items()},
    }


def masks_from_state(state: Mapping[str, Any]) -> MaskSet:
    """The inverse. Raises CheckpointError if the bits do not have the recorded hash."""
    masks = {}
    for name, bits in state["bits"].items():
        shape = state["shapes"][name]
        flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape)).view(np.bool_)
        masks[name] = torch.from_numpy(flat.copy()).view(shape)
    found = MaskSet(masks, Provenance("training checkpoint", synthetic=state["synthetic"]))
    if found.content_hash() != state["digest"]:
        raise CheckpointError(
            "the masks in the checkpoint do not have the recorded hash: it is damaged. Resume from "
            "an earlier checkpoint."
        )
    return found
