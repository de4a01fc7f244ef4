"""Fine-tuning of a pruned network that stays pruned, at the memory its live weights need."""

from __future__ import annotations

from .live import Masks
from .memory import StateBytes
from .optimizer import ELEMENTWISE, MaskedOptimizer
from .preserve import MaskGuard, preserve_masks

__all__ = [
    "ELEMENTWISE",
    "MaskGuard",
    "MaskedOptimizer",
    "Masks",
    "StateBytes",
    "preserve_masks",
]
