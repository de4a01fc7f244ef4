"""The own eigenvalue path: Householder tridiagonalisation and Sturm bisection in Triton."""

from __future__ import annotations

import pytest
import torch
from triton_tools import (
    CAPABILITIES,
    Interpreter,
    compile_for,
    pointers,
    why_no_triton,
)

CUDA = "opentrans_kernels.spectrum.cuda"
EPS = torch.finfo(torch.float64).eps


def tridiagonal(diagonal: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """Dense [B, n, n] of a diagonal [B, n] and the first n - 1 columns of off [B, n]."""
    off = off[:, : diagonal.shape[1] - 1]
    return (
        torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    )  # fmt: skip


def close(found: torch.Tensor, matrices: torch.Tensor, ulps: float) -> None:
    exact = torch.linalg.eigvalsh(matrices)
    norm = exact.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    assert ((found - exact).abs() / norm).max() <= ulps * EPS


def gram(batch: int, n: int, rank: int | None = None) -> torch.Tensor:
    weight = torch.randn(batch, n, rank or n + 3, dtype=torch.float64)
    return (weight @ weight.mT).contiguous()


def test_bisection_finds_every_eigenvalue(interpreter: Interpreter) -> None:
    """Orders below, at and above a block of rows and a block of lanes, in one launch."""
    diagonals, offs = {}, {}
    for n, batch in ((1, 1), (2, 1), (33, 1)):
        diagonals[n] = torch.randn(batch, n, dtype=torch.float64)
        spread = 10 ** torch.randn(batch, n, dtype=torch.float64)
        offs[n] = torch.randn(batch, n, dtype=torch.float64) * spread
    found = interpreter(f"{CUDA}.sturm:bisect", diagonals, offs)
    for n, values in found.items():
        assert torch.equal(values, values.sort(dim=1).values)
        close(values, tridiagonal(diagonals[n], offs[n]), 8)


def test_bisection_of_degenerate_matrices(interpreter: Interpreter) -> None:
    """Equal eigenvalues, hit exactly by a midpoint; zeros; blocks without coupling; NaN."""
    n = 16
    diagonal = torch.zeros(5, n, dtype=torch.float64)
    off = torch.zeros(5, n, dtype=torch.float64)
    diagonal[0] = 0.5
    diagonal[2, ::2] = 1.0
    diagonal[3], off[3] = 2.0, -1.0  # eigenvalues 2 - 2 cos(k pi / (n + 1))
    diagonal[4, 3] = float("nan")
    found = interpreter(f"{CUDA}.sturm:bisect", {n: diagonal}, {n: off})[n]
    close(found[:4], tridiagonal(diagonal, off)[:4], 8)
    k = torch.arange(1, n + 1, dtype=torch.float64)
    exact = 2 - 2 * torch.cos(k * torch.pi / (n + 1))
    torch.testing.assert_close(found[3], exact, rtol=0, atol=16 * EPS)
    assert found[4].isnan().all(), "a NaN must not turn into a number"
    wide = torch.linspace(-30, 0, n, dtype=torch.float64)[None]
    found = interpreter(f"{CUDA}.sturm:bisect", {n: 10**wide}, {n: torch.zeros(1, n).double()})[n]
    close(found, torch.diag_embed(10**wide), 4)  # underflow of the recurrence would show here


SPECIAL = {
    1: lambda: gram(2, 1),
    2: lambda: gram(1, 2),
    3: lambda: gram(2, 3),
    16: lambda: 0.5 * torch.eye(16, dtype=torch.float64)[None],
    19: lambda: torch.cat([gram(1, 19), gram(1, 19, rank=4)]),
    20: lambda: torch.zeros(1, 20, 20, dtype=torch.float64),
}


@pytest.mark.parametrize("path", ["small", "columns"])
def test_tridiagonalisation_keeps_the_eigenvalues(interpreter: Interpreter, path: str) -> None:
    matrices = {n: make() for n, make in SPECIAL.items()}
    before = {n: m.clone() for n, m in matrices.items()}
    diagonals, offs = interpreter("triton_targets:tridiagonalise", matrices, path == "columns")
    for n, m in matrices.items():
        assert torch.equal(m, before[n])
        close(torch.linalg.eigvalsh(tridiagonal(diagonals[n], offs[n])), m, 16)


def test_a_matrix_of_several_column_blocks(interpreter: Interpreter) -> None:
    """More columns than one program handles at a time (16 here), beside a smaller matrix."""
    matrices = {37: gram(1, 37), 21: gram(1, 21)}
    diagonals, offs = interpreter("triton_targets:tridiagonalise", matrices, True)
    for n, m in matrices.items():
        close(torch.linalg.eigvalsh(tridiagonal(diagonals[n], offs[n])), m, 32)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_without_spills(capability: int) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    from opentrans_kernels.spectrum.cuda import sturm
    from opentrans_kernels.spectrum.cuda import tridiagonal as kernels

    bisect = compile_for(
        sturm.bisect_kernel, capability,
        pointers("diagonal squares scales values") | pointers("table orders", "i32")
        | pointers("outputs", "i64"),
        {"STEPS": sturm.STEPS, "UNROLL": 16, "LANES": 32}, num_warps=1,
    )  # fmt: skip
    assert bisect.stack == 0 and bisect.registers <= 96 and bisect.shared == 0
    assert bisect.count(r"div\S*\.f64|rcp\S*\.f64") == 0, "a division is on the critical path"
    for size, warps in kernels.WARPS.items():
        small = compile_for(
            kernels.small_kernel, capability,
            pointers("matrices diagonal off") | {"n": "i32"}, {"N": size}, num_warps=warps,
        )  # fmt: skip
        assert small.stack == 0, f"n = {size} with {warps} warps spills {small.stack} bytes"
    column = compile_for(
        kernels.column_kernel, capability,
        pointers("matrices columns reflectors products taus diagonal off")
        | {"table": "*i64", "total": "i32", "count": "i32", "k": "i32"},
        {"ROWS": 8, "WIDTH": 256},
    )  # fmt: skip
    assert column.stack == 0 and column.shared <= 4096
    assert column.atomics == 0


@pytest.mark.gpu
def test_on_a_device() -> None:
    from opentrans_kernels.spectrum.cuda.solve import solve

    matrices = {n: gram(3, n) for n in (5, 64, 65, 300)}
    found = solve({n: m.cuda() for n, m in matrices.items()}, "sturm").values
    for n, m in matrices.items():
        close(found[n].cpu(), m, 64)
