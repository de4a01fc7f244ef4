"""Line and scatter plots as inline SVG text, linear or logarithmic, in the style of :mod:`.svg`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .svg import nice_ticks

COLOURS = 10  # classes c0 to c9 of the page
_LEFT, _RIGHT, _TOP, _BOTTOM, _CHAR = 62, 14, 14, 46, 6.4
_LEGEND_ROW = 16


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one colour, joined or not.

    ``tips`` are texts shown when a point is pointed at, one per point.
    """

    label: str
    points: Sequence[tuple[float, float]]
    css: str
    joined: bool = True
    tips: Sequence[str] | None = None
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """Title with unit; ``log``: decades with 1, 2, 5."""

    title: str
    log: bool = False


def plot(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    reference: float | None = None,
    width: int = 860,
    height: int = 380,
) -> str:
    """A plot of curves.

    Args:
        curves: at least one, with at least one point together; values must be finite, and above 0
            on a logarithmic axis.
        x, y: the axes. reference: a dashed horizontal line.
        width, height: pixels of the drawing area's view box, without the legend.

    Raises:
        ValueError: nothing to draw, or a value that the axis cannot show.
    """
    _check(curves, x, y)
    xs = [point[0] for curve in curves for point in curve.points]
    ys = [point[1] for curve in curves for point in curve.points]
    if reference is not None:
        ys = [*ys, reference]
    legend, legend_height = _legend(curves, width)
    top = _TOP + legend_height
    bottom = top + height - _TOP - _BOTTOM
    place_x, ticks_x = _scale(xs, x.log, _LEFT, width - _RIGHT)
    place_y, ticks_y = _scale(ys, y.log, bottom, top)
    parts = [legend, _frame(ticks_x, ticks_y, place_x, place_y, width, top, bottom)]
    if reference is not None:
        at = place_y(reference)
        parts.append(
            f'<line class="reference" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" '
            f'y2="{at:.1f}"/>'
        )
    for curve in curves:
        places = [(place_x(px), place_y(py)) for px, py in curve.points]
        if curve.joined and len(places) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline class="line {escape(curve.css)}" points="{path}"/>')
        if not curve.dots:
            continue
        for index, (px, py) in enumerate(places):
            tip = curve.tips[index] if curve.tips else _tip(curve.label, curve.points[index])
            parts.append(
                f'<circle class="{escape(curve.css)}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">'
                f"<title>{escape(tip)}</title></circle>"
            )
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="axis" x="{(_LEFT + width) / 2:.0f}" y="{bottom + 34}" '
        f'text-anchor="middle">{escape(x.title)}</text>'
        f'<text class="axis" transform="translate(13 {middle:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.title)}</text>'
    )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {bottom + _BOTTOM}" role="img" '
        f'aria-label="{escape(y.title)} over {escape(x.title)}">{"".join(parts)}</svg>'
    )


def colour(index: int) -> str:
    """Class of the index-th curve."""
    return f"c{index % COLOURS}"


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten that enclose ``low`` to ``high`` (both above 0)."""
    first = math.floor(math.log10(low) + 1e-9)
    last = math.ceil(math.log10(high) - 1e-9)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max([tick for tick in ticks if tick <= low * 1.000001], default=ticks[0])
    end = min([tick for tick in ticks if tick >= high * 0.999999], default=ticks[-1])
    chosen = [tick for tick in ticks if start <= tick <= end]
    return chosen if len(chosen) > 1 else [start, start * 10]


def _scale(
    values: Sequence[float], log: bool, start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """(position of a value, ticks) of an axis from pixel ``start`` to ``end``."""
    if log:
        low, high, ticks = _log_range(min(values), max(values))
    else:
        ticks = nice_ticks(max(values))
        low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        at = math.log(value) if log else value
        return start + (at - low) / (high - low) * (end - start)

    return place, ticks


def _log_range(least: float, most: float) -> tuple[float, float, list[float]]:
    """(low, high, ticks) as logarithms and values: the data with a margin, ticks inside it."""
    enclosing = log_ticks(least, most)
    margin = max((most / least) ** 0.04, 1.03)
    inside = [tick for tick in enclosing if least / margin <= tick <= most * margin]
    if len(inside) < 3:  # a short range: its nearest round numbers
        return math.log(enclosing[0]), math.log(enclosing[-1]), enclosing
    return math.log(least / margin), math.log(most * margin), inside


def _check(curves: Sequence[Curve], x: Axis, y: Axis) -> None:
    if not any(curve.points for curve in curves):
        raise ValueError("a plot needs at least one point")
    for curve in curves:
        if curve.tips is not None and len(curve.tips) != len(curve.points):
            raise ValueError(f"{curve.label!r} has {len(curve.tips)} tips for other points")
        for point in curve.points:
            for value, axis in zip(point, (x, y), strict=True):
                if not math.isfinite(value) or value < 0 or (axis.log and value == 0):
                    raise ValueError(f"{curve.label!r} holds {value}, no place on {axis.title!r}")


def _legend(curves: Sequence[Curve], width: int) -> tuple[str, int]:
    """Labels of all curves, as many rows as needed; and their height."""
    if len(curves) == 1:
        return "", 0
    parts, x, row = [], float(_LEFT), 0
    for curve in curves:
        wide = 30 + len(curve.label) * _CHAR
        if x + wide > width and x > _LEFT:
            x, row = float(_LEFT), row + 1
        y = 4 + row * _LEGEND_ROW
        parts.append(
            f'<rect class="{escape(curve.css)}" x="{x:.0f}" y="{y}" width="10" height="10"/>'
            f'<text class="label" x="{x + 15:.0f}" y="{y + 9}">{escape(curve.label)}</text>'
        )
        x += wide
    return "".join(parts), (row + 1) * _LEGEND_ROW


def _frame(
    ticks_x: Sequence[float],
    ticks_y: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    width: int,
    top: float,
    bottom: float,
) -> str:
    parts = []
    for tick in ticks_x:
        at = place_x(tick)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>'
            f'<text class="tick" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for tick in ticks_y:
        at = place_y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    return "".join(parts)


def _tip(label: str, point: tuple[float, float]) -> str:
    return f"{label}: {point[0]:g}, {point[1]:.4g}"
