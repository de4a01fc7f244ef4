"""The trunk cut into stem and stages, or a chain into its parts, and what several threads make of
each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .part import TrunkModule
from .timing import median_pair

__all__ = ["WHOLE", "stage_inputs", "stage_scaling"]

WHOLE = "the whole"


def stage_inputs(
    tower: nn.Module, x: torch.Tensor
) -> Iterator[tuple[str, list[nn.Module], torch.Tensor]]:
    """(name, modules that run one after the other, their input) of every piece of the trunk."""
    with torch.no_grad():
        for name, paths in TrunkModule(tower).pieces:
            modules = [tower.get_submodule(path) for path in paths]
            yield name, modules, x
            for module in modules:
                x = module(x)


def stage_scaling(
    one: nn.Module, ours: nn.Module, x: torch.Tensor, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Parallel efficiency of stem, stages and whole: time on one thread / (threads * time on all).

    Args:
        one, ours: the tower accelerated for one thread and for ``threads``; they run in turns, each
            on its number of threads. torch's is left at ``threads``.
        x: float32 [N, 3, H, W]. rounds: of which the one with the median ratio is reported.
    """
    sides = {1: list(stage_inputs(one, x)), threads: list(stage_inputs(ours, x))}
    spent: dict[int, list[list[float]]] = {count: [] for count in sides}
    for index in range(rounds + 1):
        order = list(sides) if index % 2 else list(reversed(sides))
        for count in order:
            torch.set_num_threads(count)
            parts = _milliseconds([(modules, given) for _, modules, given in sides[count]])
            if index:  # the first round warms up
                spent[count].append([*parts, sum(parts)])
    torch.set_num_threads(threads)
    rows = []
    for number, name in enumerate([*(name for name, _, _ in sides[1]), WHOLE]):
        times = ([round_[number] for round_ in spent[count]] for count in (1, threads))
        pair = median_pair(*times)
        rows.append(
            {
                "part": name,
                "one_thread_ms": pair.slow_ms,
                "ms": pair.fast_ms,
                "speedup": pair.ratios.to_dict(),
                "efficiency": pair.ratios.median / threads,
            }
        )
    return rows


def _milliseconds(parts: Sequence[tuple[list[nn.Module], torch.Tensor]]) -> list[float]:
    """Wall time of every part on its input."""
    found = []
    with torch.no_grad():
        for modules, x in parts:
            start = time.perf_counter()
            for module in modules:
                x = module(x)
            found.append((time.perf_counter() - start) * 1e3)
    return found
