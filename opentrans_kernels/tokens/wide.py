"""Distances and means in float32 at least, whatever a model computes in."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["unrounded", "wide_type"]


def wide_type(x: torch.Tensor) -> torch.dtype:
    """float64 where x has it, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unrounded(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast is off inside. The meta device has none to turn off."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
