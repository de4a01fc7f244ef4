"""Freeze sets of tables alone, to be laid side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import PlanError
from opentrans_kernels.spectrum import AlphaTable, estimate_alphas

from .make import parse_rule
from .rules import Request, Unit

__all__ = ["freeze_set", "tables_of"]


def tables_of(
    source: nn.Module | Mapping[str, torch.Tensor], labels: Sequence[str], **options: Any
) -> dict[str, AlphaTable]:
    """Label -> table; eigenvalues are solved for once for each method.

    Args:
        labels: as in :attr:`AlphaTable.label`: "xmin_peak", "farms xmin_mid". A method alone
            ("farms") stands for its published fit.
        options: other arguments of :func:`~opentrans_kernels.spectrum.estimate_alpha`.

    Raises:
        OpenTransError: as ``estimate_alpha``.
    """
    grouped: dict[str, list[str | None]] = {}
    for label in labels:
        method, _, fit = label.rpartition(" ")
        if not method and fit in ("whole", "farms"):
            method, fit = fit, ""
        grouped.setdefault(method or "whole", []).append(fit or None)
    found = {
        table.label: table
        for method, fits in grouped.items()
        for table in estimate_alphas(source, fits, method=method, **options)
    }
    return found


def freeze_set(alphas: AlphaTable, rule: str = "median") -> frozenset[str]:
    """The modules that a rule on alphas freezes, from the table alone.

    What needs the network is left out: batch norms, shared parameters, prefixes of names.

    Raises:
        PlanError: an unknown rule, or one that does not look at alphas.
    """
    options: dict[str, Any] = {}
    row = parse_rule(rule, options)
    if not row.needs_alphas:
        raise PlanError(
            f"rule {row.name!r} does not look at alphas, so its freeze set depends on no table. "
            "Use median, ratio:SHARE or above_median."
        )
    grouped: dict[str, list[Any]] = {}
    for entry in alphas:
        grouped.setdefault(entry.module, []).append(entry)
    units = [
        Unit(
            name,
            entries[0].kind,
            tuple(entries[0].shape[2:]),
            {entry.part: entry.alpha for entry in entries},
            "; ".join(dict.fromkeys(entry.reason for entry in entries if entry.reason)),
        )
        for name, entries in grouped.items()
    ]
    return frozenset(row.choose(Request(units, options, dict)).frozen)
