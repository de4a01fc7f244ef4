"""Two drawings of an alpha table: alpha per layer with the freeze line, and every spectrum.

SVG text that a page embeds; :func:`standalone` makes it a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch

from ..spectrum import AlphaTable, LayerAlpha

_WIDTH = 860
_CHAR = 6.2  # mean width of a label's character, pixels
_ROW = 15
_HEAD = 44
_COLUMNS, _CELL, _PLOT = 4, (212, 158), (172, 104)
_MARKS = ("1x1", "larger kernel", "linear")

_STYLE = """
svg { --ink: #1c2430; --soft: #5c6773; --line: #dfe4ea; --page: #ffffff; --dense: #7b8a99;
  --sparse: #1f7a8c; --lose: #c2542d; background: var(--page); }
@media (prefers-color-scheme: dark) { svg { --ink: #e6eaee; --soft: #9ba7b3; --line: #323b45;
  --page: #14181d; --dense: #8a97a5; --sparse: #46b3c6; --lose: #e2795a; } }
"""
#: Classes of these drawings; colours are the variables of the page.
ALPHA_STYLE = """
.alpha { font: 11px system-ui, sans-serif; } .alpha text { fill: var(--ink); }
.alpha .value { paint-order: stroke; stroke: var(--page); stroke-width: 3px; fill: var(--soft); }
.alpha .soft { fill: var(--soft); } .alpha .small { font-size: 9.5px; }
.alpha .grid { stroke: var(--line); fill: none; } .alpha .cut { stroke: var(--ink);
  stroke-dasharray: 4 3; } .alpha .frozen { fill: var(--sparse); stroke: var(--sparse); }
.alpha .trains { fill: var(--page); stroke: var(--dense); stroke-width: 1.6; }
.alpha .side { fill: var(--sparse); opacity: .07; } .alpha .odd { fill: var(--lose); }
.alpha .points { fill: none; stroke: var(--dense); stroke-width: 1.6; }
.alpha .points.cold { stroke: var(--sparse); } .alpha .tail { stroke: var(--lose);
  stroke-width: 1.5; } .alpha .start { stroke: var(--ink); stroke-dasharray: 2 2; opacity: .6; }
.alpha .name { font-weight: 600; font-size: 10px; } .alpha .name.cold { fill: var(--sparse); }
"""


@dataclass(frozen=True)
class Freezing:
    """What the drawings show of a freeze plan: frozen module names, the cut, and its name."""

    frozen: frozenset[str]
    threshold: float | None
    label: str


def alphas_svg(table: AlphaTable, freezing: Freezing | None = None) -> str:
    """One row per layer: alpha on a logarithmic axis, filled where frozen, with the freeze line.

    Squares are kernels larger than 1x1: pooling their slices shapes alpha, so they are told apart.
    A layer without a fit shows its reason instead of a mark.
    """
    shown = [row.alpha for row in table if 1 < row.alpha < math.inf]
    low, high = min([*shown, 1.5]) / 1.08, max([*shown, 3.0]) * 1.08
    low = max(1.0, low)
    left = max(90, int(max(len(row.name) for row in table) * _CHAR) + 14)
    right = _WIDTH - 96
    top, bottom = 50, 50 + _ROW * len(table)

    def place(alpha: float) -> float:
        share = math.log(alpha / low) / math.log(high / low)
        return left + (right - left) * min(1.0, max(0.0, share))

    parts = [_legend(left, freezing)]
    for tick in _alpha_ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{top - 6}" '
            f'y2="{bottom}"/><text class="soft" x="{place(tick):.1f}" y="{bottom + 14}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    cut = freezing.threshold if freezing is not None else None
    if cut is not None and low <= cut < math.inf:
        parts.append(
            f'<rect class="side" x="{left}" y="{top - 6}" width="{place(cut) - left:.1f}" '
            f'height="{bottom - top + 6}"/>'
            if freezing is not None and "above" not in freezing.label
            else ""
        )
        parts.append(
            f'<line class="cut" x1="{place(cut):.1f}" x2="{place(cut):.1f}" y1="{top - 10}" '
            f'y2="{bottom}"/><text x="{place(cut):.1f}" y="{top - 14}" text-anchor="middle">'
            f"{escape(freezing.label if freezing else '')} {cut:.3g}</text>"
        )
    for index, row in enumerate(table):
        parts.append(_alpha_row(row, top + index * _ROW + 8, left, place, freezing))
    parts.append(
        f'<text class="soft" x="{left}" y="{bottom + 30}">alpha by {escape(table.label)}, '
        "logarithmic; small alpha = heavy tail = well trained</text>"
    )
    return _svg(parts, bottom + 38, f"alpha of {len(table)} layers")


def _alpha_row(row: LayerAlpha, y: float, left: float, place, freezing: Freezing | None) -> str:
    cold = freezing is not None and row.module in freezing.frozen
    parts = [f'<text x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{escape(row.name)}</text>']
    if not row.alpha > 1:
        text = row.reason or "no fit"
        parts.append(f'<text class="odd" x="{left + 6}" y="{y + 3.5:.1f}">{escape(text)}</text>')
        return "".join(parts)
    x = place(min(row.alpha, 1e300))
    css = "frozen" if cold else "trains"
    tip = f"{row.name}: alpha {row.alpha:.6g}, D {row.ks_distance:.3g}"
    if row.ambiguous:
        tip += f"; ambiguous: {row.reason}"
    parts.append(_mark(_kind(row), css, x, y, tip))
    value = "infinite" if math.isinf(row.alpha) else f"{row.alpha:.2f}"
    note = " ?" if row.ambiguous else ""
    parts.append(f'<text class="value" x="{x + 9:.1f}" y="{y + 3.5:.1f}">{value}{note}</text>')
    return "".join(parts)


def _kind(row: LayerAlpha) -> str:
    if row.kind != "conv":
        return "linear"
    return "larger kernel" if any(size > 1 for size in row.shape[2:]) else "1x1"


def _mark(kind: str, css: str, x: float, y: float, tip: str) -> str:
    title = f"<title>{escape(tip)}</title>"
    if kind == "larger kernel":
        shape = f'rect class="{css}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        return f"<{shape}>{title}</rect>"
    if kind == "linear":
        path = f"M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z"
        return f'<path class="{css}" d="{path}">{title}</path>'
    return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'


def _legend(left: float, freezing: Freezing | None) -> str:
    parts, x = [], float(left)
    entries = [("trains", kind) for kind in _MARKS]
    if freezing is not None:
        entries = [("frozen", "1x1"), ("trains", "1x1")] + entries[1:]
    for position, (css, kind) in enumerate(entries):
        text = kind
        if freezing is not None and position < 2:
            text = css
        parts.append(_mark(kind, css, x + 5, 11, text))
        parts.append(f'<text x="{x + 14:.0f}" y="15">{text}</text>')
        x += 30 + len(text) * _CHAR
    parts.append(f'<text class="soft" x="{x:.0f}" y="15">?  ambiguous</text>')
    return "".join(parts)


def _alpha_ticks(low: float, high: float) -> list[float]:
    steps = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1e3, 1e4, 1e5, 1e6)
    ticks = [float(step) for step in steps if low <= step <= high]
    return ticks if len(ticks) <= 14 else ticks[::2]


def spectra_svg(table: AlphaTable, freezing: Freezing | None = None) -> str:
    """A panel per layer: share of eigenvalues >= x against x, both logarithmic.

    Drawn are the kept eigenvalues, the fitted tail ``(n/N) (x/xmin)^(1-alpha)`` from xmin to the
    largest eigenvalue, and xmin itself. A power law is a straight line there.

    Raises:
        ValueError: the table was made without ``keep_spectra=True``.
    """
    missing = [row.name for row in table if row.name not in table.spectra]
    if missing:
        raise ValueError(
            f"no spectrum of {missing[0]} in the table; estimate with keep_spectra=True"
        )
    parts = []
    for index, row in enumerate(table):
        x = 30 + index % _COLUMNS * _CELL[0]
        y = _HEAD + index // _COLUMNS * _CELL[1]
        cold = freezing is not None and row.module in freezing.frozen
        parts.append(f'<g transform="translate({x} {y})">')
        parts.append(_panel(row, table.spectra[row.name], cold))
        parts.append("</g>")
    rows = -(-len(table) // _COLUMNS)
    bottom = _HEAD + rows * _CELL[1]
    legend = (
        '<text x="30" y="12" class="soft">share of eigenvalues &#8805; x, over x, log-log; '
        '<tspan class="odd">fitted tail</tspan>, dashed: xmin'
        + ("; names of frozen layers coloured" if freezing is not None else "")
        + "</text>"
    )
    return _svg([legend, *parts], bottom, f"spectra of {len(table)} layers")


def _panel(row: LayerAlpha, values: torch.Tensor, cold: bool) -> str:
    width, height = _PLOT
    css = " cold" if cold else ""
    name = row.name if len(row.name) <= 24 else f"...{row.name[-22:]}"
    alpha = "no fit" if not row.alpha > 1 else f"\u03b1 {row.alpha:.2f}"
    parts = [
        f'<text class="name{css}" x="0" y="-5">{escape(name)}<title>{escape(row.name)}</title>'
        f'</text><text class="small" x="{width}" y="-5" text-anchor="end">{alpha}</text>'
    ]
    spectrum = values[values > 0].double().cpu()
    count = spectrum.numel()
    frame = f'<rect class="grid" x="0" y="0" width="{width}" height="{height}"/>'
    if count < 2:
        text = f'<text class="soft" x="8" y="{height / 2:.0f}">{count} eigenvalues</text>'
        return "".join([*parts, frame, text])
    low, high = math.log10(float(spectrum[0])), math.log10(float(spectrum[-1]))
    pad = 0.04 * max(high - low, 0.2)
    low, high, floor = low - pad, high + pad, math.log10(0.7 / count)

    def at(x: float, share: float) -> tuple[float, float]:
        px = (math.log10(x) - low) / (high - low) * width
        py = height * math.log10(share) / floor
        return min(max(px, 0.0), width), min(max(py, 0.0), height)

    parts.append(_panel_grid(low, high, floor))
    parts.append(frame)
    steps = []
    for i in _sample(spectrum, low, high):
        px, py = at(float(spectrum[i]), (count - i) / count)
        steps.append(f"{px:.1f} {py:.1f}")
    parts.append(f'<polyline class="points{css}" points="{",".join(steps)}"/>')
    if row.alpha > 1 and row.xmin > 0 and row.xmin_index >= 0:
        tail = (row.num_evals - row.xmin_index) / row.num_evals
        x0, y0 = at(row.xmin, tail)
        parts.append(f'<line class="start" x1="{x0:.1f}" x2="{x0:.1f}" y1="0" y2="{height}"/>')
        if not math.isinf(row.alpha):
            # The end is where the line leaves the panel, at the largest eigenvalue or the floor.
            reach = math.log10(row.xmin) + (math.log10(tail) - floor) / (row.alpha - 1)
            end = min(reach, math.log10(float(spectrum[-1])))
            drop = math.log10(tail) + (1 - row.alpha) * (end - math.log10(row.xmin))
            x1, y1 = at(10**end, 10**drop)
            parts.append(
                f'<line class="tail" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'
            )
    return "".join(parts)


def _sample(spectrum: torch.Tensor, low: float, high: float, wanted: int = 90) -> list[int]:
    """Indices evenly spread over log x and over log rank, so that both ends keep their shape."""
    count = spectrum.numel()
    if count <= 2 * wanted:
        return list(range(count))
    edges = torch.logspace(low, high, wanted, dtype=torch.float64)
    by_value = torch.searchsorted(spectrum, edges).clamp(max=count - 1).tolist()
    by_rank = [count - round(count ** (k / (wanted - 1))) for k in range(wanted)]
    return sorted({0, count - 1, *by_value, *(max(0, i) for i in by_rank)})


def _panel_grid(low: float, high: float, floor: float) -> str:
    width, height = _PLOT
    parts = []
    step = max(1, math.ceil((high - low) / 4))
    for decade in range(math.ceil(low), math.floor(high) + 1):
        x = (decade - low) / (high - low) * width
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
        if decade % step == 0:
            parts.append(_power(decade, x, height + 11, "middle"))
    for decade in range(-1, math.ceil(floor) - 1, -1):
        y = height * decade / floor
        parts.append(f'<line class="grid" x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_power(decade, -4, y + 3, "end"))
    if math.floor(high) < math.ceil(low):  # less than a decade wide: the ends in numbers
        parts.append(
            f'<text class="soft small" x="0" y="{height + 11}">{10**low:.2g}</text>'
            f'<text class="soft small" x="{width}" y="{height + 11}" text-anchor="end">'
            f"{10**high:.2g}</text>"
        )
    return "".join(parts)


def _power(exponent: int, x: float, y: float, anchor: str) -> str:
    return (
        f'<text class="soft small" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">10'
        f'<tspan dy="-3" font-size="7">{exponent}</tspan></text>'
    )


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg class="chart alpha" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}"><style>{ALPHA_STYLE}</style>{"".join(parts)}</svg>'
    )


def standalone(svg: str) -> str:
    """The drawing as a file of its own: namespace, size and colours, light and dark."""
    box = svg.split('viewBox="', 1)[1].split('"', 1)[0].split()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[2]}" height="{box[3]}" '
    return svg.replace("<svg ", head, 1).replace("<style>", f"<style>{_STYLE}", 1) + "\n"


def freezing_of(plan: Mapping[str, object]) -> Freezing:
    """From a freeze plan as plain data (``FreezePlan.to_dict()``)."""
    threshold = plan.get("threshold")
    labels = {"median": "median", "opentrans": "median", "above_median": "frozen above the median"}
    return Freezing(
        frozenset(str(name) for name in plan["frozen"]),  # type: ignore[attr-defined]
        None if threshold is None else float(threshold),  # type: ignore[arg-type]
        labels.get(str(plan["rule"]), str(plan["rule"])),
    )
