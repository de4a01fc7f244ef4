"""Freeze plans: each rule, what apply changes and leaves alone, files, and refusals with a fix."""

from __future__ import annotations

import math
import re

import hypothesis.strategies as st
import pytest
import torch
from freeze_cases import NAN, Chain, alpha_row, alpha_table, alphas, chain_plan, trainable
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import prune

import opentrans
from opentrans import freeze_plan
from opentrans.freeze import RULES
from opentrans_kernels.spectrum import AlphaTable


def test_public_names_are_lazy() -> None:
    assert opentrans.freeze_plan is freeze_plan
    assert set(opentrans.__all__) >= {"FreezePlan", "freeze_plan"}
    with pytest.raises(AttributeError, match="no attribute 'thaw_plan'"):
        _ = opentrans.thaw_plan


@pytest.mark.parametrize(
    ("rule", "values", "frozen", "threshold"),
    [
        ("median", (2, 5, 3, 4), {"conv0", "conv2"}, 3.5),
        ("median", (2, 5, 3), {"conv0"}, 3.0),  # the median itself trains: strictly below
        ("median", (2, 3, 3, 4), {"conv0"}, 3.0),
        ("median", (2, math.inf, 3, math.inf), {"conv0", "conv2"}, math.inf),
        ("median", (NAN, 5, 3, 4), {"conv2"}, 4.0),
        ("above_median", (2, 5, 3, 4), {"conv1", "conv3"}, 3.5),
        ("above_median", (2, 5, 3), {"conv1"}, 3.0),
        ("ratio:0.25", (2, 5, 3, 4), {"conv0"}, 2.0),
        ("ratio:0.75", (2, 5, 3, 4), {"conv0", "conv2", "conv3"}, 4.0),
        ("ratio:0.5", (2, 2, 2, 4), {"conv0", "conv1"}, 2.0),  # ties: network order
        ("ratio:0.5", (NAN, 5, 3, 4), {"conv2", "conv3"}, 4.0),
        ("median", (0.0, 5, 3, 4), {"conv2"}, 3.5),  # 0 is the published "no fit"
        ("opentrans", (0.0, 5, 3, 4), {"conv0", "conv2"}, 3.5),
    ],
)
def test_alpha_rules(rule, values, frozen, threshold) -> None:
    plan = chain_plan(alphas(*values), rule)
    assert plan.frozen == frozen
    assert plan.threshold == threshold
    assert plan.fit == "xmin_mid" and len(plan.alpha_digest) == 64
    reasons = {one.name: one.reason for one in plan.decisions}
    for name, value in alphas(*values).items():
        assert f"{value:.4g}" in reasons[name]


@given(st.lists(st.floats(1.0, 30.0) | st.just(NAN), min_size=2, max_size=12))
@settings(max_examples=60)
def test_median_is_strict_and_nan_never_freezes(values: list[float]) -> None:
    model = Chain(len(values))
    table = alpha_table(model, {f"conv{i}": value for i, value in enumerate(values)})
    plan = freeze_plan(model, table, "median", norms=False, allow_trivial=True)
    cut = table.median()
    assert plan.frozen == {f"conv{i}" for i, value in enumerate(values) if value < cut}
    assert 2 * len(plan.frozen) <= len([v for v in values if v == v])
    for one in plan.decisions:
        if any(value != value for value in one.alphas.values()):
            assert not one.frozen and "never frozen" in one.reason and "all zero" in one.reason


def test_batch_norms_follow_their_convolution() -> None:
    plan = chain_plan(alphas(2, 5, 3, 4))
    assert plan.norms == {"bn0", "bn2"} and plan.modules == {"conv0", "conv2", "bn0", "bn2"}
    assert plan.parameters == (
        "conv0.weight", "bn0.weight", "bn0.bias", "conv2.weight", "bn2.weight", "bn2.bias",
    )  # fmt: skip
    bare = chain_plan(alphas(2, 5, 3, 4), norms=False)
    assert bare.parameters == ("conv0.weight", "conv2.weight") and not bare.norms_frozen
    assert bare.digest() != plan.digest()


def test_apply_freezes_exactly_the_plan() -> None:
    model = Chain()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    plan = freeze_plan(model, alpha_table(model, alphas(2, 5, 3, 4)))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = plan.apply(model, optimizer)
    everything = {name for name, _ in model.named_parameters()}
    assert trainable(model) == everything - set(plan.parameters)
    assert set(done.frozen) == set(plan.parameters) and not done.already_frozen
    assert done.elements == sum(values[name].numel() for name in plan.parameters)
    own = dict(model.named_parameters())
    assert all(own[name].grad is None for name in plan.parameters)
    assert all(own[name].grad is not None for name in trainable(model))
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert kept == {id(own[name]) for name in trainable(model)} == {id(p) for p in optimizer.state}
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    for name, before in values.items():
        assert torch.equal(own[name], before) == (name in plan.parameters), name
    again = plan.apply(model, optimizer)
    assert not again.frozen and set(again.already_frozen) == set(plan.parameters)
    assert "0 elements" in str(again)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "opentrans"])
def test_nothing_the_user_froze_is_unfrozen(rule: str) -> None:
    model = Chain()
    model.conv1.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    options = {
        "ratio": {"ratio": 0.5}, "random": {"seed": 3}, "prefix": {"until": "conv0"},
        "list": {"layers": ["conv2"]},
    }  # fmt: skip
    plan = freeze_plan(model, alpha_table(model, alphas(2, 5, 3, 4)), rule, **options.get(rule, {}))
    assert plan.already_frozen == ("conv1.weight", "head.bias")
    plan.apply(model)
    assert not {"conv1.weight", "head.bias"} & trainable(model)
    assert trainable(model), "everything was frozen, so nothing is shown"


class Prefixed(nn.Module):
    """Names that begin with each other, and a norm inside and beside its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Conv2d(3, 3, 1, bias=i == 1) for i in (1, 2, 10)})
        self.bn1 = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.layers["1"](x))
        return self.layers["10"](self.layers["2"](x))


def test_published_rule_matches_by_prefix_and_enables_again() -> None:
    model = Prefixed()
    model.layers["2"].requires_grad_(False)
    model.layers["1"].norm = nn.BatchNorm2d(3)
    table = alpha_table(model, {"layers.1": 2.0, "layers.2": 4.0, "layers.10": 5.0})
    plan = freeze_plan(model, table, "opentrans")
    assert plan.frozen == {"layers.1", "layers.10"}  # 10 only because its name begins with "1"
    assert set(plan.parameters) == {
        "layers.1.weight", "layers.1.bias", "layers.1.norm.weight", "layers.1.norm.bias",
        "layers.10.weight",
    }  # fmt: skip
    done = plan.apply(model)
    assert trainable(model) == {"bn1.weight", "bn1.bias", "layers.2.weight"}
    assert done.trainable_again == ("layers.2.weight",) and "train again" in str(done)
    reasons = {one.name: one.reason for one in plan.decisions}
    assert "begins with layers.1" in reasons["layers.10"]

    exact = Prefixed()
    exact.layers["2"].requires_grad_(False)
    plan = freeze_plan(exact, alpha_table(exact, table.alphas()), "median")
    assert plan.modules == {"layers.1", "bn1"}
    plan.apply(exact)
    assert trainable(exact) == {"layers.10.weight"}


@given(st.lists(st.floats(1, 9) | st.just(NAN), min_size=1, max_size=7), st.integers(0, 127))
@settings(max_examples=60)
def test_published_rule_is_the_published_loop(values: list[float], frozen_before: int) -> None:
    keys = ("1", "2", "10", "11", "100", "3", "30")[: len(values)]
    model = nn.ModuleDict({key: nn.Conv2d(2, 2, 1) for key in keys})
    for bit, conv in enumerate(model.values()):
        conv.requires_grad_(not frozen_before >> bit & 1)
    table = alpha_table(model, dict(zip(keys, values, strict=True)))
    plan = freeze_plan(model, table, "opentrans", allow_trivial=True)
    # Restated: strictly below the median of all; startswith; all others on; nothing if none.
    middle = sorted(value for value in values if value == value)
    expected = trainable(model)
    if middle:
        half = len(middle) // 2
        cut = middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) / 2
        names = tuple(key for key, value in zip(keys, values, strict=True) if value < cut)
        if names:
            expected = {n for n, _ in model.named_parameters() if not n.startswith(names)}
    plan.apply(model)
    assert trainable(model) == expected


def test_published_rule_touches_nothing_when_nothing_is_frozen() -> None:
    model = Chain()
    model.conv1.requires_grad_(False)
    table = alpha_table(model, alphas(3, 3, 3, 3))
    plan = freeze_plan(model, table, "opentrans", allow_trivial=True)
    assert plan.parameters == plan.trainable_again == ()
    plan.apply(model)
    assert not model.conv1.weight.requires_grad


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 12)
        self.fc = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.attn(x))


def attention_table(q: float, k: float, v: float, fc: float = 9.0) -> AlphaTable:
    parts = [
        alpha_row(f"attn_{part}", value, (4, 4), part=part, parameter="attn.weight")
        for part, value in zip("qkv", (q, k, v), strict=True)
    ]
    return AlphaTable((*parts, alpha_row("fc", fc, (12, 12))), "xmin_mid")


def test_fused_projection_is_frozen_only_with_all_its_parts() -> None:
    model = Attention()
    both = attention_table(1.5, 1.6, 1.7)  # median 1.65: v is above it
    plan = freeze_plan(model, both, allow_trivial=True)
    assert plan.frozen == frozenset()
    assert "part v is not" in plan.decisions[0].reason
    plan = freeze_plan(model, both, "ratio:0.75")
    assert plan.frozen == {"attn"} and plan.parameters == ("attn.weight", "attn.bias")
    nan = attention_table(1.5, NAN, 1.7)
    assert freeze_plan(model, nan, "ratio:0.7", allow_trivial=True).frozen == frozenset()
    published = freeze_plan(model, both, "opentrans", allow_trivial=True)
    assert published.parameters == ()  # no parameter begins with "attn_q"


def test_random_is_the_same_everywhere() -> None:
    model = Chain(12)
    draws = {seed: freeze_plan(model, rule="random", seed=seed).frozen for seed in range(6)}
    assert all(len(frozen) == 6 for frozen in draws.values())
    assert len(set(draws.values())) > 3
    assert draws[0] == {"conv0", "conv4", "conv6", "conv7", "conv8", "head"}
    like = freeze_plan(model, rule="list:conv0,conv1,conv2")
    assert len(freeze_plan(model, rule="random", seed=1, like=like).frozen) == 3


def test_random_of_equal_work() -> None:
    model = Chain(16, width=8)
    like = freeze_plan(model, rule="all_3x3", input_size=(16, 16))
    target = like.report(model, (16, 16)).frozen_macs
    sets = set()
    for seed in range(4):
        plan = freeze_plan(
            model, rule="random", seed=seed, like=like, match="macs", input_size=(16, 16)
        )
        got = plan.report(model, (16, 16)).frozen_macs
        assert 0.9 * target <= got <= target
        assert f"{got / 1e6:.1f} MMAC" in plan.notes[0]
        sets.add(plan.frozen)
    assert len(sets) > 1


def test_rules_without_alphas() -> None:
    model = Chain()
    assert freeze_plan(model, rule="all_3x3").frozen == {"conv1", "conv3"}
    prefix = freeze_plan(model, rule="prefix", until="conv1")
    assert prefix.modules == {"conv0", "conv1", "bn0", "bn1"}
    assert prefix.report(model, (8, 8)).is_prefix
    chosen = freeze_plan(model, rule="list", layers=["conv3", "bn0"])
    assert chosen.frozen == {"conv3", "bn0"} and chosen.modules == {"conv3", "bn3", "bn0"}
    assert chosen.fit is None and chosen.alpha_digest is None


def test_shared_parameters_train_while_any_user_trains() -> None:
    model = Chain()
    model.conv1 = nn.Conv2d(4, 4, 1, bias=False)
    model.conv1.weight = model.conv2.weight
    plan = freeze_plan(model, rule="list", layers=["conv0", "conv1"])
    assert plan.modules == {"conv0", "bn0"}
    assert "shared with conv2: it trains" in str(plan)
    plan.apply(model)
    assert model.conv2.weight.requires_grad and model.bn1.weight.requires_grad
    both = freeze_plan(model, rule="list", layers=["conv1", "conv2"])
    both.apply(model)
    assert not model.conv2.weight.requires_grad and not model.bn1.weight.requires_grad

    model = Chain()
    model.bn1 = model.bn3  # a norm behind two convolutions
    plan = freeze_plan(model, rule="list", layers=["conv1", "conv2"])
    assert plan.modules == {"conv1", "conv2", "bn2"}
    assert any("bn1" in note and "keep training" in note for note in plan.notes)


def test_what_the_alphas_saw_is_recorded() -> None:
    model = Chain(width=16)
    table = alpha_table(model, alphas(2, 5, 3, 4))
    assert freeze_plan(model, table).weights_seen == "dense"
    for conv in (model.conv1, model.conv3):
        prune.l1_unstructured(conv, "weight", amount=0.9)
    plan = freeze_plan(model, table)
    assert plan.weights_seen == "masked" and "from masked weights" in str(plan)
    assert freeze_plan(model, table, weights_seen="dense").weights_seen == "dense"
    listed = freeze_plan(model, rule="list:conv1")
    listed.apply(model)
    assert listed.parameters[0] == "conv1.weight_orig"
    assert not model.conv1.weight_orig.requires_grad


def test_printing_says_everything() -> None:
    model = Chain()
    model.conv3.requires_grad_(False)
    text = str(freeze_plan(model, alpha_table(model, alphas(2, NAN, 3, 4))))
    for words in (
        "conv0   frozen  alpha 2 < the median 3; with bn0",
        "undefined (all zero), never frozen",
        "1 of 4 layers frozen by rule median",
        "alpha by xmin_mid from dense weights",
        "1 parameters stay frozen from before",
    ):
        assert words in re.sub(" {3,}", "   ", text.replace("conv0  ", "conv0   ")), text
