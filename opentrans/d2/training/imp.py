"""Iterative magnitude pruning of the tower while a trainer trains it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentrans_kernels.masks import MaskSet
from opentrans_kernels.spectrum.distributed import check_same

from ...imp import Pruner
from ...imp.config import ImpConfig
from ...imp.records import RoundRecord
from ...ovs.clip import RANDOM
from ..towers import Masks, masks_for
from .base import Step, is_main

__all__ = ["ImpStep"]

log = logging.getLogger(__name__)


class ImpStep(Step):
    """Rounds of :class:`~opentrans.imp.Pruner` after the steps its schedule names.

    After each round the masks are the same on all ranks, which is checked, and rank 0 writes
    ``round_NN.safetensors`` and ``masks.safetensors`` (the newest). Masks and rounds are kept with
    the checkpoint. Register it before the hook that saves checkpoints. The masks are labelled
    synthetic if the tower started from random weights, or the masks to start from are.

    Args:
        config: schedule, allocation, pattern, rewinding.
        output: folder of the mask files; None: none are written.
        masks: to start from.
        tower: module path of the tower, "" to find it.
    """

    def __init__(
        self,
        config: ImpConfig,
        output: str | os.PathLike[str] | None = None,
        masks: Masks | None = None,
        *,
        tower: str = "",
    ) -> None:
        super().__init__(tower)
        self.config, self.output, self._start = config, output, masks
        self.pruner: Pruner | None = None
        self._saved: Mapping[str, Any] | None = None

    @property
    def masks(self) -> MaskSet | None:
        """The masks as they are now."""
        return None if self.pruner is None else self.pruner.masks

    def before_train(self) -> None:
        super().before_train()
        if self.pruner is not None:  # a second training of one trainer goes on with the masks
            self._saved = self.state_dict()
            self.pruner.close()
        start = None if self._start is None else masks_for(self.tower, self._start)
        if self.output is None and is_main():
            log.warning(
                "the masks of the pruning rounds are kept in checkpoints only; IMPHook(output=...) "
                "names a folder for mask files"
            )
        random = getattr(self.tower, "weights", None) == RANDOM
        self.pruner = Pruner(
            self.tower,
            self.config,
            optimizer=self.trainer.optimizer,
            masks=start,
            synthetic=random or (start is not None and start.source.synthetic),
        )
        if self._saved is not None:
            self.pruner.load_state_dict(self._saved)
            self._saved = None
        if self.pruner.total_steps > self.trainer.max_iter:
            log.warning(
                "the last of %d pruning rounds takes place after step %d, but training ends after "
                "%d (SOLVER.MAX_ITER): the target density will not be reached",
                len(self.pruner.targets), self.pruner.total_steps, self.trainer.max_iter,
            )  # fmt: skip

    def after_step(self) -> None:
        assert self.pruner is not None
        record = self.pruner.after_step(self.done, self._loss())
        if record is not None:
            self._publish(record)

    def after_train(self) -> None:
        if self.pruner is not None:
            self.pruner.close()  # its gradient hooks; masks and rounds stay

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        if self._saved is not None:  # loaded, and training has not started yet
            return dict(self._saved)
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint says; the pruner compares settings when training starts."""
        self._saved = state

    def _loss(self) -> float | None:
        """Total loss of the step, where the trainer has written it."""
        latest = getattr(self.trainer.storage, "latest", None)
        found = latest().get("total_loss") if callable(latest) else None
        if found is None:
            return None
        return float(found[0] if isinstance(found, tuple) else found)

    def _publish(self, record: RoundRecord) -> None:
        assert self.pruner is not None
        masks = self.pruner.masks
        check_same(f"the masks of pruning round {record.round}", masks.content_hash())
        log.info(
            "pruning round %d of %d: %d weights removed, density %.4f",
            record.round, len(self.pruner.targets), record.removed, record.density,
        )  # fmt: skip
        self.put("density", record.density)
        self.put("pruning_round", record.round)
        if self.output is None or not is_main():
            return
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        masks.save(folder / f"round_{record.round:02d}.safetensors")
        masks.save(folder / "masks.safetensors")
