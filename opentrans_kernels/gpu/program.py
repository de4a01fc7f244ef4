"""A planned trunk as a function: packed layers in order, nothing decided inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import PlanError
from .kernels import Place, Run, candidates, output_size
from .network import Block, Layer, Network

__all__ = ["BlockProgram", "Program", "pack_layer", "sizes_of"]

#: (conv1's output, the block's input) -> (the block's output, conv1's output of the next block).
Chain = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def pack_layer(layer: Layer, kernel: str, place: Place, size: tuple[int, int, int]) -> Run:
    """The candidate called ``kernel``, packed. Raises PlanError if it does not exist here."""
    found, rejected = candidates(layer, place, size)
    for candidate in found:
        if candidate.name == kernel:
            return candidate.pack(layer)
    known = ", ".join(c.name for c in found)
    why = rejected.get(kernel.partition(":")[0], "it is not a candidate")
    raise PlanError(
        f"{layer.name}: no kernel {kernel!r} here ({why}); there are {known}. Plan again on this "
        "machine."
    )


def sizes_of(layers: Sequence[Layer], size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Input size of every layer of a sequence, and behind them the last one's output size."""
    sizes = [size]
    for layer in layers:
        sizes.append(output_size(layer, sizes[-1]))
    return sizes


@dataclass
class BlockProgram:
    """The packed layers of one block; ``chain`` computes all but the first, and one more."""

    layers: tuple[Layer, ...]
    runs: tuple[Run, ...]
    chain: Chain | None = None

    def __call__(
        self, x: torch.Tensor, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: the block's input; first: conv1's output if the block before has computed it."""
        y = self.runs[0](x, None, None) if first is None else first
        if self.chain is not None:
            return self.chain(y, x)
        for layer, run in zip(self.layers[1:], self.runs[1:], strict=True):
            y = run(y, x if layer.residual else None, x if layer.second is not None else None)
        return y, None


class Program:
    """Stem and stages, packed. Call it with channels_last activations of the plan's dtype."""

    def __init__(
        self,
        place: Place,
        stem: Sequence[Run],
        stem_pool: nn.Module | None,
        stages: Sequence[Sequence[BlockProgram]],
    ) -> None:
        self.place, self.stem, self.stem_pool, self.stages = place, stem, stem_pool, stages

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[stem output, output of every stage]."""
        with torch.no_grad(), self.place.precision.applied():
            for run in self.stem:
                x = run(x, None, None)
            if self.stem_pool is not None:
                x = self.stem_pool(x)
            outputs, first = [x], None
            for blocks in self.stages:
                for block in blocks:
                    x, first = block(x, first)
                outputs.append(x)
            return outputs

    def stage(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """One stage alone, for an input that is not the output of the one before it."""
        with torch.no_grad(), self.place.precision.applied():
            first = None
            for block in self.stages[index]:
                x, first = block(x, first)
            return x

    @property
    def launches(self) -> str:
        chained = sum(block.chain is not None for blocks in self.stages for block in blocks)
        return f"{chained} chained blocks of {sum(map(len, self.stages))}"


def build(
    network: Network,
    place: Place,
    size: tuple[int, int, int],
    kernels: Mapping[str, str],
    variants: Mapping[str, str],
    fused: Mapping[str, Callable[[], object]] | None = None,
) -> Program:
    """Pack a network.

    Args:
        size: batch, height and width of the input.
        kernels: layer name -> candidate. variants: block name -> width variant.
        fused: block name -> maker of its chain; "stem" -> maker of the stem's functions.
    """
    fused = fused or {}
    stem_sizes = sizes_of(network.stem, size)
    if "stem" in fused:
        stem = fused["stem"]()
    else:
        stem = [
            pack_layer(layer, kernels[layer.name], place, at)
            for layer, at in zip(network.stem, stem_sizes, strict=False)
        ]
    at = pooled_by(network.stem_pool, stem_sizes[-1])
    stages: list[list[BlockProgram]] = [[] for _ in range(network.stages)]
    for block in network.blocks:
        layers = block.variants[variants[block.name]]
        sizes = sizes_of(layers, at)
        runs = tuple(
            pack_layer(layer, kernels[layer.name], place, where)
            for layer, where in zip(layers, sizes, strict=False)
        )
        chain = fused[block.name]() if block.name in fused else None
        stages[block.stage].append(BlockProgram(layers, runs, chain))
        at = sizes[-1]
    return Program(place, stem, network.stem_pool, stages)


def pooled_by(pool: nn.Module | None, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size behind the stem's pool module."""
    if pool is None:
        return size
    shape = pool(torch.empty(size[0], 1, *size[1:], device="meta")).shape
    return shape[0], shape[2], shape[3]


def block_sizes(network: Network, size: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """Input size of every block."""
    at = pooled_by(network.stem_pool, sizes_of(network.stem, size)[-1])
    found = {}
    for block in network.blocks:
        found[block.name] = at
        at = sizes_of(_any(block), at)[-1]
    return found


def _any(block: Block) -> tuple[Layer, ...]:
    return block.variants["full"]
