"""Freeze plans in files, and every refusal with its fix; nothing is changed by a refused plan."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from freeze_cases import NAN, Chain, alpha_table, alphas, chain_plan, trainable
from torch import nn

from opentrans import FreezePlan, freeze_plan
from opentrans_kernels.errors import CheckpointError, PlanError
from opentrans_kernels.spectrum import AlphaTable


@pytest.mark.parametrize("rule", ["median", "opentrans", "list:conv1,bn3", "random:5"])
def test_json_both_ways(rule: str, tmp_path) -> None:
    plan = chain_plan(alphas(2, math.inf, 3, NAN), rule)
    path = tmp_path / "plan.json"
    text = plan.to_json(path)
    assert path.read_text() == text
    for back in (FreezePlan.from_json(path), FreezePlan.from_json(text)):
        assert back.to_json() == text and back.digest() == plan.digest()
        assert str(back) == str(plan)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no standard JSON"))
    model = Chain()
    FreezePlan.from_json(path).apply(model)
    assert not set(plan.parameters) & trainable(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)


BAD = {
    "unknown rule": (dict(rule="meadian"), r"no freeze rule 'meadian'. Did you mean median"),
    "argument missing": (dict(rule="prefix:"), "misses its until"),
    "argument too many": (dict(rule="all_3x3:5"), "takes no argument. Write 'all_3x3' alone"),
    "foreign option": (dict(rule="all_3x3", seed=1), "does not use seed; it takes no option"),
    "no alphas": (dict(rule="median", alphas=None), r"alphas=estimate_alpha\(model\)"),
    "no seed": (dict(rule="random"), "Pass seed=0"),
    "bad ratio": (dict(rule="ratio:1.5"), "ratio 1.5 is not a share between 0 and 1"),
    "no number": (dict(rule="ratio:half"), "ratio must be a number, got 'half'"),
    "bad match": (dict(rule="random:1", match="work"), "match='count' or match='macs'"),
    "unknown layer": (dict(rule="list", layers=["conv7", "conv1"]), "conv7. Did you mean conv"),
    "a string of layers": (dict(rule="list", layers="conv1"), "needs layers= a list"),
    "unknown prefix": (dict(rule="prefix:layer2"), "'layer2' is none with parameters"),
    "everything": (
        dict(rule="list", layers=["conv0", "conv1", "conv2", "conv3", "head"]),
        "freezes all 5 layers.*allow_trivial=True",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case: str) -> None:
    arguments, message = BAD[case]
    model = Chain()
    table = arguments.pop("alphas", alpha_table(model, alphas(2, 5, 3, 4)))
    with pytest.raises(PlanError, match=message):
        freeze_plan(model, table, **arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3, 3, 3, 3), "4 alphas 4 are defined, from 3 to 3"),
        ((NAN, NAN, NAN, NAN), "of 4 alphas 0 are defined"),
        ((NAN, 3, NAN, NAN), "freezes nothing"),
    ],
)
def test_nothing_to_freeze(values, message) -> None:
    with pytest.raises(PlanError, match=message):
        chain_plan(alphas(*values))
    assert chain_plan(alphas(*values), allow_trivial=True).frozen == frozenset()


def test_a_table_of_another_model() -> None:
    table = alpha_table(Chain(), alphas(2, 5, 3, 4))
    with pytest.raises(PlanError, match=r"4 of its 4 layers are not in Other.*estimate_alpha"):
        freeze_plan(Other(), table)
    with pytest.raises(PlanError, match=r"conv0 with shape \(4, 3, 1, 1\), here .*\(8, 3, 1, 1\)"):
        freeze_plan(Chain(width=8), table)
    with pytest.raises(PlanError, match="no rows"):
        freeze_plan(Chain(), AlphaTable((), "xmin_mid"))


def test_a_plan_of_another_model_changes_nothing() -> None:
    plan = chain_plan(alphas(2, 5, 3, 4))
    for model, message in (
        (Other(), r"names 6 of 6 parameters that Other does not have.*freeze_plan\(model"),
        (Chain(width=8), r"shape \(4, 3, 1, 1\); this model's has shape \(8, 3, 1, 1\)"),
        (nn.Sequential(Chain()), r"Did you mean 0\."),
    ):
        before = trainable(model)
        with pytest.raises(PlanError, match=message):
            plan.apply(model)
        assert trainable(model) == before
    forged = dataclasses.replace(plan, decisions=plan.decisions[:1] * 2)
    assert forged.parameters == plan.decisions[0].parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a freeze plan"),
        ('{"kind": "opentrans alpha table"}', "is JSON, but no freeze plan"),
        ('{"kind": "opentrans freeze plan", "format": 99}', "has format 99; this version reads 1"),
        ('{"kind": "opentrans freeze plan", "format": 1}', "lacks or garbles a field"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path) -> None:
    with pytest.raises(PlanError, match=message):
        FreezePlan.from_json(text)
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        FreezePlan.from_json(path)
    with pytest.raises(PlanError, match="cannot be read"):
        FreezePlan.from_json(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="directory"):
        chain_plan(alphas(2, 5, 3, 4)).to_json(tmp_path)


def test_wrapped_models_are_refused(tmp_path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    plan = chain_plan(alphas(2, 5, 3, 4))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Chain()
        wrapped = DistributedDataParallel(model)
        for target in (wrapped, model, nn.Sequential(wrapped)):
            with pytest.raises(PlanError, match=r"6 parameters after .*Apply the plan before"):
                plan.apply(target)
        assert len(trainable(model)) == len(list(model.parameters()))
        del wrapped, target
        plan.apply(model)
        assert not set(plan.parameters) & trainable(model)
    finally:
        dist.destroy_process_group()


def test_accelerated_models_are_refused() -> None:
    model = Chain()
    plan = freeze_plan(model, rule="all_3x3")
    model.conv1.opentrans_original = nn.Conv2d(4, 4, 3)
    with pytest.raises(PlanError, match=r"restore\(model\) first"):
        plan.apply(model)
