"""The same eigenvalues from torch's product and solver; the small ones are only flagged."""

from __future__ import annotations

import torch

__all__ = ["NOISE", "gram_eigenvalues"]

#: The error of a Gram matrix's eigenvalue in eps * largest; ``kNoise`` of the compiled kernel.
NOISE = 8.0


def gram_eigenvalues(
    matrices: torch.Tensor, scale: float = 1.0, threshold: float = 1e-5, relative: float = 1e-7
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`opentrans_kernels.ops.gram_eigenvalues`; ``redone`` is 0 or -1."""
    a = matrices.double()
    gram = torch.matmul(a, a.transpose(1, 2)) * scale
    finite = gram.diagonal(dim1=1, dim2=2).sum(1).isfinite()
    gram = torch.where(finite[:, None, None], gram, 0.0)
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    if values.shape[1] == 0:
        return values, torch.zeros_like(finite, dtype=torch.int64)
    noise = NOISE * torch.finfo(torch.float64).eps * values[:, -1]
    above = values.where(values > (threshold - noise)[:, None], torch.inf).amin(1)
    redone = -(noise > relative * above).to(torch.int64)
    return values.where(finite[:, None], torch.nan), redone
