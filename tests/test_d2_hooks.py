"""What the hooks do, followed by a stand-in trainer: no detectron2 is needed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from d2_models import SIZE, Evaluation, Trainer, dead_are_zero, segmenter  # noqa: E402

from opentrans.d2.training import (  # noqa: E402
    AccelerateStep,
    FreezeStep,
    ImpStep,
    MaskStep,
    ReportStep,
    SettingsStep,
    Step,
)
from opentrans.freeze import freeze_plan  # noqa: E402
from opentrans.imp.config import ImpConfig  # noqa: E402
from opentrans.imp.schedule import ImpSchedule  # noqa: E402
from opentrans_kernels import MaskError, MaskSet, OpenTransError, PlanError  # noqa: E402
from opentrans_kernels.masks.names import conv_modules  # noqa: E402
from opentrans_kernels.plan.subject import accelerated_parts  # noqa: E402
from opentrans_kernels.synthetic import synthetic_masks  # noqa: E402


@pytest.fixture
def masks() -> MaskSet:
    return synthetic_masks(segmenter().backbone, "global:0.8")


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def check_resume(make: Callable[[], Step], stops: range, last: int) -> None:
    """A run interrupted after any of ``stops`` steps ends as one that was not."""
    whole = Trainer(segmenter(), [make()]).train(last)
    for stop in stops:
        state = Trainer(segmenter(), [make()]).train(stop, last).state()
        again = Trainer(segmenter(seed=9), [make()]).resume(state).train(last)
        assert same(whole.model, again.model), f"interrupted after {stop} steps"
        assert again._hooks[0].state_dict().keys() == whole._hooks[0].state_dict().keys()


def test_mask_is_applied_kept_and_removed(masks: MaskSet) -> None:
    hook = MaskStep(masks, at=2, remove_at=4)
    trainer = Trainer(segmenter(), [hook])
    seen = []

    class Look(Step):
        def after_step(self) -> None:
            seen.append((dead_are_zero(trainer.model, masks), hook.in_force))

    look = Look()
    look.trainer = trainer
    trainer._hooks.append(look)
    trainer.train(6)
    assert seen == [(False, False), *[(True, True)] * 2, (True, False), *[(False, False)] * 2]
    assert trainer.checkpointer.saved == ["opentrans_masked_0000004"]
    assert trainer.storage.scalars["opentrans/density"] == pytest.approx(0.2, abs=1e-3)
    assert hook.removed


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_mask_holds_under_optimizers_with_momentum(
    masks: MaskSet, optimizer: type[torch.optim.Optimizer]
) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trainer = Trainer(segmenter(), [MaskStep(masks)], optimizer, **options).train(5)
    assert dead_are_zero(trainer.model, masks)
    untouched = segmenter().backbone.state_dict()
    moved = [n for n, v in trainer.model.backbone.state_dict().items() if (v != untouched[n]).any()]
    assert len(moved) > 20, "nothing trained, so the zeros prove nothing"


def test_mask_resumes_at_every_phase(masks: MaskSet) -> None:
    check_resume(lambda: MaskStep(masks, at=1, remove_at=3), range(1, 4), 5)


def test_recipe_resumes_with_the_masks_of_the_run() -> None:
    check_resume(lambda: MaskStep("global:0.5", at=1), range(1, 3), 3)


def test_resume_with_another_mask_is_refused(masks: MaskSet) -> None:
    state = Trainer(segmenter(), [MaskStep(masks)]).train(1, 2).state()
    other = synthetic_masks(segmenter().backbone, "uniform:0.8")
    with pytest.raises(MaskError, match="Resume with the mask file of the run"):
        Trainer(segmenter(), [MaskStep(other)]).resume(state).train(2)


@pytest.mark.parametrize(
    ("run", "now", "what"),
    [
        ({"at": 1}, {"at": 2}, "at is 1 in the run, 2 now"),
        ({"remove_at": 5}, {"remove_at": 6}, "remove_at is 5 in the run, 6 now"),
        ({"masks": "global:0.5"}, {"masks": "global:0.9"}, "recipe is 'global:0.5' in the run"),
        ({"masks": "global:0.5", "at": 4}, {"masks": "uniform:0.5", "at": 4}, "'uniform:0.5' now"),
    ],
)
def test_resume_with_another_way_of_masking_is_refused(
    run: dict[str, Any], now: dict[str, Any], what: str, masks: MaskSet
) -> None:
    state = Trainer(segmenter(), [MaskStep(**({"masks": masks} | run))]).train(2, 8).state()
    other = MaskStep(**({"masks": masks} | now))
    with pytest.raises(MaskError, match=f"{what}.*MODEL.OPENTRANS.MASK settings of the run"):
        Trainer(segmenter(), [other]).resume(state)


def test_a_restored_mask_is_in_force_at_once(masks: MaskSet) -> None:
    state = Trainer(segmenter(), [MaskStep(masks, at=2)]).train(2, 8).state()
    hook = MaskStep(masks, at=2)
    trainer = Trainer(segmenter(seed=9), [hook]).resume(state)
    trainer.start_iter = 0
    trainer._hooks.append(Evaluation(1, lambda: seen.append(hook.in_force)))
    trainer._hooks[1].trainer = trainer
    seen: list[bool] = []
    trainer.train(1, 8)
    assert seen == [True] and dead_are_zero(trainer.model, masks)


KINDS = ["AlphaFreezeHook", "MaskHook"]


@pytest.mark.parametrize("now", [[], ["MaskHook"], ["AlphaFreezeHook", "IMPHook", "MaskHook"]])
def test_resume_with_a_hook_taken_out_or_added_is_refused(now: list[str]) -> None:
    state = Trainer(segmenter(), [SettingsStep(reversed(KINDS))]).train(1, 2).state()
    with pytest.raises(PlanError, match=r"AlphaFreezeHook, MaskHook, now.*another OUTPUT_DIR"):
        Trainer(segmenter(), [SettingsStep(now)]).resume(state)
    Trainer(segmenter(), [SettingsStep(KINDS)]).resume(state).train(2)
    plain = Trainer(segmenter(), [SettingsStep()]).train(1, 2).state()
    with pytest.raises(PlanError, match="started with no MaskHook, AlphaFreezeHook or IMPHook"):
        Trainer(segmenter(), [SettingsStep(KINDS)]).resume(plain)


def test_a_missing_mask_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = Trainer(segmenter(), [MaskStep(str(tmp_path / "none.safetensors"), at=3)])
    with pytest.raises(MaskError, match="existing file, or to a recipe"):
        trainer.train(1)


def test_mask_of_another_backbone_is_refused_before_the_first_step() -> None:
    wide = {"layer1.0.conv1": torch.ones(64, 64, 1, 1)}
    trainer = Trainer(segmenter(), [MaskStep(wide, at=3)])
    with pytest.raises(MaskError, match="use the architecture the masks were made for"):
        trainer.train(1)


def test_two_hooks_of_a_kind_and_impossible_steps_are_refused(masks: MaskSet) -> None:
    with pytest.raises(OpenTransError, match="Register it once"):
        Trainer(segmenter(), [MaskStep(masks), MaskStep(masks)]).train(1)
    with pytest.raises(PlanError, match="larger remove_at"):
        MaskStep(masks, at=3, remove_at=3)


def test_a_trainer_without_checkpointer_is_told(
    masks: MaskSet, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(segmenter(), [MaskStep(masks, remove_at=1)])
    trainer.checkpointer = None  # type: ignore[assignment]
    trainer.train(2)
    assert "was not saved" in caplog.text and "save=False" in caplog.text


def test_frozen_layers_do_not_move_and_the_rest_does() -> None:
    hook = FreezeStep("median", at=2)
    trainer = Trainer(segmenter(), [hook]).train(2)
    assert hook.plan is not None
    before = {n: v.clone() for n, v in hook.tower.named_parameters()}
    norms = {n: v.clone() for n, v in hook.tower.named_buffers() if "running" in n}
    trainer.start_iter = 2
    # Gradients of zero instead of none are what would move a frozen weight through its momentum.
    zero_grad = trainer.optimizer.zero_grad
    trainer.optimizer.zero_grad = lambda: zero_grad(set_to_none=False)  # type: ignore[method-assign]
    trainer.train(6)
    now = dict(hook.tower.named_parameters())
    frozen = set(hook.plan.parameters)
    assert frozen and all(torch.equal(now[n], before[n]) for n in frozen)
    trains = [n for n, p in now.items() if p.requires_grad]
    assert all(not torch.equal(now[n], before[n]) for n in trains)
    assert all(now[n].grad is None for n in frozen)
    assert not [n for n in frozen if now[n] in trainer.optimizer.state]
    buffers = dict(hook.tower.named_buffers())
    assert all(torch.equal(buffers[n], value) for n, value in norms.items())
    scalars = trainer.storage.scalars
    assert scalars["opentrans/frozen_layers"] == len(hook.plan.frozen)
    assert scalars["opentrans/alpha/layer3.0.conv2"] > 1


def test_norms_stay_in_eval_mode_behind_an_evaluation() -> None:
    held = FreezeStep("median", norms="affine")
    trainer = Trainer(segmenter(), [held, Evaluation(1, lambda: None)])
    trainer._hooks[1]._func = lambda: trainer.model.train()
    trainer.train(2)
    assert trainer.model.training
    values = [b.clone() for n, b in held.tower.named_buffers() if "running_mean" in n]
    trainer.start_iter = 2
    trainer.train(4)
    assert all(
        torch.equal(a, b)
        for a, (n, b) in zip(
            values,
            [x for x in held.tower.named_buffers() if "running_mean" in x[0]],
            strict=True,
        )
    )


def test_norms_train_where_they_are_asked_to() -> None:
    hook = FreezeStep("median", norms="train")
    start = {n: b.clone() for n, b in segmenter().named_buffers() if "running_mean" in n}
    trainer = Trainer(segmenter(), [hook]).train(1)
    assert all(not torch.equal(b, start[n]) for n, b in trainer.model.named_buffers() if n in start)


def test_freezing_resumes_at_every_phase() -> None:
    check_resume(lambda: FreezeStep("median", at=2), range(1, 4), 5)


def test_freezing_skips_work_with_the_same_weights() -> None:
    sgd = torch.optim.SGD  # Adam would blow rounding of tiny gradients up
    plain = Trainer(segmenter(), [FreezeStep("prefix:layer2")], sgd).train(3)
    lean = Trainer(segmenter(), [FreezeStep("prefix:layer2", skip=True)], sgd).train(3)
    assert type(lean.model.backbone.layer1[0]) is not type(plain.model.backbone.layer1[0])
    for (name, a), b in zip(plain.model.named_parameters(), lean.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "change", [{"rule": "ratio:0.25"}, {"fit": "xmin_mid"}, {"at": 1}, {"norms": "train"}]
)
def test_resume_with_another_way_of_freezing_is_refused(change: dict[str, Any]) -> None:
    state = Trainer(segmenter(), [FreezeStep("median")]).train(1, 2).state()
    options: dict[str, Any] = {"rule": "median"} | change
    with pytest.raises(PlanError, match="Resume with the MODEL.OPENTRANS.FREEZE settings"):
        Trainer(segmenter(), [FreezeStep(**options)]).resume(state)


def test_freezing_everything_is_refused() -> None:
    model = segmenter()
    model.head.requires_grad_(False)
    tower = model.backbone
    owners = [n for n, m in tower.named_modules() if list(m.parameters(recurse=False))]
    plan = freeze_plan(tower, rule="list", layers=owners, allow_trivial=True)
    with pytest.raises(PlanError, match="nothing would train"):
        Trainer(model, [FreezeStep(plan)]).train(1)
    with pytest.raises(PlanError, match="median"):
        model.backbone.conv1.weight.requires_grad_(False)
        Trainer(model, [FreezeStep("opentrans")]).train(1)


def imp(**schedule: Any) -> ImpConfig:
    return ImpConfig(ImpSchedule(**{"rounds": 3, "rate": 0.5, "period": 1} | schedule))


def test_pruning_rounds_write_masks_and_resume(tmp_path: Path) -> None:
    hook = ImpStep(imp(), tmp_path / "masks")
    trainer = Trainer(segmenter(), [hook]).train(4)
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [
        "masks.safetensors", "round_01.safetensors", "round_02.safetensors",
        "round_03.safetensors",
    ]  # fmt: skip
    last = MaskSet.load(tmp_path / "masks" / "masks.safetensors")
    assert last.density() == pytest.approx(0.125, abs=1e-3)
    assert dead_are_zero(trainer.model, last)
    assert trainer.storage.scalars["opentrans/pruning_round"] == 3
    assert last.match(segmenter()).complete
    check_resume(lambda: ImpStep(imp()), range(1, 4), 5)


def test_pruned_masks_say_where_they_are_from(masks: MaskSet) -> None:
    for weights, start, synthetic in (
        ("random", None, True),
        ("RN50.pt", None, False),
        ("RN50.pt", masks, True),
    ):
        model = segmenter()
        model.backbone.weights = weights
        hook = ImpStep(imp(), masks=start)
        Trainer(model, [hook]).train(1, 4)
        assert hook.masks is not None and hook.masks.source.synthetic is synthetic


def test_pruning_refuses_other_settings_and_warns_of_a_short_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = Trainer(segmenter(), [ImpStep(imp())]).train(1, 4).state()
    with pytest.raises(PlanError, match="Continue with the settings of the run"):
        Trainer(segmenter(), [ImpStep(imp(rate=0.25))]).resume(state).train(2, 4)
    Trainer(segmenter(), [ImpStep(imp(period=5))]).train(1)
    assert "SOLVER.MAX_ITER" in caplog.text


def test_evaluation_runs_accelerated_and_training_goes_on_dense(masks: MaskSet) -> None:
    image = torch.randn(1, 3, *SIZE)
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    trainer = Trainer(segmenter(), [MaskStep(masks)])

    def evaluate() -> None:
        with torch.no_grad():
            parts = accelerated_parts(trainer.model)
            fast = trainer.model(image)
            twin = segmenter(seed=5)
            twin.load_state_dict(trainer.model.state_dict())
            found.append((len(parts), fast, twin.eval()(image)))

    hook = AccelerateStep("require", SIZE, measure=False)
    for one in (hook, Evaluation(2, evaluate)):
        one.trainer = trainer
        trainer._hooks.append(one)
    trainer.train(4)
    assert [count > 0 for count, *_ in found] == [True, True]
    for _, fast, dense in found:
        torch.testing.assert_close(fast, dense, rtol=1e-4, atol=1e-5)
    assert not accelerated_parts(trainer.model) and trainer.model.training
    plain = Trainer(segmenter(), [MaskStep(masks)]).train(4)
    assert same(plain.model, trainer.model), "evaluations changed the training"


def test_an_evaluation_that_fails_leaves_the_model_dense() -> None:
    hooks = [AccelerateStep(measure=False, input_size=SIZE), Evaluation(1, lambda: 1 / 0)]
    trainer = Trainer(segmenter(), hooks)
    with pytest.raises(ZeroDivisionError):
        trainer.train(1)
    assert not accelerated_parts(trainer.model) and trainer.model.training


def test_a_tower_that_cannot_be_accelerated(caplog: pytest.LogCaptureFixture) -> None:
    model = segmenter().double()
    hook = AccelerateStep("auto", SIZE)
    hook.trainer = Trainer(model, [hook])
    with hook.accelerated() as report:
        assert report is None and not model.training
    assert model.training and "runs densely" in caplog.text and "model.float()" in caplog.text
    strict = AccelerateStep("require", SIZE)
    strict.trainer = hook.trainer
    with pytest.raises(OpenTransError, match="float"), strict.accelerated():
        pass
    Trainer(segmenter(), [AccelerateStep()]).train(1)
    assert "no EvalHook" in caplog.text


def test_report_says_what_trains_and_what_is_left(
    masks: MaskSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hooks = [MaskStep(masks), FreezeStep("median"), ReportStep(tmp_path, SIZE)]
    Trainer(segmenter(), hooks).train(2)
    start, end = json.loads((tmp_path / "opentrans_report.json").read_text())["records"]
    assert (start["when"], end["when"], end["steps"]) == ("start", "end", 2)
    assert start["tower"] == "backbone"
    assert start["effective_macs"] < start["nominal_macs"]
    first = conv_modules(segmenter().backbone)["conv1"].weight.numel()
    assert start["alive"] == masks.nnz + first
    assert 0 < start["tower_trainable"] < start["tower_parameters"]
    assert start["norms_in_training"] == 0
    assert "GMAC nominal" in caplog.text
