"""The rounds of a pruning run, driven one training step at a time.

:class:`Pruner` owns the masks of a model that somebody else trains: a plain loop
(:func:`~opentrans.imp.iterative_magnitude_pruning`) or the hook of a training framework calls
:meth:`Pruner.after_step` after each optimizer step, and the rest happens here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import MaskError, PlanError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.masks import MaskSet, Provenance
from opentrans_kernels.masks.packed import pack_bits
from opentrans_kernels.plan import Plan

from ..masked import ELEMENTWISE, MaskedOptimizer
from ..saved import Check, check_entries, count, damaged, mapping, masks_from, tensors
from ..state import differences
from .allocation import choose
from .config import ImpConfig
from .cost import layer_costs
from .records import NotFiniteLoss, RoundRecord, record_from
from .scope import prunable_convs

ENTRIES: dict[str, Check] = {
    **dict.fromkeys(("config", "shapes"), mapping),
    "masks": tensors,
    **dict.fromkeys(("records", "targets"), lambda value: isinstance(value, list)),
    "steps": count,
    "losses": lambda value: isinstance(value, list) and all(map(math.isfinite, value)),
    "rewind": lambda value: value is None or tensors(value),
}


class Pruner:
    """Masks of a model under iterative magnitude pruning.

    Args:
        model: its convolutions are pruned in place. Weights that are zero in the masks are set to
            zero and stay zero, and so does their gradient, before anything else sees it.
        config: schedule, allocation, pattern, rewinding.
        optimizer: its state is cleared where weights are removed, and altogether by rewinding.
            Without it, or for one that is not elementwise (``opentrans.masked.ELEMENTWISE``), the
            zeros are set again in every step.
        scope: names of the convolutions to prune; None: all but the first, and none of an
            attention pool.
        masks: a mask to start from, such as an earlier run's; None: nothing is removed yet.
        plan: measured plan for ``allocation="latency"``; None: predicted milliseconds.
        synthetic: the weights are not trained ones; the masks then say so.

    Raises:
        MaskError: a name of the scope is no Conv2d, masks and model disagree, or a weight is not
            finite.
        PlanError: schedule, allocation and pattern do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ImpConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scope: Iterable[str] | None = None,
        masks: MaskSet | None = None,
        plan: Plan | None = None,
        synthetic: bool = False,
    ) -> None:
        self.model, self.config, self.optimizer = model, config or ImpConfig(), optimizer
        self.synthetic = synthetic
        self._convs = prunable_convs(model, scope)
        self._masks = self._start(masks)
        #: Weights covered, and weights left.
        self.total = sum(mask.numel() for mask in self._masks.values())
        self.kept = self._count()
        self.targets = self.config.schedule.kept(self.total, self.kept)
        names = list(self._masks)
        weighted = self.config.allocation.weighted
        self._costs = layer_costs(model, names, self.config.input_size, plan) if weighted else None
        self.records: list[RoundRecord] = []
        self.steps = 0
        self._rewind: dict[str, torch.Tensor] | None = None
        self._losses: list[float] = []
        self._began = time.perf_counter()
        self._weights_finite()
        self._enforce(state=True)
        self._hooks = [
            conv.weight.register_hook(self._gradient_mask(name))
            for name, conv in self._convs.items()
            if conv.weight.requires_grad
        ]
        # Zero weight, gradient and state are a fixed point of an elementwise optimizer.
        known = type(optimizer) in ELEMENTWISE and len(self._hooks) == len(self._convs)
        self._guard = not known
        self._keep_for_rewinding()

    @property
    def round(self) -> int:
        """Rounds done."""
        return len(self.records)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.round >= len(self.targets)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.schedule.steps_before(len(self.targets) - 1)

    @property
    def masks(self) -> MaskSet:
        """The masks as they are now, under the model's names, with their provenance."""
        notes = {
            "round": str(self.round),
            "density": f"{self.kept / self.total:.6f}",
            "rule": self.config.rule(),
            "model": type(self.model).__name__,
        }
        copies = {name: mask.cpu().clone() for name, mask in self._masks.items()}
        return MaskSet(copies, Provenance("imp", notes=notes, synthetic=self.synthetic))

    def after_step(
        self, steps: int, loss: float | torch.Tensor | None = None
    ) -> RoundRecord | None:
        """To be called after every optimizer step; prunes when a round is due.

        Args:
            steps: training steps done, this one included.
            loss: of the step; None if it is not known.

        Returns:
            The record of the round that took place, else None. One call does one round at most.

        Raises:
            NotFiniteLoss: the loss is NaN or infinite. Nothing was pruned.
            MaskError: a weight is NaN or infinite when a round is due. Nothing was pruned.
        """
        if loss is not None:
            self._check_loss(loss.item() if isinstance(loss, torch.Tensor) else loss, steps)
        self.steps = steps
        if self._guard:
            self._enforce()
        self._keep_for_rewinding()
        if self.finished or not self.config.schedule.is_due(self.round, steps):
            return None
        return self.prune()

    def prune(self) -> RoundRecord:
        """Do the next round now, whatever the schedule says."""
        self._weights_finite()
        before = self.kept
        alive = {name: int(torch.count_nonzero(mask)) for name, mask in self._masks.items()}
        allocation = self.config.allocation
        choice = choose(
            {name: conv.weight for name, conv in self._convs.items()},
            self._masks,
            max(0, before - self.targets[self.round]),
            allocation=allocation,
            pattern=self.config.pattern,
            factors=allocation.factors(alive, self._costs, self.targets[-1] / self.total),
        )
        for name, removed in choice.removed.items():
            self._masks[name] &= ~removed
        if self._rewind is not None:
            self.model.load_state_dict(self._rewind)
            if self.optimizer is not None:
                self.optimizer.state.clear()
        self._enforce(state=True)
        now = time.perf_counter()
        layers = {n: int(torch.count_nonzero(m)) / m.numel() for n, m in self._masks.items()}
        self.kept = kept = self._count()
        record = RoundRecord(
            round=self.round + 1,
            steps=self.steps,
            kept=kept,
            removed=before - kept,
            density=kept / self.total,
            threshold=choice.threshold,
            loss=sum(self._losses) / len(self._losses) if self._losses else None,
            seconds=now - self._began,
            layers=layers,
        )
        self.records.append(record)
        self._losses, self._began = [], now
        return record

    def close(self) -> None:
        """Take the gradient hooks off the model; the weights keep their zeros."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self, rewind: bool = True) -> dict[str, Any]:
        """All of it in plain values and tensors, for a checkpoint; without model and optimizer.

        rewind: with the weights kept for rewinding, as large as the model.
        """
        return {
            "config": self.config.to_dict(),
            "shapes": {name: list(mask.shape) for name, mask in self._masks.items()},
            "masks": {n: torch.from_numpy(pack_bits(mask)) for n, mask in self._masks.items()},
            "digest": self.masks.content_hash(),
            "records": [record.to_dict() for record in self.records],
            "targets": list(self.targets),
            "steps": self.steps,
            "losses": list(self._losses),
            "rewind": self._rewind if rewind else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], name: str = "the state") -> None:
        """Continue where ``state`` was taken; call it after the model's weights were loaded.

        name: of the file, for messages. With nothing changed, raises PlanError if it belongs to a
        run with other settings or another scope; the message names the differences.
        CheckpointError if it is damaged: an entry is missing, or the masks are not those saved.
        """
        check_entries(name, state, ENTRIES)
        shapes = {name: list(mask.shape) for name, mask in self._masks.items()}
        found = differences(state["config"], self.config.to_dict())
        if state["shapes"] != shapes:
            odd = sorted({n for n in {*shapes, *state["shapes"]} if n not in shapes
                          or state["shapes"].get(n) != shapes[n]})  # fmt: skip
            found.append(
                f"the scope differs in {len(odd)} of {len(shapes)} convolutions ({odd[:3]})"
                if odd
                else "the convolutions of the scope come in another order"
            )
        if state["targets"] != list(self.targets) and not found:
            found.append("the masks to start from differ")
        if found:
            raise PlanError(
                f"this run was started with other settings: {'; '.join(found)}. Continue with the "
                "settings of the run, or start a new one elsewhere."
            )
        masks = masks_from(name, state["masks"], state["shapes"], state.get("digest")).masks
        records = [record_from(name, record) for record in state["records"]]
        kept = sum(int(torch.count_nonzero(mask)) for mask in masks.values())
        if records and records[-1].kept != kept:
            raise damaged(name, f"its masks keep {kept} weights, its record {records[-1].kept}")
        self._masks = {key: mask.to(self._masks[key].device) for key, mask in masks.items()}
        self.kept, self.records = kept, records
        self.steps, self._losses = state["steps"], list(state["losses"])
        self._rewind = state["rewind"] if state["rewind"] is not None else self._rewind
        self._began = time.perf_counter()
        self._enforce(state=True)

    def _start(self, given: MaskSet | None) -> dict[str, torch.Tensor]:
        full = {
            name: torch.ones_like(conv.weight, dtype=torch.bool, requires_grad=False)
            for name, conv in self._convs.items()
        }
        if given is None:
            return full
        for name, mask in given.transfer_to(self.model).masks.items():
            if name not in full:
                raise MaskError(
                    f"the mask to start from has {name!r}, which is not in the scope of the run. "
                    "Add it to scope, or leave it out of the masks."
                )
            full[name] = mask.to(full[name].device).clone()
        return full

    def _count(self) -> int:
        return sum(int(torch.count_nonzero(mask)) for mask in self._masks.values())

    def _gradient_mask(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        # Selected, not multiplied: NaN and infinity at removed weights must not come through.
        return lambda grad: grad.masked_fill(~self._masks[name], 0)

    def _enforce(self, state: bool = False) -> None:
        """Zeros in the weights; with ``state`` also in gradients and in the optimizer's state."""
        with torch.no_grad():
            for name, conv in self._convs.items():
                dead = ~self._masks[name]
                conv.weight.masked_fill_(dead, 0)
                if not state:
                    continue
                if conv.weight.grad is not None:
                    conv.weight.grad.masked_fill_(dead, 0)
                moments = {} if self.optimizer is None else self.optimizer.state.get(conv.weight)
                for value in (moments or {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == dead.shape:
                        value.masked_fill_(dead, 0)
        if state and isinstance(self.optimizer, MaskedOptimizer):
            # It keeps the live weights by index, and would write removed ones back.
            self.optimizer.set_masks(self.model, self.masks)

    def _check_loss(self, loss: float, steps: int) -> None:
        if math.isfinite(loss):
            self._losses.append(loss)
            return
        raise NotFiniteLoss(
            f"the loss is {loss} at step {steps}, in round {self.round + 1} of "
            f"{len(self.targets)}. The round is not kept: the masks are those of round "
            f"{self.round}. Continue from it with a lower learning rate, or look for broken input."
        )

    def _weights_finite(self) -> None:
        for name, conv in self._convs.items():
            if count_non_finite(conv.weight):
                raise MaskError(
                    f"the weight of conv {name!r} holds NaN or infinity after {self.steps} steps, "
                    f"so magnitudes cannot be ranked; round {self.round + 1} did not take place. "
                    "Lower the learning rate and continue from the round before."
                )

    def _keep_for_rewinding(self) -> None:
        if self._rewind is None and self.config.rewind == self.steps and not self.records:
            self._rewind = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
