"""Accelerated modules: what ``accelerate`` puts in the place of convolutions and residual blocks.

A replacement keeps the parameters, buffers and children of the module it replaces under the same
names, so ``state_dict`` has the same keys and the same dense shapes, and keeps that module itself
as ``opentrans_original``. Packed tensors are non-persistent buffers: they follow ``.to(device)``,
``copy.deepcopy``, ``torch.compile`` and ``torch.export``, and are absent from the ``state_dict``.

Replacements are for inference. They compute gradients of their input, not of their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import dispatch, native
from .compact import FoldedConv, fold_conv
from .errors import UnsupportedModelError
from .freshness import Freshness, freshness_of
from .ops.sparse_bottleneck import fusible
from .pack import SparseWeight
from .topology import ConvNode
from .topology.blocks import plain_conv
from .topology.fold import is_plain_bn

__all__ = [
    "AcceleratedBlock",
    "AcceleratedConv2d",
    "DenseEngine",
    "FoldedActivation",
    "FoldedBatchNorm",
    "PlanarAvgPool2d",
    "Replacement",
    "SparseConv2d",
    "SparseEngine",
    "operator_of",
]

_FIX = "Call opentrans_kernels.restore(model) first"


def operator_of(name: str) -> Callable[..., Any]:
    """The kernel of an op, resolved once, when a layer is packed."""
    found = dispatch.resolve(name)
    if found.row.backend == "cpu" or not native.load():
        # Without the extension the registered op runs the reference, and still compiles.
        return getattr(torch.ops.opentrans_kernels, name).default
    return found.function()


class Engine(nn.Module):
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

    def __init__(self, weight: SparseWeight) -> None:
        super().__init__()
        self._hold(structure=weight.structure, values=weight.values, bias=weight.bias)
        self.cin, self.cout, self.kernel = weight.cin, weight.cout, weight.kernel
        self.stride, self.padding, self.nnz = weight.stride, weight.padding, weight.nnz
        self.operator = operator_of("sparse_conv2d")

    @classmethod
    def from_folded(cls, conv: FoldedConv) -> SparseEngine:
        """Pack a folded convolution; its exact zeros are dropped. Raises PlanError."""
        return cls(SparseWeight.from_dense(conv.weight, conv.bias, conv.stride, conv.padding))

    def sparse_weight(self) -> SparseWeight:
        """The same tensors as a ``SparseWeight``."""
        return SparseWeight(
            self.structure, self.values, self.bias,
            self.cin, self.cout, self.kernel, self.stride, self.padding,
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        return self.operator(
            x, self.structure, self.values, self.bias, residual,
            self.cout, self.kernel, self.stride, self.padding, relu,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.cin}, {self.cout}, k{self.kernel}, stride={self.stride}, nnz={self.nnz}"


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
        self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        if self.border is not None:
            x = F.pad(x, self.border, mode=self.border_mode)
        y = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if relu else y

    def extra_repr(self) -> str:
        cout, cin, kernel, _ = self.weight.shape
        return f"{cin}, {cout}, k{kernel}, stride={self.stride}, folded"


class Replacement(nn.Module):
    """Stands in for ``opentrans_original``: same parameters, buffers, children and attributes."""

    opentrans_original: nn.Module
    #: Over what the packed tensors were made from.
    opentrans_freshness: Freshness | None = None

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        own = self.__dict__
        for key, value in vars(original).items():  # stride, in_channels, ...
            if key not in own and not key.startswith("_") and key != "forward":
                own[key] = value
        # In __dict__, not as a child: it must not appear in named_modules or the state_dict.
        own["opentrans_original"] = original
        # The very same dicts, so that .to() or load_state_dict reach the original as well.
        for key in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            own[key] = vars(original)[key]
        own["_modules"] = dict(original._modules)
        self.training = original.training

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for key, now in self.state_dict().items():
            new = state_dict.get(prefix + key)
            if new is None or key.endswith("num_batches_tracked"):
                continue
            if new.shape != now.shape or not torch.equal(new.to(now), now):
                raise UnsupportedModelError(
                    f"{prefix}{key}: other weights cannot be loaded into an accelerated model, "
                    f"because the packed ones would keep computing the old network. {_FIX}, load, "
                    "and accelerate again."
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        fresh = self.opentrans_freshness
        if fresh is not None:
            fresh.arm()  # to know afterwards what a conversion started from
        super()._apply(fn, recurse)
        if fresh is not None:
            fresh.changed()  # takes down what is the same in another form; forward tells the rest
        return self

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as the kernels take it. Raises UnsupportedModelError with the fix."""
        if self.opentrans_freshness is not None:
            self.opentrans_freshness.require()
        if self.training:
            raise UnsupportedModelError(
                f"this {type(self).__name__} is in training mode, but its batch norm is folded "
                f"and its weights are packed for inference. Call model.eval(). To train: {_FIX}."
            )
        if x.dtype != torch.float32:
            if torch.is_autocast_enabled("cpu"):
                return x.float()
            raise UnsupportedModelError(
                f"the accelerated model computes in float32, its input here is {x.dtype}. Pass "
                f"x.float(), or run it under torch.autocast('cpu'). To convert it: {_FIX}."
            )
        if x.device.type != "cpu":
            raise UnsupportedModelError(
                f"the sparse kernels of this version run on the CPU, the input is on {x.device}. "
                f"Pass x.cpu() and keep the model there. To run elsewhere: {_FIX}."
            )
        return x


class AcceleratedConv2d(Replacement):
    """A convolution with mask, batch norm and activation folded into an engine.

    float32 ``[N, cin, H, W]`` (or ``[cin, H, W]``), any strides -> ``[N, cout, H', W']``.
    """

    def __init__(self, original: nn.Conv2d, engine: Engine, relu: bool) -> None:
        super().__init__(original)
        self.opentrans_engine = engine
        self.opentrans_relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._checked(x)
        run = self.opentrans_engine.forward  # without the overhead of a module call
        if x.dim() == 3:
            return run(x.unsqueeze(0), None, self.opentrans_relu).squeeze(0)
        return run(x, None, self.opentrans_relu)

    def extra_repr(self) -> str:
        return "relu folded" if self.opentrans_relu else ""


class SparseConv2d(AcceleratedConv2d):
    """A convolution on the sparse kernels; build it with :meth:`from_conv`."""

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        mask: torch.Tensor | None = None,
        bn: nn.Module | None = None,
        relu: bool = False,
    ) -> SparseConv2d:
        """Pack one convolution.

        Args:
            conv: float32 on the CPU; square window, groups 1, dilation 1, zero padding. Not
                changed; its parameters are shared, so the ``state_dict`` stays the same.
            mask: 0/1 of the weight's shape; None: the weight's own zeros.
            bn: eval-mode batch norm to fold in.
            relu: also apply a ReLU.

        Raises:
            UnsupportedModelError: a convolution or norm the kernels cannot express, NaN or Inf.
            MaskError: a mask of another shape, or with values other than 0 and 1.
        """
        if reason := plain_conv(conv):
            raise UnsupportedModelError(
                f"the convolution {reason}. The sparse kernels take nn.Conv2d with a square "
                "window, groups=1, dilation=1 and zero padding; leave others dense."
            )
        if conv.weight.dtype != torch.float32 or conv.weight.device.type != "cpu":
            raise UnsupportedModelError(
                f"the weight is {conv.weight.dtype} on {conv.weight.device}; the sparse kernels "
                "take float32 on the CPU. Use conv.float().cpu()."
            )
        if bn is not None and not is_plain_bn(bn):
            raise UnsupportedModelError(
                f"{type(bn).__name__} is not a batch norm that can be folded. Pass bn=None and "
                "apply it yourself."
            )
        node = ConvNode("conv", conv, bn, None if bn is None else "bn", relu)
        found = cls(conv, SparseEngine.from_folded(fold_conv(node, mask)), relu).eval()
        found.opentrans_freshness = freshness_of([node])
        return found

    def sparse_weight(self) -> SparseWeight:
        """The packed weight."""
        return self.opentrans_engine.sparse_weight()


class AcceleratedBlock(Replacement):
    """A residual block: ``relu(convs(x) + shortcut(x))``, float32 ``[N, cin, H, W]``.

    engines: "conv1", "conv2", ("conv3",) ("downsample",). With sparse engines of a plain
    bottleneck the whole block is one fused op; where gradients are needed, or shapes do not fit,
    its convolutions run one by one.
    """

    def __init__(
        self, original: nn.Module, engines: Mapping[str, Engine], pool: int = 1, down_pool: int = 1
    ) -> None:
        super().__init__(original)
        self.opentrans_engines = nn.ModuleDict(engines)
        self.opentrans_pool, self.opentrans_down_pool = pool, down_pool
        self.opentrans_planar = all(isinstance(e, SparseEngine) for e in engines.values())
        #: Why the block does not run as one fused op; None if it does.
        self.opentrans_unfused = self._why_unfused(engines)
        self.opentrans_operator = operator_of("sparse_bottleneck")
        self.opentrans_average = operator_of("avg_pool2d")

    def _why_unfused(self, engines: Mapping[str, Engine]) -> str | None:
        if not self.opentrans_planar:
            return "it runs densely"
        if "conv3" not in engines:
            return "it has two convolutions, not three"
        packs = {name: e.sparse_weight() for name, e in engines.items()}  # type: ignore[operator]
        down = packs.get("downsample")
        if (1 if down is None else self.opentrans_pool) != self.opentrans_down_pool:
            return f"its pools are {self.opentrans_pool} and {self.opentrans_down_pool}"
        return fusible(packs["conv1"], packs["conv2"], packs["conv3"], down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._checked(x)
        if self.opentrans_unfused is None and not (torch.is_grad_enabled() and x.requires_grad):
            return self._fused(x)
        return self._one_by_one(x)

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        engines = self.opentrans_engines
        c1, c2, c3 = engines["conv1"], engines["conv2"], engines["conv3"]
        extra: tuple[torch.Tensor | None, ...] = (None, None, None)
        if "downsample" in engines:
            down = engines["downsample"]
            extra = (down.structure, down.values, down.bias)
        return self.opentrans_operator(
            x, c1.structure, c1.values, c1.bias, c2.structure, c2.values, c2.bias,
            c3.structure, c3.values, c3.bias, *extra,
            c3.cout, self.opentrans_pool, self.opentrans_down_pool,
        )  # fmt: skip

    def _one_by_one(self, x: torch.Tensor) -> torch.Tensor:
        engines = self.opentrans_engines
        shortcut = x
        if "downsample" in engines:
            shortcut = engines["downsample"](self._pooled(x, self.opentrans_down_pool))
        y = engines["conv1"](x, None, True)
        if "conv3" not in engines:
            return engines["conv2"](y, shortcut, True)
        y = self._pooled(engines["conv2"](y, None, True), self.opentrans_pool)
        return engines["conv3"](y, shortcut, True)

    def _pooled(self, x: torch.Tensor, size: int) -> torch.Tensor:
        if size == 1:
            return x
        return self.opentrans_average(x, size) if self.opentrans_planar else F.avg_pool2d(x, size)

    def extra_repr(self) -> str:
        return "fused" if self.opentrans_unfused is None else f"not fused: {self.opentrans_unfused}"


class FoldedBatchNorm(Replacement):
    """In the place of a batch norm that was folded into the convolution before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class FoldedActivation(Replacement):
    """In the place of an activation that the convolution before it already applied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class PlanarAvgPool2d(Replacement):
    """A non-overlapping average pool that reads and writes the kernels' layout without a copy."""

    def __init__(self, original: nn.Module, size: int) -> None:
        super().__init__(original)
        self.opentrans_size = size
        self.opentrans_average = operator_of("avg_pool2d")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            return F.avg_pool2d(x, self.opentrans_size)
        return self.opentrans_average(x, self.opentrans_size)
