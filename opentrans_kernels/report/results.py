"""One page from result files of one machine: ``opentrans report RESULTS... -o report.html``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.compare import Comparison, one_machine, run_label
from . import result_plots, result_tables
from .page import Page

_HEADLINES = 4
Results = Mapping[str, Mapping[str, Any]]


def results_page(results: Results, comparison: Comparison | None = None) -> str:
    """HTML that stands alone.

    Args:
        results: file name -> checked result, all from one machine.
        comparison: changes since an earlier result, shown first.

    Raises:
        OpenTransError: results from different machines.
    """
    machine = one_machine({name: dict(result) for name, result in results.items()})
    page = Page(f"Benchmarks on {machine}")
    _head(page, results)
    page.contents()
    if comparison is not None:
        result_tables.comparison(page, comparison)
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for result in results.values():
        by_kind.setdefault(result["schema"]["kind"], []).append(result)
    trunks = sorted(by_kind.get("trunk", ()), key=_order)
    if trunks:
        result_tables.trunks(page, trunks)
        result_tables.work(page, trunks)
    result_tables.peers(page, [*trunks, *by_kind.get("op", ())])
    measured = [trunk for trunk in trunks if trunk["layers"]]
    for trunk in measured:
        with page.folded(f"Layers: {run_label(dict(trunk))}", opened=trunk is measured[0]):
            result_plots.roofline_of(page, trunk)
            page.subheading("Milliseconds per layer")
            result_tables.layers(page, trunk)
    for op in by_kind.get("op", ()):
        result_plots.crossover(page, op)
        result_plots.cost(page, op)
        result_tables.ops(page, op)
    models = by_kind.get("model", ())
    for model in models:
        result_tables.model(page, model)
        result_plots.scaling(page, model)
    if trunks:
        result_plots.trunk_scaling(page, trunks)
    result_tables.memory(page, trunks, models, by_kind.get("training", ()))
    for alpha in by_kind.get("alpha", ()):
        result_tables.alpha(page, alpha)
    for training in by_kind.get("training", ()):
        result_tables.training(page, training)
    _environment(page, results)
    return page.render()


def _order(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result["threads"], result["input"], run_label(dict(result))


def _head(page: Page, results: Results) -> None:
    first = next(iter(results.values()))
    trunks = [r for r in results.values() if r["schema"]["kind"] == "trunk" and r["exact"]]
    machine = first["machine"]
    page.paragraph(
        f"{len(results)} result files. CPU {machine['cpu']}, {machine['cpus']} CPUs, torch "
        f"{_all(results, lambda r: r['versions']['torch'])}, commit "
        f"{_all(results, lambda r: str((r.get('source') or {}).get('commit'))[:12])}.",
        "soft",
    )
    if any(_is_synthetic(r) for r in results.values()):
        page.paragraph(
            "SYNTHETIC weights or masks: speed and exactness are real measurements, the network's "
            "predictions mean nothing.",
            "banner",
        )
    for name, result in results.items():
        short = Path(name).name
        if result["canary"]["disturbed"]:
            reasons = "; ".join(result["canary"]["reasons"])
            page.paragraph(f"{short} was taken on a DISTURBED machine: {reasons}.", "banner")
        if not result["complete"]:
            page.paragraph(f"{short} was interrupted; it holds what was finished.", "banner")
        if (result.get("source") or {}).get("dirty"):
            page.paragraph(f"{short} was measured with uncommitted changes.", "soft")
        for line in result.get("failed_checks", ()):
            page.paragraph(f"{short} FAILED a check: {line}", "banner")
    if trunks:
        page.facts(_headline(trunks))


def _headline(trunks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Speed-ups of the first runs, over the fastest dense PyTorch of each."""
    shown = sorted(trunks, key=_order)[:_HEADLINES]
    return {f"{run_label(dict(r))}, trunk": f"{r['speedup']:.2f}x" for r in shown}


def _is_synthetic(result: Mapping[str, Any]) -> bool:
    """True if weights or mask were made up; trunk and model describe their subject, others say."""
    subject = result.get("subject")
    if isinstance(subject, Mapping):
        return bool(subject.get("synthetic"))
    return bool(result.get("synthetic_weights")) or result.get("weights") == "synthetic"


def _all(results: Results, pick: Any) -> str:
    return ", ".join(sorted({str(pick(result)) for result in results.values()}))


def _environment(page: Page, results: Results) -> None:
    page.heading("Environment")
    keys: Sequence[str] = (
        "machine", "versions", "build", "limits", "threads", "isa", "pinned_cpus", "onednn_isa",
        "source", "canary", "command",
    )  # fmt: skip
    for name, result in results.items():
        block = {key: result[key] for key in keys if key in result}
        text = json.dumps(block, indent=2, default=str)
        page.preformatted(text, f"{Path(name).name}: machine, versions, canary, command")
