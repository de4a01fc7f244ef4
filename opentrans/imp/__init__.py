"""Iterative magnitude pruning: train, remove the smallest weights, repeat.

:func:`iterative_magnitude_pruning` is the loop for a plain training step; :class:`Pruner` does the
same rounds for a loop that belongs to somebody else.
"""

from __future__ import annotations

from .allocation import ALLOCATIONS, Allocation
from .config import ImpConfig
from .folder import RunFolder
from .patterns import PATTERNS, Pattern
from .pruner import Pruner
from .records import NotFiniteLoss, RoundRecord
from .run import ImpResult, Progress, iterative_magnitude_pruning
from .schedule import ImpSchedule

__all__ = [
    "ALLOCATIONS",
    "PATTERNS",
    "Allocation",
    "ImpConfig",
    "ImpResult",
    "ImpSchedule",
    "NotFiniteLoss",
    "Pattern",
    "Progress",
    "Pruner",
    "RoundRecord",
    "RunFolder",
    "iterative_magnitude_pruning",
]
