"""A self-contained HTML page from parts: headings, facts, tables, charts, preformatted text.

Only a page with sortable tables holds a script, :data:`_SORT`, which reads nothing but the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
:root { --ink: #1c2430; --soft: #5c6773; --line: #dfe4ea; --page: #ffffff; --panel: #f5f7f9;
  --dense: #9aa7b5; --sparse: #1f7a8c; --lose: #c2542d; --warn: #fff3d6; --warn-ink: #6b4700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9ba7b3; --line: #323b45;
  --page: #14181d; --panel: #1c2229; --dense: #66727f; --sparse: #46b3c6; --lose: #e2795a;
  --warn: #3a2f14; --warn-ink: #f0d592; } }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--page); max-width: 960px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 36px 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); }
.banner { background: var(--warn); color: var(--warn-ink); padding: 10px 14px; border-radius: 6px;
  font-weight: 600; margin: 14px 0; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.fact { background: var(--panel); border-radius: 8px; padding: 12px 16px; min-width: 150px; }
.fact b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.lose td { color: var(--lose); }
pre { background: var(--panel); padding: 12px; border-radius: 6px; overflow-x: auto;
  font-size: 12px; line-height: 1.35; }
svg.chart { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg .label, svg .value { fill: var(--ink); }
svg .value { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg .tick, svg .axis { fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .reference { stroke: var(--ink); stroke-dasharray: 3 3; }
svg .dense { fill: var(--dense); } svg .sparse { fill: var(--sparse); }
svg .lose { fill: var(--lose); }
svg .line { fill: none; stroke-width: 1.6; } svg .frame { fill: none; stroke: var(--line); }
svg .c0 { stroke: #1f7a8c; fill: #1f7a8c; } svg .c1 { stroke: #c2542d; fill: #c2542d; }
svg .c2 { stroke: #6b8e23; fill: #6b8e23; } svg .c3 { stroke: #8c5fb0; fill: #8c5fb0; }
svg .c4 { stroke: #b8860b; fill: #b8860b; } svg .c5 { stroke: #4a6fa5; fill: #4a6fa5; }
svg .c6 { stroke: #a63d6a; fill: #a63d6a; } svg .c7 { stroke: #66727f; fill: #66727f; }
svg .line.c0, svg .line.c1, svg .line.c2, svg .line.c3, svg .line.c4, svg .line.c5, svg .line.c6,
svg .line.c7 { fill: none; }
table.sortable th { cursor: pointer; } table.sortable th::after { content: " \\2195";
  color: var(--soft); }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
"""


#: Click on a column's head: sort by it, numbers by value, again for the other direction.
_SORT = """
for (const head of document.querySelectorAll("table.sortable th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const up = head.dataset.up !== "1";
    head.dataset.up = up ? "1" : "0";
    const key = (row) => {
      const text = row.cells[column].textContent;
      const number = parseFloat(text.replace(/,/g, ""));
      return Number.isNaN(number) ? text : number;
    };
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return x < y ? -1 : x > y ? 1 : 0;
    };
    const rows = [...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
    body.append(...rows);
  });
}
"""


class Page:
    """Collects parts; :meth:`render` gives the whole document. All text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]
        self._sortable = False

    def heading(self, text: str) -> None:
        """A section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

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
        """A table; ``row_css`` marks rows, for instance "lose"."""
        self._sortable |= sortable
        kind = ' class="sortable"' if sortable else ""
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = []
        for index, row in enumerate(rows):
            css = row_css[index] if row_css else ""
            attribute = f' class="{escape(css)}"' if css else ""
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
            body.append(f"<tr{attribute}>{cells}</tr>")
        self._parts.append(
            f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

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
        script = f"<script>{_SORT}</script>\n" if self._sortable else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{chr(10).join(self._parts)}\n{script}</body></html>\n"
        )
