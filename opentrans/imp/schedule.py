"""When weights are removed and how many: arithmetic only, no tensors.

Iterative magnitude pruning (Frankle and Carbin 2019; Han et al., arXiv 2404.07448, algorithm 1)
trains for a period, removes a share of the weights that are left, and repeats.
"""

from __future__ import annotations

from dataclasses import dataclass

from opentrans_kernels.errors import PlanError


@dataclass(frozen=True)
class ImpSchedule:
    """Rounds of pruning.

    rounds: how many at most, at least 1.
    rate: share of the remaining weights that a round removes, in (0, 1).
    target_density: share of all weights that is left at the end, in (0, 1); the last round is cut
        so that it is met exactly. None: ``rounds`` rounds, whatever density they lead to.
    period: training steps before each round, at least 1.
    first_after: training steps before the first round; None: ``period``. The code released with
        the paper tests ``iteration % period == 0`` after the step, so its first round follows a
        single step: ``first_after=1``.

    Raises PlanError naming the value that is not possible.
    """

    rounds: int = 22
    rate: float = 0.1
    target_density: float | None = None
    period: int = 1000
    first_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "period", "first_after"):
            value = getattr(self, name)
            if name == "first_after" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name}={value!r} must be a whole number of at least 1.")
        if not 0.0 < self.rate < 1.0:
            raise PlanError(
                f"rate={self.rate!r} is the share of the remaining weights that each round "
                "removes; it must lie between 0 and 1, such as 0.1."
            )
        if self.target_density is not None and not 0.0 < self.target_density < 1.0:
            raise PlanError(
                f"target_density={self.target_density!r} is the share of weights kept at the end; "
                "it must lie between 0 and 1, such as 0.1."
            )

    def kept(self, total: int, alive: int | None = None) -> tuple[int, ...]:
        """Number of weights left after each round, strictly falling.

        total: weights the schedule covers; alive: those left at the start (None: all). A round
        removes ``round(rate * left)``; with a target the last one stops at
        ``round(target_density * total)``.

        Raises PlanError if the target cannot be met: it is reached already, or ``rounds`` are too
        few.
        """
        left = total if alive is None else alive
        goal = 0 if self.target_density is None else round(self.target_density * total)
        if self.target_density is not None and left <= goal:
            raise PlanError(
                f"{left} of {total} weights are left already (density {left / total:.4f}), so a "
                f"target density of {self.target_density} removes nothing. Ask for a lower one."
            )
        counts: list[int] = []
        while left > goal and (fewer := max(left - round(self.rate * left), goal)) < left:
            counts.append(left := fewer)
        if not counts or (self.target_density is not None and left > goal):
            raise PlanError(
                f"rate={self.rate} of {left} weights rounds to none, so pruning stops at {left} of "
                f"{total}. Use a larger rate, or prune a larger model."
            )
        if self.target_density is None:
            return tuple(counts[: self.rounds])
        if len(counts) > self.rounds:
            raise PlanError(
                f"{self.rounds} rounds at rate {self.rate} reach density "
                f"{counts[self.rounds - 1] / total:.4f}, not the target {self.target_density}. "
                f"Pass rounds={len(counts)}, or a larger rate."
            )
        return tuple(counts)

    def steps_before(self, done: int) -> int:
        """Training steps after which round ``done`` (counted from 0) takes place."""
        first = self.period if self.first_after is None else self.first_after
        return first + done * self.period

    def is_due(self, done: int, steps: int) -> bool:
        """Whether round ``done`` (counted from 0) takes place now, after ``steps`` steps."""
        return steps >= self.steps_before(done)
