"""The page of a pruning run: density of every layer in every round, and the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .page import Page
from .svg import Series, bar_chart

_ROW, _TOP, _RIGHT, _CHAR = 14, 26, 64, 6.4
_WIDTH = 860


def prune_page(title: str, rounds: Sequence[Mapping[str, Any]], banner: str | None = None) -> str:
    """HTML of a run.

    rounds: at least one record as in ``log.json``, with "round", "steps", "kept", "density",
    "loss" (None: unknown) and "layers" (name -> density). banner: a sentence that must accompany
    every number. Raises ValueError if there is no round.
    """
    if not rounds:
        raise ValueError("a pruning page needs at least one round")
    page = Page(title)
    if banner:
        page.paragraph(banner, "banner")
    last = rounds[-1]
    densities = last["layers"]
    page.facts(
        {
            "rounds": str(len(rounds)),
            "training steps": f"{last['steps']:,}",
            "weights left": f"{last['kept']:,}",
            "density": f"{last['density']:.2%}",
            "emptiest layer": f"{min(densities.values()):.2%}",
        }
    )
    page.heading("Density of every layer in every round")
    page.paragraph(
        "Share of weights left, dark is dense; steps of equal colour are equal factors. Point at "
        "a cell for its number.",
        "soft",
    )
    page.svg(density_map(rounds))
    page.heading("Density of every layer at the end")
    page.svg(
        bar_chart(
            list(densities),
            [Series("density", "sparse", list(densities.values()))],
            axis="share of weights left",
            value_text=lambda value: f"{value:.4f}",
            reference=last["density"],
        )
    )
    page.heading("Rounds")
    names = [f"round {entry['round']}" for entry in rounds]
    losses = [entry["loss"] for entry in rounds]
    if any(loss is not None for loss in losses):
        page.svg(
            bar_chart(
                names,
                [Series("loss", "dense", [None if v is None else max(v, 0.0) for v in losses])],
                axis="mean distillation loss of the steps before the round",
                value_text=lambda value: f"{value:.4g}",
            )
        )
    page.table(
        ("round", "steps", "removed", "left", "density", "threshold", "mean loss"),
        [
            [
                str(entry["round"]),
                f"{entry['steps']:,}",
                f"{entry['removed']:,}",
                f"{entry['kept']:,}",
                f"{entry['density']:.4f}",
                f"{entry['threshold']:.4g}",
                "-" if entry["loss"] is None else f"{entry['loss']:.4g}",
            ]
            for entry in rounds
        ],
    )
    return page.render()


def density_map(rounds: Sequence[Mapping[str, Any]]) -> str:
    """SVG with a row per layer and a column per round; opacity by the logarithm of density."""
    layers = list(rounds[-1]["layers"])
    positive = [d for entry in rounds for d in entry["layers"].values() if d > 0]
    lowest = math.log(min([*positive, 0.5]))
    left = int(max(len(name) for name in layers) * _CHAR) + 14
    cell = (_WIDTH - left - _RIGHT) / len(rounds)
    every = max(1, math.ceil(24 / cell))
    parts = [
        f'<text class="tick" x="{left + (i + 0.5) * cell:.1f}" y="16" text-anchor="middle">'
        f"{entry['round']}</text>"
        for i, entry in enumerate(rounds)
        if i % every == 0
    ]
    for row, name in enumerate(layers):
        top = _TOP + row * _ROW
        parts.append(
            f'<text class="label" x="{left - 8}" y="{top + 10}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        for column, entry in enumerate(rounds):
            density = entry["layers"][name]
            shade = 0.0 if density <= 0 else 1 - 0.92 * math.log(density) / lowest
            tip = f"{name}, round {entry['round']}: {density:.2%}"
            parts.append(
                f'<rect class="sparse" x="{left + column * cell:.1f}" y="{top}" '
                f'width="{max(cell - 1, 1):.1f}" height="{_ROW - 2}" '
                f'fill-opacity="{shade:.3f}"><title>{escape(tip)}</title></rect>'
            )
        parts.append(
            f'<text class="value" x="{_WIDTH - _RIGHT + 6}" y="{top + 10}">'
            f"{rounds[-1]['layers'][name]:.3f}</text>"
        )
    height = _TOP + len(layers) * _ROW + 8
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="density of every layer in every round">{"".join(parts)}</svg>'
    )
