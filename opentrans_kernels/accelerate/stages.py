"""Which stages run as one op, and in which order their rows are computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..nn import Replacement
from ..plan.clock import interleaved_ms, undisturbed
from ..plan.subject import PlanSubject
from ..stage import AcceleratedStage, fused_runs
from ..topology.behaviour import own_behaviour

__all__ = ["stage_swaps"]


def stage_swaps(
    subject: PlanSubject, swaps: Mapping[str, Replacement], measure: bool, batch: int
) -> tuple[dict[str, AcceleratedStage], list[str]]:
    """Stages to replace beside ``swaps``, and what was found.

    A stage must be a plain ``nn.Sequential`` without hooks that holds fused blocks behind each
    other. measure: time blocks a few rows behind each other against one after the other; else they
    run a few rows behind each other.
    """
    found: dict[str, AcceleratedStage] = {}
    notes = []
    if subject.trunk.iterated:
        return {}, []
    for path in subject.trunk.stages:
        original = subject.model.get_submodule(path)
        if type(original) is not nn.Sequential or own_behaviour(original):
            continue
        future = nn.Sequential()
        for key, child in original._modules.items():
            future._modules[key] = swaps.get(f"{path}.{key}", child)
        future.eval()
        longest = max((len(run) for run in fused_runs(future)), default=0)
        if longest < 2:
            continue
        in_turn = False
        if measure and (x := _input(subject, path, batch)) is not None:
            overlapping, turns = _times(future, x)
            in_turn = turns < overlapping
            ways = [f"rows apart {overlapping:.2f} ms", f"one after the other {turns:.2f} ms"]
            way, other = reversed(ways) if in_turn else ways
            notes.append(f"{path}: {longest} blocks run as one op, {way}; {other}")
        found[path] = AcceleratedStage(original, in_turn)
    return found, notes


def _times(blocks: nn.Sequential, x: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of blocks a few rows behind each other, and of one after the other."""
    overlapping, turns = (AcceleratedStage(blocks, in_turn) for in_turn in (False, True))
    calls = {"overlapping": lambda: overlapping(x), "turns": lambda: turns(x)}
    found = undisturbed(interleaved_ms(calls, 0.3, (3, 15)))
    return found["overlapping"], found["turns"]


def _input(subject: PlanSubject, path: str, batch: int) -> torch.Tensor | None:
    """What reaches the stage, from the sizes of its first block; None if they are not known."""
    block = next((b for b in subject.trunk.blocks if b.name.startswith(f"{path}.")), None)
    shape = None if block is None else subject.shapes.get(block.convs[0].name)
    if block is None or shape is None:
        return None
    generator = torch.Generator().manual_seed(0)
    channels = block.convs[0].conv.in_channels
    return torch.randn(batch, channels, shape.h_in, shape.w_in, generator=generator).relu_()
