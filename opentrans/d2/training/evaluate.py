"""The masked tower on the sparse kernels while a model is evaluated, and dense again after."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from opentrans_kernels.accelerate import Report, restore
from opentrans_kernels.errors import PlanError
from opentrans_kernels.heads import HeadReport, restore_heads
from opentrans_kernels.plan import Plan
from opentrans_kernels.plan.subject import accelerated_parts

from ..attachment import speed_up, speed_up_head
from .base import Step

__all__ = ["AccelerateStep"]

log = logging.getLogger(__name__)


class AccelerateStep(Step):
    """Wraps every evaluation of the trainer (detectron2's ``EvalHook``) in :meth:`accelerated`.

    The plan of the first evaluation, measured layer by layer, serves the later ones as long as the
    masks are the same. Predictions are those of the dense masked model, to float32 rounding. When
    training ends, evaluations are the trainer's own again.

    Args:
        policy: "auto": evaluate densely, with a line in the log, where the tower cannot be
            accelerated (another device or dtype); "require": raise there.
        input_size: (height, width) in pixels to plan and measure for.
        measure, threads: as in ``opentrans_kernels.accelerate``.
        heads: the known parts of the head, too, as in ``opentrans.d2.attach``.
        tower: module path of the tower, "" to find it.
    """

    def __init__(
        self,
        policy: str = "auto",
        input_size: tuple[int, int] | None = None,
        measure: bool = True,
        threads: int | None = None,
        *,
        heads: bool = True,
        tower: str = "",
    ) -> None:
        super().__init__(tower)
        self.with_heads = heads
        self.policy, self.input_size = policy, input_size
        self.measure, self.threads = measure, threads
        #: Reports of the last evaluation; None if it ran densely.
        self.report: Report | None = None
        self.heads: HeadReport | None = None
        self._told = ""  # about the head; the same is said once
        self._plan: Plan | None = None
        self._wrapped: list[Any] = []  # hooks whose evaluation runs accelerated

    def before_train(self) -> None:
        super().before_train()
        self._unwrap(self._wrapped)  # of a trainer that called no after_train
        self._wrapped = [h for h in self.trainer._hooks if _evaluates(h)]
        for hook in self._wrapped:
            hook._func = _Accelerated(self, hook._func)
        if not self._wrapped:
            log.warning(
                "the trainer has no EvalHook, so there is no evaluation to accelerate; call "
                "AccelerateForEvalHook.accelerated() around your own"
            )

    def after_train(self) -> None:
        # Hooks behind this one have their last evaluation still to do, and drop it then. After a
        # failure there is none.
        place = {id(hook): number for number, hook in enumerate(self.trainer._hooks)}
        own = place.get(id(self), len(place))
        ended = int(self.trainer.iter) + 1 >= int(self.trainer.max_iter)
        self._unwrap([h for h in self._wrapped if not ended or place.get(id(h), -1) < own])

    @contextlib.contextmanager
    def accelerated(self, model: nn.Module | None = None) -> Iterator[Report | None]:
        """The model in eval mode, tower and head accelerated if they can be; undone at the end."""
        model = self.model if model is None else model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            self.heads = None
            self.report = self._start()
            if self.report is not None and self.with_heads:
                self._start_head()
            yield self.report
        finally:
            restore_heads(self.model)
            if accelerated_parts(self.tower):
                restore(self.tower)
            for module, training in modes:
                module.training = training

    def _start(self) -> Report | None:
        began = time.perf_counter()
        report, note = self._speed_up()
        if note:
            log.warning("%s", note)
        if report is not None:
            self._plan = report.plan
            log.info(
                "tower accelerated for evaluation in %.1f s: %s",
                time.perf_counter() - began,
                f"{report.speedup:.2f}x" if report.speedup else "as planned",
            )
            if report.speedup:
                self.put("eval_speedup", report.speedup)
        return report

    def _start_head(self) -> None:
        self.heads, note = speed_up_head(self.model, self.tower, self.policy)
        if note and note != self._told:
            log.warning("%s", note)
        elif not self._told and self.heads is not None and self.heads.parts:
            note = str(self.heads)
            log.info("%s", note)
        self._told = note or self._told

    def _speed_up(self) -> tuple[Report | None, str]:
        options: dict[str, Any] = {"input_size": self.input_size, "threads": self.threads}
        if self._plan is not None:
            try:
                return speed_up(self.tower, self.policy, self._plan, measure=False, **options)
            except PlanError:
                self._plan = None  # the zeros are others by now: plan anew
        return speed_up(self.tower, self.policy, measure=self.measure, **options)

    def _unwrap(self, hooks: Sequence[Any]) -> None:
        for hook in hooks:
            found = getattr(hook, "_func", None)
            if isinstance(found, _Accelerated) and found.step is self:
                hook._func = found.evaluate
        self._wrapped = [hook for hook in self._wrapped if hook not in hooks]


class _Accelerated:
    """What a hook evaluates, on the accelerated tower."""

    def __init__(self, step: AccelerateStep, evaluate: Callable[[], Any]) -> None:
        self.step, self.evaluate = step, evaluate

    def __call__(self) -> Any:
        with self.step.accelerated():
            return self.evaluate()


def _evaluates(hook: Any) -> bool:
    return callable(getattr(hook, "_func", None)) and hasattr(hook, "_period")
