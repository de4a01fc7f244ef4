"""Householder tridiagonalisation of batches of symmetric matrices, values only (no back transform).

A reflector H = I - tau v v^T clears column k below the subdiagonal. With p = A v and
w = tau p - (tau^2 p.v / 2) v, the update is A - v w^T - w v^T (LAPACK's dsytd2).

- n <= 64: one program per matrix, the matrix stays in registers (``small_kernel``).
- larger: one launch per column for *all* matrices of all orders (``column_kernel``). A launch
  applies the reflector of column k - 1 to the rows of a program and multiplies the same rows, while
  they are at hand, by the reflector of column k. Each program derives that reflector itself from
  the next column, which the launch before wrote aside: nothing is exchanged within a launch, the
  matrix is read and written once per column, and the result does not depend on timing.

Bound by memory: 16 n^3 / 3 bytes for a large matrix. Float64 throughout, deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...ops.launch import OPTIONS

__all__ = ["SMALL", "WARPS", "column_kernel", "small_kernel", "tridiagonalise"]

SMALL = 64  # the largest order whose matrix one program keeps in registers without spilling
WARPS = {16: 1, 32: 2, 64: 8}  # of small_kernel, by the order rounded up
_ROWS = 8  # rows of a program of column_kernel
_WIDTH = 256  # columns it handles at a time


@triton.jit
def _reflector(alpha, tail):
    """(head of v, beta, tau) that map [alpha, x] with x.x = tail to [beta, 0]; v is [head, x]."""
    beta = -tl.sqrt(alpha * alpha + tail)
    beta = tl.where(alpha < 0, -beta, beta)
    none = tail == 0
    beta = tl.where(none, alpha, beta)
    head = tl.where(none, 1.0, alpha - beta)
    # With v scaled to a head of 1, tau is (beta - alpha) / beta.
    tau = tl.where(none, 0.0, -head / tl.where(none, 1.0, beta))
    return head, beta, tau


@triton.jit(do_not_specialize=["n"])
def small_kernel(
    matrices,  # float64 [B, n, n]
    diagonal,  # float64 [B, n]
    off,  # float64 [B, n]; the last of a row is not written
    n,
    N: tl.constexpr,  # a power of two >= n
):
    matrix = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, N)
    row, column = index[:, None], index[None, :]
    inside = (row < n) & (column < n)
    a = tl.load(matrices + matrix * n * n + row * n + column, mask=inside, other=0.0)
    for k in range(0, n - 1):
        x = tl.sum(tl.where(column == k, a, 0.0), axis=1)
        alpha = tl.sum(tl.where(index == k + 1, x, 0.0))
        x = tl.where(index > k + 1, x, 0.0)
        head, beta, tau = _reflector(alpha, tl.sum(x * x))
        v = tl.where(index == k + 1, 1.0, x / head)
        p = tl.sum(a * v[None, :], axis=1)
        p = tl.where(index > k, p, 0.0) * tau
        w = p - 0.5 * tau * tl.sum(p * v) * v
        a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
        tl.store(off + matrix * n + k, beta)
    d = tl.sum(tl.where(row == column, a, 0.0), axis=1)
    tl.store(diagonal + matrix * n + index, d, mask=index < n)


@triton.jit(do_not_specialize=["total", "count", "k"])
def column_kernel(
    table,  # int64 [programs, 5]: order, first row, start of matrix, of its vectors, matrix
    matrices,  # float64, all matrices one after another, row by row
    columns,  # float64 [2, total]: column k of the matrix before the update of launch k, by parity
    reflectors,  # float64 [2, total]: v
    products,  # float64 [2, total]: A v, for A before the update
    taus,  # float64 [2, matrices]
    diagonal,  # float64 [total]
    off,  # float64 [total]
    total,
    count,  # of matrices
    k,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    entry = table + 5 * tl.program_id(0)
    n = tl.load(entry).to(tl.int32)
    first = tl.load(entry + 1).to(tl.int32)
    a = matrices + tl.load(entry + 2)
    vectors = tl.load(entry + 3)
    matrix = tl.load(entry + 4)
    old = ((k + 1) % 2) * total + vectors
    new = (k % 2) * total + vectors
    columns_old, columns_new = columns + new, columns + old
    v_old, v_new = reflectors + old, reflectors + new
    p_old, p_new = products + old, products + new
    tau = tl.load(taus + ((k + 1) % 2) * count + matrix)
    start = (k // WIDTH) * WIDTH
    lane = tl.arange(0, WIDTH)

    dots = tl.zeros([WIDTH], tl.float64)
    for chunk in range(start, n, WIDTH):
        c = chunk + lane
        mask = (c >= k) & (c < n)
        v = tl.load(v_old + c, mask=mask, other=0.0)
        dots += v * tl.load(p_old + c, mask=mask, other=0.0)
    half = 0.5 * tau * tau * tl.sum(dots)
    v_k = tl.load(v_old + k)
    w_k = tau * tl.load(p_old + k) - half * v_k

    # Column k after the update, and the reflector that clears it.
    squares = tl.zeros([WIDTH], tl.float64)
    heads = tl.zeros([WIDTH], tl.float64)
    pivots = tl.zeros([WIDTH], tl.float64)
    for chunk in range(start, n, WIDTH):
        c = chunk + lane
        mask = (c >= k) & (c < n)
        v = tl.load(v_old + c, mask=mask, other=0.0)
        w = tau * tl.load(p_old + c, mask=mask, other=0.0) - half * v
        x = tl.load(columns_old + c, mask=mask, other=0.0) - v * w_k - w * v_k
        pivots += tl.where(c == k, x, 0.0)
        heads += tl.where(c == k + 1, x, 0.0)
        squares += tl.where(c > k + 1, x * x, 0.0)
    head, beta, tau_new = _reflector(tl.sum(heads), tl.sum(squares))

    rows = first + tl.arange(0, ROWS)
    row_mask = (rows > k) & (rows < n)
    v_rows = tl.load(v_old + rows, mask=row_mask, other=0.0)
    w_rows = tau * tl.load(p_old + rows, mask=row_mask, other=0.0) - half * v_rows
    row_start = rows.to(tl.int64)[:, None] * n
    sums = tl.zeros([ROWS], tl.float64)
    nexts = tl.zeros([ROWS], tl.float64)
    for chunk in range(start, n, WIDTH):
        c = chunk + lane
        mask = (c > k) & (c < n)
        v = tl.load(v_old + c, mask=mask, other=0.0)
        w = tau * tl.load(p_old + c, mask=mask, other=0.0) - half * v
        x = tl.load(columns_old + c, mask=mask, other=0.0) - v * w_k - w * v_k
        reflector = tl.where(c == k + 1, 1.0, tl.where(mask, x / head, 0.0))
        tile_mask = row_mask[:, None] & mask[None, :]
        tile = tl.load(a + row_start + c[None, :], mask=tile_mask, other=0.0)
        tile -= v_rows[:, None] * w[None, :] + w_rows[:, None] * v[None, :]
        tl.store(a + row_start + c[None, :], tile, mask=tile_mask)
        sums += tl.sum(tile * reflector[None, :], axis=1)
        nexts += tl.sum(tl.where(c[None, :] == k + 1, tile, 0.0), axis=1)
    tl.store(p_new + rows, sums, mask=row_mask)
    tl.store(columns_new + rows, nexts, mask=row_mask)
    # The same arithmetic as above, for the rows of this program.
    x_rows = tl.load(columns_old + rows, mask=row_mask, other=0.0) - v_rows * w_k - w_rows * v_k
    x_rows = tl.where(rows == k + 1, 1.0, x_rows / head)
    tl.store(v_new + rows, x_rows, mask=row_mask)
    if first + ROWS >= n:  # one program of each matrix stays until the last column
        tl.store(taus + (k % 2) * count + matrix, tau_new)
        tl.store(diagonal + vectors + k, tl.sum(pivots))
        tl.store(off + vectors + k, beta)


def tridiagonalise(
    matrices: Mapping[int, torch.Tensor],
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Diagonals and off-diagonals of tridiagonal matrices with the same eigenvalues.

    Args:
        matrices: order n -> float64 [B, n, n], contiguous, symmetric, not modified.

    Returns:
        Two dicts, order n -> float64 [B, n]: the diagonal, and at column i the entry (i, i + 1);
        the last column of the second is not meaningful.
    """
    diagonals = {n: torch.empty(m.shape[:2], dtype=m.dtype, device=m.device)
                 for n, m in matrices.items()}  # fmt: skip
    offs = {n: torch.zeros_like(d) for n, d in diagonals.items()}
    large = {n: m for n, m in matrices.items() if n > SMALL and len(m)}
    if large:
        # Launched first: the longest chain of launches.
        for n, (d, e) in _ByColumns(large).run().items():
            diagonals[n], offs[n] = d, e
    for n, m in matrices.items():
        if n <= SMALL and m.numel():
            size = max(16, triton.next_power_of_2(n))
            small_kernel[(len(m),)](
                m, diagonals[n], offs[n], n, N=size, num_warps=WARPS[size], **OPTIONS
            )
    return diagonals, offs


class _ByColumns:
    """Buffers and launches of ``column_kernel`` for matrices of several orders."""

    def __init__(self, matrices: Mapping[int, torch.Tensor]) -> None:
        self.orders = {n: len(m) for n, m in matrices.items()}
        any_matrix = next(iter(matrices.values()))
        new: dict[str, Any] = {"dtype": torch.float64, "device": any_matrix.device}
        self.total = sum(n * b for n, b in self.orders.items())
        self.count = sum(self.orders.values())
        # A copy: the launches overwrite it.
        self.work = torch.cat([m.flatten() for m in matrices.values()])
        self.columns, self.reflectors, self.products = torch.zeros(3, 2, self.total, **new)
        self.taus = torch.zeros(2, self.count, **new)
        self.diagonal = torch.empty(self.total, **new)
        self.off = torch.zeros(self.total, **new)
        entries, matrix, start, vector = [], 0, 0, 0
        for n, m in matrices.items():
            self.columns[0, vector : vector + n * len(m)] = m[:, 0].flatten()
            for _ in range(len(m)):
                entries += [(n, row, start, vector, matrix) for row in range(0, n, _ROWS)]
                matrix, start, vector = matrix + 1, start + n * n, vector + n
        # Programs whose rows are all above column k have finished: the rest is a prefix.
        entries.sort(key=lambda entry: -min(entry[0], entry[1] + _ROWS))
        self.ends = [min(entry[0], entry[1] + _ROWS) for entry in entries]
        self.table = torch.tensor(entries, dtype=torch.int64).to(any_matrix.device)

    def run(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        programs = len(self.ends)
        for k in range(max(self.orders)):
            while programs and self.ends[programs - 1] <= k:
                programs -= 1
            column_kernel[(programs,)](
                self.table, self.work, self.columns, self.reflectors, self.products, self.taus,
                self.diagonal, self.off, self.total, self.count, k,
                ROWS=_ROWS, WIDTH=_WIDTH, num_warps=4, **OPTIONS,
            )  # fmt: skip
        found, start = {}, 0
        for n, batch in self.orders.items():
            part = slice(start, start + n * batch)
            found[n] = (self.diagonal[part].view(batch, n), self.off[part].view(batch, n))
            start += n * batch
        return found
