"""What a pruning run reports: one record per round, and the error of a loss without a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opentrans_kernels.errors import OpenTransError

from ..saved import Check, check_entries, count, mapping


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


CHECKS: dict[str, Check] = {
    **dict.fromkeys(("round", "steps", "kept", "removed"), count),
    **dict.fromkeys(("density", "threshold", "seconds"), _number),
    "loss": lambda value: value is None or _number(value),
    "layers": lambda value: mapping(value) and all(map(_number, value.values())),
}


@dataclass(frozen=True)
class RoundRecord:
    """One finished round.

    round: counted from 1; steps: training steps done when it took place. kept, removed: weights
    over all layers; threshold: largest score removed; layers: name -> share of weights left.
    loss: mean over the steps since the round before, None if none was reported; seconds likewise.
    """

    round: int
    steps: int
    kept: int
    removed: int
    density: float
    threshold: float
    loss: float | None
    seconds: float
    layers: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"layers": dict(self.layers)}


def record_from(name: str, saved: Any) -> RoundRecord:
    """The inverse of ``to_dict``. Raises CheckpointError, naming the file ``name``."""
    check_entries(name, saved, CHECKS)
    return RoundRecord(**{key: saved[key] for key in CHECKS})


class NotFiniteLoss(OpenTransError):
    """The loss of a training step is NaN or infinite; the round it belongs to is not kept."""
