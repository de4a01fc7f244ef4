"""Which weights are removed together: the shape of a unit of pruning.

A pattern groups the weights [Cout, Cin, k, k] of a convolution into units; a unit is removed as a
whole and its score is the mean magnitude of its weights that are left.

=============  ===============================================================================
unstructured   a unit is one weight
2:4            one weight, but those that stop a group of four from having two zeros go first
channel        a unit is an output channel: all weights of one row
block          a unit is ``block`` neighbouring rows of one input channel and tap
=============  ===============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from opentrans_kernels.errors import PlanError

PATTERNS = ("unstructured", "2:4", "channel", "block")


@dataclass(frozen=True)
class Pattern:
    """One of ``PATTERNS``. block: rows of a unit of pattern "block".

    Raises PlanError for another name or a block of fewer than 2 rows.
    """

    name: str = "unstructured"
    block: int = 16

    def __post_init__(self) -> None:
        if self.name not in PATTERNS:
            raise PlanError(
                f"pattern={self.name!r} is not known. Use one of {', '.join(PATTERNS)}."
            )
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2:
            raise PlanError(f"block={self.block!r} must be a whole number of at least 2 rows.")

    @property
    def single(self) -> bool:
        """Whether a unit is one weight, so that any number of weights can be removed exactly."""
        return self.name in ("unstructured", "2:4")

    def units(self, magnitude: torch.Tensor, alive: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(score, size) of every unit, flat: mean magnitude of its live weights, their number.

        magnitude: float32 [Cout, Cin, k, k], non-negative; alive: bool of that shape. The score of
        a unit without live weights is ``inf``. Only for patterns that are not ``single``.
        """
        live = magnitude.masked_fill(~alive, 0)
        sums, sizes = self._sum(live), self._sum(alive.to(magnitude.dtype)).long()
        score = (sums / sizes.clamp(min=1)).masked_fill(sizes == 0, torch.inf)
        return score, sizes

    def expand(self, units: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Bool per unit, flat -> bool of ``shape``."""
        if self.name == "channel":
            return units.view(-1, 1, 1, 1).expand(shape)
        cout, cin, *taps = shape
        blocks = units.view(-1, 1, cin, *taps).expand(-1, self.block, -1, -1, -1)
        return blocks.reshape(-1, cin, *taps)[:cout]

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.name == "channel":
            return values.flatten(1).sum(1)
        cout, cin, *taps = values.shape
        padded = F.pad(values, (0, 0, 0, 0, 0, 0, 0, -cout % self.block))
        return padded.view(-1, self.block, cin, *taps).sum(1).flatten()

    def surplus(self, magnitude: torch.Tensor, alive: torch.Tensor) -> torch.Tensor | None:
        """Weights that have to go before all others (bool, weight-shaped); None if there are none.

        For "2:4": the live weights beyond the two largest of each group of four input channels of
        one row and tap. Equal magnitudes: the later ones count as larger.
        """
        if self.name != "2:4":
            return None
        cout, cin, *taps = magnitude.shape
        live = magnitude.masked_fill(~alive, -1)
        live = F.pad(live, (0, 0, 0, 0, 0, -cin % 4), value=-1.0)
        groups = live.view(cout, -1, 4, *taps)
        rank = torch.argsort(torch.argsort(groups, dim=2, stable=True), dim=2)
        extra = (rank < 2).view(cout, -1, *taps)[:, :cin]
        return extra & alive
