"""Which neighbours may run as one kernel, and whether they should.

A block's tail with the next block's conv1, and the first two convolutions of the stem.

Every convolution belongs to at most one such link (conv2 and conv3 of a block, conv1 of the next),
so the choices are independent: a link takes the chain if it is measured faster than the kernels it
replaces, each at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import dispatch
from ..errors import OpenTransError
from ..ops.bottleneck_chain.shapes import configs, power, why_not
from ..ops.fused_stem.shapes import CONFIGS as STEM_CONFIGS
from ..ops.fused_stem.shapes import why_not as stem_why_not
from ..ops.implicit_gemm_conv2d import pack_weight
from ..ops.nhwc import why_too_old
from .kernels import Place, Run, random_inputs
from .network import Layer, Network
from .program import Chain, block_sizes, sizes_of
from .tune import Judge, Tuner, exact_layer

__all__ = ["Link", "Stem", "chain_maker", "choose_chains", "links"]

_OP = "bottleneck_chain"


@dataclass(frozen=True, eq=False)
class Link:
    """conv2 and conv3 of ``block``, conv1 of the block behind it; size: of conv2's input."""

    block: str
    layers: tuple[Layer, Layer, Layer]
    size: tuple[int, int, int]

    def problem(self, place: Place) -> str | None:
        """Why this link cannot be a chain here; None if it can."""
        second, third, first = self.layers
        if not third.residual or second.pool > 1:
            return "a chain needs an identity shortcut and no pool"
        if (second.kernel, second.stride, second.padding, third.kernel, first.kernel) != (
            3, 1, 1, 1, 1,
        ):  # fmt: skip
            return "a chain is 3x3, 1x1, 1x1 with stride 1"
        if not (second.relu and third.relu and first.relu) or first.stride != 1:
            return "a chain has a ReLU behind every convolution"
        if place.capability is not None and (problem := why_too_old(place.capability)) is not None:
            return problem
        dtype = place.precision.dtype
        try:
            found = dispatch.resolve(_OP, place.device.type, str(dtype).removeprefix("torch."))
        except OpenTransError as error:
            return str(error)
        if place.device.type == "cuda" and found.row.backend != "triton":
            return f"triton does not serve {place.precision.name}"
        if found.row.backend != "triton":
            return None
        inner, cin = second.weight.shape[:2]
        return why_not(cin, inner, third.weight.shape[0], first.weight.shape[0], dtype)

    def tiles(self, place: Place) -> list[tuple[int, ...]]:
        """Tiles to try; one empty tile where the kernel has none."""
        if place.device.type != "cuda":
            return [()]
        inner, cin = self.layers[0].weight.shape[:2]
        return configs(cin, inner, self.layers[2].weight.shape[0], place.precision.dtype)

    def pack(self, place: Place, tile: tuple[int, ...]) -> Chain:
        """The chain as a function of conv1's output and the block's input."""
        dtype = place.precision.dtype
        name = str(dtype).removeprefix("torch.")
        function = dispatch.resolve(_OP, place.device.type, name).function()
        w2, w3, w1 = (pack_weight(i.weight).to(place.device, dtype) for i in self.layers)
        b2, b3, b1 = (i.bias.to(place.device, torch.float32) for i in self.layers)
        if more := power(w2.shape[2]) - w2.shape[2]:  # once, not in every call
            w2, b2 = F.pad(w2, (0, more)), F.pad(b2, (0, more))
            w3 = F.pad(w3, (0, 0, 0, more))
        tf32 = place.precision.tf32

        def run(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return function(x, w2, b2, w3, b3, residual, w1, b1, tf32, tile)

        return run

    def warm(self, place: Place) -> Iterator[Callable[[], None]]:
        """One compilation per tile, for ``warm.compile_all``."""
        from ..ops.bottleneck_chain import triton

        second, third, first = self.layers
        widths = second.weight.shape[1], second.weight.shape[0], third.weight.shape[0]
        given = (place.precision.dtype, *widths, first.weight.shape[0], place.precision.tf32)
        for tile in self.tiles(place):
            yield lambda t=tile: triton.warm(*given, t)

    def exact(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both outputs in float64."""
        second, third, first = self.layers
        y = exact_layer(third, exact_layer(second, x, None, None), residual, None)
        return y, exact_layer(first, y, None, None)


def links(
    network: Network, variants: Mapping[str, str], size: tuple[int, int, int]
) -> Iterator[Link]:
    """Every pair of neighbouring bottlenecks, in the widths chosen. size: of the image."""
    where = block_sizes(network, size)
    for block, after in zip(network.blocks, network.blocks[1:], strict=False):
        layers = block.variants[variants[block.name]]
        first = after.variants[variants[after.name]][0]
        if len(layers) == 3:
            at = sizes_of(layers, where[block.name])[1]
            yield Link(block.name, (layers[1], layers[2], first), at)


def choose_chains(
    network: Network,
    variants: Mapping[str, str],
    size: tuple[int, int, int],
    tuner: Tuner,
    separate: Mapping[str, tuple[float, Any]],
) -> tuple[dict[str, tuple[str, float, float]], dict[str, str]]:
    """Block -> (tile name, ms, ms of what it replaces) where a chain is faster; block -> why not.

    separate: layer name -> (best milliseconds alone, its function), which the chain must beat and
    whose result bounds its error.
    """
    chosen: dict[str, tuple[str, float, float]] = {}
    rejected: dict[str, str] = {}
    known: dict[Any, tuple[str, float] | str] = {}
    for link in links(network, variants, size):
        problem = link.problem(tuner.place)
        if problem is not None:
            rejected[link.block] = problem
            continue
        instead = sum(separate[layer.name][0] for layer in link.layers)
        key = (tuple(tuple(layer.weight.shape) for layer in link.layers), link.size)
        if key not in known:
            known[key] = _best(link, tuner, [separate[layer.name][1] for layer in link.layers])
        best = known[key]
        if isinstance(best, str):
            rejected[link.block] = best
        elif best[1] < instead:
            chosen[link.block] = (best[0], best[1], instead)
        else:
            rejected[link.block] = f"{best[1]:.4f} ms instead of {instead:.4f}"
    return chosen, rejected


def _best(link: Link, tuner: Tuner, alone: list[Callable[..., Any]]) -> tuple[str, float] | str:
    """(tile name, milliseconds) of the fastest tile, or why none counts."""
    place = tuner.place
    n, h, w = link.size
    like = torch.empty(0, dtype=place.precision.dtype, device=place.device)
    generator = torch.Generator(place.device).manual_seed(0)
    x, residual = (
        torch.empty(
            (n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
        ).normal_(generator=generator).relu_()
        for c in (link.layers[0].weight.shape[1], link.layers[1].weight.shape[0])
    )  # fmt: skip
    judge = Judge(place, link.exact)
    y = alone[1](alone[0](x, None, None), residual, None)
    problem = judge.problem((y, alone[2](y, None, None)), (x, residual))
    if problem is not None:
        return f"the kernels one by one: {problem}"
    times, reasons = {}, []
    for tile in link.tiles(place):
        name = chain_name(tile)
        time = tuner.attempt(
            f"{link.block} {name}", lambda t=tile: link.pack(place, t), (x, residual), judge
        )
        if isinstance(time, str):
            reasons.append(f"{name}: {time}")
        else:
            times[name] = time
    if not times:
        return "; ".join(reasons) or "no tile fits"
    best = min(times, key=times.__getitem__)
    return best, times[best]


def chain_name(tile: tuple[int, ...]) -> str:
    return "chain:" + ("x".join(map(str, tile)) if tile else "any")


def chain_maker(link: Link, place: Place, name: str) -> Callable[[], Chain]:
    """What ``program.build`` calls for a chosen chain."""
    text = name.removeprefix("chain:")
    tile = () if text == "any" else tuple(int(part) for part in text.split("x"))
    return lambda: link.pack(place, tile)


@dataclass(frozen=True, eq=False)
class Stem:
    """The first two convolutions of the stem as one kernel; size: of the image."""

    layers: tuple[Layer, ...]
    size: tuple[int, int, int]
    block = "stem"

    def problem(self, place: Place) -> str | None:
        """Why these two cannot be one kernel here; None if they can."""
        if len(self.layers) < 2:
            return "the stem has one convolution only"
        first, second = self.layers[:2]
        forms = [(i.kernel, i.stride, i.padding, i.relu, i.pool) for i in (first, second)]
        if forms != [(3, 2, 1, True, 1), (3, 1, 1, True, 1)]:
            return "the stem does not begin with a 3x3 of stride 2 and a 3x3 of stride 1"
        if place.capability is not None and (problem := why_too_old(place.capability)) is not None:
            return problem
        try:
            found = dispatch.resolve("fused_stem", place.device.type, _name(place))
        except OpenTransError as error:
            return str(error)
        if place.device.type == "cuda" and found.row.backend != "triton":
            return f"triton does not serve {place.precision.name}"
        (middle, cin), cout = first.weight.shape[:2], second.weight.shape[0]
        return stem_why_not(cin, middle, cout)

    def tiles(self, place: Place) -> list[tuple[int, ...]]:
        """Tiles to try; one empty tile where the kernel has none."""
        return list(STEM_CONFIGS) if place.device.type == "cuda" else [()]

    def pack(self, place: Place, tile: tuple[int, ...]) -> Run:
        """Both convolutions as one function of the image."""
        tf32, operand = place.precision.tf32, place.precision.operand
        function = dispatch.resolve("fused_stem", place.device.type, _name(place)).function()
        w1, w2 = (operand(pack_weight(i.weight), place.device) for i in self.layers[:2])
        b1, b2 = (i.bias.to(place.device, torch.float32) for i in self.layers[:2])
        return lambda x, residual=None, x2=None: function(x, w1, b1, w2, b2, tf32, tile)

    def choose(
        self, tuner: Tuner, separate: list[tuple[float, Run]]
    ) -> tuple[str, float, float] | str:
        """(tile name, ms, ms of the two kernels it replaces) if it is faster, else why not."""
        place = tuner.place
        if (problem := self.problem(place)) is not None:
            return problem
        x, *_ = random_inputs(self.layers[0], self.size, place)

        def exact(image: torch.Tensor) -> torch.Tensor:
            middle = exact_layer(self.layers[0], image, None, None)
            return exact_layer(self.layers[1], middle, None, None)

        judge = Judge(place, exact)
        (ms1, run1), (ms2, run2) = separate[:2]
        if (problem := judge.problem(run2(run1(x, None, None), None, None), (x,))) is not None:
            return f"the kernels one by one: {problem}"
        found: dict[str, float] = {}
        for tile in self.tiles(place):
            name = "stem:" + ("x".join(map(str, tile)) if tile else "any")
            time = tuner.attempt(f"stem {name}", lambda t=tile: self.pack(place, t), (x,), judge)
            if not isinstance(time, str):
                found[name] = time
        if not found:
            return "no tile runs"
        best = min(found, key=found.__getitem__)
        if found[best] >= ms1 + ms2:
            return f"{found[best]:.4f} ms instead of {ms1 + ms2:.4f}"
        return best, found[best], ms1 + ms2

    def maker(self, place: Place, name: str, rest: list[Run]) -> Callable[[], list[Run]]:
        """What ``program.build`` calls; rest: the stem's other functions."""
        text = name.removeprefix("stem:")
        tile = () if text == "any" else tuple(int(part) for part in text.split("x"))
        return lambda: [self.pack(place, tile), *rest]


def _name(place: Place) -> str:
    return str(place.precision.dtype).removeprefix("torch.")
