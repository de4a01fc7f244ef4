"""What a freeze plan saves: parameters, multiply-adds, training work, and where training begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from .record import PlanRecord
from .work import owner, trace_work


@dataclass(frozen=True)
class FreezeReport:
    """Multiply-adds (MACs) of convolutions and matrix products, per image.

    Attributes:
        layers, frozen_layers: decided about, and frozen.
        parameters, frozen_parameters: elements; frozen ones include those frozen before the plan.
        forward_macs, frozen_macs: of one forward, and of its frozen layers.
        all_train_macs: forward and backward with every parameter training.
        before_macs: with what was already frozen before the plan.
        after_macs: with the plan. forward + wgrad of trainable weights + dgrad where something
            trainable feeds the input.
        published_before, published_after: the same by the paper's rule, which charges every layer
            its dgrad.
        first_trainable: the first parameter in execution order that trains; None if none does.
        no_backward: layers before which nothing trains; no backward runs through them.
        is_prefix: every frozen layer lies before all that trains.
        unreached: layers of the plan that the forward does not run; their work is not counted.
        notes: limits of this count.
    """

    layers: int
    frozen_layers: int
    parameters: int
    frozen_parameters: int
    forward_macs: int
    frozen_macs: int
    all_train_macs: int
    before_macs: int
    after_macs: int
    published_before: int
    published_after: int
    first_trainable: str | None
    no_backward: tuple[str, ...]
    is_prefix: bool
    unreached: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def saved(self) -> float:
        """Share of a training step's multiply-adds the plan saves, 0 to 1."""
        return 1 - self.after_macs / self.before_macs if self.before_macs else 0.0

    @property
    def published_saved(self) -> float:
        """:attr:`saved` by the paper's rule."""
        before = self.published_before
        return 1 - self.published_after / before if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        shares = {"saved": self.saved, "published_saved": self.published_saved}
        return {**asdict(self), **shares}

    def __str__(self) -> str:
        def giga(macs: int) -> str:
            return f"{macs / 1e9:.3f} GMAC"

        share = self.frozen_parameters / max(1, self.parameters)
        work = self.frozen_macs / max(1, self.forward_macs)
        place = "a prefix" if self.is_prefix else "scattered, not a prefix"
        lines = [
            f"frozen layers      {self.frozen_layers} of {self.layers}, {place}",
            f"frozen parameters  {self.frozen_parameters:,} of {self.parameters:,} ({share:.1%})",
            f"their forward      {giga(self.frozen_macs)} of {giga(self.forward_macs)} per image "
            f"({work:.1%})",
            f"training step      {giga(self.after_macs)} per image, {-self.saved:+.1%} from "
            f"{giga(self.before_macs)} before the plan; {giga(self.all_train_macs)} if all train",
            f"by the paper's rule {giga(self.published_after)}, {-self.published_saved:+.1%} from "
            f"{giga(self.published_before)}",
            f"first trainable    {self.first_trainable or 'nothing trains'}; no backward through "
            f"{len(self.no_backward)} layers before it",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def report_plan(
    plan: PlanRecord,
    model: nn.Module,
    input_size: tuple[int, int] | None,
    inputs: Sequence[torch.Tensor] | None,
) -> FreezeReport:
    """The numbers of ``plan`` on ``model``; see :meth:`FreezePlan.report`."""
    work = trace_work(model, input_size, inputs)
    own = dict(model.named_parameters())
    before = [name for name, parameter in own.items() if parameter.requires_grad]
    fixed = set(plan.parameters)
    after = [n for n in dict.fromkeys([*before, *plan.trainable_again]) if n not in fixed]
    macs = work.layer_macs()
    seen = {owner(name) for name in work.parameters}
    if work.failure:  # what was read last may never have been multiplied
        seen -= {owner(name) for name, parameter in own.items() if parameter.dim() > 1} - set(macs)
    unreached = tuple(one.name for one in plan.decisions if one.name not in seen)
    first = work.first_trainable(after)
    reached = {name: index for index, name in enumerate(work.parameters)}
    frozen_at = [reached[name] for name in plan.parameters if name in reached]
    notes = []
    if work.failure:
        notes.append(f"counted up to where the forward stopped ({shorten(work.failure, 120)})")
    if unreached:
        shown = ", ".join(unreached[:4]) + (", ..." if len(unreached) > 4 else "")
        notes.append(f"{len(unreached)} layers are not reached by the forward: {shown}")
    if plan.trainable_again:
        notes.append(f"rule {plan.rule} makes all other parameters trainable again")
    return FreezeReport(
        layers=len(plan.decisions),
        frozen_layers=len(plan.frozen),
        parameters=sum(parameter.numel() for parameter in own.values()),
        frozen_parameters=sum(p.numel() for name, p in own.items() if name not in set(after)),
        forward_macs=work.forward_macs(),
        frozen_macs=sum(macs.get(name, 0) for name in plan.frozen),
        all_train_macs=work.training_macs(list(own)),
        before_macs=work.training_macs(before),
        after_macs=work.training_macs(after),
        published_before=work.published_macs(before),
        published_after=work.published_macs(after),
        first_trainable=first,
        no_backward=tuple(work.without_backward(after)),
        is_prefix=bool(frozen_at) and (first is None or max(frozen_at) < reached[first]),
        unreached=unreached,
        notes=tuple(notes),
    )
