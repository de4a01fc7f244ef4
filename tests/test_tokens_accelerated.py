"""Fewer tokens and sparse linear layers in one model, in either order."""

from __future__ import annotations

import copy
import pickle

import pytest
import token_nets
import torch
from test_linear_layers import sparse
from test_tokens import PLANS
from token_nets import images
from torch import nn
from vit_nets import prune_

from opentrans_kernels.accelerate import accelerate, restore
from opentrans_kernels.linears import AcceleratedAttention, AcceleratedLinear, AcceleratedMlp
from opentrans_kernels.nn import AcceleratedConv2d
from opentrans_kernels.plan import make_plan
from opentrans_kernels.tokens import TokenPlan, reduce_tokens, restore_tokens, token_state

SIZE = (48, 48)
ORDERS = ("tokens first", "kernels first")


def pruned(patches: bool = True) -> nn.Module:
    """Zeros in the layers of the blocks, and in the patch convolution."""
    model = prune_(token_nets.vit())
    if patches:
        weight = model.proj.weight.data
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.9] = 0
    return model


def both(model: nn.Module, plan: TokenPlan, order: str) -> None:
    steps = [
        lambda: reduce_tokens(model, plan),
        lambda: sparse(model, input_size=SIZE),
    ]
    for step in steps if order == "tokens first" else reversed(steps):
        step()


def objects(model: nn.Module) -> dict[str, tuple[int, type]]:
    return {name: (id(module), type(module)) for name, module in model.named_modules()}


def assert_same(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_both_compute_the_masked_dense_network_on_the_same_tokens(
    extension: None, name: str, order: str
) -> None:
    model, plan = pruned(), PLANS[name]
    reduced = copy.deepcopy(model)
    all_tokens = model(images())
    reduce_tokens(reduced, plan)
    both(model, plan, order)
    assert isinstance(model.proj, AcceleratedConv2d)
    assert isinstance(model.blocks[3].mlp, AcceleratedMlp)
    assert isinstance(model.blocks[3].attn.qkv, AcceleratedLinear)
    for size in ((48, 48), (40, 72)):
        x = images(*size)
        assert_same(model(x), reduced(x))
    assert not torch.allclose(model(images()), all_tokens, atol=1e-3), "nothing was reduced"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), model(images()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("undo", [(restore, restore_tokens), (restore_tokens, restore)])
@torch.no_grad()
def test_either_is_undone_first_and_the_very_same_objects_come_back(
    extension: None, order: str, undo
) -> None:
    model, plan = pruned(), PLANS["cluster"]
    before, dense = objects(model), copy.deepcopy(model)
    kept = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    both(model, plan, order)
    undo[0](model)
    if undo[0] is restore:
        reduce_tokens(dense, plan)
        assert token_state(model) is not None and type(model.proj).__bases__[1] is nn.Conv2d
        assert torch.equal(model(images()), dense(images())), "still reduced"
        restore_tokens(dense)
    else:
        assert token_state(model) is None and isinstance(model.proj, AcceleratedConv2d)
        assert_same(model(images()), dense(images()))
    undo[1](model)
    assert objects(model) == before
    assert torch.equal(model(images()), dense(images()))
    now = model.state_dict(keep_vars=True)
    assert all(id(now[key]) == one and torch.equal(now[key], t) for key, (one, t) in kept.items())
    assert not [key for module in model.modules() for key in vars(module) if "opentrans" in key]


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_for_the_tokens_that_are_left(extension: None, name: str) -> None:
    model = nn.Sequential(pruned(), nn.Linear(32, 8)).eval()  # behind the way back
    model[1].weight.data[:, :30] = 0
    reduce_tokens(model, PLANS[name])
    plan = make_plan(model, None, SIZE, measure=False)
    tokens = {row.name: row.h_out for row in plan.rows}
    left = {"cluster": 13, "pool": 13, "tome": 37 - 4 * 5, "act": 37, "evit": 1 + 10}[name]
    assert tokens["0.blocks.0.attn.qkv"] == 37
    assert tokens["0.blocks.3.mlp.0"] == left
    assert tokens["1"] == 37


def test_the_report_says_what_was_compared_and_what_timed(extension: None) -> None:
    model = pruned()
    state = reduce_tokens(model, PLANS["cluster"])
    with torch.no_grad():
        reduced = model(images())
    run = state.last
    report = accelerate(model, plan=make_plan(model, None, SIZE, measure=False))
    assert any("compared with all of them" in note for note in report.notes)
    assert report.timing is not None and report.max_rel_err < 1e-4
    assert state.last is run and not state.paused, "the caller's last forward is the one it made"
    with torch.no_grad():
        assert_same(model(images()), reduced)


def test_a_grid_that_the_planned_size_does_not_hold_is_refused(extension: None) -> None:
    model = pruned()
    reduce_tokens(model, TokenPlan(alpha=1, grid=(6, 6)))
    before = objects(model)
    with pytest.raises(Exception, match="grid 6x6 is larger than the map"):
        accelerate(model, input_size=(32, 32))
    assert objects(model) == before
    sparse(model, input_size=SIZE)


@pytest.mark.parametrize("name", token_nets.LIBRARIES)
@torch.no_grad()
def test_models_of_libraries_take_both(extension: None, name: str) -> None:
    model, tokens = token_nets.library(name)
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and "visual" in path:
            weight = module.in_proj_weight.data
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.9] = 0
    chosen = tuple(
        n for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and any(part.isdigit() for part in n.split("."))
    )  # fmt: skip
    prune_(model, names=chosen)
    before, x = objects(model), images()
    for method, order in zip(("cluster", "tome"), ORDERS, strict=True):
        reduced = copy.deepcopy(model)
        part, twin = (m.visual if name.startswith("open_clip") else m for m in (model, reduced))
        reduce_tokens(twin, PLANS[method])
        want = tokens(reduced, x)
        both(part, PLANS[method], order)
        kinds = {type(m) for m in part.modules()}
        assert kinds & {AcceleratedAttention, AcceleratedLinear} and AcceleratedMlp in kinds
        assert_same(tokens(model, x), want)
        restore(part)
        restore_tokens(part)
        assert objects(model) == before
