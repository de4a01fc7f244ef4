"""Which pools read and write the kernels' layout: those behind sparse convolutions, if faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..ops.library import plane_padded
from ..plan.choose import MARGIN, Choice
from ..plan.clock import interleaved_ms, undisturbed
from ..plan.reading import PLANAR
from ..plan.subject import PlanSubject, Unit
from ..pools import PlanarPool, planar_pool
from ..topology import ConvNode
from ..topology.find import walk_modules
from .parts import same_pool

__all__ = ["pool_swaps"]

#: What may stand between a convolution and its pool, and changes no size.
_ELEMENTWISE = (
    nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU,
    nn.GELU, nn.Hardswish,
)  # fmt: skip


def pool_swaps(
    subject: PlanSubject, choices: Mapping[str, Choice], measure: bool, batch: int
) -> tuple[dict[str, PlanarPool], list[str]]:
    """Pools to replace beside the convolutions, and what was found.

    A pool must be plain and without hooks, and stand between the convolutions of a stem and the
    first block, or behind a convolution in an ``nn.Sequential``. measure: time both and leave a
    pool alone that is not faster; else all are taken.
    """
    swaps: dict[str, PlanarPool] = {}
    notes = []
    for path, node, planar in _candidates(subject, choices):
        original = subject.model.get_submodule(path)
        new = planar_pool(original)
        if new is None or not same_pool(original, new, node.conv.out_channels):
            continue
        if measure and (x := _input(subject, node, planar, batch)) is not None:
            calls = {"before": lambda m=original, x=x: m(x), "planar": lambda m=new, x=x: m(x)}
            ms = undisturbed(interleaved_ms(calls))
            times = f"{ms['planar']:.2f} ms; as it was {ms['before']:.2f} ms"
            if ms["planar"] > MARGIN * ms["before"]:
                notes.append(f"{path}: left as it was, in the kernels' layout {times}")
                continue
            notes.append(f"{path}: pools in the kernels' layout, {times}")
        swaps[path] = new
    return swaps, notes


def _candidates(
    subject: PlanSubject, choices: Mapping[str, Choice]
) -> Iterator[tuple[str, ConvNode, bool]]:
    """Paths of pools, the convolutions before them, and whether these leave padded planes."""

    def sparse(name: str) -> bool:
        return name in choices and choices[name].kind in PLANAR

    stem, blocks = subject.trunk.stem, subject.trunk.blocks
    if stem is not None and stem.pool_name:
        last = stem.convs[-1]
        if sparse(last.name) or (blocks and sparse(blocks[0].name)):
            yield stem.pool_name, last, sparse(last.name)
    seen = set()
    planar = {name for name in choices if sparse(name)}
    for pool in subject.trunk.pools_behind(planar):  # proved by tracing, whatever calls them
        seen.add(pool.name)
        yield pool.name, subject.trunk.conv(pool.before[0]), True
    alone = [u for u in subject.units if isinstance(u, Unit) and u.block is None]
    nodes = {unit.convs[0].name: unit.convs[0] for unit in alone}
    for path, module in walk_modules(subject.model):
        if type(module) is not nn.Sequential or "forward" in vars(module):
            continue
        before: ConvNode | None = None
        for key, part in module.named_children():
            name = f"{path}.{key}" if path else key
            if isinstance(part, nn.MaxPool2d | nn.AvgPool2d):
                if before is not None and sparse(before.name) and name not in seen:
                    yield name, before, True
                before = None
            elif not isinstance(part, _ELEMENTWISE):
                before = nodes.get(name)


def _input(subject: PlanSubject, node: ConvNode, planar: bool, batch: int) -> torch.Tensor | None:
    """What the convolution ``node`` gives the pool; None if its size is not known."""
    shape = subject.shapes.get(node.name)
    if shape is None:
        return None
    generator = torch.Generator().manual_seed(0)
    size = (batch, node.conv.out_channels, shape.h_out, shape.w_out)
    x = torch.randn(size, generator=generator).relu_()
    if planar:
        return plane_padded(x, *size).copy_(x)
    weight, last = node.conv.weight, torch.channels_last
    if weight.is_contiguous(memory_format=last) and not weight.is_contiguous():
        x = x.contiguous(memory_format=last)
    return x
