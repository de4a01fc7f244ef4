"""What an optimizer keeps between steps."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StateBytes"]


@dataclass(frozen=True)
class StateBytes:
    """Memory of an optimizer in bytes.

    state: momenta and the like. index: positions of live weights. bits: the masks, one bit per
    weight. dense: the state that the plain torch optimizer would hold for all of the parameters.
    """

    state: int
    index: int
    bits: int
    dense: int

    @property
    def total(self) -> int:
        return self.state + self.index + self.bits

    def __str__(self) -> str:
        state, index, bits, dense = (
            f"{n / 1e6:.1f} MB" for n in (self.state, self.index, self.bits, self.dense)
        )
        return f"state {state} + index {index} + masks {bits} (dense state {dense})"
