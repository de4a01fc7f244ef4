"""Freezing layers of the tower by their alphas, once, at a step of the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from opentrans_kernels.errors import OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet

from ...freeze import FreezePlan
from ...gradskip import skip_frozen
from ...state import differences
from ..attachment import plan_freezing
from ..norms import hold_norms
from .base import Step, is_main, world_size
from .wrap import unwrapped

__all__ = ["FreezeStep"]

log = logging.getLogger(__name__)


class FreezeStep(Step):
    """Decide with a rule which layers stop training, freeze them, keep batch norms in their mode.

    The plan is made once, on one process, and sent to all. It is kept with the checkpoint, so a
    resumed run freezes exactly the same parameters. Frozen parameters have no gradient and no
    optimizer state any more, and stay in their parameter groups, so optimizer and scheduler go on
    as they are. Nothing is ever unfrozen, not even when training ends: a second training of the
    same trainer finds the layers frozen. A DistributedDataParallel wrapper is built anew.

    Args:
        rule: of ``docs/freezing.md``; a FreezePlan; or layer names.
        fit: how alpha is fitted, for rules that need it.
        at: finished steps after which to freeze; 0: before the first.
        norms: "frozen", "affine" or "train", as in ``MODEL.OPENTRANS.FREEZE.NORMS``.
        skip: keep for backward only what the trainable layers need (``skip_frozen``).
        tower: module path of the tower, "" to find it.
    """

    def __init__(
        self,
        rule: str | FreezePlan | list[str],
        fit: str = "xmin_peak",
        at: int = 0,
        norms: str = "frozen",
        skip: bool = False,
        *,
        tower: str = "",
    ) -> None:
        super().__init__(tower)
        self.rule, self.fit, self.at, self.norms, self.skip = rule, fit, at, norms, skip
        #: The plan in force; None before.
        self.plan: FreezePlan | None = None
        self._in_force = ""  # digest of the plan the model is frozen by
        self._held: list[nn.Module] = []
        hold_norms(nn.Module(), norms)  # refuses an unknown policy
        if skip and norms != "frozen":
            raise PlanError(
                f"skip=True freezes the batch norm of a frozen layer with it, and norms={norms!r} "
                "does not. Use norms='frozen'."
            )

    def before_train(self) -> None:
        super().before_train()
        self._held = hold_norms(self.tower, self.norms)
        if self.plan is not None and self.plan.digest() == self._in_force:
            return
        if self.plan is not None or self.trainer.start_iter >= self.at:
            self._freeze()

    def before_step(self) -> None:
        # model.train(), after an evaluation for instance, puts norms back into training mode.
        for norm in self._held:
            if norm.training:
                norm.eval()

    def after_step(self) -> None:
        if self.plan is None and self.done >= self.at:
            self._freeze()

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        plan = None if self.plan is None else self.plan.to_json()
        return {"settings": self._settings(), "plan": plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint says. Raises PlanError if the run was started with other settings."""
        found = differences(state["settings"], self._settings())
        if found:
            raise PlanError(
                f"the run was started with another way of freezing: {'; '.join(found)}. Resume "
                "with the MODEL.OPENTRANS.FREEZE settings of the run, or start a new run in "
                "another OUTPUT_DIR."
            )
        if state["plan"] is not None:
            self.plan = FreezePlan.from_json(state["plan"])

    def _settings(self) -> dict[str, Any]:
        rule = self.rule.digest() if isinstance(self.rule, FreezePlan) else self.rule
        names = ("fit", "at", "norms", "skip")
        return {"rule": rule, **{name: getattr(self, name) for name in names}}

    def _freeze(self) -> None:
        if self.plan is None:
            self.plan = self._decide()
            for one in self.plan.decisions:
                for part, alpha in one.alphas.items():
                    self.put(f"alpha/{one.name}{part}", alpha)
        plan = self.plan
        before = sum(p.requires_grad for p in self.model.parameters())
        with unwrapped(self.trainer):
            self._check_trainable(plan)
            plan.apply(self.tower)
            if self.skip:
                log.info("%s", self._skip(plan))
        own = dict(self.tower.named_parameters())
        self._in_force = plan.digest()
        for name in plan.parameters:
            self.trainer.optimizer.state.pop(own[name], None)
        left = sum(p.requires_grad for p in self.model.parameters())
        elements = sum(math.prod(plan.shapes[name]) for name in plan.parameters)
        log.info("%s", plan)
        log.info(
            "froze %d layers (%d elements); %d of %d parameters train on",
            len(plan.frozen), elements, left, before,
        )  # fmt: skip
        self.put("frozen_layers", len(plan.frozen))
        if plan.threshold is not None:
            self.put("alpha_threshold", plan.threshold)

    def _decide(self) -> FreezePlan:
        """Made by rank 0 and sent: fits may differ in the last bit between machines."""
        parcel: list[Any] = [None, None]
        if is_main():
            try:
                made = plan_freezing(self.tower, self.rule, fit=self.fit, norms=self.norms)
                parcel[0] = made.to_json()
            except OpenTransError as error:
                if world_size() == 1:
                    raise
                parcel[1] = str(error)
        if world_size() > 1:
            dist.broadcast_object_list(parcel, src=0)
        if parcel[1] is not None:
            raise PlanError(f"rank 0 could not make the freeze plan: {parcel[1]}")
        return FreezePlan.from_json(parcel[0])

    def _check_trainable(self, plan: FreezePlan) -> None:
        gone = {id(p) for n, p in self.tower.named_parameters() if n in set(plan.parameters)}
        trains = [p for p in self.model.parameters() if p.requires_grad]
        if trains and all(id(p) in gone for p in trains):
            raise PlanError(
                f"rule {plan.rule!r} freezes the last {len(trains)} trainable parameters of the "
                "model, so nothing would train. Use a rule that leaves layers, such as ratio:0.5."
            )

    def _skip(self, plan: FreezePlan) -> object:
        zeros = MaskSet.from_model_zeros(self.tower)
        masks = zeros if zeros.nnz < zeros.numel else None
        stages = [name for name, _ in self.tower.named_children() if name.startswith("layer")]
        # Its "affine" is our "frozen": statistics fixed, affine trains where its layer does.
        return skip_frozen(self.tower, plan, bn="affine", outputs=stages, masks=masks)
