"""The state of MaskedOptimizer: checkpoints, freezing, shrinking masks, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from freeze_sets import published_27
from masked_nets import (
    KINDS,
    MAIN,
    assert_dead,
    mask_by_hand,
    masks_of,
    net,
    train,
)
from torch import nn

from opentrans.freeze import freeze_plan
from opentrans.masked import MaskedOptimizer, preserve_masks
from opentrans_kernels import MaskError, MaskSet, OpenTransError


@pytest.mark.parametrize("kind", MAIN)
def test_checkpoints_are_torchs_own(kind: str) -> None:
    cls, options = KINDS[kind]
    ours, plain = net(), net()
    masks = masks_of(ours)
    a = MaskedOptimizer(cls, ours, masks, **options)
    train(ours, a, 4)
    saved = a.state_dict()
    b = cls(plain.parameters(), **options)
    plain.load_state_dict(ours.state_dict())
    b.load_state_dict(copy.deepcopy(saved))  # torch takes tensors over as they are
    for number, parameter in enumerate(plain.parameters()):
        for value in saved["state"][number].values():
            assert value is None or value.dim() == 0 or value.shape == parameter.shape
    train(ours, a, 4, start=4)
    train(plain, b, 4, start=4, before_clip=mask_by_hand(plain, masks))
    for x, y in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    a.load_state_dict(b.state_dict())  # and back: the state of pruned weights is zero there


def test_loading_without_the_mask_is_refused() -> None:
    model = net()
    masks = masks_of(model)
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, 2)
    other = MaskedOptimizer(torch.optim.AdamW, model, masks_of(model, seed=5))
    train(model, other, 1)
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks)
    with pytest.raises(MaskError, match="training without the mask.*checkpoint of the masked run"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(MaskError, match="Make the optimizer with the masks of the checkpoint"):
        optimizer.load_state_dict({**other.state_dict()})
    assert not optimizer.state
    short = torch.optim.AdamW(list(model.parameters())[:3])
    with pytest.raises(OpenTransError, match="Pass the same model and parameter groups"):
        optimizer.load_state_dict(short.state_dict())


def test_regrowth_is_found_on_save() -> None:
    model = net()
    masks = masks_of(model)
    optimizer = MaskedOptimizer(torch.optim.SGD, model, masks, lr=0.1)
    guard = preserve_masks(model, torch.optim.SGD(model.parameters(), lr=0.1), masks)
    optimizer.state_dict()
    weight = model.get_submodule("3").weight
    position = tuple(torch.nonzero(~masks.masks["3"])[0])
    with torch.no_grad():
        weight[position] = 1e-30
    with pytest.raises(MaskError, match=r"1 pruned weights in 1 layers.*masks.apply_\(model\)"):
        optimizer.state_dict()
    with pytest.raises(MaskError, match="most in 3: 1"):
        guard.check()
    masks.apply_(model)
    optimizer.state_dict()


def test_frozen_layers_have_no_state_and_lose_it_when_frozen_later() -> None:
    model = net()
    masks = masks_of(model)
    model.get_submodule("3").requires_grad_(False)
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks)
    train(model, optimizer, 2)
    frozen = model.get_submodule("3").weight
    assert frozen not in optimizer.state
    before, kept = optimizer.state_bytes(), frozen.detach().clone()
    model.get_submodule("5").requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    train(model, optimizer, 1)
    after = optimizer.state_bytes()
    live = int(masks.masks["5"].sum())
    assert before.index == 4 * live and after.index == 0
    assert before.state - after.state == 2 * 4 * (live + 7) + 2 * 4  # moments, two step counts
    assert torch.equal(frozen, kept)
    resumed = MaskedOptimizer(torch.optim.AdamW, model, masks)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state_bytes() == after


def test_a_freeze_plan_may_take_parameters_out_of_the_optimizer() -> None:
    model = net()
    masks = masks_of(model)
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks)
    train(model, optimizer, 2)
    plan = freeze_plan(model, rule="list", layers=["5"], input_size=(8, 8))
    kept = model.get_submodule("5").weight.detach().clone()
    plan.apply(model, optimizer)
    train(model, optimizer, 2)
    assert torch.equal(model.get_submodule("5").weight, kept)
    assert optimizer.state_bytes().index == 4 * int(masks.masks["3"].sum())
    optimizer.state_dict()


def test_masks_may_shrink_between_rounds() -> None:
    model = net()
    wide = masks_of(model, 0.6)
    optimizer = MaskedOptimizer(torch.optim.Adam, model, wide, lr=0.01)
    train(model, optimizer, 3)
    old = optimizer.state_dict()["state"]
    keep = masks_of(model, 0.5, seed=7).masks
    narrow = MaskSet({name: mask & keep[name] for name, mask in wide.masks.items()})
    optimizer.set_masks(model, narrow)
    new = optimizer.state_dict()["state"]
    numbers = {id(p): n for n, p in enumerate(model.parameters())}
    for name, mask in narrow.masks.items():
        number = numbers[id(model.get_submodule(name).weight)]
        moment = new[number]["exp_avg"]
        assert moment[mask].any() and not moment[~mask].any()
        assert torch.equal(moment[mask], old[number]["exp_avg"][mask])
    train(model, optimizer, 3, start=3)
    assert_dead(model, narrow)
    with pytest.raises(MaskError, match="weights return.*make a new optimizer"):
        optimizer.set_masks(model, wide)


def test_a_layer_without_live_weights_and_one_without_dead_ones() -> None:
    model = net()
    masks = MaskSet(
        {
            "3": torch.zeros(20, 12, 1, 1, dtype=torch.bool),
            "5": torch.ones(7, 20, 3, 3, dtype=torch.bool),
        }
    )
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks, lr=0.01)
    before = model[5].weight.detach().clone()
    train(model, optimizer, 2)
    assert not model[3].weight.any() and not torch.equal(model[5].weight, before)
    resumed = MaskedOptimizer(torch.optim.AdamW, model, masks, lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state_bytes() == optimizer.state_bytes()


def test_rn50_adamw_state_at_a_tenth_with_half_frozen() -> None:
    clip_resnet = pytest.importorskip("open_clip.modified_resnet")
    with torch.device("meta"):
        model = clip_resnet.ModifiedResNet((3, 4, 6, 3), 1024, 32, image_size=224)
    model.attnpool = nn.Identity()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(1)
    convs = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    convs.pop("conv1")
    total = sum(w.numel() for w in convs.values())
    assert total == 23_473_152
    density = 2_311_567 / total  # after 22 rounds of 10 %
    masks = MaskSet({n: torch.rand(w.shape) < density for n, w in convs.items()})
    frozen = published_27(model)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks, weights)
    for weight in weights:
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    memory = optimizer.state_bytes()
    assert memory.dense == 2 * 4 * 23_474_016  # 187.8 MB
    assert 10.5e6 < memory.state <= 12e6
    assert memory.index == pytest.approx(memory.state / 2, rel=1e-3)
    assert memory.bits == pytest.approx(total / 8, abs=100)
    assert "dense state 187.8 MB" in str(memory)


def test_clearing_the_state_starts_the_moments_anew() -> None:
    model = net()
    masks = masks_of(model)
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks, lr=0.01)
    train(model, optimizer, 3)
    optimizer.state.clear()
    fresh = copy.deepcopy(model)
    other = MaskedOptimizer(torch.optim.AdamW, fresh, masks, lr=0.01)
    train(model, optimizer, 2)
    train(fresh, other, 2)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)
