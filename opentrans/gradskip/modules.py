"""What stands in the place of convolutions, pools and blocks: the same names, parameters and keys.

Unlike the accelerated modules of ``opentrans_kernels`` these train: parameters are read at every
call, other weights may be loaded, and ``train()`` and ``eval()`` change nothing but a batch norm
that follows its own mode under the policy ``train``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from opentrans_kernels.compact.layers import fold_block
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.nn import AcceleratedBlock, Replacement, SparseEngine
from opentrans_kernels.ops.contents import Source
from opentrans_kernels.ops.folded_conv2d import folded_conv2d
from opentrans_kernels.ops.folded_conv2d.average import mean_pool2d
from opentrans_kernels.ops.folded_conv2d.fold import Norm
from opentrans_kernels.ops.folded_conv2d.sparse import sparse_folded_conv2d
from opentrans_kernels.ops.library import require_backward_alone
from opentrans_kernels.ops.relu_bits.add_relu import add_relu
from opentrans_kernels.topology import BlockNode
from opentrans_kernels.watch import Watch

from .sparse import Sparse

__all__ = [
    "PrefixBlock",
    "SkipAvgPool2d",
    "SkipBlock",
    "SkipConv2d",
    "SkipPassed",
    "SkipReLU",
    "Skipping",
]


UNDO = "opentrans.restore_skipped(model)"


class Skipping(Replacement):
    """Base: keeps ``opentrans_original``, and loads weights as the original would."""

    #: Over the modules that are not called as they were, where there are some.
    opentrans_watch: Watch | None = None

    def _require_unchanged(self) -> None:
        """Raise UnsupportedModelError if one of those got hooks or a forward of its own.

        Also inside a derivative that the operators do not have.
        """
        require_backward_alone(f"For other derivatives: {UNDO}.")
        watch = self.opentrans_watch
        if watch is not None and (why := watch.changed()) is not None:
            raise UnsupportedModelError(
                f"{why} since skip_frozen, and it is not called as it was. Call {UNDO}, "
                "add it then, and call skip_frozen again: that part stays as it is."
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


def _as_autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a convolution would get it under autocast."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def run_conv(
    conv: nn.Module,
    bn: nn.Module | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    relu: bool,
    bits: bool,
    batch_statistics: bool,
    sparse: Sparse | None = None,
) -> torch.Tensor:
    """``act(bn(conv(x)) + residual)``, keeping what backward needs."""
    # The sparse kernels compute in float32, under autocast too.
    x = _as_autocast(x) if sparse is None else x.float()
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    plain = bn is None or batch_statistics
    norm = (
        Norm(conv.bias, None, None, None, None, 0.0)
        if plain
        else Norm(conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    )
    if sparse is not None:
        fused = not batch_statistics
        z = sparse_folded_conv2d(
            x, conv.weight, sparse.structure, norm, residual if fused else None,
            stride=conv.stride[0], padding=conv.padding[0], relu=relu and fused, bits=bits,
            sparse_wgrad=sparse.wgrad, nnz=sparse.nnz,
        )  # fmt: skip
        return z if fused else _normalised(z, bn, residual, relu, bits)
    geometry = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }
    if not batch_statistics:
        return folded_conv2d(x, conv.weight, norm, residual, relu=relu, bits=bits, **geometry)
    z = folded_conv2d(x, conv.weight, norm, **geometry)
    return _normalised(z, bn, residual, relu, bits)


def _normalised(
    z: torch.Tensor, bn: nn.Module | None, residual: torch.Tensor | None, relu: bool, bits: bool
) -> torch.Tensor:
    """The steps behind a convolution whose norm follows its own mode."""
    if bn is not None:
        z = bn(z)
    if relu:
        return add_relu(z, None if residual is None else residual.to(z.dtype), bits)
    return z if residual is None else z + residual


class SkipConv2d(Skipping):
    """A convolution with the eval-mode norm and the ReLU behind it, where they are given."""

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.Module | None,
        *,
        relu: bool,
        bits: bool,
        sparse: Sparse | None = None,
    ) -> None:
        super().__init__(conv)
        self.opentrans_sparse = sparse
        # In __dict__: the norm stays a child of its own parent only.
        self.__dict__["opentrans_bn"] = bn
        self.opentrans_relu, self.opentrans_bits = relu, bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._require_unchanged()
        return run_conv(
            self, self.opentrans_bn, x, None, relu=self.opentrans_relu, bits=self.opentrans_bits,
            batch_statistics=False, sparse=self.opentrans_sparse,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"relu={self.opentrans_relu}, bits={self.opentrans_bits}"


class SkipReLU(Skipping):
    """A ReLU that keeps bits, or its output where another operation stores it anyway."""

    def __init__(self, original: nn.Module, bits: bool) -> None:
        super().__init__(original)
        self.opentrans_bits = bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_relu(x, None, self.opentrans_bits)


class SkipPassed(Skipping):
    """In the place of a norm or ReLU that the convolution before it already applied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._require_unchanged()
        return x


class SkipAvgPool2d(Skipping):
    """A non-overlapping average pool that does not keep its input."""

    def __init__(self, original: nn.Module, size: int) -> None:
        super().__init__(original)
        self.opentrans_size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mean_pool2d(x, self.opentrans_size)


class SkipBlock(Skipping):
    """A residual block: ``relu(convs(x) + shortcut(x))``.

    bits: output name of a convolution -> whether its ReLU keeps bits.
    """

    def __init__(
        self,
        block: BlockNode,
        bits: Mapping[str, bool],
        batch_statistics: bool,
        sparse: Mapping[str, Sparse],
    ) -> None:
        super().__init__(block.module)
        self.opentrans_watch = Watch.inside(block.module, block.name, self._modules, {}, UNDO)
        self.opentrans_sparse = tuple(sparse.get(node.name) for node in block.convs)
        down = block.downsample
        self.opentrans_sparse_shortcut = None if down is None else sparse.get(down.name)
        self.opentrans_bits = tuple(bits[node.name] for node in block.convs)
        self.opentrans_pool, self.opentrans_down_pool = block.pool, block.down_pool
        self.opentrans_batch_statistics = batch_statistics
        inside = len(block.name) + 1  # paths below the block
        self.opentrans_convs = tuple(
            (node.name[inside:], str(node.bn_name)[inside:]) for node in block.convs
        )
        self.opentrans_shortcut: tuple[str, str] | None = None
        if down is not None and down.bn_name is not None:
            self.opentrans_shortcut = down.name[inside:], down.bn_name[inside:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._require_unchanged()
        shortcut = x
        if self.opentrans_shortcut is not None:
            pooled = x
            if self.opentrans_down_pool > 1:
                pooled = mean_pool2d(_as_autocast(x), self.opentrans_down_pool)
            conv, bn = (self.get_submodule(path) for path in self.opentrans_shortcut)
            shortcut = self._run(
                conv, bn, pooled, None, False, False, self.opentrans_sparse_shortcut
            )
        y = x
        last = len(self.opentrans_bits)
        for i, bits in enumerate(self.opentrans_bits, 1):
            if i == 3 and self.opentrans_pool > 1:
                y = mean_pool2d(y, self.opentrans_pool)
            conv, bn = (self.get_submodule(path) for path in self.opentrans_convs[i - 1])
            sparse = self.opentrans_sparse[i - 1]
            y = self._run(conv, bn, y, shortcut if i == last else None, True, bits, sparse)
        return y

    def _run(self, conv, bn, x, residual, relu: bool, bits: bool, sparse) -> torch.Tensor:
        return run_conv(
            conv, bn, x, residual, relu=relu, bits=bits,
            batch_statistics=self.opentrans_batch_statistics, sparse=sparse,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"bits={self.opentrans_bits}"


class PrefixBlock(SkipBlock):
    """A pruned block before which nothing trains: one fused kernel of the inference plan.

    The packed block is made again when its tensors hold other bits. Compiled graphs cannot look at
    those, so there it runs as any other block.
    """

    def __init__(self, block: BlockNode, sparse: Mapping[str, Sparse]) -> None:
        super().__init__(block, {node.name: False for node in block.convs}, False, sparse)
        # In __dict__, not as a child: train() must not reach the accelerated block.
        self.__dict__["opentrans_node"] = block
        self.__dict__["opentrans_packed"] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        self._require_unchanged()
        block: BlockNode = self.__dict__["opentrans_node"]
        parts: list[torch.Tensor | float] = []
        for node in block.all_convs:
            bn: Any = node.bn
            parts += (*node.conv.parameters(), *bn.parameters(), *bn.buffers(), bn.eps)
        packed = self.__dict__["opentrans_packed"]
        if packed is None or not packed[0].still(*parts):
            packed = self.__dict__["opentrans_packed"] = (Source(*parts), _inference_block(block))
        return packed[1](x.float())


def _inference_block(block: BlockNode) -> AcceleratedBlock:
    """The block as ``opentrans_kernels.accelerate`` would pack it."""
    norms = [node.bn for node in block.all_convs if node.bn is not None]
    modes = [bn.training for bn in norms]
    for bn in norms:
        bn.training = False  # the policy fixes the statistics, whatever train() said
    try:
        layers = fold_block(block)
    finally:
        for bn, mode in zip(norms, modes, strict=True):
            bn.training = mode
    engines = {f"conv{i}": SparseEngine.from_folded(conv) for i, conv in enumerate(layers.convs, 1)}
    if layers.downsample is not None:
        engines["downsample"] = SparseEngine.from_folded(layers.downsample)
    found = AcceleratedBlock(block.module, engines, block.pool, block.down_pool)
    found.training = False
    return found
