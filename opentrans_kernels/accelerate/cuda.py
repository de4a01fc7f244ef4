"""``accelerate(..., device="cuda")``: plan the trunk for a GPU, check it, swap it in.

The model's trunk is replaced as a whole, so that it can be one CUDA graph; head and everything else
stay. The model may lie on the CPU or on the device; its weights are read, never written.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import settings
from ..errors import KernelUnavailable, UnsupportedModelError
from ..freshness import Freshness, freshness_of
from ..gpu import (
    GraphCache,
    Place,
    Precision,
    Program,
    TrunkPlan,
    TuneCache,
    default_folder,
    dense_program,
    plan_trunk,
    program_of,
)
from ..gpu.clock import CudaTimer, Timer
from ..gpu.graphs import CudaCapturer
from ..gpu.modules import Passed, PlannedStage, PlannedStem, TrunkRunner
from ..gpu.precision import float32_products
from ..gpu.tune import FLOORS
from ..masks import make_permanent
from ..masks.names import conv_modules
from ..nn import Replacement
from ..plan.models import accelerated_parts, require_module
from ..plan.subject import Masks, PlanSubject, prepare
from ..topology import find_trunk, forward_trunk
from ..topology.behaviour import added_behaviour
from ..watch import Watch
from .compare import Swap

__all__ = ["CudaReport", "accelerate_cuda"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CudaReport:
    """What ``accelerate(..., device="cuda")`` did. ``print(report)`` shows it.

    dense_ms: the trunk at full width on the best of PyTorch's own kernels, planned_ms: as planned;
    both in a CUDA graph. chosen: "planned", or "dense" where that was not slower or alone exact.
    max_rel_err: against the float64 masked network, relative to its largest output, over all
    outputs; dense_rel_err: the masked dense network's own in the same precision.
    """

    plan: TrunkPlan
    chosen: str
    dense_ms: float | None
    planned_ms: float | None
    max_rel_err: float
    dense_rel_err: float
    notes: tuple[str, ...] = ()

    accelerated = True

    @property
    def speedup(self) -> float | None:
        """Dense over chosen, both in graphs; at least 1."""
        if self.dense_ms is None or self.planned_ms is None:
            return None
        return 1.0 if self.chosen == "dense" else self.dense_ms / self.planned_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {k: v for k, v in vars(self).items() if k != "plan"}
        return {**own, "notes": list(self.notes), "speedup": self.speedup,
                "plan": self.plan.to_dict()}  # fmt: skip

    def __str__(self) -> str:
        lines = [str(self.plan), ""]
        if self.dense_ms is None or self.planned_ms is None:
            lines.append("the whole trunk was not timed: measure=False")
        else:
            lines.append(
                f"whole trunk in a CUDA graph: {self.dense_ms:.3f} ms dense, {self.planned_ms:.3f} "
                f"ms as planned; {self.chosen} runs ({self.speedup:.2f}x)"
            )
        lines.append(
            f"error against float64: {self.max_rel_err:.1e}; the dense network's own: "
            f"{self.dense_rel_err:.1e}"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def accelerate_cuda(
    model: nn.Module,
    masks: Masks = None,
    *,
    device: str | torch.device = "cuda",
    precision: str | torch.dtype = "bfloat16",
    input_size: tuple[int, int] | None = None,
    batch: int = 1,
    measure: bool = True,
    cache: str | os.PathLike[str] | None = "",
    graphs: bool = True,
    graph_capacity: int = 16,
    graph_bytes: int = 8 << 30,
    kept: Sequence[int] | None = None,
    timer: Timer | None = None,
) -> CudaReport:
    """Replace the trunk of ``model``, in place, by a planned one; ``restore(model)`` undoes it.

    Args:
        model: eval mode, any floating dtype, on the CPU or on ``device``.
        masks, input_size, batch: as in :func:`~opentrans_kernels.accelerate.accelerate`; shape to
            plan for. Any other shape works.
        precision: ``"bfloat16"``, ``"float16"``, ``"tf32"`` or ``"float32"`` (strict).
        measure: also time the whole trunk, and use the dense program if it is not slower.
        cache: folder of tuning results; "": the user's cache folder; None: keep none.
        graphs: run in CUDA graphs, at most ``graph_capacity`` of them and ``graph_bytes`` bytes.
        kept: outputs that are used (0: stem, 1: first stage ...); others are not copied out.
        timer: replaces the measurement, for tests.

    Raises:
        KernelUnavailable: no such device, strict mode, or the result is not exact.
        UnsupportedModelError, MaskError, CheckpointError, PlanError: nothing was changed.
    """
    target = _device(device)
    place = Place.of(target, Precision.of(precision))
    subject = prepare(_twin(model), masks, input_size)
    if (what := _changed(subject)) is not None:
        raise UnsupportedModelError(
            f"{what}, which a planned trunk would not call. Remove it, or accelerate on the CPU, "
            "where such layers stay as they are."
        )
    folder = default_folder() if cache == "" else cache
    plan, network = plan_trunk(subject, place, batch=batch, timer=timer, cache=TuneCache(folder))
    programs = {"planned": program_of(plan, network, place)}
    notes: list[str] = []
    times: dict[str, float | None] = {"dense": None, "planned": None}
    chosen = "planned"
    x = torch.randn(
        batch, _channels(subject), *plan.size[1:], generator=torch.Generator().manual_seed(0)
    ).to(target)
    if measure:
        programs["dense"] = dense_program(plan, network, place)
        clock = timer or CudaTimer(target)
        given = x.to(place.precision.dtype, memory_format=torch.channels_last)
        for name, program in programs.items():
            times[name] = clock(f"whole trunk, {name}", lambda p=program: p(given))
        if times["planned"] >= times["dense"]:  # type: ignore[operator]
            chosen = "dense"
            notes.append(
                "as a whole the planned trunk is not faster than the dense one, which runs"
            )
    error, own = _errors(subject, programs[chosen], place, x)
    floor = 1e-3 if place.precision.tf32 else FLOORS[place.precision.dtype]
    bound = max(2 * own, floor)
    if chosen == "planned" and not error <= bound and not settings.get().strict:
        # Every layer is within its bound, and yet the errors add up to more than PyTorch's own.
        programs["dense"] = programs.get("dense") or dense_program(plan, network, place)
        notes.append(
            f"the planned trunk errs by {error:.1e} against float64, more than {bound:.1e}: the "
            "dense one runs"
        )
        _log.warning("%s", notes[-1])
        chosen, (error, own) = "dense", _errors(subject, programs["dense"], place, x)
    if not error <= bound:
        raise KernelUnavailable(
            f"the {chosen} trunk errs by {error:.1e} against float64, PyTorch's by {own:.1e}: "
            "a kernel computes something else on this machine. Nothing was changed. Set "
            "OPENTRANS_BACKEND=reference to plan with PyTorch's kernels only, and report this."
        )
    like = torch.empty(0, dtype=place.precision.dtype, device=target)
    capturer = CudaCapturer(target) if graphs and target.type == "cuda" else None
    cached = GraphCache(
        programs[chosen], like, capacity=graph_capacity, max_bytes=graph_bytes, capturer=capturer
    )
    swaps = replacements(model, TrunkRunner(programs[chosen], cached, kept))
    freshness = _freshness(model)
    for module in swaps.values():
        module.opentrans_freshness = freshness
    Swap(model, swaps).on()
    report = CudaReport(plan, chosen, times["dense"], times["planned"], error, own, tuple(notes))
    for note in notes:
        _log.info("%s", note)
    return report


def _device(device: str | torch.device) -> torch.device:
    found = torch.device(device)
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise KernelUnavailable(
                f"device={str(device)!r}, but torch {torch.__version__} sees no CUDA device. "
                "Install a CUDA build of torch and check nvidia-smi, or leave device out to "
                "accelerate for the CPU."
            )
        if found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
    return found


def _twin(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU, where folding and packing happen in float64."""
    require_module(model)
    if found := accelerated_parts(model):
        raise UnsupportedModelError(
            f"the model is already accelerated ({len(found)} modules, the first is "
            f"{found[0] or type(model).__name__!r}). Call opentrans_kernels.restore(model) first "
            "to plan it again."
        )
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the model cannot be copied ({error}). Make computed weights permanent first, such as "
            f"{_computed(model)}."
        ) from error
    return twin.to("cpu", torch.float32)


def _computed(model: nn.Module) -> str:
    """How to make the first computed weight of the model permanent."""
    convs = conv_modules(model).values()
    computed = (conv for conv in convs if "weight" not in conv._parameters)
    return make_permanent(next(computed, model))


def _changed(subject: PlanSubject) -> str | None:
    """What was added to a module of the trunk, none of which is called as it was."""
    trunk = subject.trunk
    inside = list(trunk.stem.steps) if trunk.stem is not None else []
    for stage in trunk.stages:
        parts = subject.model.get_submodule(stage).named_modules()
        inside += [f"{stage}.{name}" if name else stage for name, _ in parts]
    for path in inside:
        if extra := added_behaviour(subject.model.get_submodule(path)):
            return f"{path} {extra}"
    inside = (unit for unit in subject.units if unit.role in ("stem", "block"))
    return next((unit.changed for unit in inside if unit.changed), None)


def _channels(subject: PlanSubject) -> int:
    stem = subject.trunk.stem
    assert stem is not None
    return stem.convs[0].conv.in_channels


def _errors(
    subject: PlanSubject, program: Program, place: Place, x: torch.Tensor
) -> tuple[float, float]:
    """Largest error of any output, of the program and of the dense network; first image only."""
    x = x[:1]
    dense = copy.deepcopy(subject.model).requires_grad_(False)
    for name, mask in subject.masks.items():
        dense.get_submodule(name).weight.mul_(mask)
    dense.to(place.device)
    dtype = place.precision.dtype
    with torch.no_grad():
        found = program(x.to(dtype).contiguous(memory_format=torch.channels_last))
        trunk = find_trunk(dense)
        half = dtype != torch.float32
        with (
            float32_products(place.precision.tf32),
            torch.autocast(x.device.type, dtype, enabled=half),
        ):
            own = forward_trunk(trunk, x)
        want = forward_trunk(find_trunk(dense.double()), x.double())
    return _worst(found, want), _worst(own, want)


def _worst(found: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    errors = []
    for got, exact in zip(found, want, strict=True):
        scale = exact.abs().max().clamp_min(1e-30)
        errors.append(float((got.double() - exact).abs().max() / scale))
    return max(errors, key=lambda e: float("inf") if e != e else e)  # NaN is the worst


def _freshness(model: nn.Module) -> Freshness:
    """Over everything the trunk's program was made from."""
    trunk = find_trunk(model)
    stem = trunk.stem.convs if trunk.stem is not None else ()
    nodes = [*stem, *(node for block in trunk.blocks for node in block.all_convs)]
    return freshness_of(nodes, every=1)


def replacements(model: nn.Module, runner: TrunkRunner) -> dict[str, Replacement]:
    """Module path -> replacement, for the stem and the stages of ``model``."""
    trunk = find_trunk(model)
    assert trunk.stem is not None
    first, *rest = trunk.stem.steps
    found: dict[str, Replacement] = {first: PlannedStem(model.get_submodule(first), runner)}
    for step in rest:
        found[step] = Passed(model.get_submodule(step))
    found[first].opentrans_watch = Watch([(name, part, None) for name, part in found.items()], {})
    for index, stage in enumerate(trunk.stages):
        found[stage] = PlannedStage(model.get_submodule(stage), runner, index, stage)
    return found
