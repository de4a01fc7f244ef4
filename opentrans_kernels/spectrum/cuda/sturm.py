"""Eigenvalues of symmetric tridiagonal matrices by Sturm bisection: one lane per eigenvalue.

The number of eigenvalues below x is the number of sign changes of p_0 = 1, p_1 = d_0 - x,
p_{i+1} = (d_i - x) p_i - e_{i-1}^2 p_{i-1} (Barth, Martin, Wilkinson, 1967). Every lane halves its
interval a fixed number of times; all matrices of all orders run in one launch. No division is on
the critical path, so a step costs one multiply-add of latency instead of a division's.

Accuracy: values are exact for a matrix whose entries differ by a few eps64 * norm, as LAPACK's.
Deterministic: a lane reads d and e and writes one value. Bound by float64 latency, not memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ...ops.launch import OPTIONS

__all__ = ["STEPS", "bisect", "bisect_kernel"]

STEPS = 55  # halvings of an interval of width 2, down to half an ulp of the norm
_UNROLL = 16  # rows between two rescalings of p; the scaled entries bound growth by 3^16
_LANES = 32


@triton.jit
def bisect_kernel(
    diagonal,  # float64 [total], scaled into [-1, 1], every matrix padded to UNROLL with 2
    squares,  # float64 [total], scaled e_{i-1}^2 at i, 0 at the first row and in the padding
    scales,  # float64 [matrices]
    table,  # int32 [programs, 4]: matrix, first eigenvalue, first row in diagonal, padded rows
    orders,  # int32 [matrices]
    outputs,  # int64 [matrices]: where the eigenvalues of a matrix start in values
    values,  # float64
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    matrix = tl.load(table + 4 * program)
    base = tl.load(table + 4 * program + 2)
    rows = tl.load(table + 4 * program + 3)
    index = tl.load(table + 4 * program + 1) + tl.arange(0, LANES)
    low = tl.full([LANES], -1.0, tl.float64)
    high = tl.full([LANES], 1.0, tl.float64)
    for _ in range(STEPS):
        x = 0.5 * (low + high)
        older = tl.zeros([LANES], tl.float64)
        p = tl.full([LANES], 1.0, tl.float64)
        count = tl.zeros([LANES], tl.int32)
        for first in range(0, rows, UNROLL):
            for offset in tl.static_range(UNROLL):
                d = tl.load(diagonal + base + first + offset)
                e = tl.load(squares + base + first + offset)
                new = (d - x) * p - e * older
                # A vanishing pivot counts as just below zero: a change of d by eps64 * norm. It
                # also bounds how fast p can shrink.
                floor = 2.220446049250313e-16 * p
                new = tl.where(tl.abs(new) < tl.abs(floor), -floor, new)
                count += ((new < 0) != (p < 0)).to(tl.int32)
                older = p
                p = new
            # Divide both by the power of two of the larger: exact, and no sign changes.
            size = tl.maximum(tl.abs(p), tl.abs(older)).to(tl.int64, bitcast=True)
            factor = ((2046 << 52) - (size & (2047 << 52))).to(tl.float64, bitcast=True)
            p *= factor
            older *= factor
        above = count <= index  # the eigenvalue of this lane is not below x
        low = tl.where(above, x, low)
        high = tl.where(above, high, x)
    scale = tl.load(scales + matrix)
    keep = index < tl.load(orders + matrix)
    tl.store(values + tl.load(outputs + matrix) + index, 0.5 * (low + high) * scale, mask=keep)


def bisect(
    diagonals: Mapping[int, torch.Tensor], off_diagonals: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """All eigenvalues of tridiagonal matrices of several orders, in one launch.

    Args:
        diagonals: order n -> float64 [B, n].
        off_diagonals: order n -> float64 [B, n]; column i couples rows i and i + 1, the last one
            is ignored.

    Returns:
        order n -> float64 [B, n], ascending, views of one buffer. A matrix with a NaN or Inf gives
        NaN.
    """
    orders = [n for n in diagonals if diagonals[n].numel()]
    if not orders:
        return {n: torch.empty_like(d) for n, d in diagonals.items()}
    device = diagonals[orders[0]].device
    parts = {n: _scaled(diagonals[n], off_diagonals[n]) for n in orders}
    table, sizes, outputs = [], [], []
    matrix = row = value = 0
    for n in orders:
        padded = parts[n][0].shape[1]
        for _ in range(len(diagonals[n])):
            table += [(matrix, first, row, padded) for first in range(0, n, _LANES)]
            sizes.append(n)
            outputs.append(value)
            matrix, row, value = matrix + 1, row + padded, value + n
    values = torch.empty(value, dtype=torch.float64, device=device)
    # The longest recurrences first: they decide when the launch ends.
    table.sort(key=lambda entry: -entry[3])
    bisect_kernel[(len(table),)](
        torch.cat([parts[n][0].flatten() for n in orders]),
        torch.cat([parts[n][1].flatten() for n in orders]),
        torch.cat([parts[n][2] for n in orders]),
        _to(table, torch.int32, device),
        _to(sizes, torch.int32, device),
        _to(outputs, torch.int64, device),
        values,
        STEPS=STEPS,
        UNROLL=_UNROLL,
        LANES=_LANES,
        num_warps=1,
        **OPTIONS,
    )
    found, start = {}, 0
    for n, d in diagonals.items():
        found[n] = values[start : start + d.numel()].view(d.shape)
        start += d.numel()
    return found


def _scaled(
    diagonal: torch.Tensor, off: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Diagonal and squared couplings over the norm (Gershgorin), padded; and the norms."""
    batch, n = diagonal.shape
    coupling = off[:, : n - 1].abs()
    reach = diagonal.abs()
    reach[:, : n - 1] += coupling
    reach[:, 1:] += coupling
    scale = reach.amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    padded = -(-n // _UNROLL) * _UNROLL
    d = diagonal.new_full((batch, padded), 2.0)
    d[:, :n] = diagonal / scale[:, None]
    squares = diagonal.new_zeros(batch, padded)
    squares[:, 1:n] = (coupling / scale[:, None]) ** 2
    return d, squares, scale


def _to(numbers: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
