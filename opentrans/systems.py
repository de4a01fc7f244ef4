"""Parameters and forward work of the three published segmentation systems, by named counters.

1 FLOP = 1 MAC, batch 1. A *counter* is a rule about what to count: ``fvcore`` (convolutions, matrix
products, 2 per batch-norm output, 4 per bilinear output), ``thop`` (by module: convolutions and
linear layers, 4 per batch-norm output, 1 per pooled output; it misses parameters and products of
MultiheadAttention and functional ops), ``convs`` (convolutions alone, exact). The published table
mixes them; :func:`reproduce` says which number came from which, and sets the same system beside it
counted once, by layer.

Backbone, ASPP and decoder are computed from their shapes. The two mask heads are linear in the
image area; their coefficients were measured with fvcore 0.1.5.post20221221 and thop 0.1.1 on the
published code (OpenTrans aea33ff, fc-clip 2b0bbe2; FC-CLIP with 133 prompts, each further one adds
0.00256 GMAC) and hold for multiples of 32 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from opentrans_kernels.errors import OpenTransError

from .imp.schedule import ImpSchedule

__all__ = [
    "PAPER_SIZE",
    "SYSTEMS",
    "Part",
    "Row",
    "backbone_part",
    "density_after",
    "head_parts",
    "reproduce",
]

Counter = Literal["convs", "fvcore", "thop"]
COUNTERS: tuple[Counter, ...] = ("convs", "fvcore", "thop")

PAPER_SIZE = (800, 1216)  # a 426x640 image, short side to 800, padded to a multiple of 32
PAPER_ROUNDS = 22
PAPER_RATE = 0.1
PRUNABLE = 23_473_152  # all convolutions of the RN50 but the first
AREA = 512 * 512  # unit of the coefficients
# Of the CLIP RN50 trunk at 512x512, exact: weights, multiply-adds, batch-norm and pool outputs.
_CONV_WEIGHTS, _CONV_MACS = 23_474_016, 28_041_019_392
_NORM_PARAMETERS, _NORM_OUTPUTS, _POOL_OUTPUTS = 53_248, 65_011_712, 4_849_664


@dataclass(frozen=True)
class Part:
    """A part of a system at one image size.

    parameters, macs: by counter; a counter that was never applied to the part is absent.
    """

    name: str
    parameters: Mapping[Counter, int]
    macs: Mapping[Counter, float]

    def count(self, counter: Counter) -> tuple[int, float]:
        """(parameters, MACs). Raises OpenTransError if this counter was not applied."""
        if counter not in self.macs:
            raise OpenTransError(
                f"{self.name} was never counted with {counter}; known are {', '.join(self.macs)}."
            )
        return self.parameters[counter], self.macs[counter]


@dataclass(frozen=True)
class _Convs:
    """A head made of convolutions with batch norms: (Cin, Cout, kernel, positions per 512x512)."""

    name: str
    layers: tuple[tuple[int, int, int, int], ...]
    upsampled: int = 0  # outputs of bilinear interpolation per 512x512

    def at(self, area: float) -> Part:
        weights = sum(cin * cout * k * k for cin, cout, k, _ in self.layers)
        affine = sum(2 * cout for _, cout, _, _ in self.layers)
        # What is pooled to one position does not grow with the image.
        grown = [(layer, layer[3] * area if layer[3] > 1 else 1.0) for layer in self.layers]
        convs = sum(cin * cout * k * k * n for (cin, cout, k, _), n in grown)
        norms = sum(layer[1] * n for layer, n in grown)
        return Part(
            self.name,
            {"convs": weights, "fvcore": weights + affine, "thop": weights + affine},
            {
                "convs": convs,
                "fvcore": convs + 2 * norms + 4 * self.upsampled * area,
                "thop": convs + 4 * norms,
            },
        )


@dataclass(frozen=True)
class _Linear:
    """A head measured at two sizes: counter -> (parameters, GMAC that stay, GMAC per 512x512)."""

    name: str
    measured: Mapping[Counter, tuple[int, float, float]]

    def at(self, area: float) -> Part:
        return Part(
            self.name,
            {counter: row[0] for counter, row in self.measured.items()},
            {counter: (row[1] + row[2] * area) * 1e9 for counter, row in self.measured.items()},
        )


_STRIDE16, _STRIDE4 = 32 * 32, 128 * 128
_HAN = _Linear(
    "mask head (Han et al.)",
    {"fvcore": (20_560_320, 1.545231, 43.540248), "thop": (15_046_848, 1.150669, 24.523047)},
)
_FCCLIP = _Linear(
    "mask head (FC-CLIP)",
    {"fvcore": (21_032_385, 5.527907, 60.945540), "thop": (15_442_112, 4.009728, 24.523047)},
)
_ASPP = _Convs(
    "ASPP",
    (
        (2048, 256, 1, _STRIDE16),
        *((2048, 256, 3, _STRIDE16),) * 3,
        (2048, 256, 1, 1),  # behind the global average pool
        (1280, 256, 1, _STRIDE16),
    ),
)
_DECODER = _Convs(
    "decoder",
    ((256, 48, 1, _STRIDE4), (304, 256, 3, _STRIDE4), (256, 256, 3, _STRIDE4)),
    upsampled=256 * _STRIDE4,
)


@dataclass(frozen=True)
class System:
    """One row of the published table.

    published: parameters in millions and GMAC, dense, then masked. Counters: which one its columns
    were made with, for the parameters and for the work of the head.
    """

    key: str
    title: str
    heads: tuple[_Convs | _Linear, ...]
    published: tuple[float, float, float, float]
    parameter_counter: Counter
    head_counter: Counter


SYSTEMS = {
    system.key: system
    for system in (
        System("han", "Han et al.", (_HAN,), (44.1, 268.2, 22.9, 173.3), "fvcore", "fvcore"),
        System(
            "deeplab", "DeepLabV3", (_ASPP, _DECODER), (40.3, 241.3, 19.1, 146.8), "convs", "thop"
        ),
        System("fc-clip", "FC-CLIP", (_FCCLIP,), (39.0, 200.1, 17.8, 105.6), "thop", "thop"),
    )
}


@dataclass(frozen=True)
class Row:
    """A published row, reproduced, and the same system counted honestly.

    Parameters in millions, work in GMAC, (dense, masked) each. counted: the counters of
    (parameters of the head, work of the backbone, work of the head). honest: all parameters, and
    the work of every layer by ``fvcore``; masked by the density of each layer.
    """

    key: str
    title: str
    published_parameters: tuple[float, float]
    published_macs: tuple[float, float]
    parameters: tuple[float, float]
    macs: tuple[float, float]
    counted: tuple[Counter, Counter, Counter]
    honest_parameters: tuple[float, float]
    honest_macs: tuple[float, float]

    @property
    def worst(self) -> float:
        """Largest relative difference between the published numbers and the reproduced ones."""
        pairs = zip(
            (*self.published_parameters, *self.published_macs),
            (*self.parameters, *self.macs),
            strict=True,
        )
        return max(abs(ours / published - 1) for published, ours in pairs)


def area_of(size: tuple[int, int]) -> float:
    """Image area in units of 512x512. Raises OpenTransError unless both are multiples of 32."""
    height, width = size
    if min(size) < 32 or height % 32 or width % 32:
        raise OpenTransError(
            f"size {height}x{width}: the heads' counts are linear in the area for multiples of 32 "
            f"only. Use {-(-height // 32) * 32}x{-(-width // 32) * 32}, to which detectron2 pads."
        )
    return height * width / AREA


def backbone_part(size: tuple[int, int]) -> Part:
    """The dense CLIP RN50 trunk, without attention pool, at (height, width) in pixels."""
    area = area_of(size)
    every = _CONV_WEIGHTS + _NORM_PARAMETERS
    return Part(
        "CLIP RN50 trunk",
        {"convs": _CONV_WEIGHTS, "fvcore": every, "thop": every},
        {
            "convs": _CONV_MACS * area,
            "fvcore": (_CONV_MACS + 2 * _NORM_OUTPUTS) * area,
            "thop": (_CONV_MACS + 4 * _NORM_OUTPUTS + _POOL_OUTPUTS) * area,
        },
    )


def head_parts(key: str, size: tuple[int, int]) -> list[Part]:
    """The parts of a system behind its backbone. Raises OpenTransError for an unknown system."""
    if key not in SYSTEMS:
        raise OpenTransError(f"there is no system {key!r}. Use one of {', '.join(SYSTEMS)}.")
    return [head.at(area_of(size)) for head in SYSTEMS[key].heads]


def density_after(rounds: int = PAPER_ROUNDS, rate: float = PAPER_RATE) -> float:
    """Share of the prunable weights that are left: 0.098477 after the published 22 rounds."""
    return ImpSchedule(rounds=rounds, rate=rate).kept(PRUNABLE)[-1] / PRUNABLE


def reproduce(
    kept_weights: int,
    kept_macs_share: float,
    size: tuple[int, int] = PAPER_SIZE,
    rounds: int = PAPER_ROUNDS,
) -> list[Row]:
    """The published table, and the honest count of a given mask.

    Args:
        kept_weights: of the prunable ones, in the mask of the honest count.
        kept_macs_share: share of the trunk's convolution MACs that mask keeps, by layer.
        size: (height, width) in pixels, multiples of 32.
        rounds: of pruning behind the published sparse columns, at uniform density.
    """
    backbone = backbone_part(size)
    density = density_after(rounds)
    gone = PRUNABLE * (1 - density)
    rows = []
    for system in SYSTEMS.values():
        heads = head_parts(system.key, size)
        counter = system.parameter_counter
        parameters = backbone.parameters[counter] + sum(p.parameters[counter] for p in heads)
        work = backbone.macs["thop"]
        macs = work + sum(part.macs[system.head_counter] for part in heads)
        true = backbone.parameters["fvcore"] + sum(part.parameters["fvcore"] for part in heads)
        honest = backbone.macs["fvcore"] + sum(part.macs["fvcore"] for part in heads)
        lost = backbone.macs["convs"] * (1 - kept_macs_share)
        million, giga = 1e-6, 1e-9
        published = system.published
        rows.append(
            Row(
                key=system.key,
                title=system.title,
                published_parameters=(published[0], published[2]),
                published_macs=(published[1], published[3]),
                parameters=(parameters * million, (parameters - gone) * million),
                macs=(macs * giga, (macs - (1 - density) * work) * giga),
                counted=(counter, "thop", system.head_counter),
                honest_parameters=(true * million, (true - PRUNABLE + kept_weights) * million),
                honest_macs=(honest * giga, (honest - lost) * giga),
            )
        )
    return rows
