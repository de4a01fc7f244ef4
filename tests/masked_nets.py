"""A small network, its masks and a training loop for the tests of masked fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opentrans_kernels import MaskSet

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "amsgrad-foreach": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "foreach": True}),
}
MAIN = ("sgd", "adam", "adamw")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 20, 1),
        nn.ReLU(),
        nn.Conv2d(20, 7, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 5),
    )


def masks_of(model: nn.Module, density: float = 0.3, seed: int = 1) -> MaskSet:
    gen = torch.Generator().manual_seed(seed)
    return MaskSet(
        {
            name: torch.rand(conv.weight.shape, generator=gen) < density
            for name, conv in model.named_modules()
            if isinstance(conv, nn.Conv2d) and name != "0"
        }
    )


def dead_values(model: nn.Module, masks: MaskSet) -> torch.Tensor:
    parts = [model.get_submodule(n).weight.detach()[~m] for n, m in masks.masks.items()]
    values = torch.cat(parts)
    assert values.numel() > 100, "without dead weights this proves nothing"
    return values


def assert_dead(model: nn.Module, masks: MaskSet) -> None:
    """All bits zero: no -0, no denormal."""
    assert not dead_values(model, masks).contiguous().view(torch.int32).any()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    start: int = 0,
    amp: bool = False,
    clip: float | None = 0.5,
    before_clip: Callable[[], None] = lambda: None,
    scheduler: Any = None,
    scaler: Any = None,
) -> None:
    for step in range(start, start + steps):
        gen = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=gen)
        target = torch.randn(4, 5, generator=gen)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = (model(x).float() - target).square().mean()
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        before_clip()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "lr": 0.02}, {"params": plain, "weight_decay": 0.0}]


def mask_by_hand(model: nn.Module, masks: MaskSet) -> Callable[[], None]:
    def run() -> None:
        for name, mask in masks.masks.items():
            model.get_submodule(name).weight.grad.masked_fill_(~mask, 0)

    return run
