"""Folded convolutions with their kernels: packed sparse ones, and dense ones run by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from . import dispatch, native
from .activations import NONE, Activation
from .compact import FoldedConv
from .ops.library import past_autograd
from .pack import SparseWeight
from .pack.winograd import transform_weight

__all__ = [
    "DenseEngine",
    "DepthwiseEngine",
    "Engine",
    "Operators",
    "SparseEngine",
    "WinogradEngine",
    "operator_of",
]


def operator_of(name: str) -> Callable[..., Any]:
    """The kernel of an op, resolved once, when a layer is packed."""
    found = dispatch.resolve(name)
    if found.row.backend == "cpu" or not native.load():
        # Without the extension the registered op runs the reference, and still compiles.
        return past_autograd(getattr(torch.ops.opentrans_kernels, name).default)
    return found.function()


class Operators(nn.Module):
    """Holds kernels as attributes; copies and pickles look them up again by the op's name."""

    OPERATORS: ClassVar[Mapping[str, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key not in self.OPERATORS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._resolve()

    def _resolve(self) -> None:
        for key, op in self.OPERATORS.items():
            self.__dict__[key] = operator_of(op)


class Engine(Operators):
    """One folded convolution, ``act(conv(x) + bias + residual)``, its tensors as buffers."""

    def _hold(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Engine:
        # Devices are followed; a dtype is not, because rounding packed weights cannot be undone.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this convolution."""
        return sum(t.numel() * t.element_size() for t in self.buffers())


class SparseEngine(Engine):
    """A packed convolution on the sparse kernels."""

    OPERATORS = {"operator": "sparse_conv2d"}
    #: Of those that were pickled by versions without it.
    dilation = 1

    def __init__(self, weight: SparseWeight) -> None:
        super().__init__()
        self._hold(structure=weight.structure, values=weight.values, bias=weight.bias)
        self.cin, self.cout, self.kernel = weight.cin, weight.cout, weight.kernel
        self.stride, self.padding, self.nnz = weight.stride, weight.padding, weight.nnz
        self.dilation = weight.dilation
        self._resolve()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.structure.device.type == "cpu" and type(self.structure) is torch.Tensor:
            # The kernels trust a pack, and this one may come from a file.
            self.sparse_weight().validate()

    @classmethod
    def from_folded(cls, conv: FoldedConv) -> SparseEngine:
        """Pack a folded convolution; its exact zeros are dropped. Raises PlanError."""
        return cls(
            SparseWeight.from_dense(
                conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation
            )
        )

    def sparse_weight(self) -> SparseWeight:
        """The same tensors as a ``SparseWeight``."""
        return SparseWeight(
            self.structure, self.values, self.bias,
            self.cin, self.cout, self.kernel, self.stride, self.padding, self.dilation,
        )  # fmt: skip

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        return self.operator(
            x, self.structure, self.values, self.bias, residual,
            self.cout, self.kernel, self.stride, self.padding, False,
            activation.kind, activation.slope, self.dilation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.cin}, {self.cout}, k{self.kernel}, stride={self.stride}, nnz={self.nnz}"


class DepthwiseEngine(Engine):
    """A convolution of each channel with a window of its own, on the planar kernels.

    Every weight is multiplied: what it gains is the layout, and what follows in the same pass.
    """

    OPERATORS = {"operator": "depthwise_conv2d"}

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, like: nn.Conv2d) -> None:
        super().__init__()
        self._hold(weight=weight.to(torch.float32).contiguous(), bias=bias.to(torch.float32))
        self.stride, self.padding = int(like.stride[0]), int(like.padding[0])
        self.nnz = weight.numel()  # of which none is skipped
        self._resolve()

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        if residual is None:
            return self.operator(
                x, self.weight, self.bias, self.stride, self.padding,
                activation.kind, activation.slope,
            )  # fmt: skip
        y = self.operator(x, self.weight, self.bias, self.stride, self.padding)
        return activation.apply_(y.add_(residual))

    def extra_repr(self) -> str:
        channels, _, kernel, _ = self.weight.shape
        return f"{channels}, k{kernel}, stride={self.stride}, depthwise"


class WinogradEngine(Engine):
    """A dense 3x3 convolution of stride 1 with 16 products for 36, on the planar kernels."""

    OPERATORS = {"operator": "winograd_conv2d"}

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, like: nn.Conv2d) -> None:
        super().__init__()
        self._hold(weight=transform_weight(weight), bias=bias.to(torch.float32))
        self.cout, self.padding = weight.shape[0], int(like.padding[0])
        self.nnz = int(torch.count_nonzero(weight))
        self._resolve()

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        return self.operator(
            x, self.weight, self.bias, residual, self.cout, self.padding,
            activation.kind, activation.slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.weight.shape[2]}, {self.cout}, k3, Winograd"


class DenseEngine(Engine):
    """A convolution with mask and batch norm folded in, run densely by PyTorch.

    Also serves what the sparse kernels do not: groups, dilation, other windows and paddings.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, like: nn.Conv2d) -> None:
        super().__init__()
        last = torch.channels_last
        is_last = like.weight.is_contiguous(memory_format=last) and not like.weight.is_contiguous()
        weight = weight.to(
            torch.float32, memory_format=last if is_last else torch.contiguous_format
        )
        self._hold(weight=weight)
        # A bias of zeros would cost a pass over the output for nothing.
        bias = bias.to(torch.float32)
        self.register_buffer("bias", bias if bool(bias.any()) else None, persistent=False)
        self.stride, self.dilation, self.groups = like.stride, like.dilation, like.groups
        self.padding: str | tuple[int, ...] = like.padding
        self.border: list[int] | None = None
        self.border_mode = like.padding_mode
        if like.padding_mode != "zeros":
            self.border, self.padding = list(like._reversed_padding_repeated_twice), (0, 0)
        self.nnz = int(torch.count_nonzero(weight))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        if self.border is not None:
            x = F.pad(x, self.border, mode=self.border_mode)
        y = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if residual is not None:
            y = y.add_(residual)
        return activation.apply_(y)

    def extra_repr(self) -> str:
        cout, cin, kernel, _ = self.weight.shape
        return f"{cin}, {cout}, k{kernel}, stride={self.stride}, folded"
