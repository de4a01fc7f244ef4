"""The settings of a pruning run, compared key by key when a run is continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from opentrans_kernels.errors import PlanError

from .allocation import Allocation
from .patterns import Pattern
from .schedule import ImpSchedule


@dataclass(frozen=True)
class ImpConfig:
    """Everything that decides which masks come out, apart from the training itself.

    rewind: after how many steps the weights are kept, to be put back after every round (lottery
        tickets; 0: the weights at the start); None: training goes on from the pruned weights.
    input_size: (height, width) in pixels, for the allocations that weigh by work.
    extra: what else must stay the same over the run, such as learning rate and data; values that
        JSON can hold.

    Raises PlanError if the parts do not go together.
    """

    schedule: ImpSchedule = field(default_factory=ImpSchedule)
    allocation: Allocation = field(default_factory=Allocation)
    pattern: Pattern = field(default_factory=Pattern)
    rewind: int | None = None
    input_size: tuple[int, int] = (224, 224)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.schedule.steps_before(0)
        whole = isinstance(self.rewind, int) and not isinstance(self.rewind, bool)
        if self.rewind is not None and not (whole and 0 <= self.rewind < first):
            raise PlanError(
                f"rewind={self.rewind!r} must be a number of steps from 0 to {first - 1}, before "
                f"the first round (after step {first}), or None."
            )
        target = self.schedule.target_density
        if self.pattern.name == "2:4" and target is not None and target > 0.5:
            raise PlanError(
                f"pattern='2:4' leaves at most half of the weights, so target_density={target} "
                "cannot be 2:4. Use at most 0.5."
            )
        if len(self.input_size) != 2 or any(n < 1 for n in self.input_size):
            raise PlanError(
                f"input_size={self.input_size!r} must be (height, width) in pixels, such as "
                "(224, 224)."
            )
        self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Flat and plain, as kept with the run. Raises PlanError for what JSON cannot hold."""
        parts = asdict(self.schedule)
        parts |= {
            "allocation": self.allocation.name,
            "strength": self.allocation.strength if self.allocation.weighted else None,
            "floor": self.allocation.least(self.pattern),
            "pattern": self.pattern.name,
            "block": self.pattern.block if self.pattern.name == "block" else None,
            "rewind": self.rewind,
            "input_size": list(self.input_size) if self.allocation.weighted else None,
        }
        parts |= {f"extra.{key}": value for key, value in self.extra.items()}
        try:
            return json.loads(json.dumps(parts))
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"run_config={dict(self.extra)!r} cannot be kept with the run ({error}). Use "
                "numbers, text, lists and dicts only."
            ) from error

    def rule(self) -> str:
        """One line for the provenance of the masks."""
        parts = f"{self.allocation.name} {self.pattern.name}, rate {self.schedule.rate}"
        return f"iterative magnitude pruning, {parts}, {self.schedule.period} steps per round"
