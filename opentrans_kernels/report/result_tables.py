"""The sortable tables of the benchmark page; losing rows are marked, never left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bench.compare import Change, Comparison, run_label
from ..bench.derive import agreeing, beside, kind_of_layer, trunk_work
from .page import Page
from .svg import Series, bar_chart

Result = Mapping[str, Any]
CHANGES = 20  # cases of a comparison that are shown at once
NO_SPEED = "inexact"  # stands where a speed-up would, if the case failed its exactness check


def trunks(page: Page, results: Sequence[Result]) -> None:
    """One row per trunk run."""
    page.heading("Trunk: fastest dense PyTorch against ours")
    page.paragraph(
        "Stem to layer4. The speed-up is the median of the ratios within a round, with its "
        "quartiles; the wall times are those of that round (with ~: what the ratio makes of ours, "
        "where rounds were not kept). Errors are relative to the largest output of the masked "
        "network in float64.",
        "soft",
    )
    rows, css = [], []
    for r in results:
        spread = r["speedup_spread"]
        ratio = f"{r['speedup']:.2f}x" if r["exact"] else NO_SPEED
        shown = beside(r["baseline"], r["accelerated"], {**spread, "median": r["speedup"]})
        rows.append(
            [
                run_label(dict(r)),
                r["baseline"]["name"],
                shown.slow(),
                f"{shown.fast_ms:.1f}",
                ratio,
                f"{spread['q1']:.2f} - {spread['q3']:.2f}" if r["exact"] else "",
                f"{r['max_rel_err']:.1e}",
                f"{r['dense_own_rel_err']:.1e}",
                "disturbed" if r["canary"]["disturbed"] else "",
            ]
        )
        css.append("lose" if r["speedup"] < 1 or not r["exact"] else "")
    columns = ("run", "fastest dense", "dense ms", "our ms", "speed-up", "quartiles", "our error")
    page.table((*columns, "dense's error", "machine"), rows, css, sortable=True)
    labels = [run_label(dict(r)) for r in results]
    page.svg(
        bar_chart(
            labels,
            [
                Series("fastest dense", "dense", [r["baseline"]["ms"] for r in results]),
                Series("ours", "sparse", [r["accelerated"]["ms"] for r in results]),
            ],
            axis="milliseconds per batch (lower is better)",
            value_text=lambda value: f"{value:.1f}",
        )
    )


def work(page: Page, results: Sequence[Result]) -> None:
    """Three counts of work against measured time."""
    rows = []
    for r in results:
        macs = trunk_work(r)
        if macs is None:
            continue
        ms, dense = r["accelerated"]["ms"], r["baseline"]["ms"]
        batch = r["input"][0]
        rows.append(
            [
                run_label(dict(r)),
                *(f"{macs[key] / 1e9 * 2:.2f}" for key in ("nominal", "effective", "executed")),
                f"{macs['effective'] / macs['nominal']:.3f}",
                f"{dense:.1f}",
                f"{ms:.1f}",
                f"{2 * macs['nominal'] * batch / dense / 1e6:.1f}",
                f"{2 * macs['effective'] * batch / ms / 1e6:.1f}",
            ]
        )
    if not rows:
        return
    page.heading("Work and time")
    page.paragraph(
        "GFLOP per image (two per multiply-add): nominal is the dense network, effective counts "
        "nonzero weights, executed what the kernels compute: with padding, without channels that "
        "are dead. Fewer FLOPs alone are no speed: the last columns are what was measured.",
        "soft",
    )
    work = ("nominal GFLOP", "effective GFLOP", "executed GFLOP", "effective / nominal")
    rates = ("dense ms", "our ms", "dense GFLOP/s", "our GFLOP/s on nonzeros")
    page.table(("run", *work, *rates), rows, sortable=True)


def peers(page: Page, results: Sequence[Result]) -> None:
    """Other engines on the same network, linear layer or MLP, of trunk and op results."""
    rows, css = [], []
    for r, where in _with_peers(results):
        for name, peer in r["peers"].items():
            label = [where, name]
            if not peer["available"]:
                kind = "skipped" if peer.get("skipped", True) else "FAILED"
                why = f"{kind}: {peer.get('error', 'not run').partition(chr(10))[0]}"
                rows.append([*label, "", "", "", "", "", why])
                css.append("")
                continue
            spread = peer["speedup_of_ours"]
            ours = peer["ours_ms"] if "ours_ms" in peer else r["accelerated"]["ms"]
            shown = agreeing(peer["ms"], ours, spread)
            rows.append(
                [
                    *label,
                    shown.slow(),
                    f"{shown.fast_ms:.1f}",
                    f"{spread['median']:.2f}x" if r["exact"] else NO_SPEED,
                    f"{spread['q1']:.2f} - {spread['q3']:.2f}" if r["exact"] else "",
                    "" if peer["max_rel_err"] is None else f"{peer['max_rel_err']:.1e}",
                    peer.get("note", ""),
                ]
            )
            css.append("lose" if spread["median"] < 1 else "")
    if not rows:
        return
    page.heading("Peers")
    page.paragraph(
        "Each in a process of its own, taking turns with ours on the same CPUs: our ms is what "
        "ours took in those rounds.",
        "soft",
    )
    columns = ("run", "peer", "peer ms", "our ms", "our speed-up", "quartiles", "its error", "note")
    page.table(columns, rows, css, sortable=True)


def _with_peers(results: Sequence[Result]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(what holds ``peers``, its label) of every network and operator row that has some."""
    for result in results:
        label = run_label(dict(result))
        for row in result["rows"] if "rows" in result else [result]:
            if row.get("peers"):
                case = "case" in row
                yield row, f"{row['case']}, {row['density_asked']:g}, {label}" if case else label


def layers(page: Page, r: Result) -> None:
    """Milliseconds per layer, dense and sparse; a part of the run's section."""
    losing = [row["name"] for row in r["layers"] if row["loses"]]
    page.paragraph(
        "Each layer measured alone against oneDNN's prepacked dense convolution. "
        f"{len(losing)} of {len(r['layers'])} are slower sparse than dense"
        + (f": {', '.join(losing)}." if losing else "."),
        "soft",
    )
    batch = r["input"][0]
    rows = []
    for row in r["layers"]:
        flops = 2 * row["nnz"] * row["h_out"] * row["w_out"] * batch
        rows.append(
            [
                row["name"],
                kind_of_layer(row["cin"], row["cout"], row["kernel"]),
                f"{row['cin']}->{row['cout']}",
                f"{row['h_out']}x{row['w_out']}",
                f"{row['density']:.3f}",
                agreeing(row["dense_ms"], row["sparse_ms"], {"median": row["speedup"]}).slow(3),
                f"{row['sparse_ms']:.3f}",
                f"{row['speedup']:.2f}x" if row["exact"] else NO_SPEED,
                f"{flops / row['sparse_ms'] / 1e6:.1f}",
            ]
        )
    columns = ("layer", "kind", "channels", "output", "density", "dense ms", "sparse ms")
    css = ["lose" if row["loses"] or not row["exact"] else "" for row in r["layers"]]
    page.table((*columns, "speed-up", "GFLOP/s on nonzeros"), rows, css, sortable=True)
    names = [row["name"] for row in r["layers"]]
    page.svg(
        bar_chart(
            names,
            [
                Series("dense (oneDNN)", "dense", [row["dense_ms"] for row in r["layers"]]),
                Series("sparse", "sparse", [row["sparse_ms"] for row in r["layers"]]),
            ],
            axis="milliseconds, layers alone",
            value_text=lambda value: f"{value:.2f}",
        )
    )


def _dense_ms(row: Mapping[str, Any], digits: int) -> str:
    """Dense milliseconds that agree with the row's speed-up, if it has one."""
    if row["speedup"] is None:
        return f"{row['dense_ms']:.{digits}f}"
    return agreeing(row["dense_ms"], row["ms"], row["speedup"]).slow(digits)


def ops(page: Page, r: Result) -> None:
    """All rows of an op run."""
    rows, css = [], []
    for row in r["rows"]:
        spread = row["speedup"]
        ratio = f"{spread['median']:.2f}x" if spread else NO_SPEED
        rows.append(
            [
                f"{row['op']} {row['backend']}",
                row["case"],
                row["kind"],
                str(row["batch"]),
                f"{row['density']:.3f}",
                _dense_ms(row, 3),
                f"{row['ms']:.3f}",
                ratio,
                f"{2 * row['macs']['effective'] / row['ms'] / 1e6:.1f}",
                f"{row['error']:.1e}",
            ]
        )
        css.append("lose" if spread is None or spread["median"] < 1 else "")
    columns = ("op", "shape", "kind", "batch", "density", "dense ms", "ms", "speed-up")
    marks: dict[str, list[bool]] = {}
    for row, mark in zip(r["rows"], css, strict=True):
        marks.setdefault(row["backend"], []).append(mark == "lose")
    losing = ", ".join(f"{sum(m)} of {len(m)} of {name}" for name, m in marks.items())
    with page.folded(f"Operators: {run_label(dict(r))} ({len(rows)} rows)"):
        page.paragraph(
            f"Slower than the fastest dense operator, or inexact, by backend: {losing}.", "soft"
        )
        page.table((*columns, "GFLOP/s on nonzeros", "error"), rows, css, sortable=True)
        if r["skipped"]:
            page.subheading("Rows of the dispatch table that were not timed here")
            skipped = [[one["backend"], one["reason"]] for one in r["skipped"]]
            page.table(("row", "reason"), skipped)


def model(page: Page, r: Result) -> None:
    """Whole towers: batch, size, threads."""
    page.heading(f"Whole model: {r['subject']['arch']}, {r['mask']['label']}")
    rows, css = [], []
    for row in r["rows"]:
        spread = row["speedup"]
        rows.append(
            [
                f"{row['part']} {row['height']}x{row['width']}",
                str(row["batch"]),
                str(row["threads"]),
                row["dense_kind"],
                _dense_ms(row, 1),
                f"{row['ms']:.1f}",
                f"{spread['median']:.2f}x" if spread else NO_SPEED,
                f"{1e3 * row['batch'] / row['ms']:.1f}",
                *(
                    f"{2 * row['macs'][key] / 1e9:.1f}"
                    for key in ("nominal", "effective", "executed")
                ),
            ]
        )
        css.append("lose" if spread is None or spread["median"] < 1 else "")
    columns = ("input", "batch", "threads", "fastest dense", "dense ms", "our ms", "speed-up")
    work = ("images/s", "nominal GFLOP", "effective GFLOP", "executed GFLOP")
    page.table((*columns, *work), rows, css, sortable=True)


def memory(
    page: Page, trunk: Sequence[Result], models: Sequence[Result], trainings: Sequence[Result]
) -> None:
    """Bytes: packed weights, peaks of a call, what training keeps."""
    found: list[tuple[str, float | None, float | None]] = []
    for r in trunk:
        packed = (r.get("report") or {}).get("packed_bytes")
        if packed:
            numel = r["report"]["plan"]["totals"]["numel"]
            found.append((f"packed weights, {run_label(dict(r))}", 4 * numel, packed))
    for r in models:
        for row in r["rows"]:
            what = f"peak of a call, {row['part']} {row['height']}x{row['width']}"
            what += f", batch {row['batch']}, {row['threads']} t"
            found.append((what, row["memory"]["dense_peak_bytes"], row["memory"]["peak_bytes"]))
    for r in trainings:
        for one in r["results"]:
            for row in one["rows"][1:]:
                base = _kept_by_baseline(row, one["rows"]) * 2**20
                what = f"kept for backward, {one['set']}, {row['variant']}, batch {r['batch']}"
                found.append((what, base, row["kept_mib"] * 2**20))
    if not found:
        return
    page.heading("Memory")
    page.paragraph(
        "Packed weights come on top of the dense ones, which stay for the state_dict. A peak is "
        "what one call needs beyond the weights. For training the baseline is frozen layers as "
        "detectron2 freezes them. Rows that need more are coloured.",
        "soft",
    )
    rows, css = [], []
    for what, base, mine in found:
        share = "" if not base or mine is None else f"{mine / base:.2f}"
        rows.append([what, _mb(base), _mb(mine), share])
        css.append("lose" if base is not None and mine is not None and mine > base else "")
    columns = ("what", "dense or baseline MB", "measured MB", "of baseline")
    page.table(columns, rows, css, sortable=True)


def alpha(page: Page, r: Result) -> None:
    """Alpha of a network, all sides."""
    page.heading(f"Alpha, {r['threads']} thread(s)")
    rows = []
    for name, side in r["sides"].items():
        over = "; ".join(
            f"{s['median']:.2f}x ({s['q1']:.2f} - {s['q3']:.2f}) of {own}"
            for own, s in side["slower_than"].items()
        )
        near = side.get("agreement", {})
        largest = f"{near['largest']:.1e}" if "largest" in near else ""
        rows.append([name, f"{side['ms']:.0f}", over, largest, near.get("freeze_set", "")])
    columns = ("side", "ms", "time (quartiles)", "largest relative difference", "freeze set")
    page.table(columns, rows, sortable=True)


def training(page: Page, r: Result) -> None:
    """Training steps with frozen layers."""
    page.heading(f"Training step, {r['size']} pixels, batch {r['batch']}")
    page.paragraph(
        "Forward and backward. Times are CPU time, ratios the median within a round; above 1 a "
        "variant is slower than its baseline, which trains the same parameters.",
        "soft",
    )
    rows, css = [], []
    for one in r["results"]:
        for row in one["rows"]:
            base = _kept_by_baseline(row, one["rows"])
            time, error = row["time_vs_baseline"], row.get("gradient_error")
            rows.append(
                [
                    one["set"],
                    row["variant"],
                    f"{row['kept_mib']:.1f}",
                    f"{row['kept_mib'] / base:.2f}" if base else "",
                    f"{row['cpu_ms']['median']:.0f}" if "cpu_ms" in row else "",
                    row.get("baseline", one["rows"][0]["variant"]),
                    f"{time['median']:.3f}",
                    f"{time['q1']:.3f} - {time['q3']:.3f}",
                    "" if error is None else f"{error:.1e}",
                ]
            )
            css.append("lose" if time["median"] > 1 else "")
    kept = ("frozen", "variant", "MiB kept for backward", "of baseline")
    times = ("CPU ms", "baseline", "time of baseline", "quartiles", "gradient error")
    page.table((*kept, *times), rows, css, sortable=True)


def _kept_by_baseline(row: Result, rows: Sequence[Result]) -> float:
    """MiB kept by the baseline of a training row: the one it names, else the first row."""
    return row.get("kept_baseline_mib", rows[0]["kept_mib"])


def comparison(page: Page, found: Comparison) -> None:
    """Before and after."""
    page.heading("Before and after")
    page.paragraph(
        "Ratios of dense time to our time, each within its own run; worst change first.", "soft"
    )
    shown = found.changes
    if len(shown) > CHANGES:
        most = sorted(shown, key=lambda change: -abs(change.slower))[:CHANGES]
        shown = tuple(change for change in shown if change in most)
        page.paragraph(
            f"The {CHANGES} of {len(found.changes)} cases that changed most; all of them: below.",
            "soft",
        )
    _changes(page, shown)
    for name in found.missing:
        page.paragraph(f"{name} was measured before only.", "soft")
    for name in found.added:
        page.paragraph(f"{name} was measured after only.", "soft")
    for note in found.notes:
        page.paragraph(note, "soft")

    if len(shown) < len(found.changes):
        with page.folded(f"Before and after: all {len(found.changes)} cases"):
            _changes(page, found.changes)


def _changes(page: Page, changes: Sequence[Change]) -> None:
    rows = [
        [
            change.name,
            f"{change.base.ratio:.3f}x",
            f"{change.new.ratio:.3f}x",
            f"{change.slower:+.1%}",
            "quartiles overlap" if change.overlap else "",
        ]
        for change in changes
    ]
    css = ["lose" if change.slower > 0 and not change.overlap else "" for change in changes]
    columns = ("case", "ratio before", "ratio after", "our time", "remark")
    page.table(columns, rows, css, sortable=True)


def _mb(count: float | None) -> str:
    return "not known" if count is None else f"{count / 1e6:.1f}"
