"""The milliseconds that ``allocation="latency"`` weighs layers by, measured once per run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from opentrans_kernels.errors import CheckpointError, PlanError
from opentrans_kernels.masks import atomic_write
from opentrans_kernels.masks.limits import parse_json
from opentrans_kernels.plan import Plan, make_plan
from opentrans_kernels.synthetic import synthetic_masks

MASKS = "uniform:0.8"  # that layers are timed with; the cost model has the curve over density


def measured_plan(
    model: nn.Module,
    input_size: tuple[int, int],
    path: str | os.PathLike[str],
    measure: bool = True,
) -> Plan:
    """A plan of ``model`` in eval mode with four of five weights zero: each form of a layer timed.

    Kept in the file ``path`` and taken from it the next time: a continued run must weigh by the
    same milliseconds. measure: False: predicted ones. Raises CheckpointError for a file that is no
    plan.
    """
    file = Path(path)
    if file.exists():
        try:
            return Plan.from_dict(parse_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, PlanError) as error:
            raise CheckpointError(
                f"{file} is not the plan of a run ({error}). Copy it again from its source; a "
                "continued run must weigh by the same milliseconds."
            ) from error
    plan = make_plan(model, synthetic_masks(model, MASKS), input_size, measure=measure)
    atomic_write(file, json.dumps(plan.to_dict()).encode())
    return plan
