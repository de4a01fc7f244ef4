"""Multiply-adds of token reduction: the published tables reproduced, and an honest count.

The three published tables (Liang et al., arXiv 2210.01035) reduce Segmenter ViT-L/16. Their
numbers fit one counter and, by method, different rules about what was counted; :func:`published`
names the rule of every row. 1 FLOP = 1 MAC, batch 1; beside products a layer norm and a GELU count
2 per element, a softmax 2, scaling the queries 1; biases of convolutions count, of linear layers
not. The decoder's products of two activations do not. The honest column counts products alone
in addition: those of the decoder, the distances and sums of clustering as dense products (as they
are computed), matching, hashing, and the way back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opentrans_kernels.tokens import TokenPlan
from opentrans_kernels.tokens.merge import kept_count

__all__ = ["SHAPES", "TABLES", "TokenRow", "VitShape", "published", "segmenter_macs"]

ITERS, NEAR, K = 5, 25, 20  # of the published clustering: passes, candidates, neighbours on return


@dataclass(frozen=True)
class VitShape:
    """A Segmenter: width, blocks and heads of encoder and decoder alike, MLP of four widths.

    decoder_layers: of the mask transformer; 0: a linear decoder. kept: share of the weights of
    blocks' linear layers that are not zero.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    decoder_layers: int = 2
    kept: float = 1.0

    @property
    def hidden(self) -> int:
        return 4 * self.width

    def linear(self, macs: int) -> int:
        """What is left of products with the weights of blocks."""
        return macs if self.kept == 1 else round(self.kept * macs)

    def embed(self, n: int) -> int:
        """Patch convolution of n tokens, with its bias."""
        return (3 * self.patch**2 + 1) * n * self.width

    def attention(self, n: int, queries: int | None = None) -> int:
        """Norm, projections and attention of n tokens (from fewer queries, if given)."""
        d, q = self.width, n if queries is None else queries
        products = self.linear(4 * n * d * d) + 2 * d * q * n
        return products + n * d + 2 * self.heads * q * n + 2 * n * d

    def feed(self, n: int) -> int:
        """Norm and MLP."""
        return (
            self.linear(2 * n * self.width * self.hidden) + 2 * n * self.hidden + 2 * n * self.width
        )

    def layer(self, n: int) -> int:
        return self.attention(n) + self.feed(n)

    def decoder(self, n: int, classes: int) -> int:
        """Of n patches, as counted: linear layers, norms and the final norm of masks."""
        if not self.decoder_layers:
            return n * self.width * classes
        d, q = self.width, n + classes
        layers = self.linear(12 * d * d * q) + 2 * q * self.hidden + 4 * q * d
        return n * d * d + self.decoder_layers * layers + 2 * q * d + 2 * n * classes

    def decoder_products(self, n: int, classes: int) -> int:
        """What the published counter leaves out: attention, two projections, masks."""
        if not self.decoder_layers:
            return 0
        d, q = self.width, n + classes
        return self.decoder_layers * 2 * q * q * d + q * d * d + n * classes * d


SHAPES = {
    "segmenter-s16": VitShape(384, 12, 6),
    "segmenter-b16": VitShape(768, 12, 12),
    "segmenter-l16": VitShape(1024, 24, 16),
}


@dataclass(frozen=True)
class _Numbers:
    """One published cell: setting, GFLOPs, frames per second, mIoU in percent."""

    setting: float | tuple[int, int, int]  # EViT, ToMe: share; ACT: clusters; else alpha and grid
    gflops: float
    fps: float
    miou: float


@dataclass(frozen=True)
class Table:
    """One published table: token map (square), layers of the decoder, classes, rows by method.

    act: mean clusters per head that the published counts imply.
    evit_backbone: EViT settings whose published number has no decoder in it.
    """

    title: str
    side: int
    decoder_layers: int
    classes: int
    rows: dict[str, tuple[_Numbers, ...]]
    evit_backbone: tuple[float, ...] = ()


def _cells(*values: tuple[float | tuple[int, int, int], float, float, float]) -> tuple:
    return tuple(_Numbers(*one) for one in values)


TABLES = (
    Table(
        "ADE20K", 40, 2, 150,
        {
            "dense": _cells((0, 658.98, 6.55, 51.82)),
            "ours": _cells(
                ((16, 28, 28), 529.81, 7.92, 51.93), ((10, 28, 28), 443.84, 9.51, 51.56),
                ((8, 20, 20), 309.4, 13.51, 47.96),
            ),
            "evit": _cells(
                (0.9, 572.01, 7.58, 51.52), (0.8, 500.19, 8.50, 50.37), (0.5, 351.83, 12.03, 38.89)
            ),
            "tome": _cells(
                (0.2, 516.23, 6.97, 51.66), (0.3, 448.70, 8.31, 50.96), (0.5, 321.29, 10.75, 47.12)
            ),
            "act": _cells(
                (1001, 611.06, 6.01, 51.69), (177, 545.18, 6.16, 51.24), (31, 533.52, 6.33, 48.03)
            ),
        },
    ),
    Table(
        "Cityscapes", 48, 1, 19,
        {
            "dense": _cells((0, 995.6, 4.20, 79.14)),
            "ours": _cells(
                ((18, 32, 32), 840.9, 4.82, 78.82), ((12, 32, 32), 691.0, 5.89, 78.38),
                ((10, 24, 24), 529.64, 8.02, 76.20),
            ),
            "evit": _cells(
                (0.9, 822.7, 5.27, 79.03), (0.8, 707.2, 5.96, 78.49), (0.5, 506.2, 8.68, 68.14)
            ),
            "tome": _cells(
                (0.2, 760.8, 5.20, 78.37), (0.3, 651.5, 5.50, 77.81), (0.5, 448.5, 7.84, 71.23)
            ),
            "act": _cells(
                (1529, 906.26, 4.76, 79.00), (108, 742.7, 4.49, 78.71), (1, 730.44, 5.32, 75.42)
            ),
        },
        evit_backbone=(0.9, 0.8),
    ),
    Table(
        "Pascal Context", 30, 2, 60,
        {
            "dense": _cells((0, 338.7, 14.7, 58.07)),
            "ours": _cells(
                ((14, 20, 20), 251.2, 18.2, 58.27), ((12, 15, 15), 201.3, 21.6, 57.85),
                ((8, 15, 15), 161.0, 25.0, 55.08),
            ),
            "evit": _cells(
                (0.9, 271.7, 16.0, 57.94), (0.8, 261.0, 17.7, 56.99), (0.5, 184.4, 23.5, 48.57)
            ),
            "tome": _cells(
                (0.2, 269.8, 13.2, 57.67), (0.3, 236.5, 12.8, 57.24), (0.5, 172.4, 14.2, 54.25)
            ),
            "act": _cells(
                (189, 306.7, 11.1, 58.04), (17, 299.0, 11.7, 57.88), (1.8, 298.3, 11.9, 56.08)
            ),
        },
        evit_backbone=(0.9,),
    ),
)  # fmt: skip
PROJECTIONS = (32, 24, 16)  # of ACT, in the order of its settings
EVIT_AT = (7, 13, 19)  # 0-based, of 24


@dataclass(frozen=True)
class TokenRow:
    """One published row: what it says, the same number reproduced, and an honest count.

    gflops, reproduced, honest: 1e9 MACs per image. counted: what the published number contains.
    """

    table: str
    size: int
    method: str
    setting: str
    gflops: float
    reproduced: float
    counted: str
    honest: float
    fps: float
    miou: float

    @property
    def error(self) -> float:
        """Relative difference between published and reproduced."""
        return abs(self.reproduced / self.gflops - 1)


def published() -> list[TokenRow]:
    """All 39 rows of the three tables."""
    rows = []
    for table in TABLES:
        shape = VitShape(1024, 24, 16, decoder_layers=table.decoder_layers)
        for method, cells in table.rows.items():
            for index, cell in enumerate(cells):
                told, ours, counted, honest = _row(shape, table, method, cell, index)
                rows.append(
                    TokenRow(
                        table.title, 16 * table.side, method, told, cell.gflops, ours / 1e9,
                        counted, honest / 1e9, cell.fps, cell.miou,
                    )
                )  # fmt: skip
    return rows


def _row(
    shape: VitShape, table: Table, method: str, cell: _Numbers, index: int
) -> tuple[str, float, str, float]:
    """Setting in words, published count and what is in it, honest count."""
    n, setting, depth, d = table.side**2, cell.setting, shape.depth, shape.width
    decoder = shape.decoder(n, table.classes)
    missing = shape.decoder_products(n, table.classes)
    dense = shape.embed(n) + depth * shape.layer(n + 1) + 2 * (n + 1) * d + decoder
    plain = "encoder, decoder without its products"
    if isinstance(setting, tuple):
        alpha, h, w = setting
        m = h * w
        core = shape.embed(n) + alpha * shape.layer(n + 1) + (depth - alpha) * shape.layer(m + 1)
        core += 2 * (m + 1) * d + shape.decoder(m, table.classes)
        clustering = n * d + 2 * (n + m)
        clustering += ITERS * (2 * NEAR * n * d + 3 * NEAR * n + m * n * d + m * d)
        back = K * n * d + 3 * K * n
        honest = core + n * d + 2 * ITERS * m * n * d + m * n * d + m * n * table.classes
        honest += shape.decoder_products(m, table.classes)
        what = (
            f"{plain}, both on reduced tokens; sums of clustering dense, its distances by window, "
            f"those of the way back for {K} centres"
        )
        return f"alpha {alpha}, {h}x{w}", core + clustering + back, what, honest
    if method == "evit":
        encoder, back = _evit(shape, n, setting)
        if setting in table.evit_backbone:
            what, counted = "encoder and the way back, no decoder", encoder + back
        else:
            what, counted = f"{plain}, the way back", encoder + back + decoder
        return f"keep {setting:g}", counted, what, encoder + back + decoder + missing
    if method == "tome":
        left = n + 1 - math.floor(setting * (n + 1))
        counted = shape.embed(n) + depth * shape.layer(left) + 2 * (n + 1) * d + decoder
        matching = 2 * depth * (((n + 2) // 2) * ((n + 1) // 2) * d + 2 * (n + 1) * d)
        what = f"{plain}; matching, done before all {2 * depth} modules, at no cost"
        return f"merge {setting:.0%}", counted, what, counted + matching + missing
    if method == "act":
        saved = depth * (2 * d + 2 * shape.heads) * (n + 1) * (n + 1 - setting)
        count = PROJECTIONS[index]
        hashing = depth * (n + 1) * d * count
        what = (
            f"{plain}; data-dependent: {setting:g} clusters of {n + 1} queries, which the "
            "published number implies; hashing at no cost"
        )
        counted = dense - saved
        return f"{count} projections", counted, what, counted + hashing + missing
    return "-", dense, plain, dense + missing


def _evit(shape: VitShape, n: int, keep: float) -> tuple[int, int]:
    """Encoder with a shrinking count, and distances of removed to kept tokens."""
    return _shrinking(shape, n, keep, EVIT_AT)


def _shrinking(shape: VitShape, n: int, keep: float, at: Sequence[int]) -> tuple[int, int]:
    total, back, tokens = shape.embed(n), 0, n
    for index in range(shape.depth):
        total += shape.attention(tokens + 1)
        if index in at and (kept := kept_count(tokens, keep)) < tokens:
            back += (tokens - kept) * kept * shape.width
            tokens = kept + 1
        total += shape.feed(tokens + 1)
    return total + 2 * (tokens + 1) * shape.width, back


def segmenter_macs(
    shape: VitShape, size: tuple[int, int], classes: int, plan: TokenPlan | None = None
) -> int | None:
    """Honest MACs of a Segmenter of this package on an image of ``size`` pixels.

    None for "act", whose count depends on the image. Of "cluster" and "pool" the decoder works on
    the reduced tokens unless ``plan.expand``.
    """
    n = -(-size[0] // shape.patch) * -(-size[1] // shape.patch)
    d, depth = shape.width, shape.depth

    def behind(tokens: int) -> int:
        return shape.decoder(tokens, classes) + shape.decoder_products(tokens, classes)

    dense = shape.embed(n) + depth * shape.layer(n + 1) + 2 * (n + 1) * d + behind(n)
    numbers = () if plan is None else plan.blocks(depth)
    if plan is None or not numbers:
        return dense
    if plan.method == "act":
        return None
    if plan.grid is not None:
        m, alpha = plan.grid[0] * plan.grid[1], numbers[0]
        total = shape.embed(n) + alpha * shape.layer(n + 1) + (depth - alpha) * shape.layer(m + 1)
        total += 2 * ((n if plan.expand else m) + 1) * d + behind(n if plan.expand else m) + n * d
        given = d if plan.expand else classes
        if plan.method == "pool":
            return total + 4 * n * given
        return total + (2 * plan.iters + 1) * m * n * d + m * n * given
    if plan.method == "evit":
        total, back = _shrinking(shape, n, plan.keep or 1.0, plan.stages(depth))
        return total + back + behind(n)
    total, tokens = shape.embed(n), n
    for index in range(depth):
        total += shape.attention(tokens + 1)
        if index in numbers:
            total += (tokens + 1) // 2 * (tokens // 2) * d // shape.heads
            tokens -= min(plan.r or 0, tokens // 2)
        total += shape.feed(tokens + 1)
    return total + 2 * (n + 1) * d + behind(n)
