"""Whether what a file says of a run is whole, found out before anything is overwritten with it."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import MaskSet, Provenance
from opentrans_kernels.masks.limits import brief
from opentrans_kernels.masks.packed import is_shape

__all__ = [
    "check_entries",
    "check_random",
    "count",
    "damaged",
    "guarded",
    "masks_from",
    "mapping",
    "numpy_state",
    "tensors",
]

Check = Callable[[Any], bool]


def damaged(name: str, what: str) -> CheckpointError:
    """The error for a state that lost its form."""
    return CheckpointError(
        f"{name} is the state of a run, but {what}: it was changed or damaged after it was "
        "written. Copy it again from its source, or continue from an earlier one."
    )


def mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def tensors(value: Any) -> bool:
    return mapping(value) and all(isinstance(one, torch.Tensor) for one in value.values())


def check_entries(name: str, state: Any, checks: Mapping[str, Check]) -> None:
    """Raise CheckpointError naming an entry of ``state`` that is missing or of another kind."""
    for key, check in checks.items():
        if not isinstance(state, Mapping) or key not in state:
            raise damaged(name, f"its entry {key!r} is missing")
        try:
            valid = check(state[key])
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise damaged(name, f"its entry {key!r} is {brief(state[key])}")


def masks_from(
    name: str, bits: Any, shapes: Any, digest: str | None, synthetic: bool = False
) -> MaskSet:
    """Masks kept as packed bits. Raises CheckpointError unless shapes, sizes and hash agree."""
    if not tensors(bits) or not mapping(shapes) or set(bits) != set(shapes) or not bits:
        raise damaged(name, "its masks and their shapes disagree")
    found = {}
    for key, shape in shapes.items():
        packed, size = bits[key], math.prod(shape) if is_shape(shape) else -1
        if size < 0 or packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
            raise damaged(name, f"the mask of {key} does not have its shape {brief(shape)}")
        flat = np.unpackbits(packed.numpy(), count=size).view(np.bool_)
        found[key] = torch.from_numpy(flat.copy()).view(shape)
    masks = MaskSet(found, Provenance("training state", name, synthetic=synthetic))
    if digest is not None and masks.content_hash() != digest:
        raise damaged(name, "its masks do not have the recorded hash")
    return masks


def numpy_state(state: Any) -> tuple[Any, ...]:
    """What ``np.random.set_state`` takes. Raises ValueError: it does not check the place itself."""
    kind, key, place, *gauss = state
    valid = kind == "MT19937" and type(place) is int and 0 <= place <= 624
    if not valid or key.shape != (624,) or int(key.min()) < 0 or int(key.max()) >= 2**32:
        raise ValueError("no state of a Mersenne twister")
    return kind, key.numpy().astype("uint32"), place, *gauss


def check_random(name: str, states: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the states fit their generators; changes none that is in use."""
    with guarded(name, "random states cannot be put back"):
        random.Random().setstate(states["python"])
        torch.Generator().set_state(states["torch"])
        if "numpy" in states:
            np.random.RandomState().set_state(numpy_state(states["numpy"]))


@contextlib.contextmanager
def guarded(name: str, what: str) -> Iterator[None]:
    """Turns any error inside into a CheckpointError that says what did not work with the file."""
    try:
        yield
    except OpenTransError:
        raise
    except Exception as error:  # states of foreign objects: what they raise is not specified
        raise damaged(name, f"its {what} ({type(error).__name__}: {brief(error)})") from error
