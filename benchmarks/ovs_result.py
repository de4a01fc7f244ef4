"""What the parts of ``bench_ovs.py`` share: errors, summary, and the form of a result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from opentrans_kernels.bench.schema import (
    COUNT,
    ENVELOPE,
    FLAG,
    NUMBER,
    POSITIVE,
    SHARE,
    SPREAD,
    TEXT,
    Each,
    Maybe,
    problems,
)
from opentrans_kernels.bench.timing import TimingTable
from opentrans_kernels.bench.variants import relative_error
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.plan.subject import accelerated_parts

KIND = "ovs"
OURS = "accelerated"
COMPILED = "compiled"  # the dense variant of torch.compile
LARGEST_ERROR = 1e-4  # of the largest value: a dense variant that is further off is no baseline
FLOOR = 1e-6  # of the largest value: an error below it is never a fault
NOT_FINITE = 1e9  # the error of an output with NaN or infinity: max() may drop a NaN

TIMES = Each({"cpu": SPREAD, "wall": SPREAD})
WHOLE_MODEL = {
    "exact": FLAG,
    "errors": Each({"ours": NUMBER, "dense": NUMBER, "limit": NUMBER}),
    "accelerated_layers": COUNT,
    "baseline": {"whole": TEXT, "backbone": TEXT},
    "unavailable": Each(TEXT),
    "speedup": Maybe(SPREAD),
    "backbone_speedup": Maybe(SPREAD),
    "backbone_share_dense": SHARE,
    "amdahl_bound": POSITIVE,
    "amdahl_predicted": Maybe(POSITIVE),
    "timings": TIMES,
}
FORM = {
    **ENVELOPE,
    "command": [TEXT],
    "failed_checks": [TEXT],
    "weights": TEXT,
    "mask": {"label": TEXT, "synthetic": FLAG},
    "rounds": COUNT,
    "compile": FLAG,
    "parts": {
        "inference": Maybe({**WHOLE_MODEL, "size": COUNT, "classes": COUNT}),
        "text": Maybe(
            {"prompts": COUNT, "size": COUNT, "speedup": SPREAD, "timings": Each({"cpu": SPREAD})}
        ),
        "fc-clip": Maybe(
            {
                **WHOLE_MODEL,
                "size": COUNT,
                "prompts": COUNT,
                "deformable_attention": TEXT,
            }
        ),
    },
}


def check_form(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result, if it has the form. Raises OpenTransError with the first three faults."""
    found = list(problems(result, FORM))
    if (kind := result.get("schema", {}).get("kind")) != KIND:
        found.append(f"schema.kind is {kind!r}, expected {KIND!r}")
    if found:
        raise OpenTransError(
            f"this is no valid result of bench_ovs.py: {'; '.join(found[:3])}. Measure it again "
            "with: python benchmarks/bench_ovs.py --json FILE"
        )
    return result


def relative_errors(
    outputs: Mapping[str, torch.Tensor], reference: torch.Tensor
) -> dict[str, float]:
    """Per variant: largest difference from ``reference`` over its largest value."""
    errors = {name: relative_error(value, reference) for name, value in outputs.items()}
    return {name: e if math.isfinite(e) else NOT_FINITE for name, e in errors.items()}


def error_row(errors: Mapping[str, float], limit: float | None = None) -> dict[str, float]:
    """Ours and dense, the worst variant of each, and what ours may be: by default twice dense."""
    ours = max(error for name, error in errors.items() if name.startswith(OURS))
    dense = max(error for name, error in errors.items() if not name.startswith(OURS))
    return {
        "ours": ours,
        "dense": dense,
        "limit": max(FLOOR, 2 * dense) if limit is None else limit,
    }


def is_exact(rows: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether ours keeps its limit everywhere."""
    return all(row["ours"] <= row["limit"] for row in rows.values())


def layers_of(tower: nn.Module) -> int:
    """How many parts of the tower run on our kernels. Raises OpenTransError if none does."""
    count = len(accelerated_parts(tower))
    if not count:
        raise OpenTransError(
            "no layer of the tower was accelerated, so both sides would be the same network. Use a "
            "mask that removes more, such as global:0.90."
        )
    return count


def compiled(module: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """``torch.compile`` with the weights as constants; compiled here, on the examples."""
    import torch._inductor.config as inductor

    # A CUDA build of torch warns that no GPU is visible, which is no news to a CPU benchmark.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with inductor.patch(freezing=True), torch.no_grad():
        call = torch.compile(module)
        call(*examples)
        call(*examples)
    return call


def summary(table: TimingTable, *, exact: bool) -> dict[str, Any]:
    """Baselines, speed-ups, the backbone's share of the dense model and Amdahl's bound.

    Timings are named ``whole: VARIANT`` and ``backbone: VARIANT``; those whose variant starts with
    ``OURS`` are accelerated. Speed-ups are None unless ``exact``.
    """

    def names(part: str, ours: bool) -> Iterator[str]:
        return (
            name
            for name in table.timings
            if name.startswith(f"{part}: ") and name.startswith(f"{part}: {OURS}") == ours
        )

    best = {
        part: table.fastest(list(names(part, False)), "cpu")
        for part in ("whole", "backbone", "head")
        if list(names(part, False))
    }
    ours = table.fastest(list(names("whole", True)), "cpu")
    own_backbone = f"backbone: {OURS}"
    whole = table.ratio(best["whole"], ours, "cpu")
    backbone = table.ratio(best["backbone"], own_backbone, "cpu")
    share = min(1.0, table[best["backbone"]].cpu.median / table[best["whole"]].cpu.median)
    left = table[own_backbone].cpu.median / table[ours].cpu.median
    predicted = 1 / (1 - share + share / backbone.median)
    return {
        "exact": exact,
        "baseline": best,
        "accelerated": ours,
        "speedup": whole.to_dict() if exact else None,
        "backbone_speedup": backbone.to_dict() if exact else None,
        "backbone_share_dense": share,
        "head_share_accelerated": max(0.0, 1 - left),
        "amdahl_bound": 1 / (1 - share) if share < 1 else 1e9,
        "amdahl_predicted": predicted if exact else None,
        "timings": table.to_dict(),
    }
