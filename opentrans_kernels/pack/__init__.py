"""Packing: a masked convolution weight becomes the stream of nonzeros that the kernels read.

The packed form does not depend on the image size, so one pack serves every input. Nonzeros are
ordered row block > input-channel chunk > output row (fewest nonzeros first, so that neighbouring
rows have equal loop counts) > code. ``csrc/otk.h`` documents the structure tensor's parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import PlanError
from .layout import Header, assemble, check_content, damaged, indices, read_header

__all__ = [
    "Header",
    "SparseWeight",
    "dense_weight",
    "packed_indices",
    "read_header",
    "transposed_structure",
]


@dataclass(frozen=True)
class SparseWeight:
    """A convolution weight packed for the sparse kernels.

    Attributes:
        structure: int32 ``[words]``; where the nonzeros are (about 2 bytes per nonzero).
        values: float32 ``[nnz]`` in packed order; differentiable.
        bias: float32 ``[cout]``.
        cin, cout: channels. kernel: side of the square window. stride, padding: in pixels.
    """

    structure: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    cin: int
    cout: int
    kernel: int
    stride: int
    padding: int

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        numel = self.cout * self.cin * self.kernel**2
        return self.nnz / numel if numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of structure, values and bias."""
        return sum(t.numel() * t.element_size() for t in (self.structure, self.values, self.bias))

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
        *,
        chunk: int | None = None,
        row_block: int | None = None,
    ) -> SparseWeight:
        """Pack ``weight`` ``[cout, cin, k, k]``; its exact zeros are dropped.

        Args:
            weight: float32 or float64 on any device; rounded to float32 once.
            bias: ``[cout]``, zero if omitted.
            chunk: input channels whose nonzeros are visited together; by default chosen from the
                window and the density.
            row_block: output rows that share one pass over a chunk.

        Raises:
            PlanError: a weight that is not a square convolution, has no channels, holds NaN or
                Inf, or is too large for the packed form.
        """
        if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
            raise PlanError(
                f"a packed convolution needs a weight [cout, cin, k, k] with a square window, got "
                f"{tuple(weight.shape)}. Grouped and non-square convolutions stay dense."
            )
        if weight.numel() == 0:
            raise PlanError(
                f"a packed convolution needs at least one input and one output channel, got a "
                f"weight of shape {tuple(weight.shape)}. Remove the layer, or keep one channel "
                "whose weights are zero."
            )
        if stride < 1 or padding < 0:
            raise PlanError(f"stride {stride} must be >= 1 and padding {padding} >= 0.")
        dense = weight.detach().to("cpu", torch.float32).contiguous().numpy()
        if not np.isfinite(dense).all():
            raise PlanError(
                "the weight holds NaN or Inf (in float32), so dropping zeros would hide it. "
                "Repair the checkpoint first."
            )
        cout, cin, kernel, _ = dense.shape
        words, values = assemble(dense, kernel, stride, padding, chunk, row_block)
        if bias is None:
            packed_bias = torch.zeros(cout)
        else:
            packed_bias = bias.detach().to("cpu", torch.float32).contiguous().clone()
            if packed_bias.shape != (cout,):
                raise PlanError(f"bias has shape {tuple(packed_bias.shape)}, expected ({cout},).")
        return cls(
            torch.from_numpy(words), torch.from_numpy(values.astype(np.float32)), packed_bias,
            cin, cout, kernel, stride, padding,
        )  # fmt: skip

    def indices(self) -> torch.Tensor:
        """int64 ``[nnz]``: flat index into ``[cout, cin, k, k]`` of each value."""
        return packed_indices(self.structure)

    def to_dense(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The masked dense weight ``[cout, cin, k, k]``, differentiable in ``values``."""
        values = self.values if values is None else values
        return dense_weight(self.structure, values, self.cin, self.cout, self.kernel)

    def validate(self) -> SparseWeight:
        """Check everything a kernel relies on; returns itself.

        Packs made by :meth:`from_dense` are valid. The kernels check sizes but do not look at every
        index, so call this on packed tensors that come from a file or from elsewhere.

        Raises:
            PlanError: the structure contradicts itself, the values, the bias or the attributes.
        """
        words = self.structure.detach().cpu().numpy()
        header = read_header(words)
        own = (self.cin, self.cout, self.kernel, self.stride, self.padding)
        if own != header[:5]:
            raise damaged(
                f"it was packed for (cin, cout, kernel, stride, padding) {header[:5]}, the "
                f"attributes say {own}"
            )
        parts = (("values", self.values, header.nnz), ("bias", self.bias, self.cout))
        for name, tensor, size in parts:
            if tensor.shape != (size,) or tensor.dtype != torch.float32:
                raise damaged(
                    f"{name} must be float32 [{size}], got {tensor.dtype} {list(tensor.shape)}"
                )
        check_content(words, header)
        return self


def transposed_structure(structure: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The structure that maps output gradients to input gradients (stride 1), and the order of
    the values in it: channels swapped, taps mirrored, padding ``k - 1 - padding``.

    Returns:
        (structure, order): ``values[order]`` are the transposed pack's values.
    """
    words = structure.detach().cpu().numpy()
    index = indices(words)
    cin, cout, kernel, _, padding = read_header(words)[:5]
    taps = kernel * kernel
    # Number the nonzeros, scatter the numbers, transpose them, and read where each one went.
    number = np.zeros(cout * cin * taps, np.float64)
    number[index] = np.arange(1, len(index) + 1)
    flipped = number.reshape(cout, cin, kernel, kernel)[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    parts, order = assemble(flipped, kernel, 1, max(kernel - 1 - padding, 0), None, None)
    return torch.from_numpy(parts), torch.from_numpy(order.astype(np.int64) - 1)


def packed_indices(structure: torch.Tensor) -> torch.Tensor:
    """int64 ``[nnz]``: flat index into ``[cout, cin, k, k]`` of each packed value."""
    return torch.from_numpy(indices(structure.detach().cpu().numpy())).to(structure.device)


def dense_weight(
    structure: torch.Tensor, values: torch.Tensor, cin: int, cout: int, kernel: int
) -> torch.Tensor:
    """Scatter packed ``values`` into ``[cout, cin, k, k]``, in the dtype of ``values``."""
    index = packed_indices(structure).to(values.device)
    if values.shape != index.shape:
        raise PlanError(
            f"values must have shape [{len(index)}], one per nonzero of the packed structure, got "
            f"{list(values.shape)}."
        )
    flat = values.new_zeros(cout * cin * kernel * kernel)
    return flat.index_put((index,), values).view(cout, cin, kernel, kernel)
