"""``gram_eigenvalues``: squared singular values of many matrices, in float64.

The eigenvalues of ``scale * A A^T``: Gram matrix, reduction to tridiagonal form in two stages
(Bischof, Lang and Sun, ACM TOMS 26, 2000), root-free QL (Pal, Walker and Kahan). An eigenvalue of
a Gram matrix is off by about ``8 eps * largest``. Where that is more than ``relative`` of the
smallest one at or above ``threshold``, the smallest ones are computed again from the matrix
projected on their own subspace (Rayleigh-Ritz), whose errors are those of an SVD.
"""

from __future__ import annotations

import torch

from ...errors import OpenTransError
from ..library import define, resolve

__all__ = ["gram_eigenvalues"]


def _fake(
    matrices, scale: float = 1.0, threshold: float = 1e-5, relative: float = 1e-7
) -> tuple[torch.Tensor, torch.Tensor]:
    count, rows, _ = matrices.shape
    values = matrices.new_empty((count, rows), dtype=torch.float64)
    return values, matrices.new_empty((count,), dtype=torch.int64)


OP = define(
    "gram_eigenvalues",
    "(Tensor matrices, float scale=1.0, float threshold=1e-05, float relative=1e-07)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    fallback=f"{__name__}.reference:gram_eigenvalues",
)


def gram_eigenvalues(
    matrices: torch.Tensor, scale: float = 1.0, threshold: float = 1e-5, relative: float = 1e-7
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of ``scale * A A^T`` for every ``A`` of a batch. Not differentiable.

    Args:
        matrices: float32 or float64 [k, m, n] of any strides, read where it is. m <= n is the
            cheap side.
        scale: not negative.
        threshold, relative: eigenvalues from ``threshold`` on get a relative error of at most
            about ``relative``, if the second entry of the result does not say otherwise.

    Returns:
        values: float64 [k, m], ascending, at least 0; NaN for a matrix whose squares are not
            finite. Identical for any number of threads and any batch.
        redone: int64 [k], how many of the smallest were computed again; -1 where they should have
            been and could not, so that only a singular value decomposition has their digits.

    Raises:
        KernelUnavailable: no kernel for this device.
        OpenTransError: ``matrices`` has another shape or dtype.
    """
    if matrices.dim() != 3 or matrices.dtype not in (torch.float32, torch.float64):
        raise OpenTransError(
            f"gram_eigenvalues: matrices must be float32 or float64 [k, m, n], got "
            f"{matrices.dtype} {tuple(matrices.shape)}. Pass matrices[None] for a single one, and "
            "convert other dtypes with .float()."
        )
    run = resolve("gram_eigenvalues", matrices.device.type, "float64")
    return run(matrices, scale, threshold, relative)
