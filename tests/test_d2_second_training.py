"""A trainer that trains twice, or fails: hooks take off what they put on, and do nothing twice."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from d2_models import SIZE, Evaluation, Trainer, dead_are_zero, segmenter  # noqa: E402

from opentrans.d2.training import AccelerateStep, FreezeStep, ImpStep, MaskStep, Step  # noqa: E402
from opentrans.imp.config import ImpConfig  # noqa: E402
from opentrans.imp.schedule import ImpSchedule  # noqa: E402
from opentrans_kernels import MaskSet  # noqa: E402
from opentrans_kernels.plan.subject import accelerated_parts  # noqa: E402
from opentrans_kernels.synthetic import synthetic_masks  # noqa: E402


@pytest.fixture
def masks() -> MaskSet:
    return synthetic_masks(segmenter().backbone, "global:0.8")


class Fails(Step):
    """Raises behind the step of that number."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def after_step(self) -> None:
        if self.done == self.step:
            raise RuntimeError("planned")


def gradient_hooks(model: nn.Module) -> list[int]:
    """How many hooks every parameter has."""
    return [len(p._backward_hooks or ()) for p in model.parameters()]


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> int:
    kinds = ("state_dict_pre", "load_state_dict_pre", "step_pre", "step_post")
    return sum(len(getattr(optimizer, f"_optimizer_{kind}_hooks")) for kind in kinds)


@pytest.mark.parametrize("kind", ["mask", "imp"])
@pytest.mark.parametrize("fails", [False, True])
def test_training_takes_off_what_it_put_on_and_can_be_repeated(
    kind: str, fails: bool, masks: MaskSet
) -> None:
    hook = (
        MaskStep(masks)
        if kind == "mask"
        else ImpStep(ImpConfig(ImpSchedule(rounds=2, rate=0.5, period=1)))
    )
    during: list[tuple[int, int]] = []
    trainer = Trainer(segmenter(), [hook])

    def count() -> None:
        during.append((max(gradient_hooks(trainer.model)), optimizer_hooks(trainer.optimizer)))

    for one in (Evaluation(1, count), *([Fails(2)] if fails else [])):
        one.trainer = trainer
        trainer._hooks.append(one)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            if fails:
                stack.enter_context(pytest.raises(RuntimeError, match="planned"))
            trainer.train(3)
        assert max(gradient_hooks(trainer.model)) == 0
        assert optimizer_hooks(trainer.optimizer) == 0
        assert hook.masks is not None
        assert dead_are_zero(trainer.model, hook.masks)
    assert set(during) == {(1, 2 if kind == "mask" else 0)}, "two trainings, one set of hooks"
    if kind == "imp":  # no round is done twice, and none of the first training is undone
        assert hook.masks.density() == pytest.approx(0.25, abs=1e-3)


def test_a_second_training_does_not_freeze_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hook = FreezeStep("median", skip=True)
    trainer = Trainer(segmenter(), [hook]).train(1)
    flags = [p.requires_grad for p in trainer.model.parameters()]
    modules = list(trainer.model.modules())
    trainer.train(1)
    assert [p.requires_grad for p in trainer.model.parameters()] == flags
    assert all(a is b for a, b in zip(modules, trainer.model.modules(), strict=True))
    assert caplog.text.count("parameters train on") == 1


class LastEvaluation(Evaluation):
    """Evaluates when training ended, as detectron2's does."""

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._func()


@pytest.mark.parametrize("first", ["accelerate", "evaluate"])
@pytest.mark.parametrize("fails", [False, True])
def test_evaluations_are_wrapped_once_and_given_back(
    first: str, fails: bool, masks: MaskSet
) -> None:
    entered: list[int] = []
    seen: list[int] = []

    class Counted(AccelerateStep):
        @contextlib.contextmanager
        def accelerated(self, model: nn.Module | None = None) -> Any:
            entered.append(1)
            with super().accelerated(model) as report:
                yield report

    own = [Counted("require", SIZE, measure=False)]
    evaluation = LastEvaluation(1, lambda: seen.append(len(accelerated_parts(trainer.model))))
    plain = evaluation._func
    own.insert(0 if first == "evaluate" else 1, evaluation)
    trainer = Trainer(segmenter(), [MaskStep(masks), *own, *([Fails(1)] if fails else [])])
    for run in (1, 2):
        with contextlib.ExitStack() as stack:
            if fails:
                stack.enter_context(pytest.raises(RuntimeError, match="planned"))
            trainer.train(3 if fails else 1)
        count = run * (1 if fails else 2)
        assert len(entered) == len(seen) == count, "every evaluation accelerated, and once"
        assert all(seen)
        # A hook that is still to evaluate when ours ends keeps it for that, once at most.
        if fails or first == "evaluate":
            assert evaluation._func is plain
