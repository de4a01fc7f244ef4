"""What a layer costs at a number of nonzeros, and so what one more zero in it is worth.

The curves are those of :func:`opentrans_kernels.audit.predicted_speedup`; the milliseconds of the
dense layer are nominal (a constant rate) or come from a measured plan, which also scales the curve
to the sparse time it measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from opentrans_kernels.audit import predicted_speedup
from opentrans_kernels.errors import PlanError
from opentrans_kernels.flops import nominal_macs
from opentrans_kernels.plan import NOMINAL_RATE, Plan
from opentrans_kernels.topology import conv_shapes, find_trunk

LEAST_WORTH = 0.01  # of the mean: a zero is never worth nothing, or its layer would stay dense


@dataclass(frozen=True)
class LayerCost:
    """One convolution: kernel size, weights, output pixels, dense milliseconds per image.

    scale: measured over predicted time of the sparse layer; 1.0 where nothing was measured.
    unskipped: speed of the fastest form that skips no zero over the dense one.
    """

    name: str
    kernel: int
    numel: int
    pixels: int
    dense_ms: float
    scale: float = 1.0
    unskipped: float = 1.0

    def ms(self, nnz: float) -> float:
        """Milliseconds with ``nnz`` nonzeros, in the fastest form."""
        sparse = self.dense_ms * self.scale / predicted_speedup(self.kernel, nnz / self.numel)
        return min(self.dense_ms / self.unskipped, sparse)

    def worth(self, nnz: int, goal: float) -> float:
        """Milliseconds that one zero saves on the way from ``nnz`` to ``goal`` nonzeros.

        The slope between the two, not the one at ``nnz``: a dense layer gains nothing from its
        first zeros, and would by that slope never get as far as being sparse.
        """
        goal = min(goal, nnz - 1)
        return (self.ms(nnz) - self.ms(goal)) / (nnz - goal)


def layer_costs(
    model: nn.Module,
    names: Iterable[str],
    input_size: tuple[int, int],
    plan: Plan | None = None,
) -> dict[str, LayerCost]:
    """The cost of each named convolution for images of ``input_size`` (height, width) in pixels.

    plan: measured on the machine the mask is for, of this model with any masks; None: nominal
    dense times. Raises PlanError if a name is not reached by the image or not in the plan.
    """
    names = list(names)
    shapes = conv_shapes(find_trunk(model), input_size)
    if missing := [name for name in names if name not in shapes]:
        raise PlanError(
            f"the output size of {missing[0]!r} is not known: an image of {input_size[0]}x"
            f"{input_size[1]} does not reach it. Leave it out of the scope, or use "
            "allocation='global' or 'uniform'."
        )
    measured = {} if plan is None else _measured(plan)
    if plan is not None and (missing := [name for name in names if name not in measured]):
        raise PlanError(
            f"the plan has no milliseconds for {missing[0]!r}. Pass a plan of this model made "
            "with make_plan(model, masks, measure=True)."
        )
    costs = {}
    for name in names:
        conv = model.get_submodule(name)
        weight, shape = conv.weight, shapes[name]
        nominal = nominal_macs(tuple(weight.shape), shape.h_out, shape.w_out)
        known = measured.get(name, (nominal / NOMINAL_RATE,))
        costs[name] = LayerCost(name, weight.shape[-1], weight.numel(), shape.pixels, *known)
    return costs


def _measured(plan: Plan) -> dict[str, tuple[float, float, float]]:
    """Convolution -> dense_ms, scale and unskipped of its :class:`LayerCost`.

    A plan times blocks: their milliseconds are shared out by multiply-adds.
    """
    rows = defaultdict(list)
    for row in plan.rows:
        rows[row.unit].append(row)
    found = {}
    for unit in plan.units:
        work = sum(row.nominal_macs for row in rows[unit.name])
        if unit.dense_ms is None or not work:
            continue
        shares = {row.name: row.nominal_macs / work for row in rows[unit.name]}
        scale = 1.0
        if unit.sparse_ms is not None:
            predicted = sum(
                unit.dense_ms * shares[row.name] / predicted_speedup(row.kernel, row.density)
                for row in rows[unit.name]
            )
            scale = unit.sparse_ms / predicted
        unskipped = max(1.0, unit.dense_ms / (unit.winograd_ms or unit.dense_ms))
        for name, share in shares.items():
            found[name] = (unit.dense_ms * share / plan.batch, scale, unskipped)
    return found
