"""The demo's first part: a trained, pruned network on a photograph, beside the dense one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from opentrans_kernels.accelerate import Report
    from opentrans_kernels.bench.variants import Variant
    from opentrans_kernels.report import Picture

    from .render import Output

ABOUT = (
    "HED, a VGG-16 that marks edges, pruned and trained again to give the dense network's answers"
)
#: Cheap to build and, of those that run this network, among the fastest.
VARIANTS = ("eager_channels_last", "compile_folded_channels_last")
NEEDED = {"PIL": "the pictures of the demo need Pillow", "skimage": "the demo's photograph is one"}
_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "trained"


def trained_part(
    out: Output, threads: int, variants: tuple[str, ...] | None
) -> tuple[dict[str, Any], list[Picture]]:
    """What the page shows of the trained network, and its three pictures.

    variants: dense ways to run it, by name; None: ``VARIANTS``. Where a file or package is missing,
    that is said, and the result is ``{"skipped": why}``.
    """
    from opentrans_kernels.errors import OpenTransError

    from .progress import steps

    try:
        with steps(out, "demo") as step:
            found, pictures = _measure(out, threads, variants or VARIANTS, step)
    except OpenTransError as error:
        out.warn(f"the trained network is left out: {error}")
        return {"skipped": str(error)}, []
    timing, agreement = found["timing"], found["agreement"]
    out.text(
        f"{found['dense_kind']} {timing['before_ms']:.0f} ms, accelerated "
        f"{timing['after_ms']:.0f} ms: {timing['speedup']:.2f}x ({timing['rule']})"
    )
    out.text(
        f"{found['zeros']:.1%} zeros; against the dense network's answer: F-score "
        f"{agreement['f_score']:.3f}, mean absolute difference {agreement['mae']:.3f}"
    )
    for line in found["notes"]:
        out.note(line)
    return found, pictures


def _measure(
    out: Output, threads: int, variants: tuple[str, ...], step: Callable[[str], None]
) -> tuple[dict[str, Any], list[Picture]]:
    """Raises OpenTransError where something is missing."""
    import torch

    from opentrans.trained.agreement import f_score, mean_absolute_error
    from opentrans.trained.edges import edge_input, edge_map, photograph, png
    from opentrans.trained.shipped import shipped
    from opentrans_kernels.bench.variants import relative_error
    from opentrans_kernels.lazy import require_packages
    from opentrans_kernels.report import Picture
    from opentrans_kernels.timing.rounds import measure_pair

    require_packages(NEEDED)
    torch.set_num_threads(threads)
    path = shipped("hed-090")
    photo = photograph()
    reference, answer = _dense_answer(out, photo)
    step("a trained network: planning on this machine")
    model, report, origin = _network(path)
    x = edge_input(photo)
    step("a trained network: dense variants")
    best, unavailable = _fastest_dense(model, x, variants)
    assert best.run is not None
    with torch.no_grad():
        difference = relative_error(model(x), best.run())
    step("a trained network: dense and accelerated in turns")
    pair = measure_pair(best.run, lambda: model(x))
    pruned = edge_map(model, photo)
    size = photo.shape[2], photo.shape[1]
    totals = report.plan.totals
    pictures = [
        Picture(png(photo), size, "The photograph", f"{size[0]}x{size[1]} pixels"),
        Picture(
            png(reference), size, f"Dense: {pair.before_ms:.0f} ms",
            f"every weight; time of the fastest dense PyTorch here, {best.name}",
        ),
        Picture(
            png(pruned), size, f"Pruned, accelerated: {pair.after_ms:.0f} ms",
            f"{totals['density']:.0%} of the weights; {pair.speedup:.2f}x",
        ),
    ]  # fmt: skip
    return {
        "about": ABOUT,
        "zeros": 1 - totals["density"],
        "weights": totals["numel"],
        "file_bytes": path.stat().st_size,
        "dense_answer": answer,
        "dense_kind": best.name,
        "unavailable": unavailable,
        "timing": pair.to_dict(),
        "difference": difference,
        "agreement": {
            "f_score": f_score(pruned, reference),
            "mae": mean_absolute_error(pruned, reference),
        },
        "threads": threads,
        "isa": report.plan.isa,
        "plan": str(report),
        "notes": pair.notes(),
        "origin": origin,
        "frontier": _frontier(out),
    }, pictures


def _network(path: Path) -> tuple[nn.Module, Report, list[str]]:
    """The accelerated network, its report, and where it comes from."""
    from opentrans_kernels.checkpoint import load_accelerated, provenance_of

    own = ("created", "model", "torch")
    origin = [f"{key}: {text}" for key, text in provenance_of(path).items() if key not in own]
    return (*load_accelerated(path), origin)


def _dense_answer(out: Output, photo: torch.Tensor) -> tuple[torch.Tensor, str]:
    """The dense network's map, and where it comes from: computed here if its weights are."""
    from opentrans.trained.edges import cached_hed, edge_map, read_map
    from opentrans.trained.shipped import shipped
    from opentrans_kernels.errors import OpenTransError

    try:
        dense = cached_hed()
    except OpenTransError as error:
        out.warn(f"the dense network is not used: {error}")
        dense = None
    if dense is not None:
        return edge_map(dense, photo), "The dense answer was computed here, by the fetched weights"
    size = photo.shape[1], photo.shape[2]
    return read_map(shipped("coffee-dense"), size), (
        "The dense answer comes with the package, in steps of 1/255; 'opentrans trained fetch hed' "
        "fetches the dense weights, which then compute it here"
    )


def _fastest_dense(
    model: nn.Module, x: torch.Tensor, names: tuple[str, ...]
) -> tuple[Variant, dict[str, str | None]]:
    """The fastest dense way to run the masked network, and why others could not be built."""
    import time

    from opentrans_kernels.accelerate import restore
    from opentrans_kernels.bench.variants import WholeModule, build_variants
    from opentrans_kernels.errors import OpenTransError

    dense = copy.deepcopy(model)
    restore(dense)
    built = build_variants(WholeModule(dense), x, names)
    seconds: dict[str, float] = {}
    for one in built:
        if one.run is not None:
            start = time.perf_counter()
            one.run()
            seconds[one.name] = time.perf_counter() - start
    unavailable = {one.name: one.error for one in built if one.run is None}
    if not seconds:
        raise OpenTransError(f"no dense variant of the trained network runs here: {unavailable}.")
    best = min(seconds, key=lambda name: seconds[name])
    return next(one for one in built if one.name == best), unavailable


def _frontier(out: Output) -> list[dict[str, Any]]:
    from opentrans_kernels.errors import CheckpointError

    try:
        return frontier(_RESULTS / "hed.json")
    except CheckpointError as error:
        out.warn(f"the figure of the study is left out: {error}")
        return []


def frontier(path: Path) -> list[dict[str, Any]]:
    """Agreement of the study's runs: "run", "way", "macs_left", "f_score" each; none without its
    file.

    Raises CheckpointError if the file holds something else.
    """
    from opentrans_kernels.errors import CheckpointError

    if not path.is_file():  # installed without the source tree
        return []
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = {
            name: (float(cell["macs_left"]), float(cell["agreement"]["mean"]["f_score"]))
            for name, cell in cells.items()
            if "agreement" in cell
        }
        if not all(math.isfinite(number) for pair in found.values() for number in pair):
            raise ValueError("a number is not finite")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no result of the study of pruned networks ({type(error).__name__}: "
            f"{error}). Restore it from the repository, or remove it."
        ) from error
    return [
        {"run": name, "way": _way(name), "macs_left": left, "f_score": score}
        for name, (left, score) in found.items()
    ]


def _way(cell: str) -> str:
    """ "imp/global" of "imp/global/0.2": runs that differ in their density make a curve."""
    head, _, last = cell.rpartition("/")
    return head if head and last.replace(".", "", 1).isdigit() else cell
