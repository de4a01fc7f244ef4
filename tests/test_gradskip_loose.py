"""Pruned convolutions outside a ResNet trunk train on the sparse kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from accel_nets import random_masks
from torch import nn

from opentrans import restore_skipped, skip_frozen
from opentrans.gradskip import is_skipped
from opentrans.gradskip.modules import SkipConv2d, SkipPassed
from opentrans_kernels.hed import Hed
from opentrans_kernels.masks import MaskSet

SMALL = ((8, 8), (12, 12), (16,))


class Normed(nn.Module):
    """Convolutions with norm and ReLU, a value that two modules read, and an even window."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.even = nn.Conv2d(8, 8, 2)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn(self.one(x)))
        z = self.two(y)
        return self.head(torch.relu(z) + y) + self.even(z).mean()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    model(x).sin().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}


def check(model: nn.Module, masks: MaskSet, x: torch.Tensor, frozen: list[str] | None = None):
    """Gradients at most twice as far from float64 as plain PyTorch's; dead weights have none."""
    plain = copy.deepcopy(model)
    for name in frozen or []:
        plain.get_submodule(name).requires_grad_(False)
        if name == "one":  # the norm behind a frozen convolution is frozen with it
            plain.bn.requires_grad_(False)
    exact = copy.deepcopy(plain).double()
    report = skip_frozen(model, frozen or [], bn="affine", masks=masks)
    found, own = gradients(model, x), gradients(plain, x)
    wanted = gradients(exact, x.double())
    assert set(found) == set(wanted)
    for name, want in wanted.items():
        layer = name.removesuffix(".weight")
        live = masks.masks.get(layer, torch.ones_like(want, dtype=torch.bool))
        if layer in report.sparse and name.endswith(".weight"):
            assert not found[name][~live].any()
        scale = want[live].norm().clamp_min(1e-12)
        errors = [float((t[name].double() - want)[live].norm() / scale) for t in (found, own)]
        assert errors[0] <= max(2 * errors[1], 1e-6), f"{name}: {errors}"
    return report


@pytest.mark.parametrize("size", [(17, 23), (32, 32)])
def test_an_edge_detector_trains_sparsely(size: tuple[int, int], extension: None) -> None:
    model = Hed(SMALL)
    masks = random_masks(model, 0.2)
    masks.apply_(model)
    before = dict(model.named_modules())
    report = check(model, masks, torch.randn(2, 3, *size))
    assert {n for n in masks.masks if n.startswith("blocks.")} <= set(report.sparse)
    first = model.blocks[0]
    assert isinstance(first[2], SkipConv2d) and first[2].opentrans_relu
    assert isinstance(first[3], SkipPassed), "the ReLU is part of the convolution"
    assert is_skipped(model)
    restore_skipped(model)
    assert dict(model.named_modules()) == before and not is_skipped(model)


@pytest.mark.parametrize("frozen", [[], ["one"], ["two"]])
def test_norms_readers_and_even_windows(frozen: list[str], extension: None) -> None:
    model = Normed().eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    masks = random_masks(model, 0.3)
    masks.apply_(model)
    report = check(model, masks, torch.randn(2, 3, 9, 11), frozen)
    assert {"two", "head"} <= set(report.sparse) and "even" not in report.sparse
    assert not isinstance(model.even, SkipConv2d)


def test_a_hook_keeps_a_convolution_as_it_is(extension: None) -> None:
    model = Hed(SMALL)
    masks = random_masks(model, 0.2)
    masks.apply_(model)
    seen: list[int] = []
    model.blocks[0][2].register_forward_hook(lambda *_: seen.append(1))
    report = check(model, masks, torch.randn(1, 3, 16, 16))
    assert seen and "has hooks" in report.untouched["blocks.0.2"]
