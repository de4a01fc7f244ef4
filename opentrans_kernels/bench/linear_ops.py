"""Linear layers and MLPs of vision transformers for ``opentrans bench op``.

The dense sides are PyTorch's own product and the ones a frozen ``torch.compile`` makes of it, with
weights reordered beforehand: oneDNN's, which also has the activation in it, and MKL's where torch
was built with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..activations import NONE, Activation, Kind
from ..pack import SparseWeight
from .op_case import Call, Case, macs_of, masked_weight, random_values

__all__ = ["LINEAR_OPS", "LinearCase", "linear_case", "linear_cases"]

LINEAR_OPS = ("sparse_linear", "sparse_mlp")
#: (channels, wide channels, tokens): ViT-B/16 at 224, ViT-L/16 at 640, each with a class token.
_NETWORKS = ((768, 3072, 197), (1024, 4096, 1601))


@dataclass(frozen=True)
class LinearCase:
    """A layer ``cin -> cout`` on ``tokens`` of each image; with ``hidden``: an MLP through it."""

    cin: int
    cout: int
    tokens: int
    hidden: int = 0

    @property
    def kind(self) -> str:
        """What the report groups by."""
        return "mlp" if self.hidden else "linear"

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(in, out) of each layer."""
        ends = [self.cin, *([self.hidden] if self.hidden else []), self.cout]
        return list(zip(ends, ends[1:], strict=False))

    @property
    def name(self) -> str:
        """For instance ``768->3072, 197 tokens``."""
        widths = "->".join(str(n) for n in [self.cin, *(out for _, out in self.widths)])
        return f"{widths}, {self.tokens} tokens"


def linear_cases(op: str) -> list[LinearCase]:
    """The shapes of an op, the one to take for all first."""
    if op == "sparse_mlp":
        return [LinearCase(width, width, tokens, wide) for width, wide, tokens in _NETWORKS]
    return [
        LinearCase(cin, cout, tokens)
        for width, wide, tokens in _NETWORKS
        for cin, cout in ((width, wide), (wide, width), (width, 3 * width), (width, width))
    ]


def linear_case(op: str, case: LinearCase, density: float, batch: int) -> Case:
    """A case of "sparse_linear" or "sparse_mlp", whose activation is GELU."""
    act = Activation(Kind.GELU) if case.hidden else NONE
    weights = [masked_weight(cout, cin, 1, density)[:, :, 0, 0] for cin, cout in case.widths]
    biases = [random_values([cout], 5 + i) for i, (_, cout) in enumerate(case.widths)]
    packs = [
        SparseWeight.from_dense(weight[:, :, None, None], bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    x = random_values([batch, case.tokens, case.cin], 2)

    def dense(x: torch.Tensor, ws: list[torch.Tensor], bs: list[torch.Tensor]) -> torch.Tensor:
        for i, (weight, bias) in enumerate(zip(ws, bs, strict=True)):
            x = functional.linear(functional.gelu(x) if i else x, weight, bias)
        return x

    counts = [
        (pack.nnz, weight.numel(), case.tokens, 1, 1)
        for pack, weight in zip(packs, weights, strict=True)
    ]
    nnz = sum(pack.nnz for pack in packs)
    parts: list[Any] = [t for p in packs for t in (p.structure, p.values, p.bias)]
    return Case(
        op, case.name, case.kind,
        {"cin": case.cin, "cout": case.cout, "kernel": 1, "stride": 1, "h_out": case.tokens,
         "w_out": 1, "batch": batch},
        nnz / sum(weight.numel() for weight in weights), density, nnz, macs_of(counts, batch),
        (x, *parts, None, case.cout, act.kind, act.slope),
        {"eager": lambda: dense(x, weights, biases), **_reordered(x, weights, biases)},
        lambda: dense(x, weights, biases),
        dense(x.double(), [w.double() for w in weights], [b.double() for b in biases]),
        module=_module(weights, biases),
    )  # fmt: skip


def _module(weights: list[torch.Tensor], biases: list[torch.Tensor]) -> nn.Module:
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        layers += [*([nn.GELU()] if layers else []), layer]
    return nn.Sequential(*layers).eval()


def _reordered(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]
) -> dict[str, Call]:
    """What a frozen graph calls, of the libraries that this build of torch has."""
    rows = x.shape[0] * x.shape[1]
    found: dict[str, Call] = {}
    if torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

        def onednn() -> torch.Tensor:
            y = x
            for i, (weight, bias) in enumerate(zip(packed, biases, strict=True)):
                last = i + 1 == len(packed)
                how = "none" if last else "gelu"
                y = torch.ops.mkldnn._linear_pointwise(y, weight, bias, how, [], "none")
            return y

        found["onednn_reordered"] = onednn
    if torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available():
        found["mkl_reordered"] = _mkl(x, weights, biases, rows)
    return found


def _mkl(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], rows: int
) -> Callable[[], torch.Tensor]:
    packed = [torch.ops.mkl._mkl_reorder_linear_weight(weight, rows) for weight in weights]

    def run() -> torch.Tensor:
        y = x
        for i, parts in enumerate(zip(packed, weights, biases, strict=True)):
            y = torch.ops.mkl._mkl_linear(functional.gelu(y) if i else y, *parts, rows)
        return y

    return run
