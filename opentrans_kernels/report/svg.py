"""Horizontal bar charts as inline SVG text: no scripts, no fonts, no files.

Colours are CSS variables defined by the page (:mod:`.page`), so charts follow light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_ROW, _BAR, _GAP = 13, 11, 8
_TOP, _RIGHT, _CHAR = 30, 76, 6.4


@dataclass(frozen=True)
class Series:
    """One colour of bars: a legend label, a CSS class, and one value (or None) per row."""

    label: str
    css: str
    values: Sequence[float | None]


def bar_chart(
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    axis: str,
    value_text: Callable[[float], str],
    reference: float | None = None,
    row_css: Sequence[str] | None = None,
    width: int = 860,
) -> str:
    """A bar chart with one row per label and one bar per series in it.

    Args:
        labels: row names.
        series: one or more series, each with ``len(labels)`` non-negative values.
        axis: what the x axis shows, with its unit.
        value_text: text behind each bar.
        reference: draw a vertical line at this value (for instance speed-up 1).
        row_css: CSS class that overrides the series' class, one per row ("" keeps it).
        width: pixels of the view box; the chart scales to its container.

    Raises:
        ValueError: no rows, lengths that differ, or values that are negative or not finite.
    """
    _check(labels, series)
    numbers = [value for one in series for value in one.values if value is not None]
    ticks = nice_ticks(max([*numbers, reference or 0.0]))
    left = max(60, int(max(len(label) for label in labels) * _CHAR) + 14)
    scale = (width - left - _RIGHT) / ticks[-1]
    group = _ROW * len(series) + _GAP
    bottom = _TOP + group * len(labels)
    parts = [_legend(series, left), _grid(ticks, left, scale, bottom)]
    if reference is not None:
        x = left + reference * scale
        parts.append(
            f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}"/>'
        )
    for row, label in enumerate(labels):
        top = _TOP + row * group
        middle = top + _ROW * len(series) / 2 + 3
        parts.append(
            f'<text class="label" x="{left - 8}" y="{middle:.1f}" text-anchor="end">'
            f"{escape(label)}</text>"
        )
        for index, one in enumerate(series):
            value = one.values[row]
            if value is None:
                continue
            css = (row_css[row] if row_css else "") or one.css
            y = top + index * _ROW
            end = left + value * scale
            tip = f"{label}: {one.label} {value_text(value)}"
            parts.append(
                f'<rect class="{escape(css)}" x="{left}" y="{y}" width="{value * scale:.2f}" '
                f'height="{_BAR}" rx="2"><title>{escape(tip)}</title></rect>'
                f'<text class="value" x="{end + 5:.1f}" y="{y + 9}">'
                f"{escape(value_text(value))}</text>"
            )
    parts.append(f'<text class="axis" x="{left}" y="{bottom + 30}">{escape(axis)}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {width} {bottom + 38}" role="img" '
        f'aria-label="{escape(axis)}">{"".join(parts)}</svg>'
    )


def nice_ticks(largest: float, wanted: int = 5) -> list[float]:
    """Round tick positions from 0 to at least ``largest`` (from 0 to 1 for an empty axis)."""
    if largest <= 0:
        return [0.0, 1.0]
    raw = largest / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    count = math.ceil(largest / step - 1e-9)
    return [index * step for index in range(count + 1)]


def _check(labels: Sequence[str], series: Sequence[Series]) -> None:
    if not labels or not series:
        raise ValueError("a bar chart needs at least one row and one series")
    for one in series:
        if len(one.values) != len(labels):
            raise ValueError(
                f"series {one.label!r} has {len(one.values)} values for {len(labels)} rows"
            )
        for value in one.values:
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"series {one.label!r} holds {value}; bars must be >= 0 and finite"
                )


def _legend(series: Sequence[Series], left: int) -> str:
    if len(series) == 1:
        return ""
    parts, x = [], float(left)
    for one in series:
        parts.append(
            f'<rect class="{escape(one.css)}" x="{x:.0f}" y="4" width="11" height="11" rx="2"/>'
            f'<text class="label" x="{x + 16:.0f}" y="13">{escape(one.label)}</text>'
        )
        x += 34 + len(one.label) * _CHAR
    return "".join(parts)


def _grid(ticks: Sequence[float], left: int, scale: float, bottom: int) -> str:
    parts = []
    for tick in ticks:
        x = left + tick * scale
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    return "".join(parts)
