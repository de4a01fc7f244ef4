"""A self-contained HTML page from parts: headings, facts, tables, charts, preformatted text.

Only a page with sortable tables holds a script, :data:`_SORT`, which reads nothing but the table;
a page with contents one that opens the folded section a link leads to.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { --ink: #1c2430; --soft: #5c6773; --line: #dfe4ea; --page: #ffffff; --panel: #f5f7f9;
  --dense: #9aa7b5; --sparse: #1f7a8c; --lose: #c2542d; --warn: #fff3d6; --warn-ink: #6b4700;
  --c0: #1f7a8c; --c1: #c2542d; --c2: #6b8e23; --c3: #8c5fb0; --c4: #b8860b; --c5: #2f5fa8;
  --c6: #a63d6a; --c7: #66727f; --c8: #2e9e6b; --c9: #7a4b2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9ba7b3; --line: #323b45;
  --page: #14181d; --panel: #1c2229; --dense: #66727f; --sparse: #46b3c6; --lose: #e2795a;
  --warn: #3a2f14; --warn-ink: #f0d592; --c0: #46b3c6; --c1: #e2795a; --c2: #a3c154;
  --c3: #b894dc; --c4: #e0b23c; --c5: #7aa6e8; --c6: #e07aa8; --c7: #9ba7b3; --c8: #5fd0a0;
  --c9: #c79a74; } }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--page); max-width: 1240px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 8px; } h3 { font-size: 1rem; margin: 18px 0 4px; }
p { margin: 6px 0; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.banner { background: var(--warn); color: var(--warn-ink); padding: 10px 14px; border-radius: 6px;
  font-weight: 600; margin: 14px 0; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.fact { background: var(--panel); border-radius: 8px; padding: 12px 16px; min-width: 150px; }
.fact b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr));
  gap: 14px; margin: 14px 0; } figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px;
  border: 1px solid var(--line); box-sizing: border-box; }
figcaption { font-size: 13px; color: var(--soft); padding-top: 5px; }
figcaption b { display: block; color: var(--ink); font-size: 15px; }
nav { columns: 3 260px; background: var(--panel); border-radius: 8px; padding: 12px 16px;
  margin: 16px 0; font-size: 13px; } nav a { display: block; color: var(--sparse); padding: 1px 0; }
.wide { overflow-x: auto; margin: 6px 0 14px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 8px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td.note { white-space: normal; min-width: 20em; } tr.lose td { color: var(--lose); }
pre { background: var(--panel); padding: 12px; border-radius: 6px; overflow-x: auto;
  font-size: 12px; line-height: 1.35; }
svg.chart { width: 100%; min-width: 660px; max-width: 1000px; height: auto;
  font: 11px system-ui, sans-serif; }
svg .label, svg .value { fill: var(--ink); }
svg .value { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg .tick, svg .axis { fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .reference { stroke: var(--ink); stroke-dasharray: 3 3; }
svg .dense { fill: var(--dense); } svg .sparse { fill: var(--sparse); }
svg .lose { fill: var(--lose); }
svg .c0 { stroke: var(--c0); fill: var(--c0); } svg .c1 { stroke: var(--c1); fill: var(--c1); }
svg .c2 { stroke: var(--c2); fill: var(--c2); } svg .c3 { stroke: var(--c3); fill: var(--c3); }
svg .c4 { stroke: var(--c4); fill: var(--c4); } svg .c5 { stroke: var(--c5); fill: var(--c5); }
svg .c6 { stroke: var(--c6); fill: var(--c6); } svg .c7 { stroke: var(--c7); fill: var(--c7); }
svg .c8 { stroke: var(--c8); fill: var(--c8); } svg .c9 { stroke: var(--c9); fill: var(--c9); }
svg polyline.line { fill: none; stroke-width: 1.6; }
table.sortable th { cursor: pointer; } table.sortable th::after { content: " \\2195";
  color: var(--soft); } table.sortable th[aria-sort="ascending"]::after { content: " \\2191"; }
table.sortable th[aria-sort="descending"]::after { content: " \\2193"; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
details.section > summary { color: var(--ink); font-size: 1.15rem; font-weight: 700;
  margin: 28px 0 8px; }
"""


#: Click on a column's head, or Enter on it: sort by it, again for the other direction. Cells that
#: are one number sort by value and stand before text; empty ones stay last.
_SORT = """
for (const head of document.querySelectorAll("table.sortable th")) {
  const number = /^[-+]?[\\d.,]*\\d(e[-+]?\\d+)?[x%]?( |$)/i;
  const sort = () => {
    const table = head.closest("table");
    const up = head.ariaSort !== "ascending";
    for (const other of table.querySelectorAll("th")) other.ariaSort = null;
    head.ariaSort = up ? "ascending" : "descending";
    const key = (row) => {
      const text = row.cells[head.cellIndex].textContent.trim();
      return number.test(text) ? parseFloat(text.replace(/,/g, "")) : text;
    };
    const kind = (value) => (value === "" ? 2 : typeof value === "string" ? 1 : 0);
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (kind(x) !== kind(y)) return kind(x) - kind(y);
      const found = kind(x) ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return up ? found : -found;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
"""
_OPEN = """
const open = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", open);
open();
"""
_NUMBER = re.compile(r"[-+]?[\d.,]*\d(e[-+]?\d+)?[x%]?( - [\d.]+)?", re.IGNORECASE)
_LONG = 45  # characters of a cell from which on it is wrapped


@dataclass(frozen=True)
class Picture:
    """A PNG file with its title and a line below it; ``size`` is (width, height) in pixels."""

    png: bytes
    size: tuple[int, int]
    title: str
    caption: str


class Page:
    """Collects parts; :meth:`render` gives the whole document. All text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]
        self._sortable = False
        self._sections: list[str] = []
        self._contents: int | None = None

    def contents(self) -> None:
        """Links to all sections, here."""
        self._contents = len(self._parts)
        self._parts.append("")

    def heading(self, text: str) -> None:
        """A section."""
        self._parts.append(f'<h2 id="{self._section(text)}">{escape(text)}</h2>')

    @contextmanager
    def folded(self, text: str, *, opened: bool = False) -> Iterator[None]:
        """A section whose parts, added inside the block, are folded away at first."""
        state = " open" if opened else ""
        self._parts.append(
            f'<details class="section" id="{self._section(text)}"{state}>'
            f"<summary>{escape(text)}</summary>"
        )
        yield
        self._parts.append("</details>")

    def _section(self, text: str) -> str:
        self._sections.append(text)
        return f"s{len(self._sections)}"

    def subheading(self, text: str) -> None:
        """A heading inside a section."""
        self._parts.append(f"<h3>{escape(text)}</h3>")

    def paragraph(self, text: str, css: str = "") -> None:
        """One paragraph; ``css`` is a class ("soft", "banner")."""
        attribute = f' class="{escape(css)}"' if css else ""
        self._parts.append(f"<p{attribute}>{escape(text)}</p>")

    def facts(self, facts: Mapping[str, str]) -> None:
        """Large numbers with captions."""
        boxes = "".join(
            f'<div class="fact"><b>{escape(value)}</b>{escape(name)}</div>'
            for name, value in facts.items()
        )
        self._parts.append(f'<div class="facts">{boxes}</div>')

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        row_css: Sequence[str] | None = None,
        *,
        sortable: bool = False,
    ) -> None:
        """A table; ``row_css`` marks rows, for instance "lose". Columns of text stand left."""
        self._sortable |= sortable
        kind = ' class="sortable"' if sortable else ""
        left = [_is_text([row[index] for row in rows]) for index in range(len(columns))]
        head = "".join(
            f"<th{_css(text)}>{escape(column)}</th>"
            for column, text in zip(columns, left, strict=True)
        )
        body = []
        for index, row in enumerate(rows):
            css = row_css[index] if row_css else ""
            attribute = f' class="{escape(css)}"' if css else ""
            cells = "".join(
                f"<td{_css(text, len(cell) > _LONG and i > 0)}>{escape(cell)}</td>"
                for i, (cell, text) in enumerate(zip(row, left, strict=True))
            )
            body.append(f"<tr{attribute}>{cells}</tr>")
        self._parts.append(
            f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Pictures beside each other, below each other where the page is narrow."""
        figures = "".join(
            f'<figure><img alt="{escape(one.title)}" width="{one.size[0]}" height="{one.size[1]}" '
            f'src="data:image/png;base64,{b64encode(one.png).decode("ascii")}">'
            f"<figcaption><b>{escape(one.title)}</b>{escape(one.caption)}</figcaption></figure>"
            for one in pictures
        )
        self._parts.append(f'<div class="pictures">{figures}</div>')

    def svg(self, drawing: str) -> None:
        """A drawing made by :mod:`.svg`."""
        self._parts.append(f'<div class="wide">{drawing}</div>')

    def preformatted(self, text: str, summary: str | None = None) -> None:
        """Fixed-width text, folded away under ``summary`` if given."""
        block = f"<pre>{escape(text)}</pre>"
        if summary is not None:
            block = f"<details><summary>{escape(summary)}</summary>{block}</details>"
        self._parts.append(block)

    def render(self) -> str:
        """The document; it refers to nothing outside itself."""
        scripts = _SORT * self._sortable
        if self._contents is not None:
            scripts += _OPEN
            links = (
                f'<a href="#s{number}">{escape(text)}</a>'
                for number, text in enumerate(self._sections, 1)
            )
            self._parts[self._contents] = f"<nav>{''.join(links)}</nav>"
        script = f"<script>{scripts}</script>\n" if scripts else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{chr(10).join(self._parts)}\n{script}</body></html>\n"
        )


def _is_text(cells: Sequence[str]) -> bool:
    """True if most of the filled cells of a column are no numbers."""
    filled = [cell for cell in cells if cell]
    return 2 * sum(bool(_NUMBER.fullmatch(cell)) for cell in filled) <= len(filled)


def _css(text: bool, long: bool = False) -> str:
    names = " ".join(["text"] * text + ["note"] * long)
    return f' class="{names}"' if names else ""
