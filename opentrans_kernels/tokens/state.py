"""What one forward knows about its tokens, and the way back to the full map."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import PlanError, UnsupportedModelError
from .plan import TokenPlan

__all__ = ["Run", "TokenState"]


class Reduction(Protocol):
    """Reduced tokens of one forward."""

    count: int

    def expand(self, y: torch.Tensor) -> torch.Tensor:
        """[B, count, C] -> [B, H W, C]."""
        ...


@dataclass
class Run:
    """One forward: size of the map, and what became of its tokens."""

    size: tuple[int, int]
    batch: int | None = None
    reduction: Any = None
    sizes: torch.Tensor | None = None  # how many tokens each merged one stands for
    tapped: tuple[torch.Tensor, torch.Tensor] | None = None  # (full, reduced) of a read block


class TokenState:
    """Handle of :func:`reduce_tokens`: the plan, and the last forward of the calling thread.

    plan: the plan. prefix: class and register tokens in front of the map. depth: blocks of the
    model.
    """

    #: All tokens go through for now.
    paused = False

    def __init__(self, plan: TokenPlan, prefix: int, depth: int, length_first: bool) -> None:
        self.plan, self.prefix, self.depth = plan, prefix, depth
        self.length_first = length_first
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._own = threading.local()

    def begin(self, size: tuple[int, int]) -> None:
        """A forward starts, on a map of (height, width) tokens."""
        grid = None if self.paused else self.plan.grid
        if grid is not None and (grid[0] > size[0] or grid[1] > size[1]):
            raise PlanError(
                f"the plan's grid {grid[0]}x{grid[1]} is larger than the map of this "
                f"image, {size[0]}x{size[1]} tokens. Use a grid of at most {size[0]}x{size[1]}, or "
                "a larger image."
            )
        self.last = Run(size)

    @property
    def run(self) -> Run:
        """The last forward of this thread. Raises UnsupportedModelError before the first."""
        found = self.last
        if found is None:
            raise UnsupportedModelError(
                "no image went through the patch convolution of this model in this thread, so the "
                "size of the token map is not known. Call the model on an image first."
            )
        return found

    @property
    def last(self) -> Run | None:
        """The last forward of this thread, None before the first."""
        return getattr(self._own, "run", None)

    @last.setter
    def last(self, run: Run | None) -> None:
        self._own.run = run

    @property
    def map_size(self) -> tuple[int, int]:
        """(height, width) of the full token map of the last forward."""
        return self.run.size

    @property
    def tokens(self) -> int:
        """Tokens of the map, without prefix, after the last block of the last forward."""
        run = self.run
        return run.size[0] * run.size[1] if run.reduction is None else run.reduction.count

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Bring features or logits of reduced tokens back to the full map.

        x: [B, n, C], with the prefix tokens in front or without, or a map [B, C, h, w] of the grid
        ("cluster", "pool"). Returns [B, N, C] with the same prefix, or [B, C, H, W]. Gradients flow
        through x and, for "cluster", through the weights. What has full size is returned as it is.
        A count that could be either is taken for what the model gives: full with ``plan.expand``,
        else reduced.

        Raises:
            PlanError: another number of tokens, or another batch than the last forward's.
        """
        run = self.run
        full = run.size[0] * run.size[1]
        if x.dim() not in (3, 4):
            raise PlanError(f"expand: [B, n, C] or [B, C, h, w] is needed, got {tuple(x.shape)}.")
        if run.batch not in (None, x.shape[0]):
            raise PlanError(
                f"expand: {x.shape[0]} images were given, but the last forward had {run.batch}. "
                "Expand what it gave before the next one runs."
            )
        if x.dim() == 4:
            if tuple(x.shape[2:]) == run.size:
                return x
            grid = self.plan.grid
            if grid is None or tuple(x.shape[2:]) != grid or run.reduction is None:
                raise PlanError(
                    f"expand: a map of {x.shape[2]}x{x.shape[3]} is neither the reduced nor the "
                    f"full one ({run.size[0]}x{run.size[1]}). Pass tokens [B, n, C]."
                )
            rows = run.reduction.expand(x.flatten(2).transpose(1, 2))
            return rows.transpose(1, 2).unflatten(2, run.size)
        spare = {"full": x.shape[1] - full, "reduced": x.shape[1] - self.tokens}
        for kind in ("full", "reduced") if self.plan.expand else ("reduced", "full"):
            prefix = spare[kind]
            if prefix in (0, self.prefix):
                if kind == "full" or run.reduction is None:
                    return x
                return self.whole(x, prefix)
        raise PlanError(
            f"expand: {x.shape[1]} tokens were given, but the last forward left {self.tokens} of "
            f"{full} (and {self.prefix} before them). Pass what belongs to that forward."
        )

    def whole(self, x: torch.Tensor, prefix: int) -> torch.Tensor:
        """[B, prefix + reduced, C] -> [B, prefix + N, C]."""
        reduction = self.run.reduction
        if reduction is None:
            return x
        return torch.cat([x[:, :prefix], reduction.expand(x[:, prefix:])], 1)
