"""The HTML report: drawings are right, pages stand alone, hostile labels stay text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from report_result import example_result

from opentrans_kernels.report import trunk_page
from opentrans_kernels.report.page import Page
from opentrans_kernels.report.svg import Series, bar_chart, nice_ticks


def drawn(svg: str, css: str) -> list[float]:
    """Widths of the bars of a class, legend squares left out."""
    root = ElementTree.fromstring(svg)
    bars = [one for one in root.iter("rect") if one.get("class") == css and len(one)]
    return [float(bar.get("width", "nan")) for bar in bars]


@pytest.mark.parametrize(
    ("largest", "last"),
    [(0.0, 1.0), (0.53, 0.6), (1.0, 1.0), (4.2, 5.0), (163.0, 200.0), (1e-4, 1e-4)],
)
def test_ticks_are_round_and_reach_the_largest(largest: float, last: float) -> None:
    ticks = nice_ticks(largest)
    assert ticks[0] == 0 and ticks[-1] == pytest.approx(last)
    assert ticks[-1] >= largest * 0.999 and 2 <= len(ticks) <= 7


def test_bars_are_proportional_to_values() -> None:
    svg = bar_chart(
        ["a", "b"],
        [Series("dense", "dense", [4.0, 2.0]), Series("sparse", "sparse", [1.0, None])],
        axis="ms",
        value_text=lambda value: f"{value:.1f}",
        reference=1.0,
    )
    dense, sparse = drawn(svg, "dense"), drawn(svg, "sparse")
    assert dense[0] == pytest.approx(2 * dense[1], rel=1e-3)
    assert sparse == [pytest.approx(dense[0] / 4, rel=1e-3)]
    assert 'class="reference"' in svg and "sparse" in svg


def test_a_row_can_have_its_own_class() -> None:
    svg = bar_chart(
        ["wins", "loses"],
        [Series("x", "sparse", [2.0, 0.5])],
        axis="x",
        value_text=str,
        row_css=["", "lose"],
    )
    assert len(drawn(svg, "sparse")) == len(drawn(svg, "lose")) == 1


@pytest.mark.parametrize("values", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_impossible_bars_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="series 's'"):
        bar_chart(["a", "b"], [Series("s", "dense", values)], axis="x", value_text=str)
    with pytest.raises(ValueError, match="at least one row"):
        bar_chart([], [], axis="x", value_text=str)


def test_the_page_shows_the_result() -> None:
    html = trunk_page(example_result())
    for text in (
        "3.60x",
        "120.2",
        "33.4",
        "15.2%",
        "SYNTHETIC weights and mask",
        "224 x 192 pixels",
        "1 of 2 layers are slower sparse than dense",
        "layer1.0.conv3",
        "jit_optimized could not be run: RuntimeError: no compiler",
        "within the limit",
        "fastest of the 1 dense variants that were timed: compile.",
        "density table",
        "plan table",
        "Example CPU",
    ):
        assert text in html, text
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_an_inexact_result_says_so() -> None:
    assert "OUTSIDE the limit" in trunk_page({**example_result(), "exact": False})


def test_the_page_needs_nothing_from_outside() -> None:
    html = trunk_page(example_result())
    assert "<script" not in html and "&lt;script&gt;" in html
    for outside in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert outside not in html, outside


def test_without_layers_there_are_no_layer_charts() -> None:
    html = trunk_page({**example_result(), "layers": []})
    assert html.count("<svg") == 1 and "Density per layer" not in html


def test_page_parts_escape_their_text() -> None:
    page = Page("a < b")
    page.heading("<h>")
    page.paragraph("<p>", "x")
    page.facts({"<n>": "<v>"})
    page.table(("<c>",), [["<cell>"]], ["lose"])
    page.preformatted("<pre>", "<s>")
    html = page.render()
    assert "a &lt; b" in html and 'tr class="lose"' in html
    for raw in ("<h>", "<n>", "<v>", "<c>", "<cell>", "<s>"):
        assert raw not in html
