"""Which weights the alphas of a freeze plan saw, and which of two tables decides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from opentrans_kernels.errors import PlanError
from opentrans_kernels.spectrum import AlphaTable, masked_note, zero_shares, zeros_note

from .rules import FreezeRule


def weights_seen_by(
    model: nn.Module, layers: Sequence[str], alphas: AlphaTable | None, told: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """("dense" or "masked", the warning if alphas of masked weights decide).

    A table that counted zeros is believed; of one that did not, what the caller ``told``, or else
    the zeros in the model's weights now.
    """
    if alphas is not None and not math.isnan(alphas.zeros):
        note = masked_note(alphas)
        return told or alphas.weights_seen, (note,) if note else ()
    if told is not None:
        return told, ()
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = {name: getattr(modules[name], "weight", None) for name in layers}
    real = {n: w for n, w in weights.items() if isinstance(w, torch.Tensor) and not w.is_meta}
    shares, sizes = zero_shares(list(real.values())), [w.numel() for w in real.values()]
    note = zeros_note(list(zip(real, shares, sizes, strict=True)))
    return ("masked" if note else "dense"), ((note,) if note and alphas is not None else ())


def denser_first(
    alphas: AlphaTable | None, also: AlphaTable | None, row: FreezeRule
) -> tuple[AlphaTable | None, AlphaTable | None]:
    """The table that decides and the one it is compared with.

    Raises:
        PlanError: two tables that cannot be compared.
    """
    if also is None:
        return alphas, None
    if alphas is None or not row.needs_alphas:
        why = "no alphas are given beside it" if row.needs_alphas else f"rule {row.name!r} has none"
        raise PlanError(f"also= is a second table of alphas, but {why}. Leave it out.")
    names = [[one.name for one in table] for table in (alphas, also)]
    if names[0] != names[1] or alphas.label != also.label:
        what = (
            f"{alphas.label} and {also.label}"
            if alphas.label != also.label
            else f"{len(names[0])} and {len(names[1])} layers, or other names"
        )
        raise PlanError(
            f"the two alpha tables do not belong together: {what}. Estimate both with the same "
            "fit and method: estimate_alpha(model, fit), and again with masks=masks."
        )
    return (also, alphas) if also.zeros < alphas.zeros else (alphas, also)


def weights_of(alphas: AlphaTable, also: AlphaTable) -> tuple[str, str]:
    """Names of the weights of two tables, told apart by their zeros if need be."""
    if alphas.weights_seen != also.weights_seen:
        return f"{alphas.weights_seen} weights", f"{also.weights_seen} weights"
    return f"weights with {alphas.zeros:.1%} zeros", f"weights with {also.zeros:.1%} zeros"
