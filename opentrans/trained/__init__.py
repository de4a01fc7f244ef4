"""Trained networks that packages ship, as plain torch modules."""

from __future__ import annotations

from .hed import load_hed

__all__ = ["load_hed"]
