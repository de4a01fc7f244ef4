"""Token reduction in a model: what it computes, that it is undone, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from token_nets import SIDE, Block, Vit, images, vit
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.tokens import TokenPlan, reduce_tokens, restore_tokens, token_state
from opentrans_kernels.tokens.cluster import Clusters, pooled

CLUSTER = TokenPlan(alpha=2, grid=(3, 4))
PLANS = {
    "cluster": CLUSTER,
    "pool": TokenPlan("pool", alpha=2, grid=(3, 4)),
    "tome": TokenPlan("tome", r=5),
    "evit": TokenPlan("evit", keep=0.6),
    "act": TokenPlan("act", cell=1.0, projections=4),
}
#: Nothing is reduced, so every number is the dense one.
NOTHING = {
    "grid is the map": TokenPlan(alpha=1, grid=(6, 6)),
    "pool, grid is the map": TokenPlan("pool", alpha=1, grid=(6, 6)),
    "alpha is the depth": TokenPlan(alpha=4, grid=(3, 3)),
    "r is 0": TokenPlan("tome", r=0),
    "all are kept": TokenPlan("evit", keep=1.0),
}


@pytest.fixture
def model() -> Vit:
    return vit()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def blocks_of(model: Vit, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    for block in model.blocks[first:last]:
        x = block(x)
    return x


def dense_until(model: Vit, x: torch.Tensor, alpha: int) -> torch.Tensor:
    part = copy.copy(model)
    part._modules = {**model._modules, "blocks": model.blocks[:alpha]}
    return part(x)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 72)])
@torch.no_grad()
def test_clustering_is_what_its_parts_say(model, size):
    x = images(*size)
    maps = (size[0] // 8, size[1] // 8)
    before = dense_until(model, x, 2)
    clusters = Clusters(before[:, 1:], maps, CLUSTER)
    inner = blocks_of(model, torch.cat([before[:, :1], clusters.centres], 1), 2, 4)
    right = torch.cat([inner[:, :1], clusters.weights @ inner[:, 1:]], 1)
    state = reduce_tokens(model, CLUSTER)
    torch.testing.assert_close(model(x), right)
    assert (state.map_size, state.tokens, state.prefix) == (maps, 12, 1)
    restore_tokens(model)
    reduced = reduce_tokens(model, TokenPlan(alpha=2, grid=(3, 4), expand=False))
    torch.testing.assert_close(model(x), inner)
    torch.testing.assert_close(reduced.expand(inner), right)
    torch.testing.assert_close(reduced.expand(inner[:, 1:]), right[:, 1:])
    logits = inner[:, 1:].mT.reshape(2, -1, 3, 4)
    torch.testing.assert_close(reduced.expand(logits), right[:, 1:].mT.reshape(2, -1, *maps))
    assert reduced.expand(right) is right, "what is whole stays"


@torch.no_grad()
def test_pooling_is_what_its_parts_say(model):
    x = images()
    before = dense_until(model, x, 2)
    small = torch.cat([before[:, :1], pooled(before[:, 1:], (6, 6), (3, 4))], 1)
    inner = blocks_of(model, small, 2, 4)
    reduce_tokens(model, PLANS["pool"])
    back = F.interpolate(inner[:, 1:].mT.reshape(2, -1, 3, 4), (6, 6), mode="bilinear")
    torch.testing.assert_close(model(x), torch.cat([inner[:, :1], back.flatten(2).mT], 1))


@torch.no_grad()
def test_merging_attends_to_a_token_as_often_as_it_stands_for():
    """Merging equal tokens changes nothing, the class token's attention included."""

    class Flat(Vit):
        def forward(self, image):
            x = self.proj(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            return blocks_of(self, x, 0, 4)

    torch.manual_seed(0)
    model, x = Flat().eval(), torch.full((1, 3, SIDE, SIDE), 0.7)
    dense = model(x)
    assert (dense[:, 0] - dense[:, 1]).abs().max() > 0.1, "all are equal: the test proves nothing"
    state = reduce_tokens(model, TokenPlan("tome", r=7))
    torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-5)
    assert state.tokens == 36 - 7 - 7 - 7 - 7


@torch.no_grad()
def test_evit_keeps_by_the_attention_of_the_class_token(model):
    x = images(batch=3)
    reduce_tokens(model, TokenPlan("evit", keep=0.5, at=(1,), expand=False))
    found = model(x)
    restore_tokens(model)
    before = dense_until(model, x, 1)
    block = model.blocks[1]
    q, k, _ = block.attn.qkv(block.norm1(before)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    attention = ((q[:, :, :1] @ k.mT) * block.attn.scale).softmax(-1).mean(1)[:, 0, 1:]
    after = before + block.attn(block.norm1(before))
    for image in range(3):
        stay = attention[image].topk(18).indices.sort().values
        gone = [i for i in range(36) if i not in stay]
        rest = after[image, 1:]
        fused = (attention[image, gone, None] * rest[gone]).sum(0, keepdim=True)
        y = torch.cat([after[image, :1], rest[stay], fused])[None]
        y = blocks_of(model, y + block.mlp(block.norm2(y)), 2, 4)
        torch.testing.assert_close(found[image : image + 1], y)


@torch.no_grad()
def test_act_with_a_cell_for_every_query_is_dense(model):
    x = images()
    dense = model(x)
    reduce_tokens(model, TokenPlan("act", cell=1e-4))
    torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-5)
    restore_tokens(model)
    reduce_tokens(model, TokenPlan("act", cell=30.0, projections=1))
    coarse = model(x)
    assert not torch.allclose(coarse, dense, atol=1e-3)
    assert torch.equal(model(x), coarse), "the same projections in every call"


@pytest.mark.parametrize("plan", NOTHING.values(), ids=NOTHING)
def test_nothing_reduced_is_dense_to_the_bit(model, plan):
    x = images()
    dense = run(model, x)
    state = reduce_tokens(model, plan)
    found = run(model, x)
    assert torch.equal(found, dense)
    assert state.expand(found) is found and state.tokens == 36


@pytest.mark.parametrize("name", PLANS)
def test_images_do_not_depend_on_their_batch(model, name):
    x = images(batch=3)
    reduce_tokens(model, PLANS[name])
    whole = run(model, x)
    torch.testing.assert_close(run(model, x[[2, 0, 1]]), whole[[2, 0, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, x[1:2]), whole[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_it_is_undone_copied_and_pickled(model, name):
    x = images()
    dense, keys, classes = run(model, x), list(model.state_dict()), list(map(type, model.modules()))
    kept = list(model.modules())
    assert token_state(model) is None
    state = reduce_tokens(model, PLANS[name])
    assert token_state(model) is state and list(model.state_dict()) == keys
    assert isinstance(model.proj, nn.Conv2d) and isinstance(model.blocks[3], Block)
    found = run(model, x)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    twin = copy.deepcopy(model)
    assert token_state(twin) is not state
    for other in (twin, pickle.loads(pickle.dumps(twin))):
        assert torch.equal(run(other, x), found)
        restore_tokens(other)
        assert torch.equal(run(other, x), dense)
    assert torch.equal(run(model, x), found)
    restore_tokens(model)
    restore_tokens(model)  # nothing to do
    assert torch.equal(run(model, x), dense)
    assert list(model.modules()) == kept and list(map(type, model.modules())) == classes
    assert not any("tokens" in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", ["cluster", "pool", "tome"])
def test_gradients_reach_weights_and_image(name):
    model = vit(width=8, depth=2, heads=2).double()
    plan = {"alpha": 1, "grid": (2, 3)} if name != "tome" else {"r": 5}
    reduce_tokens(model, TokenPlan(name, **plan))
    x = images(24, 32, batch=1).double().requires_grad_()
    weight = model.blocks[0].mlp[0].weight
    model(x).square().sum().backward()
    for tensor in (x, weight):
        place = tensor.grad.abs().argmax()
        step = torch.zeros_like(tensor).flatten()
        step[place] = 1e-6
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                tensor.add_(sign * step.view_as(tensor))
                ends.append(model(x).square().sum())
                tensor.sub_(sign * step.view_as(tensor))
        torch.testing.assert_close(
            tensor.grad.flatten()[place], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-6
        )


def test_outputs_of_taps_are_whole_and_change_nothing(model):
    x, seen = images(), []
    reduce_tokens(model, CLUSTER)
    plain = run(model, x)
    restore_tokens(model)
    state = reduce_tokens(model, TokenPlan(alpha=2, grid=(3, 4), taps=(0, 2)))
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    assert torch.equal(run(model, x), plain)
    assert seen == [37, 37, 37, 37] and state.tokens == 12


def test_a_count_that_could_be_either_is_what_the_model_gives(model):
    x = images()  # 36 tokens and a class token: 35 + 1 is 36, too
    state = reduce_tokens(model, TokenPlan("tome", alpha=3, r=1))
    whole = run(model, x)
    assert state.tokens == 35 and whole.shape[1] == 37
    assert state.expand(whole) is whole and state.expand(whole[:, 1:]).shape[1] == 36
    assert torch.equal(state.expand(whole[:, 1:]), whole[:, 1:])
    restore_tokens(model)
    state = reduce_tokens(model, TokenPlan("tome", alpha=3, r=1, expand=False))
    reduced = run(model, x)
    assert reduced.shape[1] == 36 and torch.equal(state.expand(reduced), whole)


def test_every_thread_has_its_own_forward(model):
    small, large = images(), images(72, 72)
    state = reduce_tokens(model, TokenPlan(alpha=2, grid=(3, 4), expand=False))
    own = run(model, small)
    right = state.expand(own)
    seen: dict[str, object] = {}

    def other() -> None:
        with pytest.raises(UnsupportedModelError, match="in this thread"):
            state.expand(own)
        run(model, large)
        seen["map"] = state.map_size

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen["map"] == (9, 9) and state.map_size == (6, 6)
    assert torch.equal(state.expand(own), right)


def test_public_names():
    names = ("TokenPlan", "TokenState", "reduce_tokens", "restore_tokens", "token_state")
    assert all(name in otk.__all__ and getattr(otk, name) for name in names)


@pytest.mark.slow  # torch.compile's own start
def test_a_reduced_model_compiles(model):
    x = images(batch=1)
    reduce_tokens(model, CLUSTER)
    eager = run(model, x)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, x), eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(compiled, images(40, 72)), run(model, images(40, 72)))
