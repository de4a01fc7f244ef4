"""What one update of the tracker found: per layer how old, how sure, and what was skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .certificate import UNKNOWN
from .table import AlphaTable

__all__ = ["ACTIONS", "LayerState", "TrackerUpdate", "undecided"]

ACTIONS = {
    "computed": "solved in this update",
    "unchanged": "the weights are the same bits as when it was solved",
    "certified": "moved, but provably stays on its side of the median",
    "approximated": "moved; eigenvalues approximated",
    "waiting": "moved; its turn comes in a later update, the value is old",
}


@dataclass(frozen=True)
class LayerState:
    """What one update did with one layer.

    Attributes:
        action: a key of :data:`ACTIONS`.
        low, high: alpha of the present weights lies in here; equal where it is exact, 0 and
            infinity where nothing is known.
        age: updates since it was solved.
        change: ||W - W_solved||_F / ||W_solved||_F; NaN if no copy of the weights is kept.
        error: relative error of the approximation when it was last compared with an exact solve;
            NaN without an approximation.
    """

    name: str
    action: str
    low: float
    high: float
    age: int
    change: float = math.nan
    error: float = math.nan

    @property
    def exact(self) -> bool:
        """Whether the row's alpha is that of the present weights."""
        return self.action in ("computed", "unchanged")


@dataclass(frozen=True)
class TrackerUpdate:
    """The table after an update, and for each row how old and how sure it is.

    Attributes:
        table: a row of a layer that was not solved keeps its last values and says so in ``approx``.
        states: one per row.
        certain: the set of layers with alpha below the median is that of a full estimate.
    """

    table: AlphaTable
    states: tuple[LayerState, ...]
    certain: bool

    def count(self, action: str) -> int:
        """Layers with this action."""
        return sum(state.action == action for state in self.states)

    def __str__(self) -> str:
        parts = [f"{self.count(action)} {action}" for action in ACTIONS if self.count(action)]
        sure = "certain" if self.certain else "not certain"
        lines = [
            f"{len(self.states)} layers: {', '.join(parts)}; median alpha "
            f"{self.table.median():.4f}, sides of it {sure}"
        ]
        for state in self.states:
            if state.exact:
                continue
            text = f"  {state.name}: {state.action}, {state.age} updates old"
            if state.change == state.change:
                text += f", weights moved {state.change:.2e}"
            if (state.low, state.high) != UNKNOWN:
                text += f", alpha in [{state.low:.4f}, {state.high:.4f}]"
            if state.error == state.error:
                text += f", error {state.error:.1e} when last measured"
            lines.append(text)
        return "\n".join(lines)


def undecided(states: Sequence[LayerState]) -> list[str]:
    """Layers that may lie on either side of the median, or decide where it is.

    The median of the lower ends and that of the upper ends enclose it, because order statistics
    grow with every one of their arguments. An alpha that is undefined does not count.
    """
    known = [state for state in states if not state.exact or state.low >= 0]
    if not known:
        return []
    middle = ((len(known) - 1) // 2, len(known) // 2)
    lows = sorted(state.low for state in known)
    highs = sorted(state.high for state in known)
    least = (lows[middle[0]] + lows[middle[1]]) / 2
    most = (highs[middle[0]] + highs[middle[1]]) / 2
    open_ones = [s for s in known if not (s.high < least or s.low >= most)]
    if open_ones and all(state.exact for state in open_ones):
        # Exact ones stay open while the layers that make the median are not solved.
        first, last = lows[middle[0]], highs[middle[1]]
        return [s.name for s in known if not s.exact and s.low <= last and s.high >= first]
    return [state.name for state in open_ones]
