"""The masked tower on the sparse kernels while a model is evaluated, and dense again after."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from opentrans_kernels.accelerate import Report, restore
from opentrans_kernels.errors import PlanError
from opentrans_kernels.plan import Plan
from opentrans_kernels.plan.subject import accelerated_parts

from ..attachment import speed_up
from .base import Step

__all__ = ["AccelerateStep"]

log = logging.getLogger(__name__)


class AccelerateStep(Step):
    """Wraps every evaluation of the trainer (detectron2's ``EvalHook``) in :meth:`accelerated`.

    The plan of the first evaluation, measured layer by layer, serves the later ones as long as the
    masks are the same. Predictions are those of the dense masked model, to float32 rounding.

    Args:
        policy: "auto": evaluate densely, with a line in the log, where the tower cannot be
            accelerated (another device or dtype); "require": raise there.
        input_size: (height, width) in pixels to plan and measure for.
        measure, threads: as in ``opentrans_kernels.accelerate``.
        tower: module path of the tower, "" to find it.
    """

    def __init__(
        self,
        policy: str = "auto",
        input_size: tuple[int, int] | None = None,
        measure: bool = True,
        threads: int | None = None,
        *,
        tower: str = "",
    ) -> None:
        super().__init__(tower)
        self.policy, self.input_size = policy, input_size
        self.measure, self.threads = measure, threads
        #: Report of the last evaluation; None if it ran densely.
        self.report: Report | None = None
        self._plan: Plan | None = None

    def before_train(self) -> None:
        super().before_train()
        found = [h for h in self.trainer._hooks if _evaluates(h)]
        for hook in found:
            hook._func = self._wrap(hook._func)
        if not found:
            log.warning(
                "the trainer has no EvalHook, so there is no evaluation to accelerate; call "
                "AccelerateForEvalHook.accelerated() around your own"
            )

    @contextlib.contextmanager
    def accelerated(self, model: nn.Module | None = None) -> Iterator[Report | None]:
        """The model in eval mode, its tower accelerated if it can be; undone at the end."""
        model = self.model if model is None else model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            self.report = self._start()
            yield self.report
        finally:
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

    def _speed_up(self) -> tuple[Report | None, str]:
        options: dict[str, Any] = {"input_size": self.input_size, "threads": self.threads}
        if self._plan is not None:
            try:
                return speed_up(self.tower, self.policy, self._plan, measure=False, **options)
            except PlanError:
                self._plan = None  # the zeros are others by now: plan anew
        return speed_up(self.tower, self.policy, measure=self.measure, **options)

    def _wrap(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with self.accelerated():
                return evaluate()

        return run


def _evaluates(hook: Any) -> bool:
    return callable(getattr(hook, "_func", None)) and hasattr(hook, "_period")
