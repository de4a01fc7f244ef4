"""``accelerate(model, masks)`` swaps layers in place and measures; ``restore(model)`` undoes it.

Everything is built and checked before the first module is swapped, and a swap is a dictionary
assignment, so an error leaves the model as it was. The dense weights are never written: masks act
in the packed copies only, and ``restore`` brings back the very same modules and bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import native
from ..errors import PlanError, UnsupportedModelError
from ..masks.packed import pack_bits
from ..nn import Engine, Replacement, SparseEngine
from ..plan import Plan, plan_and_build, prepare
from ..plan.arguments import checked_batch, checked_size, device_of, thread_count
from ..plan.build import Builder, check_replaceable
from ..plan.choose import Choice, by_winograd
from ..plan.layers import LinearUnit
from ..plan.models import accelerated_parts, require_module
from ..plan.subject import Masks, PlanSubject
from ..topology.cover import states, switched
from .compare import Culprit, Outcome, Swap
from .cuda import CudaReport, accelerate_cuda
from .parts import check_parts
from .pools import pool_swaps
from .report import Report
from .stages import stage_swaps

__all__ = ["CudaReport", "Report", "accelerate", "record_of", "restore"]

_RECORD = "_opentrans_record"
log = logging.getLogger(__name__)


def accelerate(
    model: nn.Module,
    masks: Masks = None,
    *,
    plan: Plan | None = None,
    input_size: tuple[int, int] | None = None,
    measure: bool = True,
    threads: int | None = None,
    batch: int = 1,
    device: str | torch.device | None = None,
    **options: Any,
) -> Report | CudaReport:
    """Replace layers of ``model`` in place by faster ones that compute the same masked network.

    Modules keep their names, and the ``state_dict`` its keys and shapes. Any input size and batch
    works afterwards. For inference: forward raises in training mode. Tokens may be reduced
    (``reduce_tokens``) before, so that the times are for those that are left, or after.

    Args:
        model: float32, eval mode, on the CPU.
        masks: a MaskSet, name -> 0/1 tensors, a mask file, matched by module name, or a recipe for
            synthetic ones such as "global:0.90"; None: the weights' own zeros. The dense weights
            themselves are not multiplied.
        plan: from ``make_plan`` for this model and these masks; None: make one.
        input_size: (height, width) in pixels to plan and measure for; None: the plan's, else the
            tower's ``image_size``, else 224x224.
        measure: time the forms of every layer and the whole, and undo what does not pay; False:
            rely on predictions, or on the given plan.
        threads: torch threads to plan and measure for; None: as set now.
        batch: images per call to plan and measure for.
        device: None or "cpu"; "cuda": plan the whole trunk for a GPU, where the other arguments of
            :func:`~opentrans_kernels.accelerate.cuda.accelerate_cuda` go into ``options``.

    Raises:
        UnsupportedModelError, MaskError, CheckpointError, PlanError: nothing was changed.
    """
    if (target := device_of(device)) != "cpu":
        if plan is not None or threads is not None:
            raise PlanError(
                f"plan and threads are for the CPU, device={str(device)!r} makes its own plan. "
                "Leave them out; choices for CUDA are kept in cache=FOLDER."
            )
        return accelerate_cuda(
            model, masks, device=target, input_size=input_size, measure=measure, batch=batch,
            **options,
        )  # fmt: skip
    if options:
        raise PlanError(
            f"accelerate: {', '.join(options)} only mean something with device='cuda'. Leave them "
            "out, or pass device='cuda'."
        )
    size = input_size
    if plan is not None:
        if not isinstance(plan, Plan):
            raise PlanError(
                f"plan must be a Plan of make_plan, got {type(plan).__name__}. A record of "
                "Plan.to_dict() becomes one with Plan.from_dict(record)."
            )
        if size is not None and checked_size(size) != tuple(plan.input_size):
            raise PlanError(
                f"input_size={tuple(size)}, but the plan is for {tuple(plan.input_size)}. Leave "
                "input_size out, or make a plan for that size."
            )
        size, batch = plan.input_size, plan.batch
    batch = checked_batch(batch)
    require_module(model)
    # Packed tensors made in inference mode could never take part in autograd. Rounding may decide
    # which tokens a reduction keeps, so all are compared, and the reduced ones timed.
    with (
        torch.inference_mode(False),
        thread_count(threads) as count,
        switched(model, paused=True),
    ):
        subject = prepare(model, masks, size)
        report = _accelerate(subject, plan, count, measure, batch)
    for line in report.notes:
        log.log(logging.WARNING if line in subject.collapse.notes() else logging.INFO, "%s", line)
    return report


def _accelerate(
    subject: PlanSubject, given: Plan | None, threads: int, measure: bool, batch: int
) -> Report:
    """Plan, build, check and swap; on any error the model is as it was."""
    notes: list[str] = list(subject.collapse.notes())
    if torch.nn.modules.module._has_any_global_hook():
        notes.append(
            "global module hooks are registered (torch.nn.modules.module): modules inside a "
            "replaced part are not called, so these do not see them"
        )
    if states(subject.model):
        notes.append("tokens are reduced: compared with all of them, timed with the reduced ones")
    if given is None:
        plan, choices = plan_and_build(subject, threads, measure, batch)
    else:
        given.check(subject)
        plan, choices = given, _carry_out(subject, given)
        notes += _differences(given, threads)
    choices, parts = check_parts(subject, choices, Builder(subject))
    unfolded: set[str] = set()
    while True:
        plan = plan.changed({name: (c.kind, c.reason) for name, c in choices.items()})
        swaps = _replacements(choices)
        pools, found = pool_swaps(subject, choices, measure, batch)
        stages, of_stages = stage_swaps(subject, swaps, measure, batch)
        swaps |= pools
        found += of_stages
        swap = Swap(subject.model, {**swaps, **stages})
        outcome = Outcome(subject, plan, batch, measure)
        outcome.parts = [part for part in parts if choices[part.name].built is not None]
        try:
            if swaps:
                outcome.compare(swap)
                if outcome.timing is not None and outcome.timing.speedup < 1:
                    swap.off()
                    found = []
                    plan, swaps = outcome.give_up(plan, choices)
                    swap = Swap(subject.model, swaps)
            swap.on()
            break
        except Culprit as culprit:
            swap.off()
            subject = _less(subject, choices, culprit, unfolded)
        except BaseException:
            swap.off()
            raise
    bits = {n: (tuple(m.shape), pack_bits(m)) for n, m in subject.masks.items()}
    vars(subject.model)[_RECORD] = {"plan": plan, "masks": bits}
    return _report(plan, swaps, outcome, notes + found)


def _less(
    subject: PlanSubject, choices: dict[str, Choice], culprit: Culprit, unfolded: set[str]
) -> PlanSubject:
    """Replace less of a unit that the model uses in an unforeseen way. Changes ``choices``.

    First the convolution without what follows it, then nothing. Raises UnsupportedModelError where
    neither will do.
    """
    unit, choice = culprit.unit, choices[culprit.unit.name]
    whole = isinstance(unit, LinearUnit) or unit.block is not None or unit.name in unfolded
    if not whole and unit.convs[0].follows:
        unfolded.add(unit.name)
        subject, bare = subject.unfolded(unit)
        reason = f"{choice.reason}; its norm stays: {culprit.why}"
        choices[unit.name] = Choice(
            choice.kind, reason, Builder(subject).build(bare, choice.kind), choice.ms
        )
        return subject
    if unit.must_mask:
        raise UnsupportedModelError(
            f"{unit.name}: {culprit.why}; and its mask is not in the weights, so it cannot stay "
            "as it is either. Nothing was changed. Multiply the mask into the weights first "
            "(MaskSet.apply_)."
        )
    choices[unit.name] = Choice("dense", f"dense: {culprit.why}", None, choice.ms)
    return subject


def restore(model: nn.Module) -> None:
    """Put the original modules back, bit for bit.

    Raises PlanError if ``accelerate`` was never called on ``model``, UnsupportedModelError if it is
    no module.
    """
    require_module(model)
    found = accelerated_parts(model)
    if vars(model).pop(_RECORD, None) is not None and not found:
        return  # accelerate had left everything as it was
    if not found:
        raise PlanError(
            "restore: the model holds no accelerated module. Pass the model (or the part of it) "
            "that was given to accelerate."
        )
    if "" in found:
        raise PlanError(
            "restore: the module itself is a replacement, and only its parent can put the original "
            "back. Pass the whole model; the original is module.opentrans_original."
        )
    for path in reversed(found):  # the inner ones first, which are inside a replacement
        parent_path, _, key = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        new = parent._modules[key]
        original = new.opentrans_original  # type: ignore[union-attr]
        original.training = new.training  # type: ignore[union-attr]
        parent._modules[key] = original


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """What ``accelerate`` keeps with the model: "plan", and "masks" as name -> (shape, bits).

    None if it was never called. Raises PlanError if it was called on a part of the model.
    """
    require_module(model)
    record = vars(model).get(_RECORD)
    if record is None and accelerated_parts(model):
        raise PlanError(
            "this module was not accelerated as a whole: the plan is kept by the module that was "
            "given to accelerate. Pass that one."
        )
    return record


def _carry_out(subject: PlanSubject, plan: Plan) -> dict[str, Choice]:
    """Build what a given plan says."""
    builder = Builder(subject)
    choices = {}
    for unit, entry in zip(subject.units, plan.units, strict=True):
        check_replaceable(unit)
        kind = entry.kind
        if kind == "sparse" and unit.unsupported:
            raise PlanError(f"{unit.name}: planned as sparse, but the layer {unit.unsupported}.")
        if kind == "winograd" and not by_winograd(unit):
            raise PlanError(
                f"{unit.name}: planned as winograd, but it is no 3x3 convolution of stride 1 alone."
            )
        if kind == "dense" and unit.must_mask:
            raise PlanError(
                f"{unit.name}: planned as dense, but its mask is not in the weights. Make a plan "
                "for this model with make_plan(model, masks)."
            )
        if kind != "dense" and (what := unit.changed):
            raise PlanError(
                f"{unit.name}: planned as {kind}, but {what}, which a replacement would not call. "
                "Remove it, or make a new plan."
            )
        built = None if kind == "dense" else builder.build(unit, kind)
        builder.release()
        choices[unit.name] = Choice(kind, entry.reason, built)
    return choices


def _differences(plan: Plan, threads: int) -> list[str]:
    now = {"threads": threads, "isa": native.cpu_capability() or "reference"}
    now["torch"] = torch.__version__
    changed = [f"{k} {getattr(plan, k)} -> {v}" for k, v in now.items() if getattr(plan, k) != v]
    if not changed:
        return []
    return [
        f"the plan was made under other conditions ({', '.join(changed)}): results are the same, "
        "but other choices may be faster now"
    ]


def _replacements(choices: Mapping[str, Choice]) -> dict[str, Replacement]:
    swaps: dict[str, Replacement] = {}
    for choice in choices.values():
        if choice.built is not None:
            swaps.update(choice.built.swaps)
    return swaps


def _parts(swaps: Mapping[str, Replacement]) -> Iterator[Any]:
    for module in swaps.values():
        yield from (part for part in module.modules() if isinstance(part, Engine))


def _report(
    plan: Plan, swaps: Mapping[str, Replacement], outcome: Outcome, notes: list[str]
) -> Report:
    sparse = [part for part in _parts(swaps) if isinstance(part, SparseEngine)]
    nonzeros = sum(part.nnz for part in sparse)
    worst = max(outcome.parts, key=lambda part: part.error / part.bound, default=None)
    per_nonzero = sum(part.nbytes for part in sparse) / nonzeros if nonzeros else None
    return Report(
        plan=plan,
        accelerated=bool(swaps),
        timing=outcome.timing,
        measured=outcome.measured if swaps or outcome.timing else "nothing was replaced",
        max_rel_err=outcome.max_rel_err,
        worst_part=worst,
        parts_checked=len(outcome.parts),
        packed_bytes=sum(part.nbytes for part in _parts(swaps)),
        bytes_per_nonzero=per_nonzero,
        dense={unit.name: unit.reason for unit in plan.units if unit.kind == "dense"},
        notes=(*notes, *outcome.notes, *(n for n in plan.notes if not swaps)),
    )
