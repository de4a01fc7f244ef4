"""The plan: for every layer dense, compact or sparse, with the reason and the times.

``make_plan(model, masks)`` runs every form of every layer for a moment on this machine and keeps
the fastest; ``print(plan)`` shows what was decided and why. ``accelerate`` carries a plan out.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from .. import native
from ..errors import PlanError
from ..flops import effective_macs, executed_macs, nominal_macs
from ..topology import ConvShape
from ..topology.cover import switched
from .arguments import checked_batch, device_of, thread_count
from .build import Builder
from .choose import WINOGRAD, Choice, Chooser, predicted_layer_speedup
from .layers import PRUNED, Layer, LinearUnit
from .models import require_module
from .records import Plan, PlanRow, PlanUnit, totals_of
from .remarks import other_zeros, unread_weights
from .subject import Masks, PlanSubject, Unit, prepare

__all__ = ["Plan", "PlanRow", "PlanUnit", "make_plan", "plan_and_build", "prepare"]

NOMINAL_RATE = 30e6  # MACs per millisecond of a dense AVX2 core, for predictions without timings
_LANES = {"avx512": 16, "avx2": 8}


def make_plan(
    model: nn.Module,
    masks: Masks = None,
    input_size: tuple[int, int] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    measure: bool = True,
    batch: int = 1,
) -> Plan:
    """Decide what to do with each layer. The model is not changed.

    Args:
        model: float32, eval mode, on the CPU.
        masks: a MaskSet, name -> 0/1 tensors, a mask file, or a recipe for synthetic ones such as
            "global:0.90"; None: the weights' own zeros.
        input_size: (height, width) in pixels the times are for; other sizes still work. None:
            the tower's ``image_size``, else 224x224.
        device: "cpu".
        threads: torch threads the times are for; None: as set now.
        measure: time every form of every layer (RN50 at 224: some seconds); False: predict.
        batch: images per call the times are for.

    Raises:
        UnsupportedModelError, MaskError, CheckpointError, PlanError: see the messages.
    """
    if device_of(device) != "cpu":
        raise PlanError(
            f"device={device!r}: this version accelerates on the CPU only. Pass device='cpu'."
        )
    batch = checked_batch(batch)
    require_module(model)
    with (
        torch.inference_mode(False),
        thread_count(threads) as count,
        switched(model, paused=True),
    ):
        subject = prepare(model, masks, input_size)
        return plan_and_build(subject, count, measure, batch, keep=False)[0]


def plan_and_build(
    subject: PlanSubject, threads: int, measure: bool, batch: int = 1, keep: bool = True
) -> tuple[Plan, dict[str, Choice]]:
    """The plan, and per unit the choice with its modules (without them unless ``keep``)."""
    builder = Builder(subject)
    chooser = Chooser(subject, builder, batch, measure)
    choices: dict[str, Choice] = {}
    units: list[PlanUnit] = []
    rows: list[PlanRow] = []
    predicted_dense = 0.0
    isa = native.cpu_capability() or "reference"
    for unit in subject.units:
        choice = chooser.choose(unit)
        ms = choice.ms
        units.append(
            PlanUnit(
                unit.name,
                unit.role,
                choice.kind,
                unit.density,
                choice.reason,
                ms.get("dense"),
                ms.get("compact"),
                ms.get("sparse"),
                ms.get("winograd"),
            )  # fmt: skip
        )
        dense = ms.get("dense")
        nominal = sum(_nominal(la, subject.shapes.get(la.name)) for la in unit.layers)
        for layer in unit.layers:
            share = _nominal(layer, subject.shapes.get(layer.name)) / max(1, nominal)
            dense_ms = nominal * batch / NOMINAL_RATE if dense is None else dense
            predicted_dense += dense_ms * share
            rows.append(_row(unit, layer, choice, subject, dense_ms * share, isa))
        choices[unit.name] = choice if keep else Choice(choice.kind, choice.reason, None, ms)
    notes = list(subject.notes)
    layers = [layer for unit in subject.units for layer in unit.layers]
    elsewhere = functools.partial(other_zeros, subject.model, layers, subject.left_alone)
    if subject.has_zeros and (where := elsewhere(PRUNED)):
        notes.append(f"zeros that nothing is gained from: {where}")
    unread = unread_weights(subject.model)
    if not subject.has_zeros:
        where = elsewhere(0.0)
        none = f"no weight {'that can be read ' if unread else ''}is zero" if where is None else (
            f"no layer that can be accelerated has enough zeros, only {where} are zero"
        )  # fmt: skip
        notes.append(
            f"{none}, so there is nothing to gain: everything stays dense. Pass the pruning "
            "masks, or a checkpoint whose pruned weights are zero."
        )
    if unread:
        notes.append(unread)
    if why := native.reason():
        notes.append(f"the sparse layers run on the slow reference kernels: {why}")
    plan = Plan(
        architecture=subject.architecture(),
        masks_hash=subject.masks_hash,
        masks_label=subject.masks_label,
        input_size=subject.input_size,
        batch=batch,
        threads=threads,
        isa=isa,
        torch=torch.__version__,
        measured=measure,
        units=tuple(units),
        rows=tuple(rows),
        notes=tuple(notes),
        totals=totals_of(tuple(units), tuple(rows), predicted_dense or None),
    )
    return plan, choices


def _nominal(layer: Layer, shape: ConvShape | None) -> int:
    if shape is None:
        return 0
    return nominal_macs(layer.shape, shape.h_out, shape.w_out, groups=layer.groups)


def _row(
    unit: Unit | LinearUnit, layer: Layer, choice: Choice, subject: PlanSubject,
    dense_ms: float, isa: str,
) -> PlanRow:  # fmt: skip
    """dense_ms: measured or nominal dense milliseconds of this layer."""
    name = layer.name
    shape = subject.shapes.get(name)
    height, width = (shape.h_out, shape.w_out) if shape else (0, 0)
    nnz, kernel = unit.nnz[name], layer.shape[2]
    nominal = _nominal(layer, shape)
    executed, predicted = nominal, dense_ms
    if choice.built is not None and choice.kind == "sparse":
        kept = choice.built.nnz[name]
        executed = executed_macs(kept, height, width, kernel=kernel, lanes=_LANES.get(isa, 4))
        predicted = dense_ms / predicted_layer_speedup(layer, nnz)
    elif choice.kind == "winograd":
        executed = nominal * 4 // 9
        predicted = dense_ms / WINOGRAD
    elif choice.built is not None:
        cout, cin = choice.built.widths[name]
        executed = nominal * cout * cin // max(1, layer.shape[0] * layer.shape[1])
        predicted = dense_ms * executed / max(1, nominal)
    return PlanRow(
        unit=unit.name,
        name=name,
        kind=choice.kind,
        cin=layer.cin,
        cout=layer.cout,
        kernel=kernel,
        stride=layer.stride,
        h_out=height,
        w_out=width,
        nnz=nnz,
        numel=layer.numel,
        nominal_macs=nominal,
        effective_macs=effective_macs(nnz, height, width),
        executed_macs=executed,
        predicted_ms=predicted if shape else None,
    )
