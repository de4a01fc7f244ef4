"""TrainingState: an interrupted run goes on as if it had not been, or says why it cannot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked_nets import assert_dead, masks_of, net
from torch import nn

from opentrans.freeze import freeze_plan
from opentrans.masked import MaskedOptimizer
from opentrans.state import TrainingState, read_training_state
from opentrans_kernels import CheckpointError, MaskError, MaskSet, OpenTransError, PlanError


class Run:
    """A masked run with a frozen layer, a schedule, and noise from three random generators."""

    def __init__(self, seed: int, masks: MaskSet, plan: Any = None, **config: Any) -> None:
        self.model = net(seed)
        self.plan = plan or freeze_plan(self.model, rule="list", layers=["5"], input_size=(8, 8))
        self.plan.apply(self.model)
        self.optimizer = MaskedOptimizer(torch.optim.AdamW, self.model, masks, lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.state = TrainingState(
            self.model,
            self.optimizer,
            masks=masks,
            freeze_plan=self.plan,
            extras={"scheduler": self.scheduler},
            config={"lr": 0.01, **config},
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            noise = random.random() + float(np.random.rand())
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 3, 8, 8) * noise).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.model.state_dict().items()}


@pytest.fixture
def masks() -> MaskSet:
    return masks_of(net())


def test_a_resumed_run_is_bit_equal(tmp_path: Path, masks: MaskSet) -> None:
    path = tmp_path / "run.pt"
    first = Run(0, masks)
    first.train(5)
    first.state.save(path, step=5, round=2)
    first.train(5)
    expected, rate = first.weights(), first.optimizer.param_groups[0]["lr"]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)

    saved = read_training_state(path)
    assert saved.masks is not None and saved.masks.content_hash() == masks.content_hash()
    assert saved.freeze_plan is not None and saved.freeze_plan.frozen == {"5"}
    assert (saved.position.step, saved.position.round, saved.config) == (5, 2, {"lr": 0.01})
    second = Run(4, saved.masks, saved.freeze_plan)
    position = second.state.load(path)
    assert (position.step, position.round) == (5, 2)
    second.train(5)
    assert second.optimizer.param_groups[0]["lr"] == rate != 0.01
    for name, value in second.weights().items():
        assert torch.equal(value, expected[name]), name
    assert_dead(second.model, masks)


def test_loading_with_other_masks_or_none_is_refused(tmp_path: Path, masks: MaskSet) -> None:
    path = tmp_path / "run.pt"
    run = Run(0, masks)
    run.train(1)
    run.state.save(path, step=1)
    model = net(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(MaskError, match="no masks are given.*read_training_state"):
        TrainingState(model, optimizer).load(path)
    with pytest.raises(MaskError, match="Continue with the masks of the run"):
        TrainingState(model, optimizer, masks=masks_of(model, seed=8)).load(path)
    plain = tmp_path / "plain.pt"
    TrainingState(model, optimizer).save(plain, step=0)
    with pytest.raises(MaskError, match="is the state of a run without masks"):
        run.state.load(plain)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_settings_plans_models_and_parts_are_named(tmp_path: Path, masks: MaskSet) -> None:
    path = tmp_path / "run.pt"
    run = Run(0, masks, data="a")
    run.train(1)
    run.state.save(path, step=1)
    with pytest.raises(PlanError, match=r"data is 'a' in the run, 'b' now.*start a new one"):
        Run(0, masks, data="b").state.load(path)
    other = freeze_plan(net(), rule="list", layers=["0"], input_size=(8, 8))
    with pytest.raises(PlanError, match="freeze plan: 1 layers frozen in the file, 1 layers given"):
        Run(0, masks, other, data="a").state.load(path)
    same = Run(0, masks, data="a")
    same.state.extras = {}
    with pytest.raises(CheckpointError, match="Continue the run with the same extras"):
        same.state.load(path)
    same.state.extras, same.state.optimizer = run.state.extras, None
    with pytest.raises(CheckpointError, match="with an optimizer. Continue the run"):
        same.state.load(path)
    same.state.model = nn.Sequential(*run.model, nn.Linear(5, 2))
    with pytest.raises(CheckpointError, match=r"2 tensors differ, such as 9.bias"):
        same.state.load(path)


def test_grown_weights_are_not_saved_and_the_old_file_stays(tmp_path: Path, masks: MaskSet) -> None:
    path = tmp_path / "run.pt"
    run = Run(0, masks)
    run.state.save(path, step=1)
    kept = path.read_bytes()
    with torch.no_grad():
        run.model.get_submodule("3").weight[~masks.masks["3"]] = 1.0
    with pytest.raises(MaskError, match=r"not the pruned network.*masks.apply_"):
        run.state.save(path, step=2)
    masks.apply_(run.model)
    run.state.config["when"] = object()
    with pytest.raises(OpenTransError, match="config/when is a object.*Turn it into"):
        run.state.save(path, step=2)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


def test_damaged_and_foreign_files(tmp_path: Path, masks: MaskSet) -> None:
    path = tmp_path / "run.pt"
    run = Run(0, masks)
    run.state.save(path, step=1)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        run.state.load(path)
    torch.save(net().state_dict(), path)
    with pytest.raises(CheckpointError, match="not one of TrainingState.save"):
        read_training_state(path)


def _edited(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def _set(*keys: Any, value: Any) -> Any:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def _drop(*keys: Any) -> Any:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((_drop(key), f"its entry '{key}' is missing") for key in ("step", "masks", "model")),
        *((_drop(key), f"its entry '{key}' is missing") for key in ("optimizer", "random")),
        *((_drop("masks", key), f"'{key}' is missing") for key in ("digest", "bits", "shapes")),
        (_set("step", value=-1), "'step' is -1"),
        (_set("round", value=2**70), "'round' is 1180591620717411303424"),
        (_set("config", value=3), "'config' is 3"),
        (_set("model", value={"0.weight": 1}), "'model' is"),
        (_set("freeze_plan", value=1), "'freeze_plan' is 1"),
        (_set("masks", value=[]), "'masks' is"),
        (_set("random", "torch", value=torch.zeros(5, dtype=torch.uint8)), "random states cannot"),
        (_set("random", "python", value=(3, (1, 2), None)), "random states cannot"),
        (_set("random", "python", value=(3, tuple([2**70] * 625), None)), "random states cannot"),
        (_drop("random", "torch"), "random states cannot"),
        (_set("random", "numpy", value=("MT19937", torch.zeros(624).long(), 10**6, 0, 0.0)),
         "random states cannot"),
        (_set("optimizer", value={}), "another optimizer, or is damaged"),
        (_set("optimizer", "param_groups", value=3), "another optimizer, or is damaged"),
        (_set("extras", "scheduler", value=5), "state of 'scheduler' cannot"),
    ],
)  # fmt: skip
def test_entries_that_are_missing_or_odd(
    change: Any, words: str, tmp_path: Path, masks: MaskSet
) -> None:
    path = tmp_path / "run.pt"
    run = Run(0, masks)
    run.train(1)
    run.state.save(path, step=1)
    _edited(path, change)
    with pytest.raises(CheckpointError, match=words):
        run.state.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("masks", "shapes", "3", value=[20, 11, 1, 1]), "does not have its shape"),
        (_set("masks", "shapes", "3", value=[12, 20, 1, 1]), "recorded hash"),
        (_set("masks", "shapes", "3", value=[-20, -12, 1, 1]), "does not have its shape"),
        (_set("masks", "shapes", "3", value=[2**40, 2**40]), "does not have its shape"),
        (_set("masks", "bits", value={}), "disagree"),
        (_set("masks", "digest", value="0" * 64), "recorded hash"),
        (lambda c: c["masks"]["bits"]["3"].__setitem__(0, 7), "recorded hash"),
    ],
)
def test_masks_that_are_not_those_saved(
    change: Any, words: str, tmp_path: Path, masks: MaskSet
) -> None:
    path = tmp_path / "run.pt"
    Run(0, masks).state.save(path, step=1)
    _edited(path, change)
    with pytest.raises(CheckpointError, match=words):
        read_training_state(path)


def test_a_flipped_bit_in_the_pickle_hides_no_other(tmp_path: Path, masks: MaskSet) -> None:
    path = tmp_path / "run.pt"
    run = Run(0, masks)
    run.state.save(path, step=1)
    data = bytearray(path.read_bytes())
    data[data.index(b"digest") + 1] ^= 1
    path.write_bytes(data)
    for read in (read_training_state, run.state.load):
        with pytest.raises(CheckpointError, match="recorded checksum"):
            read(path)
