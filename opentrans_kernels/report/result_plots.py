"""The plots of the benchmark page: roofline, crossover, cost against nonzeros, scaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..bench.compare import run_label
from ..bench.derive import crossovers, kind_of_layer, roofline
from .page import Page
from .plots import Axis, Curve, colour, plot

Result = Mapping[str, Any]
_INTENSITY = Axis(
    "FLOPs of nonzeros per byte moved (input, output, packed weights, once each)", True
)


def roofline_of(page: Page, r: Result) -> None:
    """Each layer of a trunk run under its two measured ceilings; a part of the run's section."""
    ceilings = r.get("ceilings")
    if not ceilings:
        return
    points = roofline(r["layers"], ceilings, r["input"][0])
    if not points:
        return
    page.subheading("Roofline")
    page.paragraph(
        f"Ceilings measured in the same run: {ceilings['dense_gflops']:.0f} GFLOP/s (a dense "
        f"product in cache) and {ceilings['copy_gbs']:.1f} GB/s (a copy that fits no cache). "
        "Layers that stay in cache can lie above the slope. Every sparse multiply-add loads its "
        "activation, a dense product reuses it in registers: the flat roof is out of reach.",
        "soft",
    )
    knee = ceilings["dense_gflops"] / ceilings["copy_gbs"]
    low = min([knee, *(p.intensity for p in points)]) / 1.5
    high = max([knee, *(p.intensity for p in points)]) * 1.5
    roof = [(x, min(x * ceilings["copy_gbs"], ceilings["dense_gflops"]))
            for x in (low, knee, high)]  # fmt: skip
    curves = [Curve("measured ceilings", roof, "c7", dots=False)]
    kinds = {row["name"]: kind_of_layer(row["cin"], row["cout"], row["kernel"])
             for row in r["layers"]}  # fmt: skip
    for index, kind in enumerate(sorted(set(kinds.values()))):
        mine = [point for point in points if kinds[point.name] == kind]
        tips = [
            f"{p.name}: {p.gflops:.1f} GFLOP/s, {p.share:.0%} of the limit by {p.bound}"
            for p in mine
        ]
        spots = [(p.intensity, p.gflops) for p in mine]
        curves.append(Curve(kind, spots, colour(index), joined=False, tips=tips))
    page.svg(plot(curves, _INTENSITY, Axis("GFLOP/s on nonzeros", True)))


def crossover(page: Page, r: Result) -> None:
    """Speed-up over density per shape, and where sparse starts to win."""
    found = crossovers(r["rows"])
    drawn = [one for one in found if one.backend != "reference"] or found
    if not found:
        return
    page.heading(f"Crossover: {run_label(dict(r))}")
    page.paragraph(
        "Speed-up over the fastest dense convolution by density, uniform random masks, layers "
        "alone. Above the dashed line sparse wins. The reference rows, plain PyTorch, are in the "
        "table only.",
        "soft",
    )
    for kind in sorted({one.kind for one in drawn}):
        curves = []
        for one in (one for one in drawn if one.kind == kind):
            points = sorted(
                (row["density"], row["speedup"]["median"])
                for row in _rows_of(r["rows"], one.case, one.backend, one.batch)
            )
            label = f"{one.case} {one.backend}" + f", batch {one.batch}" * (one.batch > 1)
            label = label.removesuffix(" cpu")
            curves.append(Curve(label, points, colour(len(curves))))
        page.subheading(kind)
        axes = Axis("density (share of weights kept)", True), Axis("speed-up over dense", True)
        page.svg(plot(curves, *axes, reference=1.0, height=320))
    rows = [
        [one.kind, one.case, one.backend, str(one.batch),
         "" if one.density is None else f"{one.density:.2f}", one.verdict]
        for one in found
    ]  # fmt: skip
    columns = ("kind", "shape", "backend", "batch", "crossover", "verdict")
    page.table(columns, rows, sortable=True)


def cost(page: Page, r: Result) -> None:
    """Milliseconds against multiply-adds on nonzeros, by kind of layer."""
    exact = [
        row
        for row in r["rows"]
        if row["op"] == "sparse_conv2d" and row["exact"] and row["macs"]["effective"]
    ]
    rows = [row for row in exact if row["backend"] != "reference"] or exact
    if not rows:
        return
    page.heading(f"Cost against nonzeros: {run_label(dict(r))}")
    page.paragraph(
        "A straight line of slope 1 is a constant rate; what lies above it at the left are fixed "
        "costs: epilogue, short rows.",
        "soft",
    )
    for kind in sorted({row["kind"] for row in rows}):
        curves: list[Curve] = []
        mine = [row for row in rows if row["kind"] == kind]
        for case, backend in dict.fromkeys((row["case"], row["backend"]) for row in mine):
            points = sorted(
                (row["macs"]["effective"] / 1e6, row["ms"])
                for row in mine
                if (row["case"], row["backend"]) == (case, backend)
            )
            label = f"{case} {backend}".removesuffix(" cpu")
            curves.append(Curve(label, points, colour(len(curves))))
        page.subheading(kind)
        axes = Axis("million multiply-adds on nonzeros", True), Axis("ms", True)
        page.svg(plot(curves, *axes, height=320))


def scaling(page: Page, r: Result) -> None:
    """Curves over batch, pixels and threads from a model run, each with the others fixed."""
    for key, title, others in (
        ("threads", "threads", ("part", "batch", "height", "width")),
        ("batch", "batch", ("part", "threads", "height", "width")),
        ("pixels", "input pixels (thousands)", ("part", "threads", "batch")),
    ):
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in r["rows"]:
            groups.setdefault(tuple(row[name] for name in others), []).append(row)
        curves: list[Curve] = []
        for fixed, rows in groups.items():
            if len({_along(row, key) for row in rows}) < 2:
                continue
            rows = sorted(rows, key=lambda row: _along(row, key))
            label = ", ".join(f"{n} {v}" for n, v in zip(others, fixed, strict=True)).removeprefix(
                "part "
            )
            for side, field in (("ours", "ms"), ("dense", "dense_ms")):
                # Time per image: a flat line means the work grows with the batch, no more.
                points = [(_along(row, key), row[field] / row["batch"]) for row in rows]
                curves.append(Curve(f"{side}, {label}", points, colour(len(curves))))
        if curves:
            page.heading(f"Scaling with {key}")
            page.svg(plot(curves, Axis(title, True), Axis("ms per image", True)))


def trunk_scaling(page: Page, results: Sequence[Result]) -> None:
    """Thread scaling from trunk runs: one-thread times taken in the same rounds."""
    rows = []
    for r in results:
        found = r.get("thread_scaling")
        if found:
            checks = [check["verdict"] for check in found["cores_before"]]
            rows.append(
                [
                    run_label(dict(r)),
                    f"{found['one_thread_ms']:.1f}",
                    f"{found['ms']:.1f}",
                    f"{found['speedup']['median']:.2f}x",
                    checks[-1] if checks else "not checked",
                ]
            )
    if rows:
        page.heading("Thread scaling of the trunk")
        columns = ("run", "ms on one thread", "ms on all", "speed-up", "the two CPUs are")
        page.table(columns, rows, sortable=True)


def _along(row: Mapping[str, Any], key: str) -> float:
    return row["height"] * row["width"] / 1e3 if key == "pixels" else row[key]


def _rows_of(
    rows: Iterable[Mapping[str, Any]], case: str, backend: str, batch: int
) -> Iterable[Mapping[str, Any]]:
    return (
        row
        for row in rows
        if (row["case"], row["backend"], row["batch"]) == (case, backend, batch)
        and row["op"] == "sparse_conv2d"
        and row["speedup"] is not None
        and row["density"] > 0
    )
