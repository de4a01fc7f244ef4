"""MaskedOptimizer and preserve_masks against torch's own optimizers; what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accel_nets
import pytest
import torch
from masked_nets import (
    KINDS,
    MAIN,
    assert_dead,
    dead_values,
    groups_of,
    mask_by_hand,
    masks_of,
    net,
    train,
)
from torch import nn

from opentrans.gradskip import skip_frozen
from opentrans.masked import MaskedOptimizer, preserve_masks
from opentrans_kernels import MaskError, OpenTransError


@pytest.mark.parametrize("kind", KINDS)
def test_live_weights_move_as_under_torchs_optimizer(kind: str) -> None:
    cls, options = KINDS[kind]
    ours, plain = net(), net()
    masks = masks_of(ours)
    masks.apply_(plain)
    a = MaskedOptimizer(cls, ours, masks, groups_of(ours), **options)
    b = cls(groups_of(plain), **options)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, [0.03, 0.05], total_steps=30) for o in (a, b)
    ]
    start = copy.deepcopy(plain.state_dict())
    train(ours, a, 25, scheduler=schedules[0])
    train(plain, b, 25, scheduler=schedules[1], before_clip=mask_by_hand(plain, masks))
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] != 0.02
    for name, value in plain.named_parameters():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(
            ours.get_parameter(name), value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert_dead(ours, masks)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("kind", MAIN)
def test_dead_weights_stay_bit_zero_for_100_steps_and_a_resume(kind: str, amp: bool) -> None:
    cls, options = KINDS[kind]
    model = net()
    masks = masks_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if amp else None
    optimizer = MaskedOptimizer(cls, model, masks, **options)
    train(model, optimizer, 50, amp=amp, scaler=scaler)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 50, start=50, amp=amp, scaler=scaler)
    assert_dead(model, masks)
    again = net(seed=3)
    again.load_state_dict(weights)
    resumed = MaskedOptimizer(cls, again, masks, **options)
    resumed.load_state_dict(state)
    train(again, resumed, 50, start=50, amp=amp, scaler=scaler)
    assert_dead(again, masks)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("kind", MAIN)
def test_preserve_masks_under_a_running_optimizer(kind: str, amp: bool) -> None:
    cls, options = KINDS[kind]
    model = net()
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, 5, amp=amp)  # momenta at positions that die now
    masks = masks_of(model)
    assert dead_values(model, masks).any()
    guard = preserve_masks(model, optimizer, masks)
    train(model, optimizer, 100, start=5, amp=amp)
    assert_dead(model, masks)
    saved = copy.deepcopy(optimizer.state_dict())
    guard.remove()
    train(model, optimizer, 2, start=105)
    assert dead_values(model, masks).any(), "the hooks were what kept them"
    fresh = net()
    guarded = cls(fresh.parameters(), **options)
    preserve_masks(fresh, guarded, masks)
    guarded.load_state_dict(saved)
    with pytest.raises(MaskError, match="grow again.*Load the checkpoint of the masked run"):
        guarded.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["hook", "call"])
def test_clipping_sees_live_gradients_only(mode: Any) -> None:
    model = net()
    masks = masks_of(model, 0.05)

    def gradients(of_dead: bool) -> torch.Tensor:
        parts = [(model.get_submodule(n).weight.grad, m) for n, m in masks.masks.items()]
        return torch.cat([grad[m != of_dead] for grad, m in parts])

    optimizer = MaskedOptimizer(torch.optim.SGD, model, masks, lr=0.1, gradients=mode)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    if mode == "call":
        assert gradients(of_dead=True).any()
        optimizer.mask_gradients()
    assert not gradients(of_dead=True).any() and gradients(of_dead=False).any()
    optimizer.zero_grad()
    del optimizer  # and its hooks with it
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert gradients(of_dead=True).any()


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clip_live_gradients_is_masking_and_clipping(limit: float) -> None:
    ours, plain = net(), net()
    masks = masks_of(ours)
    masks.apply_(plain)
    a = MaskedOptimizer(torch.optim.SGD, ours, masks, lr=0.1, momentum=0.9, gradients="call")
    b = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x = torch.randn(4, 3, 8, 8)
        for model, optimizer in ((ours, a), (plain, b)):
            optimizer.zero_grad(set_to_none=step != 2)
            model(x).square().mean().backward()
        mask_by_hand(plain, masks)()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
        torch.testing.assert_close(a.clip_live_gradients(limit), norm)
        if step == 1:  # a step that never comes, as after an overflow: the next one is not its own
            continue
        a.step(), b.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert_dead(ours, masks)


def test_a_step_with_infinite_gradients_is_skipped_by_the_scaler() -> None:
    model = net()
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks_of(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(model.state_dict())
    loss = model.eval()(torch.randn(2, 3, 8, 8)).sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert scaler.get_scale() == 1.0 and not optimizer.state


def test_channels_last_weights_and_steps_with_a_closure() -> None:
    plain, last = net(), net().to(memory_format=torch.channels_last)
    masks = masks_of(plain)
    pair = [MaskedOptimizer(torch.optim.SGD, m, masks, lr=0.1, momentum=0.9) for m in (plain, last)]
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        for model, optimizer in zip((plain, last), pair, strict=True):

            def closure(model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    state = pair[1].state_dict()
    assert state["state"][6]["momentum_buffer"].shape == last[5].bias.shape
    assert state["state"][5]["momentum_buffer"].stride() == last[5].weight.stride()
    last.to(memory_format=torch.contiguous_format)
    with pytest.raises(MaskError, match=r"model.to\(memory_format=\.\.\.\) first"):
        pair[1].step()


def test_what_cannot_work_is_refused() -> None:
    model = net()
    masks = masks_of(model)
    with pytest.raises(OpenTransError, match="preserve_masks"):
        MaskedOptimizer(torch.optim.Adafactor, model, masks)
    with pytest.raises(OpenTransError, match="Leave it out"):
        MaskedOptimizer(torch.optim.AdamW, model, masks, capturable=True)
    with pytest.raises(OpenTransError, match="choose one"):
        MaskedOptimizer(torch.optim.AdamW, model, masks, gradients="no")  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="matched by module name"):
        MaskedOptimizer(torch.optim.AdamW, model, {"x": torch.ones(3, 3)})
    optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks)
    with pytest.raises(OpenTransError, match="make a new one with the same masks"):
        copy.deepcopy(optimizer)


def test_preserve_masks_tries_the_optimizer_out() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1e-3)

    model = net()
    masks = masks_of(model)
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(OpenTransError, match="moves a weight.*Use SGD, Adam or AdamW"):
        preserve_masks(model, Noisy(model.parameters(), lr=0.1), masks)
    with pytest.raises(OpenTransError, match="keep eps above 0"):
        preserve_masks(model, torch.optim.Adam(model.parameters(), eps=0.0), masks)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_a_mask_file_will_do(tmp_path: Path) -> None:
    model = net()
    masks = masks_of(model)
    masks.save(tmp_path / "masks.safetensors")
    optimizer = MaskedOptimizer(torch.optim.SGD, model, tmp_path / "masks.safetensors", lr=0.1)
    train(model, optimizer, 1)
    assert_dead(model, masks)
    assert optimizer.digest == masks.content_hash()


def test_after_skip_frozen_masks_match_the_same_names() -> None:
    plain = accel_nets.tower().requires_grad_(True)
    masks = accel_nets.random_masks(plain, 0.3)
    skipping = copy.deepcopy(plain)
    frozen = ["conv1", "conv2", "layer1.0.conv1", "layer3.0.conv2"]
    skip_frozen(skipping, frozen)
    for one, other in zip(plain.parameters(), skipping.parameters(), strict=True):
        one.requires_grad_(other.requires_grad)
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, skipping):
        optimizer = MaskedOptimizer(torch.optim.SGD, model, masks, lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model.eval()(x).square().mean().backward()
            optimizer.step()
        optimizer.state_dict()
        expected = sum(int(masks.masks[n].sum()) for n in masks.masks if n not in frozen)
        assert optimizer.state_bytes().index == 4 * expected
    for one, other in zip(plain.parameters(), skipping.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
