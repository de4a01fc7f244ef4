"""The page of one alpha table: the numbers, the drawings, and what a freeze plan would save."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..spectrum import AlphaTable
from .alpha_plots import Freezing, alphas_svg, freezing_of, spectra_svg, standalone
from .page import Page


def alpha_page(
    table: AlphaTable,
    *,
    title: str,
    subtitle: str = "",
    banner: str | None = None,
    plan: Mapping[str, Any] | None = None,
    savings: Mapping[str, Any] | None = None,
    plan_text: str = "",
    savings_text: str = "",
) -> str:
    """HTML that stands alone.

    Args:
        table: with spectra (``keep_spectra=True``).
        banner: what is synthetic, or None.
        plan, savings: ``FreezePlan.to_dict()`` and ``FreezeReport.to_dict()``.
        plan_text, savings_text: the same as printed.
    """
    freezing = freezing_of(plan) if plan is not None else None
    page = Page(title)
    page.paragraph(subtitle or f"fit {table.fit}", "soft")
    if banner:
        page.paragraph(banner, "banner")
    page.facts(_facts(table, plan, savings))
    for note in table.notes:
        page.paragraph(note, "soft")
    page.heading("Alpha per layer")
    page.paragraph(
        "Squares are kernels larger than 1x1. Their alpha pools one spectrum per kernel position, "
        "so it is not comparable with that of a 1x1: compare any result with freezing all 3x3.",
        "soft",
    )
    page.svg(alphas_svg(table, freezing))
    if savings_text:
        page.heading("What the freeze plan saves")
        page.preformatted(savings_text)
    if plan_text:
        page.preformatted(plan_text, "Show the decision about every layer")
    page.heading("Spectra")
    page.svg(spectra_svg(table, freezing))
    page.heading("Numbers")
    page.table(*_numbers(table, freezing))
    if table.skipped:
        left_out = "\n".join(f"{name}: {reason}" for name, reason in table.skipped.items())
        page.preformatted(left_out, f"Show the {len(table.skipped)} weights that were left out")
    record = {"parameters": dict(table.parameters), "versions": dict(table.versions)}
    page.preformatted(json.dumps(record, indent=2, default=str), "Show parameters and versions")
    return page.render()


def alpha_files(table: AlphaTable, **arguments: Any) -> dict[str, str]:
    """File name -> text: the page and both drawings; arguments as in :func:`alpha_page`."""
    plan = arguments.get("plan")
    freezing = freezing_of(plan) if plan is not None else None
    return {
        "index.html": alpha_page(table, **arguments),
        "alpha.svg": standalone(alphas_svg(table, freezing)),
        "spectra.svg": standalone(spectra_svg(table, freezing)),
    }


def _facts(
    table: AlphaTable, plan: Mapping[str, Any] | None, savings: Mapping[str, Any] | None
) -> dict[str, str]:
    facts = {"layers": str(len(table)), f"median alpha ({table.fit})": f"{table.median():.3f}"}
    flagged = sum(row.ambiguous for row in table)
    if flagged:
        facts["ambiguous"] = str(flagged)
    if plan is not None:
        facts[f"frozen by rule {plan['rule']}"] = str(len(plan["frozen"]))
    if savings is not None:
        facts["training multiply-adds"] = f"{-savings['saved']:+.1%}"
    return facts


def _numbers(
    table: AlphaTable, freezing: Freezing | None
) -> tuple[tuple[str, ...], list[list[str]]]:
    columns = (
        "layer",
        "shape",
        "alpha",
        "D",
        "xmin",
        "kept / all",
        "norm",
        "stable rank",
        "remark",
    )
    rows = []
    for row in table:
        remarks = [row.reason and ("ambiguous: " if row.ambiguous else "") + row.reason, row.approx]
        if freezing is not None and row.module in freezing.frozen:
            remarks.insert(0, "frozen")
        rows.append(
            [
                row.name,
                "x".join(map(str, row.shape)),
                "-" if math.isnan(row.alpha) else f"{row.alpha:.4f}",
                f"{row.ks_distance:.4f}",
                f"{row.xmin:.3e}",
                f"{row.num_evals} / {row.num_total}",
                f"{row.spectral_norm:.3g}",
                f"{row.stable_rank:.2f}",
                "; ".join(filter(None, remarks)),
            ]
        )
    return columns, rows
