"""A freeze plan: which modules stop training and why. Data, JSON both ways, applied in place."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import PlanError
from opentrans_kernels.masks import atomic_write
from opentrans_kernels.masks.limits import parse_json

from .record import Decision, Disagreement, PlanRecord
from .report import FreezeReport, report_plan
from .rules import suggest
from .work import owner

_KIND, _FORMAT = "opentrans freeze plan", 1


@dataclass(frozen=True)
class Applied:
    """What :meth:`FreezePlan.apply` changed; numbers count elements, names are parameters."""

    frozen: tuple[str, ...]
    already_frozen: tuple[str, ...]
    trainable_again: tuple[str, ...]
    elements: int
    trainable_left: int

    def __str__(self) -> str:
        text = (
            f"froze {len(self.frozen)} parameters with {self.elements:,} elements "
            f"({len(self.already_frozen)} were frozen before); {self.trainable_left:,} elements "
            "keep training"
        )
        if self.trainable_again:
            text += f"; {len(self.trainable_again)} that were frozen before train again"
        return text


@dataclass(frozen=True)
class FreezePlan(PlanRecord):
    """A :class:`PlanRecord` that is checked, applied, reported and stored; ``print`` shows all."""

    def check(self, model: nn.Module) -> None:
        """Raise unless the plan can be applied to ``model``; nothing is changed.

        Raises:
            PlanError: other names or shapes, or the model is wrapped for distributed training.
        """
        refuse_wrapped(model, len(self.parameters))
        own = dict(model.named_parameters(remove_duplicate=False))
        changed = (*self.parameters, *self.trainable_again)
        unknown = [name for name in changed if name not in own]
        if unknown:
            raise PlanError(
                f"the plan names {len(unknown)} of {len(changed)} parameters that "
                f"{type(model).__name__} does not have: {', '.join(unknown[:5])}."
                f"{suggest(unknown[0], list(own))} A plan fits the model it was made for; make one "
                "with freeze_plan(model, ...)."
            )
        for name in changed:
            shape = tuple(own[name].shape)
            if shape != self.shapes[name]:
                raise PlanError(
                    f"the plan was made for {name} of shape {self.shapes[name]}; this model's has "
                    f"shape {shape}. Make a plan for this model with freeze_plan(model, ...)."
                )

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Applied:
        """Freeze: ``requires_grad = False``, ``.grad = None``; checked before anything changes.

        Parameters frozen earlier stay frozen, except under the rule ``opentrans``. Applying twice
        changes nothing more. Call it before the model is wrapped in DistributedDataParallel.

        Args:
            optimizer: also drop the frozen parameters and their state from it. Without that an
                optimizer with ``zero_grad(set_to_none=False)`` would keep moving them.

        Raises:
            PlanError: see :meth:`check`.
        """
        self.check(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        frozen, before, again = [], [], []
        for name in self.parameters:
            (frozen if own[name].requires_grad else before).append(name)
            own[name].requires_grad_(False)
            own[name].grad = None
        for name in self.trainable_again:
            if not own[name].requires_grad:
                own[name].requires_grad_(True)
                again.append(name)
        if optimizer is not None:
            _forget(optimizer, [own[name] for name in self.parameters])
        left = sum(p.numel() for p in model.parameters() if p.requires_grad)
        elements = sum(own[name].numel() for name in frozen)
        return Applied(tuple(frozen), tuple(before), tuple(again), elements, left)

    def report(
        self,
        model: nn.Module,
        input_size: tuple[int, int] | None = None,
        inputs: Sequence[torch.Tensor] | None = None,
    ) -> FreezeReport:
        """Parameters, multiply-adds and training work saved; the model is not changed.

        Args:
            input_size: (height, width) in pixels of a training image (224, 224 by default).
            inputs: example arguments of the forward, for models that do not take one image.

        Raises:
            PlanError: the plan does not fit the model.
            UnsupportedModelError: the model's forward cannot be traced.
        """
        self.check(model)
        return report_plan(self, model, input_size, inputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and undefined numbers become strings."""
        return {
            "kind": _KIND,
            "format": _FORMAT,
            "rule": self.rule,
            "options": dict(self.options),
            "fit": self.fit,
            "threshold": _plain(self.threshold),
            "alpha_digest": self.alpha_digest,
            "weights_seen": self.weights_seen,
            "norms_frozen": self.norms_frozen,
            "frozen": [one.name for one in self.decisions if one.frozen],
            "decisions": [
                {
                    "name": one.name,
                    "frozen": one.frozen,
                    "reason": one.reason,
                    "alphas": {part: _plain(value) for part, value in one.alphas.items()},
                    "parameters": list(one.parameters),
                    "norms": list(one.norms),
                }
                for one in self.decisions
            ],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "already_frozen": list(self.already_frozen),
            "trainable_again": list(self.trainable_again),
            "notes": list(self.notes),
            "disagreement": self.disagreement and self.disagreement.to_dict(),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The plan as JSON text; with ``path`` also written there, atomically.

        Raises:
            CheckpointError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            atomic_write(path, text.encode("utf-8"))
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> FreezePlan:
        """Read what :meth:`to_json` made: a path, or the text itself.

        Raises:
            PlanError: not readable, or no freeze plan.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        what = "the text" if is_text else os.fspath(source)
        fix = "Write one with FreezePlan.to_json(PATH)."
        try:
            text = source if is_text else Path(source).read_text(encoding="utf-8")
            record = parse_json(str(text))
        except (OSError, ValueError) as error:
            raise PlanError(f"{what} cannot be read as a freeze plan: {error}. {fix}") from error
        if not isinstance(record, dict) or record.get("kind") != _KIND:
            raise PlanError(f"{what} is JSON, but no freeze plan. {fix}")
        if record.get("format") != _FORMAT:
            raise PlanError(
                f"{what} has format {record.get('format')!r}; this version reads {_FORMAT}. {fix}"
            )
        try:
            return cls(
                rule=record["rule"],
                options=record["options"],
                decisions=tuple(
                    Decision(
                        one["name"],
                        bool(one["frozen"]),
                        one["reason"],
                        {part: float(value) for part, value in one["alphas"].items()},
                        tuple(one["parameters"]),
                        tuple(one["norms"]),
                    )
                    for one in record["decisions"]
                ),
                fit=record["fit"],
                threshold=None if record["threshold"] is None else float(record["threshold"]),
                alpha_digest=record["alpha_digest"],
                weights_seen=record["weights_seen"],
                norms_frozen=record["norms_frozen"],
                shapes={name: tuple(shape) for name, shape in record["shapes"].items()},
                already_frozen=tuple(record["already_frozen"]),
                trainable_again=tuple(record["trainable_again"]),
                notes=tuple(record["notes"]),
                disagreement=_disagreement(record.get("disagreement")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(
                f"{what} lacks or garbles a field of a freeze plan ({error!r}). {fix}"
            ) from error

    def __str__(self) -> str:
        width = max([5, *(len(one.name) for one in self.decisions)])
        lines = [f"{'layer':<{width}}  state   why"]
        for one in self.decisions:
            state = "frozen" if one.frozen else "trains"
            with_norm = f"; with {', '.join(one.norms)}" if one.norms else ""
            lines.append(f"{one.name:<{width}}  {state}  {one.reason}{with_norm}")
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        elements = sum(math.prod(self.shapes[name]) for name in self.parameters)
        head = f"{len(self.frozen)} of {len(self.decisions)} layers frozen by rule {self.rule}"
        head += f" ({options})" if options else ""
        head += f", {elements:,} elements in {len(self.parameters)} parameters"
        if self.fit is not None:
            head += f"; alpha by {self.fit} from {self.weights_seen} weights"
        lines.append(head)
        if self.already_frozen:
            kept = "stay" if self.rule != "opentrans" else "were"
            lines.append(f"{len(self.already_frozen)} parameters {kept} frozen from before")
        if self.disagreement is not None:
            lines.append(str(self.disagreement))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _plain(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value


def _disagreement(record: Any) -> Disagreement | None:
    return None if record is None else Disagreement.from_dict(record)


def _forget(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def refuse_wrapped(model: nn.Module, count: int) -> None:
    """Raise if ``model`` is wrapped by, holds, or is held by a distributed wrapper.

    Raises:
        PlanError: with what to do.
    """
    from torch.nn.parallel import DistributedDataParallel

    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if not wrappers and torch.distributed.is_available() and torch.distributed.is_initialized():
        # The wrapped module does not know its wrapper; frozen behind it, training stops at the
        # second step with an error that names neither.
        wrappers = [
            found
            for found in gc.get_objects()
            if issubclass(type(found), DistributedDataParallel)
            and any(module is model for module in found.modules())
        ]
    if wrappers:
        raise PlanError(
            f"the plan freezes {count} parameters after DistributedDataParallel was built around "
            f"{type(model).__name__}; it would wait for their gradients for ever. Apply the plan "
            "before wrapping; during training: unwrap (model = wrapped.module; del wrapped), "
            "apply, wrap again and build the optimizer anew."
        )
    for module in model.modules():
        if type(module).__name__.startswith("FSDP") or "FullySharded" in type(module).__name__:
            raise PlanError(
                f"{type(module).__name__} has already sharded the parameters of this model, so "
                "single ones cannot be frozen. Apply the plan before sharding."
            )
        if hasattr(module, "opentrans_original"):
            raise PlanError(
                f"{type(model).__name__} is accelerated: its layers compute with packed copies of "
                "their weights and do not train. Call opentrans_kernels.restore(model) first."
            )


def parameters_of(model: nn.Module) -> dict[str, list[str]]:
    """Module -> full names of the parameters it owns itself, in network order."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        found.setdefault(owner(name), []).append(name)
    return found
