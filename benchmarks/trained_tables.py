"""The generated tables of docs/trained.md and the figures beside them, made from
``benchmarks/results/trained/*.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_tables import EMPTY, table

from opentrans_kernels.bench.schema import read_json
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.report.alpha_plots import standalone
from opentrans_kernels.report.plots import Axis, Curve, plot

Result = Mapping[str, Any]
FOLDER = "trained"
PAGE = "trained.md"
#: Network -> (title, measures: key, heading, digits); the first one is drawn.
NETWORKS = {
    "hed": ("edge detector", (("f_score", "F-score", 3), ("mae", "mean abs. error", 3))),
    "resnet50-half": (
        "half-width ResNet-50",
        (("cosine", "cosine of features", 3), ("logit_error", "logit error", 3),
         ("top1", "same class", 3)),
    ),
}  # fmt: skip
SETS = {
    "none": "nothing",
    "below": "alpha below the median (the rule)",
    "above": "alpha above the median (alpha*)",
    "random": "random half",
    "prefix": "first half",
    "affine": "everything but scales and shifts of norms",
    "classifier": "everything but the classifier",
}
BARE = ("untrained/", "fitted/", "selected/")  # cells without a training step
#: Of those, what was done to the weights that were left -> its name in tables and figures.
REPAIRED = {"fitted/": "refitted", "selected/": "selected and refitted"}
WAYS = ("global", "uniform", "macs", "latency", "random")


def load(folder: Path) -> dict[str, Result]:
    """File stem -> result. Raises OpenTransError for a file of another form."""
    found = {}
    names = {f"{network}{kind}" for network in NETWORKS for kind in ("", "-freezing")}
    for path in sorted((folder / FOLDER).glob("*.json")):
        if path.stem not in {*names, "alpha"}:
            continue  # another script's, with a table of its own
        result = read_json(path)
        if not isinstance(result, Mapping) or "schema" not in result:
            raise OpenTransError(f"{path.name} is no result of the study. Move it elsewhere.")
        found[path.stem] = result
    return found


def tables(folder: Path) -> dict[str, dict[str, str]]:
    """Page name -> table name -> Markdown."""
    results = load(folder)
    made = {}
    for name in NETWORKS:
        made[f"untrained-{name}"] = untrained_table(name, results.get(name))
        made[f"trained-{name}"] = trained_table(name, results.get(name))
        if freezing := results.get(f"{name}-freezing"):
            made[f"freezing-{name}"] = freezing_table(name, freezing)
    made["alpha"] = alpha_table(results.get("alpha"))
    return {PAGE: made}


def figures(folder: Path) -> dict[Path, str]:
    """SVG files: agreement against density, and against measured milliseconds."""
    found = {}
    for name, result in load(folder).items():
        if name not in NETWORKS:
            continue
        if svg := sparsity_figure(name, result):
            found[folder / FOLDER / f"{name}-sparsity.svg"] = svg
        if svg := frontier_figure(name, result):
            found[folder / FOLDER / f"{name}-frontier.svg"] = svg
    return found


def _values(name: str, cell: Result) -> list[str]:
    return [f"{cell['agreement']['mean'][key]:.{n}f}" for key, _, n in NETWORKS[name][1]]


def _heads(name: str) -> list[str]:
    return [title for _, title, _ in NETWORKS[name][1]]


def untrained_table(name: str, result: Result | None) -> str:
    """Pruned at once, not trained at all."""
    cells = _cells(result, "untrained/")
    if not cells:
        return EMPTY
    rows = []
    key, title, digits = NETWORKS[name][1][0]
    again = any("recalibrated" in found for found in cells.values())
    repaired = [kind for kind in REPAIRED if _cells(result, kind)]
    for cell, found in cells.items():
        _, way, density = cell.split("/")
        row = [way, f"{1 - float(density):.0%}", f"{found['macs_left']:.3f}", *_values(name, found)]
        if again:
            row.append(f"{found['recalibrated']['mean'][key]:.{digits}f}")
        for kind in repaired:
            other = _cells(result, kind).get(cell.replace("untrained/", kind))
            row += _repaired(other, key, digits)
        rows.append(row)
    head = ["allocation", "zeros", "multiply-adds left", *_heads(name)]
    if again:
        head.append(f"{title}, statistics measured again")
    for kind in repaired:
        head += [f"{title}, {REPAIRED[kind]}", "seconds"]
    return table(head, rows)


def _repaired(cell: Result | None, key: str, digits: int) -> tuple[str, str]:
    """Agreement after the least squares fit, and its CPU seconds."""
    if cell is None:
        return "-", "-"
    best = cell.get("recalibrated", cell["agreement"])
    return f"{best['mean'][key]:.{digits}f}", f"{cell['cpu_seconds']:.0f}"


def trained_table(name: str, result: Result | None) -> str:
    """Every way of pruning that was trained, by agreement, with milliseconds where measured."""
    cells = {k: v for k, v in _cells(result, "").items() if not k.startswith(BARE)}
    if not cells:
        return EMPTY
    first = NETWORKS[name][1][0][0]
    ordered = sorted(cells.items(), key=lambda item: -item[1]["agreement"]["mean"][first])
    rows = []
    for cell, found in ordered:
        recipe = found.get("recipe", found)
        rows.append(
            (
                cell,
                str(recipe["steps"]),
                f"{1 - found['density']:.0%}",
                f"{found['macs_left']:.3f}",
                *_values(name, found),
                *_latency(found),
                f"{found['cpu_seconds'] / 60:.1f}" if "cpu_seconds" in found else "-",
            )
        )
    head = [
        "way", "steps", "zeros", "multiply-adds left", *_heads(name), "dense ms, ours",
        "speed-up (quartiles)", "minutes of training",
    ]  # fmt: skip
    below = _measured(result), _step(result)
    return "\n\n".join([table(head, rows), *filter(None, below)])


def _latency(cell: Result) -> tuple[str, str]:
    if "latency" not in cell:
        return "-", "-"
    one = cell["latency"]
    ratio = one["speedup"]
    spread = f"({ratio['q1']:.2f}-{ratio['q3']:.2f})"
    return f"{one['dense_ms']:.0f}, {one['ours_ms']:.0f}", f"**{ratio['median']:.2f}x** {spread}"


def _measured(result: Result | None) -> str:
    """Under which circumstances the times were taken."""
    if result is None or "latency" not in result:
        return ""
    one = result["latency"]
    best = min(one["dense_ms"], key=one["dense_ms"].get)
    disturbed = ", disturbed machine" if one["machine"].get("disturbed") else ""
    height, width = one["input"]
    machine = one["environment"]["machine"]["cpu"]
    return (
        f"Times: {width}x{height}, one thread, CPU time, medians of {one['rounds']} interleaved "
        f"rounds, against {best} (fastest of {len(one['dense_ms'])} dense variants), on "
        f"{machine}{disturbed}."
    )


def _step(result: Result | None) -> str:
    """What the sparse kernels make of a training step."""
    if result is None or "training_step" not in result:
        return ""
    one = result["training_step"]
    low, high = min(one["ratios"]), max(one["ratios"])
    return (
        f"A training step of `{one['cell']}`: {one['plain_seconds']:.2f} s in plain PyTorch, "
        f"{one['sparse_seconds']:.2f} s on the sparse kernels, **{one['ratio']:.2f}x** "
        f"({low:.2f}-{high:.2f}; {one['counted']})."
    )


def freezing_table(name: str, result: Result) -> str:
    """Six freeze sets under equal steps and equal seconds, mean and standard error over seeds."""
    key, title, digits = NETWORKS[name][1][0]
    rows = []
    for budget, sets in result["summary"].items():
        for which, found in sets.items():
            value = found[key]
            rows.append(
                (
                    f"same {budget}",
                    SETS[which],
                    f"{found['frozen']['mean']:.0f}",
                    f"{value['mean']:.{digits + 1}f} ± {value['standard_error']:.{digits + 1}f}",
                    f"{found['steps']['mean']:.0f}",
                    f"{found['cpu_seconds']['mean']:.1f}",
                    f"{found['kept_bytes']['mean'] / 2**20:.1f}",
                )
            )
    head = "budget|frozen|layers|" + title + "|steps|CPU s|MiB kept for backward"
    seeds = next(iter(next(iter(result["summary"].values())).values()))[key]["seeds"]
    before = f"{result['before'][key]:.{digits + 1}f}"
    told = f"{seeds} seeds, mean ± standard error. Before fine-tuning: {before}."
    return table(head.split("|"), rows) + "\n\n" + told


def alpha_table(result: Result | None) -> str:
    """Median alpha of the dense weights, and what masks do to it and to the freeze set."""
    if result is None:
        return EMPTY
    rows = []
    for name, found in result["networks"].items():
        dense = found["stages"][0]["estimates"]
        for label, first in dense.items():
            moved = []
            for stage in found["stages"][1:]:
                if not stage["name"].startswith("global:"):
                    continue
                now = stage["estimates"][label]
                changed = now["moved"]
                count = len(set(now["frozen"]) ^ set(first["frozen"]))
                moved.append(f"{now['median']:.2f}, {count}" if changed else "-")
            counts = str(first["layers"]), str(first["remarks"])
            rows.append((name, label, *counts, f"{first['median']:.2f}", *moved))
    stages = [s["name"] for s in next(iter(result["networks"].values()))["stages"]]
    masks = [name for name in stages if name.startswith("global:")]
    head = ["network", "estimate", "layers", "with a remark", "dense: median", *masks]
    told = (
        "In the columns of masks: median alpha, and layers that enter or leave the freeze set "
        "of the dense weights."
    )
    return table(head, rows) + "\n\n" + told


def _cells(result: Result | None, prefix: str) -> dict[str, Result]:
    cells = (result or {}).get("cells", {})
    return {name: cell for name, cell in cells.items() if name.startswith(prefix)}


def sparsity_figure(name: str, result: Result) -> str | None:
    """Agreement against the share of zeros: untrained curves, trained points."""
    key, title, _ = NETWORKS[name][1][0]
    curves = []
    for way in WAYS:
        points = sorted(
            (1 - float(cell.split("/")[2]), found["agreement"]["mean"][key])
            for cell, found in _cells(result, f"untrained/{way}/").items()
        )
        if points:
            curves.append(Curve(f"{way}, untrained", points, f"c{len(curves)}"))
    for kind, way in itertools.product(REPAIRED, WAYS):
        points = sorted(
            (1 - found["density"], found.get("recalibrated", found["agreement"])["mean"][key])
            for found in _cells(result, f"{kind}{way}/").values()
        )
        if points:
            curves.append(Curve(f"{way}, {REPAIRED[kind]}", points, f"c{len(curves)}"))
    points, tips = [], []
    for cell, found in _cells(result, "").items():
        if not cell.startswith(BARE):
            points.append((1 - found["density"], found["agreement"]["mean"][key]))
            tips.append(cell)
    if points:
        curves.append(Curve("trained", points, f"c{len(curves)}", joined=False, tips=tips))
    if not curves:
        return None
    return standalone(plot(curves, Axis("share of zeros"), Axis(title)))


def frontier_figure(name: str, result: Result) -> str | None:
    """Agreement against measured milliseconds, of every cell that was timed."""
    key, title, _ = NETWORKS[name][1][0]
    kinds: dict[str, list[tuple[str, tuple[float, float]]]] = {}
    for cell, found in _cells(result, "").items():
        if "latency" in found:
            at = found["latency"]["ours_ms"], found["agreement"]["mean"][key]
            kinds.setdefault(cell.split("/")[0], []).append((cell, at))
    if not kinds:
        return None
    curves = [
        Curve(kind, [at for _, at in cells], f"c{i}", joined=False, tips=[c for c, _ in cells])
        for i, (kind, cells) in enumerate(kinds.items())
    ]
    dense = min(result["latency"]["dense_ms"].values())
    curves.append(Curve("dense", [(dense, 1.0)], f"c{len(curves)}", joined=False))
    return standalone(plot(curves, Axis("milliseconds, one thread"), Axis(title)))
