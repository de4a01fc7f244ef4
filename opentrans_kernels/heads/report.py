"""What was done to the parts of a head, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .parts import Found

__all__ = ["HeadReport"]


@dataclass(frozen=True)
class HeadReport:
    """The parts that were recognised: replaced, or left as they are with a reason."""

    parts: Sequence[Found] = field(default_factory=list)

    @property
    def replaced(self) -> list[Found]:
        return [part for part in self.parts if part.replacement is not None]

    @property
    def left(self) -> list[Found]:
        return [part for part in self.parts if part.replacement is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "replaced": [
                {"path": part.path, "kind": part.kind, "what": part.reason}
                | (
                    {"error": part.error.error, "dense_error": part.error.dense_error}
                    if part.error is not None
                    else {}
                )
                for part in self.replaced
            ],
            "left": [{"path": p.path, "kind": p.kind, "reason": p.reason} for p in self.left],
        }

    def done(self) -> list[str]:
        """ "6 x deformable attention: HOW; error ..., as it was ..." of every kind and way."""
        lines = []
        counts = Counter((part.kind, part.reason) for part in self.replaced)
        for (kind, how), count in counts.items():
            errors = [
                part.error
                for part in self.replaced
                if (part.kind, part.reason) == (kind, how) and part.error is not None
            ]
            worst = max(errors, key=lambda e: e.error / e.bound, default=None)
            exact = f"; error {worst.error:.1e}, as it was {worst.dense_error:.1e}" if worst else ""
            lines.append(f"{count} x {kind}: {how}{exact}")
        return lines

    def __str__(self) -> str:
        lines = [f"head: {line}" for line in self.done()]
        lines += [
            f"head: {part.path} ({part.kind}) stays as it was: {part.reason}" for part in self.left
        ]
        return "\n".join(lines) or "head: no part was recognised"
