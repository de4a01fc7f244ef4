"""Alphas of dense and of masked weights: which were seen, what is warned of, and what moves."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from freeze_cases import Chain, alpha_table, alphas
from spectrum_cases import heavy
from torch import nn
from torch.nn.utils import parametrize, prune

from opentrans import freeze_plan
from opentrans.freeze import (
    Disagreement,
    FreezePlan,
    alpha_along_rounds,
    freeze_set,
    tables_of,
)
from opentrans_kernels.errors import MaskError, OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.spectrum import (
    AlphaTable,
    estimate_alpha,
    estimate_alpha_distributed,
    select,
)


def by_magnitude(weight: torch.Tensor, kept: float) -> torch.Tensor:
    """True for the largest ``kept`` of the weights."""
    count = round(kept * weight.numel())
    bound = weight.abs().flatten().topk(count).values[-1]
    return weight.abs() >= bound


def planted(seed: int, size: int = 128) -> torch.Tensor:
    """A square weight whose squared singular values follow a power law of exponent 2 exactly."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((size, size)))[0] for _ in range(2))
    spectrum = size / (np.arange(size) + 0.5)
    return torch.from_numpy(left * np.sqrt(spectrum) @ right).float()


@pytest.mark.parametrize("seed", range(5))
def test_masking_by_magnitude_moves_alpha_of_a_heavy_tail(seed: int) -> None:
    weight = planted(seed)
    mask = by_magnitude(weight, 0.1)
    weights = {"dense": weight, "masked": weight * mask}
    for fit, least, most in (("ks", 1.2, 1.5), ("weightwatcher", 1.2, 1.5), ("xmin_mid", 0.8, 1)):
        dense, masked = estimate_alpha(weights, fit)
        assert dense.alpha == pytest.approx(2.0, abs=0.05)
        assert masked.zeros == pytest.approx(0.9, abs=1e-3) and dense.zeros == 0
        assert least < masked.alpha / dense.alpha < most, fit


@pytest.fixture
def model() -> Chain:
    torch.manual_seed(0)
    net = Chain(width=24)
    with torch.no_grad():
        for i in range(4):
            conv = getattr(net, f"conv{i}")
            conv.weight.copy_(heavy(*conv.weight.shape, seed=i))
    return net


def magnitude_masks(model: nn.Module, kept: float, names=("conv1", "conv2", "conv3")) -> MaskSet:
    return MaskSet({n: by_magnitude(model.get_submodule(n).weight, kept) for n in names})


def test_rows_count_the_exact_zeros_they_saw(model: Chain) -> None:
    masks = magnitude_masks(model, 0.25)
    table = estimate_alpha(model, "ks")
    assert table.zeros == 0 and table.weights_seen == "dense" and table.notes == ()
    under = estimate_alpha(model, "ks", masks=masks)
    assert under["conv0"].zeros == 0 and not under["conv0"].masked
    for name in ("conv1", "conv2", "conv3"):
        assert under[name].zeros == 1 - float(masks.masks[name].float().mean())
        assert under[name].alpha != table[name].alpha
    sizes = {row.name: math.prod(row.shape) for row in under}
    share = sum(under[name].zeros * size for name, size in sizes.items()) / sum(sizes.values())
    assert under.zeros == pytest.approx(share) and under.weights_seen == "masked"
    (note,) = under.notes
    assert note.startswith("masked weights: 3 of 4 layers hold exact zeros (75.0% of their weights")
    assert "Estimate the weights from before pruning" in note and note in str(under)
    back = AlphaTable.from_json(under.to_json())
    assert back.rows == under.rows and back.notes == under.notes
    assert "zeros" in under.to_csv().splitlines()[0]
    masks.apply_(model)
    applied = estimate_alpha(model, "ks")
    assert applied.rows == under.rows


def test_tables_written_before_zeros_were_counted_are_read(model: Chain) -> None:
    table = estimate_alpha(model, "ks")
    record = json.loads(table.to_json())
    for layer in record["layers"]:
        del layer["zeros"]
    old = AlphaTable.from_json(json.dumps(record))
    assert old.alphas() == table.alphas() and math.isnan(old.zeros)
    assert not any(row.masked for row in old)
    magnitude_masks(model, 0.2).apply_(model)
    plan = freeze_plan(model, old)  # judged by the model as it is now
    assert plan.weights_seen == "masked" and "masked weights: 3 of 4" in plan.notes[0]
    assert freeze_plan(model, old, weights_seen="dense").notes == ()


class Mask(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_dense_weights_under_the_masks_are_taken(how: str, model: Chain) -> None:
    dense = estimate_alpha(model, "ks")
    masks = magnitude_masks(model, 0.25)
    under = estimate_alpha(model, "ks", masks=masks)
    for name, mask in masks.masks.items():
        if how == "prune":
            prune.custom_from_mask(model.get_submodule(name), "weight", mask)
        else:
            parametrize.register_parametrization(
                model.get_submodule(name), "weight", Mask(mask), unsafe=True
            )
    taken = estimate_alpha(model, "ks")
    assert taken.alphas() == dense.alphas() and taken.weights_seen == "dense"
    assert [row.params for row in taken] == [row.params for row in dense]
    (note,) = taken.notes
    assert "3 of the weights have masks of their own (which remove 75.0%)" in note
    assert "weights='masked' measures" in note
    masked = estimate_alpha(model, "ks", weights="masked")
    assert masked.alphas() == under.alphas() and masked.weights_seen == "masked"
    assert "masked weights: 3 of 4" in masked.notes[0] and len(masked.notes) == 1
    assert estimate_alpha_distributed(model, "ks").alphas() == dense.alphas()
    shared = estimate_alpha_distributed(model, "ks", weights="masked")
    assert shared.alphas() == masked.alphas() and shared.notes == masked.notes
    plan = freeze_plan(model, masked, also=taken)
    assert plan.weights_seen == "dense" and plan.frozen == freeze_set(dense)
    assert plan.disagreement is not None and plan.disagreement.second == "masked weights"
    # Layers as views are those the network computes with, unless asked otherwise.
    assert float((select(model)[1].weight == 0).float().mean()) > 0.7
    assert not (select(model, weights="dense")[1].weight == 0).any()


def test_masks_that_hold_everything_are_nothing_to_tell(model: Chain) -> None:
    prune.identity(model.conv1, "weight")
    assert estimate_alpha(model, "ks").notes == ()


def test_a_network_whose_masks_cannot_be_told_is_measured_as_it_computes(model: Chain) -> None:
    both = by_magnitude(model.conv1.weight, 0.5)
    for _ in range(2):
        parametrize.register_parametrization(model.conv1, "weight", Mask(both), unsafe=True)
    table = estimate_alpha(model, "ks")
    assert "weights are measured as the network computes" in table.notes[0]
    assert table["conv1"].zeros == pytest.approx(0.5, abs=0.01) and len(table.notes) == 2


def test_a_plan_takes_the_denser_table_and_says_where_the_other_differs(model: Chain) -> None:
    dense = estimate_alpha(model, "xmin_mid")
    masks = magnitude_masks(model, 0.04, ("conv1", "conv3"))
    masked = estimate_alpha(model, "xmin_mid", masks=masks)
    expected = {name: freeze_set(table) for name, table in (("d", dense), ("m", masked))}
    assert expected["d"] != expected["m"], "the case proves nothing"
    for tables in ((dense, masked), (masked, dense)):
        plan = freeze_plan(model, tables[0], also=tables[1])
        assert plan.frozen == expected["d"] and plan.weights_seen == "dense"
        differ = plan.disagreement
        assert differ is not None and (differ.first, differ.second, differ.layers) == (
            "dense weights", "masked weights", 4,
        )  # fmt: skip
        assert set(differ.only_first) == expected["d"] - expected["m"]
        assert set(differ.only_second) == expected["m"] - expected["d"]
        assert differ.count == len(expected["d"] ^ expected["m"]) and str(differ) in str(plan)
        assert not any("masked weights" in note for note in plan.notes)
        back = FreezePlan.from_json(plan.to_json())
        assert back == plan or (back.disagreement == differ and str(back) == str(plan))
    alone = freeze_plan(model, masked)
    assert alone.weights_seen == "masked" and alone.frozen == expected["m"]
    assert alone.notes[0].startswith("masked weights: 2 of 4 layers") and alone.disagreement is None
    assert alone.notes[0] in str(alone) and "from masked weights" in str(alone)
    record = json.loads(alone.to_json())
    del record["disagreement"]  # a plan written before there was one
    assert FreezePlan.from_json(json.dumps(record)).to_json() == alone.to_json()
    twice = freeze_plan(model, masked, also=masked).disagreement
    assert twice is not None and twice.count == 0 and "the same over 4 layers" in str(twice)
    assert twice.first.startswith("weights with ") and twice.first.endswith("% zeros")


def test_tables_that_do_not_belong_together_are_refused(model: Chain) -> None:
    one, other = estimate_alpha(model, "ks"), estimate_alpha(model, "xmin_mid")
    with pytest.raises(PlanError, match="do not belong together: ks and xmin_mid"):
        freeze_plan(model, one, also=other)
    fewer = AlphaTable(one.rows[:3], "ks", one.parameters)
    with pytest.raises(PlanError, match="4 and 3 layers"):
        freeze_plan(model, one, also=fewer)
    with pytest.raises(PlanError, match="rule 'all_3x3' has none. Leave it out"):
        freeze_plan(model, one, "all_3x3", also=one)
    with pytest.raises(PlanError, match="no alphas are given beside it"):
        freeze_plan(model, None, also=one)


def test_bad_masks_and_words_are_refused(model: Chain) -> None:
    with pytest.raises(OpenTransError, match="weights='both' is not known.*'dense', 'masked'"):
        estimate_alpha(model, weights="both")
    good = magnitude_masks(model, 0.5)
    with pytest.raises(MaskError):
        estimate_alpha(model, masks=MaskSet({"conv9": good.masks["conv1"]}))
    weights = {"a.weight": heavy(24, 24), "b": heavy(24, 24, seed=1)}
    mask = MaskSet({"a": by_magnitude(weights["a.weight"], 0.5)})
    found = estimate_alpha(weights, "ks", masks=mask)
    assert [row.zeros for row in found] == [0.5, 0]
    with pytest.raises(MaskError, match="1 of 1 masks belong to no weight.*'c'"):
        estimate_alpha(weights, masks=MaskSet({"c": mask.masks["a"]}))
    with pytest.raises(MaskError, match=r"layer 'a': its mask has shape \(3, 3\)"):
        estimate_alpha(weights, masks=MaskSet({"a": torch.ones(3, 3, dtype=torch.bool)}))


def test_alpha_along_the_rounds_of_pruning(model: Chain, tmp_path) -> None:
    before = copy.deepcopy(model.state_dict())
    masks = [magnitude_masks(model, kept) for kept in (0.5, 0.25, 0.1)]
    retrained = copy.deepcopy(model)
    masks[2].apply_(retrained)
    with torch.no_grad():
        retrained.conv0.weight.mul_(torch.rand_like(retrained.conv0.weight))
    labels = ("xmin_mid", "ks", "farms")
    found = alpha_along_rounds(model, [*masks, retrained], labels=labels, threads=1)
    assert [stage.name for stage in found.stages] == ["dense", *(f"round {i}" for i in range(1, 5))]
    assert list(found.dense.tables) == ["xmin_mid", "ks", "farms xmin_mid"]
    assert found.dense.moved == {} and found.dense.zeros == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    zeros = [stage.zeros for stage in found.stages]
    assert zeros[:4] == sorted(zeros[:4]) and zeros[3] == zeros[4] > 0.7
    for stage, one in zip(found.stages[1:4], masks, strict=True):
        assert stage.tables["ks"].rows == estimate_alpha(model, "ks", masks=one).rows
        assert set(stage.frozen["ks"]) == freeze_set(stage.tables["ks"])
        moved = stage.moved["ks"]
        assert moved.count == len(set(stage.frozen["ks"]) ^ set(found.dense.frozen["ks"]))
    last = found.stages[4].tables["ks"]
    assert last.rows == estimate_alpha(retrained, "ks").rows
    assert last["conv0"].alpha != found.stages[3].tables["ks"]["conv0"].alpha
    record = json.loads(found.to_json(tmp_path / "rounds.json"))
    assert record == json.loads((tmp_path / "rounds.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == [s.name for s in found.stages]
    entry = record["stages"][2]["estimates"]["ks"]
    assert entry["alpha"]["conv2"] == found.stages[2].tables["ks"]["conv2"].alpha
    assert entry["moved"]["count"] == found.stages[2].moved["ks"].count
    assert record["stages"][2]["layer_zeros"]["conv2"] == pytest.approx(0.75, abs=0.01)
    assert record["stages"][0]["estimates"]["farms xmin_mid"]["alpha"]["conv0"] == "nan"
    lines = str(found).splitlines()
    assert len(lines) == 1 + 15 + 1 and "differ from dense" in lines[0]
    named = alpha_along_rounds(model, {"half": masks[0]}, rule="ratio:0.5")
    assert [stage.name for stage in named.stages] == ["dense", "half"] and named.rule == "ratio:0.5"


def test_rounds_that_do_not_fit_are_refused(model: Chain) -> None:
    with pytest.raises(PlanError, match="at least one fit"):
        alpha_along_rounds(model, [], labels=())
    with pytest.raises(PlanError, match="rule 'all_3x3' does not look at alphas"):
        alpha_along_rounds(model, [], rule="all_3x3")
    with pytest.raises(PlanError, match="round 1 is a dict, neither masks nor a network"):
        alpha_along_rounds(model, [{}])  # type: ignore[list-item]
    with pytest.raises(PlanError, match="round 1 has 5 layers, the dense network 4"):
        alpha_along_rounds(model, [Chain(5, width=24)])
    with pytest.raises(OpenTransError, match="fit='mid' is not known"):
        alpha_along_rounds(model, [], labels=("farms mid",))
    with pytest.raises(OpenTransError, match="method='nearest' is not known"):
        tables_of(model, ("nearest ks",))


def test_a_freeze_set_is_that_of_the_plan() -> None:
    for values in ((2, 5, 3, 4), (2, math.nan, 3, math.inf)):
        net = Chain()
        table = alpha_table(net, alphas(*values))
        for rule in ("median", "above_median", "ratio:0.5"):
            assert freeze_set(table, rule) == freeze_plan(net, table, rule).frozen
    one = Disagreement.of("a", {"x", "y"}, "b", {"y", "z"}, ["z", "y", "x", "w"])
    assert (one.only_first, one.only_second, one.count) == (("x",), ("z",), 2)
    assert Disagreement.from_dict(one.to_dict()) == one
    assert str(one) == (
        "freeze sets of a and of b: 2 of 4 layers differ; frozen only by a: x; only by b: z"
    )
