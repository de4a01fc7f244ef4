"""The convolutions and blocks of CLIP's RN50 trunk as data, at any input size.

Made by the rule of the architecture; a test holds them against the real tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .derive import kind_of_layer

_WIDTH, _BLOCKS = 64, (3, 4, 6, 3)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
QUICK_DENSITIES = (0.05, 0.1, 0.3, 0.7)


@dataclass(frozen=True)
class ConvCase:
    """One shape of convolution. ``height``, ``width``: of the input, in pixels; ``count``: how
    many layers of the trunk have this shape."""

    cin: int
    cout: int
    kernel: int
    stride: int
    height: int
    width: int
    count: int = 1

    @property
    def padding(self) -> int:
        """Half the window."""
        return self.kernel // 2

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        down = self.kernel - 1 - 2 * self.padding
        return (
            (self.height - 1 - down) // self.stride + 1,
            (self.width - 1 - down) // self.stride + 1,
        )

    @property
    def kind(self) -> str:
        """What the report groups by: "3x3", "1x1 expand", "1x1 reduce" or "1x1 same"."""
        return kind_of_layer(self.cin, self.cout, self.kernel)

    @property
    def name(self) -> str:
        """For instance ``64->256 k1 56x56``; a stride is named if it is not 1."""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.cin}->{self.cout} k{self.kernel}{stride} {self.out[0]}x{self.out[1]}"


@dataclass(frozen=True)
class BlockCase:
    """One shape of bottleneck: ``planes`` inside, four times as many out; ``pool`` 2 halves it."""

    cin: int
    planes: int
    pool: int
    down: bool
    height: int
    width: int
    count: int = 1

    @property
    def name(self) -> str:
        """For instance ``block 256-64-256 56x56``."""
        size = f"{self.height // self.pool}x{self.width // self.pool}"
        return f"block {self.cin}-{self.planes}-{4 * self.planes}{'+down' * self.down} {size}"


def block_cases(size: tuple[int, int] = (224, 224)) -> list[BlockCase]:
    """The distinct bottlenecks for an image of ``size`` (height, width) in pixels."""
    found: dict[BlockCase, int] = {}
    h, w = (((side + 1) // 2) // 2 for side in size)
    cin = _WIDTH
    for stage, blocks in enumerate(_BLOCKS):
        planes = _WIDTH << stage
        for block in range(blocks):
            pool = 2 if stage and not block else 1
            case = BlockCase(cin, planes, pool, not block, h, w)
            found[case] = found.get(case, 0) + 1
            cin, h, w = 4 * planes, h // pool, w // pool
    return [BlockCase(*_fields(case)[:-1], count) for case, count in found.items()]


def conv_cases(size: tuple[int, int] = (224, 224)) -> list[ConvCase]:
    """The distinct masked convolutions for an image of ``size`` (height, width) in pixels, in the
    order of the network. The first one, on three channels, is not masked and left out."""
    h, w = ((side + 1) // 2 for side in size)
    half = _WIDTH // 2
    convs = [ConvCase(half, half, 3, 1, h, w), ConvCase(half, _WIDTH, 3, 1, h, w)]
    for case in block_cases(size):
        shrunk = case.height // case.pool, case.width // case.pool
        each = [
            ConvCase(case.cin, case.planes, 1, 1, case.height, case.width),
            ConvCase(case.planes, case.planes, 3, 1, case.height, case.width),
            ConvCase(case.planes, 4 * case.planes, 1, 1, *shrunk),
        ]
        if case.down:
            each.append(ConvCase(case.cin, 4 * case.planes, 1, 1, *shrunk))
        convs += each * case.count
    counts: dict[ConvCase, int] = {}
    for conv in convs:
        counts[conv] = counts.get(conv, 0) + 1
    return [ConvCase(*_fields(conv)[:-1], count) for conv, count in counts.items()]


def representative(cases: Sequence[ConvCase]) -> list[ConvCase]:
    """One shape per kind, the one with the most work; for quick runs."""
    best: dict[str, ConvCase] = {}
    for case in cases:
        held = best.get(case.kind)
        if held is None or _work(case) > _work(held):
            best[case.kind] = case
    return list(best.values())


def _work(case: ConvCase) -> int:
    return case.cin * case.cout * case.kernel**2 * case.out[0] * case.out[1] * case.count


def _fields(case: ConvCase | BlockCase) -> list[int]:
    return list(vars(case).values())
