"""A small training run with everything that has state, for the tests of pruning runs."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch
from torch import nn

from opentrans.imp import ImpResult, iterative_magnitude_pruning


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Dropout(0.2),
        nn.Conv2d(16, 6, 1),
    )


class Training:
    """A step with everything that has state: momentum, a schedule, dropout, random data."""

    def __init__(self, stop_at: int | None = None, nan_at: int | None = None) -> None:
        self.model = small_net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, 0.7)
        self.stop_at, self.nan_at = stop_at, nan_at
        self.seen: list[int] = []

    def step(self, model: nn.Module, iteration: int) -> torch.Tensor:
        if iteration == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(iteration)
        x = torch.randn(2, 3, 6, 6) * random.uniform(0.5, 2) * numpy.random.uniform(0.9, 1.1)
        self.optimizer.zero_grad()
        loss = (model(x) - 1).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        self.optimizer.step()
        self.schedule.step()
        return loss * torch.nan if iteration == self.nan_at else loss

    def run(self, out_dir: Path | None = None, **options: object) -> ImpResult:
        settings = {"rounds": 5, "rate": 0.3, "period": 3, **options}
        return iterative_magnitude_pruning(
            self.model,
            self.step,
            optimizer=self.optimizer,
            extras={"schedule": self.schedule},
            out_dir=out_dir,
            **settings,
        )


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def seed_everything() -> None:
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)


def fresh(**options: object) -> Training:
    training = Training(**options)
    seed_everything()
    return training
