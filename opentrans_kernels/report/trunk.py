"""The report of one trunk measurement, a part of the page of ``opentrans demo``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..bench.derive import beside, timed_variants
from ..bench.part import title
from .page import Page
from .svg import Series, bar_chart


def trunk_title(result: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    return f"{title(result['subject'])}, {result['mask']['label']}"


def trunk_page(result: Mapping[str, Any]) -> str:
    """HTML of a result of :func:`opentrans_kernels.bench.trunk.run`.

    ``result`` may also hold ``audit`` and ``plan`` (texts) and ``banner`` (what is synthetic).
    """
    page = Page(trunk_title(result))
    add_trunk(page, result)
    return page.render()


def add_trunk(page: Page, result: Mapping[str, Any]) -> None:
    """The parts of :func:`trunk_page`, without a heading of their own."""
    subject = result["subject"]
    size = " x ".join(map(str, result["input"][2:]))
    page.paragraph(
        f"{subject['weights']}; {size} pixels, batch {result['input'][0]}, "
        f"{result['threads']} thread(s), {result['machine']['cpu']}, instruction set "
        f"{result['isa']}.",
        "soft",
    )
    if result.get("banner"):
        page.paragraph(result["banner"], "banner")
    best = result["baseline"]["name"]
    page.facts(
        {
            f"speed-up over {best}": f"{result['speedup']:.2f}x",
            "ms accelerated": f"{result['accelerated']['ms']:.1f}",
            "ms best dense PyTorch": f"{result['baseline']['ms']:.1f}",
            "multiply-adds left": f"{result['mask']['flop_density']:.1%}",
        }
    )
    _exactness(page, result)
    _variants(page, result)
    if result["layers"]:
        _layers(page, result["layers"])
    for name in ("audit", "plan"):
        if result.get(name):
            page.heading(name.capitalize())
            page.preformatted(result[name], f"Show the {name} of every layer")
    page.heading("Environment")
    keys = ("machine", "versions", "build", "limits", "pinned_cpus", "onednn_isa", "source")
    environment = {key: result.get(key) for key in keys}
    page.preformatted(json.dumps(environment, indent=2, default=str), "Show machine and versions")


def _exactness(page: Page, result: Mapping[str, Any]) -> None:
    page.heading("Exactness")
    verdict = "within" if result["exact"] else "OUTSIDE"
    page.paragraph(
        f"Largest error against the masked network in float64, relative to its largest output: "
        f"{result['max_rel_err']:.2e}. Dense float32 PyTorch's own error on the same image: "
        f"{result['dense_own_rel_err']:.2e}. The accelerated network is {verdict} the limit of "
        "twice that."
    )


def _variants(page: Page, result: Mapping[str, Any]) -> None:
    timed = timed_variants(result)
    page.heading("Every way to run it")
    page.paragraph(
        f"Wall time of {result['rounds']} interleaved rounds, with its quartiles. The speed-up is "
        "the median of the ratios within a round, and a variant's time and ours beside it are "
        f"those of that round; the baseline is the fastest of the {len(timed)} dense "
        f"variants that were timed: {', '.join(timed)}.",
        "soft",
    )
    entries = [("accelerated", result["accelerated"])]
    entries += [(name, one) for name, one in result["variants"].items() if one["available"]]
    labels = [name for name, _ in entries]
    times = [entry["ms"] for _, entry in entries]
    css = ["sparse" if name == "accelerated" else "" for name in labels]
    page.svg(
        bar_chart(
            labels,
            [Series("wall", "dense", times)],
            axis="milliseconds per batch (lower is better)",
            value_text=lambda value: f"{value:.1f} ms",
            row_css=css,
        )
    )
    rows = []
    for name, entry in entries:
        wall, ratio = entry["wall"], entry.get("speedup_of_accelerated")
        times = [f"{wall['median']:.2f}", "", ""]
        if ratio:
            shown = beside(entry, result["accelerated"], ratio)
            times = [shown.slow(2), f"{shown.fast_ms:.2f}", f"{ratio['median']:.2f}x"]
        quartiles = f"{wall['q1']:.2f} - {wall['q3']:.2f}"
        rows.append([name, times[0], quartiles, f"{entry['cpu_ms']:.2f}", *times[1:]])
    columns = ("variant", "wall ms", "quartiles", "CPU ms", "accelerated ms beside it")
    page.table((*columns, "speed-up of accelerated"), rows)
    for name, entry in result["variants"].items():
        if not entry["available"]:
            page.paragraph(f"{name} could not be run: {entry['error']}", "soft")


def _layers(page: Page, layers: list[Mapping[str, Any]]) -> None:
    names = [row["name"] for row in layers]
    page.heading("Density per layer")
    page.svg(
        bar_chart(
            names,
            [Series("density", "sparse", [row["density"] for row in layers])],
            axis="share of weights that are not zero",
            value_text=lambda value: f"{value:.3f}",
        )
    )
    page.heading("Milliseconds per layer, dense and sparse")
    page.paragraph(
        "Each layer measured alone against oneDNN's prepacked dense convolution; in the network, "
        "layers are fused and compacted, so these do not add up to the total.",
        "soft",
    )
    page.svg(
        bar_chart(
            names,
            [
                Series("dense (oneDNN)", "dense", [row["dense_ms"] for row in layers]),
                Series("sparse", "sparse", [row["sparse_ms"] for row in layers]),
            ],
            axis="milliseconds",
            value_text=lambda value: f"{value:.2f}",
        )
    )
    page.heading("Speed-up per layer")
    losing = [row for row in layers if row["loses"]]
    page.paragraph(
        f"{len(losing)} of {len(layers)} layers are slower sparse than dense when measured alone"
        + (f": {', '.join(row['name'] for row in losing)}." if losing else "."),
    )
    page.svg(
        bar_chart(
            names,
            [Series("speed-up", "sparse", [row["speedup"] for row in layers])],
            axis="dense time / sparse time (dashed line: equal)",
            value_text=lambda value: f"{value:.2f}x",
            reference=1.0,
            row_css=["lose" if row["loses"] else "" for row in layers],
        )
    )
