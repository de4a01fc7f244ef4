"""Packing: a masked convolution weight becomes the stream of nonzeros that the kernels read.

The packed form does not depend on the image size, so one pack serves every input. Nonzeros are
ordered row block > input-channel chunk > output row (fewest nonzeros first, so that neighbouring
rows have equal loop counts) > code. ``csrc/otk.h`` documents the structure tensor's parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import PlanError
from .layout import LARGEST_STEP, Header, assemble, check_content, damaged, indices, read_header

__all__ = [
    "Header",
    "SparseWeight",
    "checked_header",
    "dense_weight",
    "packed_indices",
    "read_header",
    "transposed_structure",
    "version_of",
]

_CHECKED = WeakTensorKeyDictionary()  # structure -> (version, header)


def version_of(tensor: torch.Tensor) -> int:
    """Changes whenever torch writes to the tensor; inference tensors have one version."""
    return -1 if tensor.is_inference() else tensor._version


def _words(structure: torch.Tensor) -> np.ndarray:
    plain = isinstance(structure, torch.Tensor) and structure.layout == torch.strided
    if not plain or structure.dtype != torch.int32 or not structure.is_contiguous():
        raise PlanError(
            "structure must be a contiguous int32 tensor made by SparseWeight; pack the weight "
            "again."
        )
    return structure.detach().cpu().numpy()


_UNTRACED: dict[str, Callable[..., Any]] = {}


def _reads_numbers(read: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a structure's numbers; ``torch.compile`` calls it from between two graphs."""
    name = read.__name__

    def leave_out() -> None:
        if name not in _UNTRACED:
            why = "the reference kernels read where the nonzeros are; the compiled ones do not"
            _UNTRACED[name] = torch.compiler.disable(read, reason=why)

    # As torch.compiler.assume_constant_result does, which would import the compiler, and triton.
    leave_out._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @functools.wraps(read)
    def run(structure: torch.Tensor) -> Any:
        if torch.compiler.is_compiling():
            leave_out()
            return _UNTRACED[name](structure)
        return read(structure)

    return run


@_reads_numbers
def checked_header(structure: torch.Tensor) -> Header:
    """The header of a structure tensor of which every word is valid.

    All of it is read once, and again after torch wrote to it. (What is written through ``.data`` or
    NumPy moves no version counter; the compiled kernels check again what they read.)

    Raises:
        PlanError: it is none, or is damaged.
    """
    found = _CHECKED.get(structure) if isinstance(structure, torch.Tensor) else None
    if found is not None and found[0] == version_of(structure):
        return found[1]
    return _check(structure)


def _check(structure: torch.Tensor) -> Header:
    words = _words(structure)
    header = read_header(words)
    check_content(words, header)
    _CHECKED[structure] = (version_of(structure), header)
    return header


def _readable(structure: Any) -> bool:
    """Whether there are numbers to look at: a compiler's stand-ins have none."""
    if torch.compiler.is_compiling():
        return False
    if not isinstance(structure, torch.Tensor):
        return True
    return type(structure) in (torch.Tensor, torch.nn.Parameter) and structure.device.type != "meta"


@dataclass(frozen=True)
class SparseWeight:
    """A convolution weight packed for the sparse kernels.

    Made by :meth:`from_dense`. One that is made from tensors, unpickled or copied is checked as
    :meth:`validate` does, but that values and bias may have another dtype (the reference kernels
    take float64).

    Attributes:
        structure: int32 ``[words]``; where the nonzeros are (about 2 bytes per nonzero).
        values: float32 ``[nnz]`` in packed order; differentiable.
        bias: float32 ``[cout]``.
        cin, cout: channels. kernel: side of the square window. stride, padding, dilation: in
            pixels.

    Raises:
        PlanError: the structure contradicts itself, the values, the bias or the attributes.
    """

    structure: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    cin: int
    cout: int
    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    def __post_init__(self) -> None:
        if _readable(self.structure):
            self._check_fit(checked_header(self.structure))

    def __setstate__(self, state: Any) -> None:
        """Of a pickle or a copy, which may come from anywhere."""
        names = {field.name for field in fields(self)}
        if isinstance(state, dict):
            state = {"dilation": 1, **state}  # not among those of earlier versions
        if not isinstance(state, dict) or set(state) != names:
            raise damaged(f"its state must be a dict of {', '.join(sorted(names))}")
        self.__dict__.update(state)
        self.__post_init__()

    def _check_fit(self, header: Header) -> None:
        own = (self.cin, self.cout, self.kernel, self.stride, self.padding, self.dilation)
        packed = (*header[:5], header.dilation)
        if own != packed:
            raise damaged(
                f"it was packed for (cin, cout, kernel, stride, padding, dilation) {packed}, the "
                f"attributes say {own}"
            )
        parts = (("values", self.values, header.nnz), ("bias", self.bias, self.cout))
        for name, tensor, size in parts:
            if not isinstance(tensor, torch.Tensor):
                raise damaged(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.shape != (size,):
                raise damaged(
                    f"{name} must be float32 [{size}], got {tensor.dtype} {list(tensor.shape)}"
                )

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
        dilation: int = 1,
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
        if min(stride, dilation) < 1 or padding < 0:
            raise PlanError(
                f"stride {stride} must be >= 1 and padding {padding} >= 0, and dilation "
                f"{dilation} >= 1."
            )
        if weight.shape[2] == 1:
            dilation = 1  # of one tap
        if max(stride, padding, dilation) > LARGEST_STEP:
            raise PlanError(
                f"stride {stride}, padding {padding} and dilation {dilation} must be at most "
                f"{LARGEST_STEP}. Crop or pad the image before the convolution."
            )
        dense = weight.detach().to("cpu", torch.float32).contiguous().numpy()
        if not np.isfinite(dense).all():
            raise PlanError(
                "the weight holds NaN or Inf (in float32), so dropping zeros would hide it. "
                "Repair the checkpoint first."
            )
        cout, cin, kernel, _ = dense.shape
        words, values = assemble(dense, kernel, stride, padding, chunk, row_block, dilation)
        if bias is None:
            packed_bias = torch.zeros(cout)
        else:
            packed_bias = bias.detach().to("cpu", torch.float32).contiguous().clone()
            if packed_bias.shape != (cout,):
                raise PlanError(f"bias has shape {tuple(packed_bias.shape)}, expected ({cout},).")
        structure = torch.from_numpy(words)
        _CHECKED[structure] = (version_of(structure), read_header(words))
        return cls(
            structure, torch.from_numpy(values.astype(np.float32)), packed_bias,
            cin, cout, kernel, stride, padding, dilation,
        )  # fmt: skip

    def indices(self) -> torch.Tensor:
        """int64 ``[nnz]``: flat index into ``[cout, cin, k, k]`` of each value."""
        return packed_indices(self.structure)

    def to_dense(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The masked dense weight ``[cout, cin, k, k]``, differentiable in ``values``."""
        values = self.values if values is None else values
        return dense_weight(self.structure, values, self.cin, self.cout, self.kernel)

    def validate(self) -> SparseWeight:
        """Check everything anew, whatever was checked before; returns itself.

        Raises:
            PlanError: the structure contradicts itself, the values, the bias or the attributes; or
                values or bias are not float32.
        """
        self._check_fit(_check(self.structure))
        for name, tensor in (("values", self.values), ("bias", self.bias)):
            if tensor.dtype != torch.float32:
                raise damaged(
                    f"{name} must be float32 {list(tensor.shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        return self


def transposed_structure(structure: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The structure that maps output gradients to input gradients (stride 1), and the order of
    the values in it: channels swapped, taps mirrored, padding ``span - 1 - padding``.

    Returns:
        (structure, order): ``values[order]`` are the transposed pack's values.
    """
    header = checked_header(structure)
    cin, cout, kernel, _, padding = header[:5]
    index = indices(_words(structure))
    taps = kernel * kernel
    # Number the nonzeros, scatter the numbers, transpose them, and read where each one went.
    number = np.zeros(cout * cin * taps, np.float64)
    number[index] = np.arange(1, len(index) + 1)
    flipped = number.reshape(cout, cin, kernel, kernel)[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    parts, order = assemble(
        flipped, kernel, 1, max(header.span - 1 - padding, 0), None, None, header.dilation
    )
    return torch.from_numpy(parts), torch.from_numpy(order.astype(np.int64) - 1)


@_reads_numbers
def packed_indices(structure: torch.Tensor) -> torch.Tensor:
    """int64 ``[nnz]``: flat index into ``[cout, cin, k, k]`` of each packed value.

    Raises:
        PlanError: the structure is damaged.
    """
    checked_header(structure)
    return torch.from_numpy(indices(_words(structure))).to(structure.device)


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
