"""Errors raised by OpenTrans.

Every message says what is wrong, why, and what to type or change to fix it, with the values
involved. ``except OpenTransError`` catches all of them.
"""

from __future__ import annotations

__all__ = [
    "BuildMismatch",
    "CheckpointError",
    "KernelUnavailable",
    "MaskError",
    "OpenTransError",
    "PlanError",
    "UnsupportedModelError",
]


class OpenTransError(Exception):
    """Base class of every error this project raises on purpose."""


class MaskError(OpenTransError):
    """A mask is malformed, or does not fit the model it is used with."""


class CheckpointError(OpenTransError):
    """A file cannot be read, is not a checkpoint, or cannot be written."""


class UnsupportedModelError(OpenTransError):
    """A model, or its present state (dtype, training mode, values), cannot be accelerated."""


class PlanError(OpenTransError):
    """A plan contradicts itself, the model, or the input size it is used with."""


class KernelUnavailable(OpenTransError):
    """A kernel or CPU capability was asked for by name and does not exist here."""


class BuildMismatch(KernelUnavailable):
    """The compiled extension exists but cannot be used with the installed torch or Python."""
