"""A training step of the trunk, and how far its gradients are from those in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def run_trunk(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = model.stem(x)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
    return x


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    run_trunk(model, x).square().mean().backward()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weight gradients of one step by module, of convolutions and batch norms that have one."""
    step(model, x)
    found = {}
    for name, module in model.named_modules():
        grad = getattr(getattr(module, "weight", None), "grad", None)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and grad is not None:
            found[name] = grad.clone()
    return found


def gradient_error(model: nn.Module, x: torch.Tensor, exact: Mapping[str, torch.Tensor]) -> float:
    """Largest relative difference (2-norm) of a weight's gradient from ``exact``, those in float64.

    Of a convolution only live weights count: what is behind a zero is nobody's gradient. Modules
    without a gradient in ``exact`` are not compared; infinite for one that has none in ``model``.
    """
    step(model, x)
    worst = 0.0
    for name, wanted in exact.items():
        module = model.get_submodule(name)
        if module.weight.grad is None:
            return float("inf")
        live = module.weight.detach() != 0
        if not isinstance(module, nn.BatchNorm2d):
            wanted, found = wanted[live], module.weight.grad.double()[live]
        else:
            found = module.weight.grad.double()
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst
