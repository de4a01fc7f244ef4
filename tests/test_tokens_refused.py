"""Token plans, models and calls that are refused, before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_tokens import CLUSTER, PLANS, model, run
from token_nets import Vit, images, vit
from torch import nn

from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.tokens import TokenPlan, reduce_tokens, restore_tokens, token_state

__all__ = ["model"]  # the fixture


BAD_PLANS = {
    "method": (dict(method="magic"), "cluster, pool, tome, evit, act"),
    "alpha missing": (dict(grid=(2, 2)), "needs alpha"),
    "grid missing": (dict(alpha=1), "needs grid"),
    "alpha": (dict(alpha=-1, grid=(2, 2)), "0 or more"),
    "alpha kind": (dict(alpha=1.5, grid=(2, 2)), "alpha=1.5"),
    "grid": (dict(alpha=1, grid=(2, 0)), "1 or more"),
    "grid kind": (dict(alpha=1, grid="28x28"), "whole numbers"),
    "window": (dict(alpha=1, grid=(2, 2), window=4), "odd"),
    "temperature": (dict(alpha=1, grid=(2, 2), temperature=0.0), "above 0"),
    "temperature nan": (dict(alpha=1, grid=(2, 2), temperature=float("nan")), "finite"),
    "temperature text": (dict(alpha=1, grid=(2, 2), temperature="hot"), "'auto'"),
    "k": (dict(alpha=1, grid=(2, 2), k=0), "1 or more"),
    "norm": (dict(alpha=1, grid=(2, 2), norm="l3"), "'l1' or 'l2'"),
    "r": (dict(method="tome", r=-1), "0 or more"),
    "r missing": (dict(method="tome"), "needs r"),
    "keep": (dict(method="evit", keep=1.5), "at most 1"),
    "at": (dict(method="evit", keep=0.5, at=(1, 1)), "different"),
    "of another method": (dict(method="tome", r=2, grid=(2, 2)), "'cluster' or 'pool'"),
    "cell": (dict(method="act", cell=0), "above 0"),
    "seed": (dict(method="act", seed=-1), "seed=-1"),
    "expand": (dict(alpha=1, grid=(2, 2), expand="no"), "True or False"),
}  # fmt: skip


@pytest.mark.parametrize("options, words", BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plans(options, words):
    with pytest.raises(PlanError, match=words):
        TokenPlan(**options)


def test_a_plan_is_plain_and_frozen():
    plan = TokenPlan(alpha=1, grid=[2, 3])  # as JSON has it
    assert plan.grid == (2, 3) and hash(plan) == hash(TokenPlan(alpha=1, grid=(2, 3)))
    with pytest.raises(AttributeError):
        plan.alpha = 2


@pytest.mark.parametrize("plan, words", [
    (TokenPlan(alpha=5, grid=(3, 3)), "alpha=5 .* model has 4"),
    (TokenPlan("evit", keep=0.5, at=(4,)), "at names block 4"),
    (TokenPlan(alpha=1, grid=(3, 3), taps=(7,)), "taps names block 7"),
    ("cluster", "must be a TokenPlan"),
])  # fmt: skip
def test_plans_that_do_not_fit_the_model(model, plan, words):
    with pytest.raises(PlanError, match=words):
        reduce_tokens(model, plan)
    assert token_state(model) is None


def test_a_grid_larger_than_the_map(model):
    reduce_tokens(model, TokenPlan(alpha=1, grid=(4, 7)))
    with pytest.raises(PlanError, match="grid 4x7 is larger than the map of this image, 6x6"):
        run(model, images())
    assert run(model, images(48, 64)).shape == (2, 49, 32), "a larger image is fine"


def hooked(model: Vit) -> None:
    model.blocks[2].mlp[0].register_forward_hook(lambda *_: None)


def with_own_forward(model: Vit) -> None:
    model.blocks[3].forward = lambda x: x


def tied(model: Vit) -> None:
    model.blocks[3] = model.blocks[1]


def quantised(model: Vit) -> None:
    linear = model.blocks[2].mlp[0]
    whole = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    linear.weight = whole


def packed_linear(model: Vit) -> None:
    class Packed(nn.Module):
        def weight(self):
            return None

    model.blocks[2].mlp[0] = Packed()


def positional(model: Vit) -> None:
    class Placed(type(model.blocks[2].attn)):
        def forward(self, x):
            return super().forward(x) * torch.arange(x.shape[1])[:, None]

    model.blocks[2].attn.__class__ = Placed


def of_one_size(model: Vit) -> None:
    model.blocks[2].mlp = nn.Sequential(nn.Flatten(1), nn.Linear(37 * 32, 32))


def compiled(model: Vit) -> None:
    model.blocks[2]._compiled_call_impl = model.blocks[2]._call_impl  # as .compile() leaves it


def without_patches(model: Vit) -> None:
    model.proj = nn.Conv2d(3, 32, 3, 2, 1)


def two_stacks(model: Vit) -> None:
    model.more = copy.deepcopy(model.blocks)


def rotary(model: Vit) -> None:
    model.rope_embeddings = nn.Identity()


BAD_MODELS = {
    "rotary": (rotary, "rope_embeddings turns queries and keys"),
    "hooks": (hooked, "blocks.2.mlp.0 has hooks"),
    "own forward": (with_own_forward, "blocks.3 has a forward of its own"),
    "tied": (tied, "blocks.1 is tied: .* 2 places"),
    "quantised": (quantised, "blocks.2.mlp.0 is a Linear whose weight is no plain"),
    "packed": (packed_linear, "blocks.2.mlp.0 is a Packed whose weight is no plain"),
    "positions": (positional, "blocks.2: Block depends on the order of tokens"),
    "one size": (of_one_size, "blocks.2: Block does not run on tokens alone"),
    "compiled": (compiled, "blocks.2 is compiled already"),
    "no patches": (without_patches, "no vision transformer in this Vit"),
    "two stacks": (two_stacks, "several stacks of blocks"),
}


@pytest.mark.parametrize("spoil, words", BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_cannot_be_reduced_are_left_alone(model, spoil, words):
    spoil(model)
    classes = list(map(type, model.modules()))
    with pytest.raises(UnsupportedModelError, match=words):
        reduce_tokens(model, TokenPlan(alpha=1, grid=(3, 3)))
    assert list(map(type, model.modules())) == classes and token_state(model) is None


def test_other_things_that_cannot_be_reduced(model):
    with pytest.raises(UnsupportedModelError, match="no class token"):
        reduce_tokens(vit(cls=False), TokenPlan("evit", keep=0.5))
    with pytest.raises(UnsupportedModelError, match="no vision transformer"):
        reduce_tokens(nn.Sequential(nn.Conv2d(3, 8, 3)), CLUSTER)
    with pytest.raises(UnsupportedModelError, match="a torch.nn.Module is needed"):
        reduce_tokens("model", CLUSTER)
    with pytest.raises(UnsupportedModelError, match="2 vision transformers"):
        reduce_tokens(nn.ModuleList([model, vit(1)]), CLUSTER)
    reduce_tokens(model, CLUSTER)
    with pytest.raises(UnsupportedModelError, match="reduced already"):
        reduce_tokens(model, CLUSTER)
    state = reduce_tokens(other := vit(2), CLUSTER)
    with pytest.raises(UnsupportedModelError, match="2 transformers"):
        token_state(nn.ModuleList([model, other]))
    with pytest.raises(UnsupportedModelError, match="in this thread"):
        state.expand(torch.zeros(1, 12, 3))


def test_inside_methods_refuse_blocks_of_another_make(model):
    class Parallel(type(model.blocks[0])):
        def forward(self, x):
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))

    model.blocks[1].__class__ = Parallel
    with pytest.raises(UnsupportedModelError, match="blocks.1: Parallel computes something else"):
        reduce_tokens(model, TokenPlan("tome", r=2))
    reduce_tokens(model, TokenPlan(alpha=1, grid=(3, 3)))  # called as it is
    assert run(model, images()).shape == (2, 37, 32)


def test_misuse_of_a_reduced_model(model):
    state = reduce_tokens(model, TokenPlan(alpha=2, grid=(3, 4), expand=False))
    out = run(model, images())
    for wrong, words in (
        (out[:, :7], "7 tokens were given, but the last forward left 12 of 36"),
        (out[:1], "1 images were given, but the last forward had 2"),
        (out[0], r"\[B, n, C\] or \[B, C, h, w\] is needed"),
        (torch.zeros(2, 3, 5, 5), "a map of 5x5 is neither"),
    ):
        with pytest.raises(PlanError, match=words):
            state.expand(wrong)
    with pytest.raises(UnsupportedModelError, match="block 2 got .* expected 37 tokens"):
        model.blocks[2](torch.zeros(1, 30, 32))
    with pytest.raises(UnsupportedModelError, match="an attention mask"):
        model.blocks[2](torch.zeros(1, 37, 32), torch.zeros(37, 37))
    restore_tokens(model)
    reduce_tokens(model, PLANS["tome"])
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="block 1: its attention has hooks"):
        run(model, images())
    handle.remove()
    run(model, images())
