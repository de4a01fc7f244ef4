"""The page of ``opentrans demo``: a trained network's answers and times, then a trunk in detail."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .page import Page, Picture
from .plots import Axis, Curve, colour, plot
from .trunk import add_trunk, trunk_title


def demo_page(result: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> str:
    """HTML of a trunk's result, as ``trunk_page`` takes it, below its entry ``trained``.

    ``trained`` holds what ``opentrans.cli.demo_trained`` measured, or ``skipped``: why there is
    nothing. pictures: of the former.
    """
    page = Page("opentrans demo")
    trained = result["trained"]
    page.heading("A trained network: the edges of a photograph")
    if trained.get("skipped"):
        page.paragraph(f"Left out: {trained['skipped']}", "soft")
    else:
        _trained(page, trained, pictures)
    page.heading(trunk_title(result))
    add_trunk(page, result)
    return page.render()


def _trained(page: Page, found: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    timing, agreement = found["timing"], found["agreement"]
    page.paragraph(
        f"{found['about']}. {found['zeros']:.1%} of its {found['weights']:,} convolution weights "
        f"are zero; the file is {found['file_bytes'] / 1e6:.1f} MB. {found['dense_answer']}.",
        "soft",
    )
    page.facts(
        {
            f"speed-up over {found['dense_kind']}": f"{timing['speedup']:.2f}x",
            "ms accelerated": f"{timing['after_ms']:.0f}",
            "ms best dense PyTorch": f"{timing['before_ms']:.0f}",
            "F-score (dense: 1)": f"{agreement['f_score']:.3f}",
            "mean difference (dense: 0)": f"{agreement['mae']:.3f}",
        }
    )
    page.pictures(pictures)
    page.paragraph(
        f"Times on this machine, {found['threads']} thread(s), {found['isa']}: {timing['rule']}, "
        f"both sides in turns, quartiles of the ratio {timing['q1']:.2f} - {timing['q3']:.2f}. "
        "Both sides run the same masked network; PyTorch multiplies by the zeros, so the dense "
        f"one takes as long there. They differ by {found['difference']:.1e} of the largest value. "
        "The F-score takes pixels where the dense answer exceeds 0.5 as edges, and the best "
        "threshold for the other; the difference is the mean of absolute ones.",
        "soft",
    )
    for line in found["notes"]:
        page.paragraph(line, "soft")
    if found["origin"]:
        page.paragraph(f"From the file: {'; '.join(found['origin'])}", "soft")
    for name, error in found["unavailable"].items():
        page.paragraph(f"{name} could not be run: {error}", "soft")
    page.preformatted(found["plan"], "Show what was done with each layer")
    if found.get("frontier"):
        _frontier(page, found["frontier"])


def _frontier(page: Page, runs: Sequence[Mapping[str, Any]]) -> None:
    """Agreement over work left: a curve per way of pruning, single runs as points by their kind."""
    several = {way for way, count in Counter(run["way"] for run in runs).items() if count > 1}
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        way = run["way"]
        groups[way if way in several else f"{way.partition('/')[0]}, single runs"].append(run)
    page.subheading("What other ways and amounts of pruning keep")
    page.paragraph(
        "Mean F-score over photographs that nothing was trained on, against the dense answer, by "
        "the share of multiply-adds left. Up and to the left is better. From "
        "benchmarks/results/trained; point at a dot for its run.",
        "soft",
    )
    curves = []
    for index, (label, members) in enumerate(sorted(groups.items())):
        ordered = sorted(members, key=lambda run: (run["macs_left"], run["f_score"]))
        points = [(run["macs_left"], run["f_score"]) for run in ordered]
        tips = [
            f"{r['run']}: {r['macs_left']:.1%} left, F-score {r['f_score']:.3f}" for r in ordered
        ]
        joined = label in several
        curves.append(Curve(label, points, colour(index), joined=joined, tips=tips))
    page.svg(plot(curves, Axis("share of multiply-adds left"), Axis("F-score"), height=320))
    ranked = sorted(runs, key=lambda run: -run["f_score"])
    rows = [[r["run"], f"{r['macs_left']:.1%}", f"{r['f_score']:.3f}"] for r in ranked]
    with page.folded("Every run of that study"):
        page.table(("run", "multiply-adds left", "F-score"), rows)
