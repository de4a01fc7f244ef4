"""What ``accelerate`` tells: the plan it carried out, times before and after, memory, error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Plan
from ..timing.rounds import PairTiming
from .parts import PartError


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did. ``print(report)`` shows the plan and the totals.

    timing: milliseconds of the trunk (or of the whole model, see ``measured``) before and after,
        timed alternately, with quartiles and what disturbed them; None if not measured.
    max_rel_err: largest difference from the masked dense network in float32 on a random image,
        relative to its largest output; it includes the rounding of both.
    worst_part: the replaced layer that comes closest to its bound, twice dense's own error against
        float64, with both errors; of parts_checked. None if nothing was replaced.
    packed_bytes: memory that acceleration adds; bytes_per_nonzero: of the sparse layers.
    dense: layer left as it was -> reason.
    accelerated: False if nothing was replaced.
    """

    plan: Plan
    accelerated: bool
    timing: PairTiming | None
    measured: str
    max_rel_err: float | None
    worst_part: PartError | None
    parts_checked: int
    packed_bytes: int
    bytes_per_nonzero: float | None
    dense: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def before_ms(self) -> float | None:
        """Milliseconds before, in the round that ``after_ms`` is of; None if not measured."""
        return None if self.timing is None else self.timing.before_ms

    @property
    def after_ms(self) -> float | None:
        """Milliseconds after; None if not measured."""
        return None if self.timing is None else self.timing.after_ms

    @property
    def speedup(self) -> float | None:
        """``before_ms / after_ms``; None if not measured."""
        return None if self.timing is None else self.timing.speedup

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        record = {key: getattr(self, key) for key in _REPORTED}
        return {
            **record,
            "timing": None if self.timing is None else self.timing.to_dict(),
            "worst_part": None if self.worst_part is None else asdict(self.worst_part),
            "dense": dict(self.dense),
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        lines = [str(self.plan), ""]
        if (timing := self.timing) is not None:
            threads = f"{self.plan.threads} thread" + "s" * (self.plan.threads > 1)
            lines.append(
                f"{self.measured}: {timing.before_ms:.2f} ms before, {timing.after_ms:.2f} ms "
                f"after: {timing.speedup:.2f}x (quartiles {timing.q1:.2f}-{timing.q3:.2f}; "
                f"{timing.rule}, measured alternately, {threads}, against the model as it was)"
            )
        else:
            lines.append(f"speed-up not measured: {self.measured}")
        if self.max_rel_err is not None:
            lines.append(f"difference from the masked dense network: {self.max_rel_err:.1e}")
        if self.worst_part is not None:
            lines.append(
                f"{self.parts_checked} replaced layers checked alone; the worst is "
                f"{self.worst_part}"
            )
        if self.bytes_per_nonzero is not None:
            lines.append(
                f"packed weights: {self.packed_bytes / 1e6:.1f} MB, "
                f"{self.bytes_per_nonzero:.2f} bytes per nonzero"
            )
        if self.dense:
            kept = "everything" if not self.accelerated else f"{len(self.dense)} layers"
            lines.append(f"left as it was: {kept}")
        notes = (note for note in self.notes if note not in self.plan.notes)  # already above
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])


_REPORTED = (
    "accelerated", "before_ms", "after_ms", "speedup", "measured", "max_rel_err", "parts_checked",
    "packed_bytes", "bytes_per_nonzero",
)  # fmt: skip
