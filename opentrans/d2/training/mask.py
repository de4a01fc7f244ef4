"""A pruning mask over a stretch of a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from opentrans_kernels.errors import MaskError, PlanError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.spectrum.distributed import check_same
from opentrans_kernels.synthetic import is_mask_spec

from ...masked import preserve_masks
from ...masked.preserve import MaskGuard
from ...state import differences
from ..towers import Masks, masks_for
from .base import Step, masks_from_state, masks_to_state

__all__ = ["MaskStep"]

log = logging.getLogger(__name__)


class MaskStep(Step):
    """Apply a mask, keep its zeros through training, remove it.

    While it is in force, weights, gradients (before clipping and before DistributedDataParallel
    averages them) and optimizer state are zero where pruned; saving raises if a pruned weight grew.
    The masks themselves are kept with the checkpoint: a resumed run is masked at once, and needs
    the file only to see that it is the same. So are the steps and the recipe; others are refused.
    When training ends the zeros stay and nothing watches them any more; training on masks again.

    Args:
        masks: MaskSet, tensors, file, or recipe (made from the weights when it is applied).
        at: finished steps after which it is applied; 0: before the first.
        remove_at: finished steps after which pruned weights may grow again; None: never.
        save: save a checkpoint ``opentrans_masked_STEP`` just before removing.
        tower: module path of the tower, "" to find it.

    Raises PlanError for ``remove_at`` before ``at``.
    """

    def __init__(
        self,
        masks: Masks,
        at: int = 0,
        remove_at: int | None = None,
        save: bool = True,
        *,
        tower: str = "",
    ) -> None:
        super().__init__(tower)
        if at < 0 or (remove_at is not None and remove_at <= at):
            raise PlanError(
                f"a mask applied after step {at} cannot be removed after step {remove_at}. Use "
                "at >= 0 and a larger remove_at, or None to keep it."
            )
        self._given, self.at, self.remove_at, self.save = masks, at, remove_at, save
        #: The masks in force or done with, under the tower's names; None before.
        self.masks: MaskSet | None = None
        self.removed = False
        self._guard: MaskGuard | None = None

    @property
    def in_force(self) -> bool:
        """Whether training keeps pruned weights at zero now."""
        return self._guard is not None

    def before_train(self) -> None:
        super().before_train()
        self._release()  # of a trainer that called no after_train
        going_on = self.masks is not None  # resumed, or a second training of one trainer
        if going_on:
            self._same_as_given()
        elif self._recipe is None:
            masks_for(self.tower, self._given)  # no file, other backbone: say so before step `at`
        if (going_on or self.trainer.start_iter >= self.at) and not self.removed:
            self._apply()

    def after_step(self) -> None:
        done = self.done
        if not self.in_force and not self.removed and done >= self.at:
            self._apply()
        if self.in_force and self.remove_at is not None and done >= self.remove_at:
            self._remove(done)

    def after_train(self) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        masks = None if self.masks is None else masks_to_state(self.masks)
        return {"settings": self._settings(), "masks": masks, "removed": self.removed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint says; acted on when training starts.

        Raises MaskError if the run was started with other steps or another recipe.
        """
        found = differences(state["settings"], self._settings())
        if found:
            raise MaskError(
                f"the run was started with another way of masking: {'; '.join(found)}. Resume with "
                "the MODEL.OPENTRANS.MASK settings of the run, or start a new run in another "
                "OUTPUT_DIR."
            )
        if state["masks"] is not None:
            self.masks = masks_from_state(state["masks"])
            self.removed = bool(state["removed"])

    @property
    def _recipe(self) -> str | None:
        """What the masks are made by, where they are neither a file nor given."""
        given = self._given
        return given if isinstance(given, str) and is_mask_spec(given) else None

    def _settings(self) -> dict[str, Any]:
        return {"at": self.at, "remove_at": self.remove_at, "recipe": self._recipe}

    def _apply(self) -> None:
        if self.masks is None:
            self.masks = masks_for(self.tower, self._given)
        check_same("the pruning masks", self.masks.content_hash())
        self._guard = preserve_masks(self.tower, self.trainer.optimizer, self.masks)
        log.info("mask in force: %s", self.masks)
        if self.masks.nnz == self.masks.numel:
            log.warning("this mask removes no weight at all: %s", self.masks)
        self.put("density", self.masks.density())

    def _remove(self, done: int) -> None:
        assert self._guard is not None
        self._guard.check()
        checkpointer = getattr(self.trainer, "checkpointer", None)
        if self.save and checkpointer is not None:
            checkpointer.save(f"opentrans_masked_{done:07d}")
        elif self.save:
            log.warning(
                "the trainer has no checkpointer, so the masked model after step %d was not saved. "
                "Use DefaultTrainer, or MaskHook(save=False).",
                done,
            )
        self._release()
        self.removed = True
        log.info("mask removed after step %d: pruned weights train again, from zero", done)

    def _release(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def _same_as_given(self) -> None:
        """A file or set given now must be the run's; a recipe depends on the weights it was for."""
        assert self.masks is not None
        try:
            self.masks = self.masks.transfer_to(self.tower)
        except MaskError as error:
            raise MaskError(
                f"the checkpoint's masks are of another backbone: {error} Resume with the model "
                "the run was started with."
            ) from error
        if self._recipe is not None:
            return
        now = masks_for(self.tower, self._given).content_hash()
        if now != self.masks.content_hash():
            raise MaskError(
                f"the run was started with masks {self.masks.content_hash()[:12]}, now given are "
                f"{now[:12]}. Resume with the mask file of the run, or start a new run in another "
                "OUTPUT_DIR."
            )
