"""Which stages run as one op: those whose fused blocks are faster together."""

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
    other. measure: time both ways and leave a stage alone that is not faster; else all are taken.
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
        if measure and (x := _input(subject, path, batch)) is not None:
            alone, together = _times(future, x)
            if together >= alone:
                notes.append(
                    f"{path}: blocks run one by one, {alone:.2f} ms; as one op {together:.2f} ms"
                )
                continue
            notes.append(
                f"{path}: {longest} blocks run as one op, {together:.2f} ms; one by one "
                f"{alone:.2f} ms"
            )
        found[path] = AcceleratedStage(original)
    return found, notes


def _times(blocks: nn.Sequential, x: torch.Tensor) -> tuple[float, float]:
    """Milliseconds one by one and as one op."""
    stage = AcceleratedStage(blocks)
    calls = {"blocks": lambda: blocks(x), "stage": lambda: stage(x)}
    found = undisturbed(interleaved_ms(calls, 0.3, (3, 15)))
    return found["blocks"], found["stage"]


def _input(subject: PlanSubject, path: str, batch: int) -> torch.Tensor | None:
    """What reaches the stage, from the sizes of its first block; None if they are not known."""
    block = next((b for b in subject.trunk.blocks if b.name.startswith(f"{path}.")), None)
    shape = None if block is None else subject.shapes.get(block.convs[0].name)
    if block is None or shape is None:
        return None
    generator = torch.Generator().manual_seed(0)
    channels = block.convs[0].conv.in_channels
    return torch.randn(batch, channels, shape.h_in, shape.w_in, generator=generator).relu_()
