"""Linear layers and MLPs of tokens against dense float64. Also run in child processes, where the
instruction set is forced, so it needs neither pytest nor fixtures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernel_cases import assert_within, at_end_of_page, masked_weight

from opentrans_kernels import ops
from opentrans_kernels.activations import NONE, Activation, Kind
from opentrans_kernels.pack import SparseWeight

ACTIVATIONS = tuple(Activation(kind, 0.1 * (kind == Kind.LEAKY_RELU)) for kind in Kind)
GELU = Activation(Kind.GELU)
#: (in, out) of a layer.
WIDTHS = ((1, 1), (1, 7), (7, 1), (16, 16), (65, 33), (64, 130), (130, 64))
TOKENS = (1, 2, 7, 8, 16, 17, 50, 197)


def layer(
    cin: int, cout: int, density: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, SparseWeight]:
    """Weight ``[out, in]`` with an empty row and column, bias, and the two packed."""
    weight = masked_weight(cout, cin, 1, density, seed)
    bias = torch.randn(cout, generator=torch.Generator().manual_seed(seed))
    return weight[:, :, 0, 0], bias, SparseWeight.from_dense(weight, bias)


def dense_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: Activation = NONE,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The masked dense layer's answer."""
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    y = y if residual is None else y + residual.to(dtype)
    return act.apply_(y)


def assert_linear(
    out: torch.Tensor, x, weight, bias, residual=None, act=NONE, what: object = ""
) -> None:
    """Off by at most twice dense float32's own error and a few roundings of the largest."""
    results = [
        dense_linear(x, weight, bias, residual, act, dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    assert out.shape == results[0].shape and out.is_contiguous(), what
    assert_within(out, *results, what=what, ulp=8)


def assert_mlp(out: torch.Tensor, x, first, second, residual=None, act=NONE, what: object = ""):
    """The same of two layers, each (weight, bias)."""
    results = []
    for dtype in (torch.float64, torch.float32):
        hidden = dense_linear(x, *first, None, act, dtype)
        results.append(dense_linear(hidden, *second, residual, NONE, dtype))
    assert out.shape == results[0].shape and out.is_contiguous(), what
    assert_within(out, *results, what=what, ulp=8)


def sweep() -> int:
    """A short contract for one instruction set; returns the number of checked results."""
    runs = 0
    for index, (cin, cout) in enumerate(WIDTHS):
        for density in (0.0, 0.1, 1.0):
            weight, bias, packed = layer(cin, cout, density, index)
            back = layer(cout, cin, density, index + 50)
            act = ACTIVATIONS[index % len(ACTIVATIONS)]
            for tokens in TOKENS:
                what = (cin, cout, density, tokens, str(act))
                x, residual = torch.randn(tokens, cin), torch.randn(tokens, cout)
                out = ops.sparse_linear(x, packed, residual, act)
                assert_linear(out, x, weight, bias, residual, act, what)
                out = ops.sparse_mlp(x, packed, back[2], act)
                assert torch.equal(
                    out, ops.sparse_linear(ops.sparse_linear(x, packed, None, act), back[2])
                ), what
                assert_mlp(out, x, (weight, bias), back[:2], None, act, what)
                runs += 2
    for act in ACTIVATIONS:
        weight, bias, packed = layer(33, 19, 0.4)
        x = 4 * torch.randn(21, 33)
        assert_linear(ops.sparse_linear(x, packed, None, act), x, weight, bias, None, act, str(act))
        runs += 1
    return runs + cuts()


def cuts() -> int:
    """A hidden layer made in blocks of rows that are not the next layer's chunks."""
    runs = 0
    first, second = layer(37, 150, 0.3, 1)[:2], layer(150, 41, 0.3, 2)[:2]
    x, residual = torch.randn(53, 37), torch.randn(53, 41)
    for rows, chunk in ((1, 150), (7, 5), (5, 7), (64, 64), (64, 65), (100, 48), (150, 1)):
        what = (rows, chunk)
        one = SparseWeight.from_dense(first[0][..., None, None], first[1], row_block=rows)
        two = SparseWeight.from_dense(
            second[0][..., None, None], second[1], chunk=chunk, row_block=rows
        )
        out = ops.sparse_mlp(x, one, two, GELU, residual)
        assert torch.equal(
            out, ops.sparse_linear(ops.sparse_linear(x, one, None, GELU), two, residual)
        ), what
        assert_mlp(out, x, first, second, residual, GELU, what)
        runs += 1
    return runs


def guarded_inputs() -> int:
    """Tokens and residuals that end at an unreadable page."""
    runs = 0
    for cin, cout in ((5, 17), (17, 5), (64, 64)):
        _, _, packed = layer(cin, cout, 0.5)
        _, _, back = layer(cout, cin, 0.5)
        for tokens in (1, 3, 8, 13, 50):
            x, residual = torch.randn(tokens, cin), torch.randn(tokens, cout)
            free = ops.sparse_linear(x, packed, residual, GELU)
            held = at_end_of_page(x)
            found = ops.sparse_linear(held, packed, at_end_of_page(residual), GELU)
            assert torch.equal(found, free), (cin, cout, tokens)
            free = ops.sparse_mlp(x, packed, back, GELU, x)
            assert torch.equal(ops.sparse_mlp(held, packed, back, GELU, held), free)
            runs += 1
    return runs
