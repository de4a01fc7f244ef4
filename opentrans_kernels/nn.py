"""Accelerated modules: what ``accelerate`` puts in the place of convolutions and residual blocks.

A replacement keeps the parameters, buffers and children of the module it replaces under the same
names, so ``state_dict`` has the same keys and the same dense shapes, and keeps that module itself
as ``opentrans_original``. Packed tensors are non-persistent buffers: they follow ``.to(device)``,
``copy.deepcopy``, ``torch.compile`` and ``torch.export``, and are absent from the ``state_dict``.

Replacements are for inference. They compute gradients of their input, not of their parameters.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from .activations import NONE, RELU, Activation, activation_of
from .compact import fold_conv
from .engines import (
    DenseEngine,
    DepthwiseEngine,
    Engine,
    Operators,
    SparseEngine,
    WinogradEngine,
    operator_of,
)
from .errors import MaskError, UnsupportedModelError
from .freshness import Freshness, freshness_of
from .ops.library import require_backward_alone
from .ops.sparse_bottleneck import fusible
from .pack import SparseWeight
from .topology import ConvNode
from .topology.behaviour import first_changed
from .topology.blocks import plain_conv
from .topology.cover import put_over_as
from .topology.fold import is_plain_bn
from .watch import RESTORE, Watch

__all__ = [
    "AcceleratedBlock",
    "AcceleratedConv2d",
    "DenseEngine",
    "DepthwiseEngine",
    "FoldedActivation",
    "FoldedBatchNorm",
    "Replacement",
    "SparseConv2d",
    "SparseEngine",
    "WinogradEngine",
    "operator_of",
    "watch_together",
]

_FIX = "Call opentrans_kernels.restore(model) first"
_OTHER_DERIVATIVES = f"For other derivatives: {_FIX}."


class Replacement(Operators):
    """Stands in for ``opentrans_original``: same parameters, buffers, children and attributes."""

    opentrans_original: nn.Module
    #: What ties it to inference, for messages.
    PREPARED = "its batch norm is folded and its weights are packed"
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
        put_over_as(self, original)

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

    def _require_ready(self) -> None:
        """Raise UnsupportedModelError if it was written to, or is in training mode."""
        if self.opentrans_freshness is not None:
            self.opentrans_freshness.require()
        if self.training:
            raise UnsupportedModelError(
                f"this {type(self).__name__} is in training mode, but {self.PREPARED} for "
                f"inference. Call model.eval(). To train: {_FIX}."
            )

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as the kernels take it. Raises UnsupportedModelError with the fix."""
        self._require_ready()
        return self._taken(x)

    @staticmethod
    def _taken(x: torch.Tensor) -> torch.Tensor:
        require_backward_alone(_OTHER_DERIVATIVES)
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

    def __init__(self, original: nn.Conv2d, engine: Engine, activation: Activation = NONE) -> None:
        super().__init__(original)
        self.opentrans_engine = engine
        self.opentrans_activation = activation
        #: Of the modules folded in together; None if it is the convolution alone.
        self.opentrans_watch: Watch | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._checked(x)
        watch = self.opentrans_watch
        if watch is not None and (why := watch.changed()) is not None:
            return watch.dense(self.opentrans_original, x, why)
        run = self.opentrans_engine.forward  # without the overhead of a module call
        if x.dim() == 3:
            return run(x.unsqueeze(0), None, self.opentrans_activation).squeeze(0)
        return run(x, None, self.opentrans_activation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "opentrans_relu" in state:  # pickled before there were others
            state["opentrans_activation"] = RELU if state.pop("opentrans_relu") else NONE
        super().__setstate__(state)

    def extra_repr(self) -> str:
        return f"{self.opentrans_activation} folded" if self.opentrans_activation else ""


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
            conv: float32 on the CPU; square window, groups 1, zero padding. Not
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
                "window, groups=1 and zero padding; leave others dense."
            )
        if is_lazy(conv.weight):
            raise UnsupportedModelError(
                f"the {type(conv).__name__} has no shape yet. Run one image through it, which "
                "makes its weights."
            )
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.is_meta):
            kind = "on meta" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
            raise MaskError(f"the mask is {kind}. Pass a 0/1 tensor of the weight's shape.")
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
        parts = [("the convolution", conv)] + ([("the norm", bn)] if bn is not None else [])
        if what := first_changed(parts):
            raise UnsupportedModelError(f"{what}, which would not be called. Remove it first.")
        node = ConvNode("conv", conv, bn, None if bn is None else "bn", relu)
        act = RELU if relu else NONE
        with torch.inference_mode(False):  # or autograd could not use the packed tensors
            found = cls(conv, SparseEngine.from_folded(fold_conv(node, mask)), act).eval()
            found.opentrans_freshness = freshness_of([node])
        return found

    def sparse_weight(self) -> SparseWeight:
        """The packed weight."""
        return self.opentrans_engine.sparse_weight()


class AcceleratedBlock(Replacement):
    """A residual block: ``relu(convs(x) + shortcut(x))``, float32 ``[N, cin, H, W]``.

    engines: "conv1", "conv2", ("conv3",) ("downsample",). With sparse engines of a plain
    bottleneck the whole block is one fused op; where gradients are needed, or shapes do not fit,
    its convolutions run one by one. masks, name: see :class:`~opentrans_kernels.watch.Watch`.
    """

    OPERATORS = {
        "opentrans_operator": "sparse_bottleneck",
        "opentrans_average": "avg_pool2d",
    }

    def __init__(
        self,
        original: nn.Module,
        engines: Mapping[str, Engine],
        pool: int = 1,
        down_pool: int = 1,
        masks: Mapping[str, torch.Tensor] | None = None,
        name: str = "",
    ) -> None:
        super().__init__(original)
        self.opentrans_watch = Watch.inside(original, name, self._modules, masks or {})
        self.opentrans_engines = nn.ModuleDict(engines)
        self.opentrans_pool, self.opentrans_down_pool = pool, down_pool
        self.opentrans_planar = all(isinstance(e, SparseEngine) for e in engines.values())
        #: Why the block does not run as one fused op; None if it does.
        self.opentrans_unfused = self._why_unfused(engines)
        self._resolve()

    def _why_unfused(self, engines: Mapping[str, Engine]) -> str | None:
        if not self.opentrans_planar:
            return "it runs densely"
        if "conv3" not in engines:
            return "it has two convolutions, not three"
        packs = {name: e.sparse_weight() for name, e in engines.items()}  # type: ignore[operator]
        down = packs.get("downsample")
        if (1 if down is None else self.opentrans_pool) != self.opentrans_down_pool:
            return f"its pools are {self.opentrans_pool} and {self.opentrans_down_pool}"
        if packs["conv2"].stride > 1 and self.opentrans_pool > 1:
            return f"it pools, and conv2 has stride {packs['conv2'].stride}"
        return fusible(packs["conv1"], packs["conv2"], packs["conv3"], down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._checked(x)
        if (why := self.opentrans_watch.changed()) is not None:
            return self.opentrans_watch.dense(self.opentrans_original, x, why)
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
            c3.cout, self.opentrans_pool, self.opentrans_down_pool, c2.stride,
        )  # fmt: skip

    def _one_by_one(self, x: torch.Tensor) -> torch.Tensor:
        engines = self.opentrans_engines
        shortcut = x
        if "downsample" in engines:
            shortcut = engines["downsample"](self._pooled(x, self.opentrans_down_pool))
        y = engines["conv1"](x, None, RELU)
        if "conv3" not in engines:
            return engines["conv2"](y, shortcut, RELU)
        y = self._pooled(engines["conv2"](y, None, RELU), self.opentrans_pool)
        return engines["conv3"](y, shortcut, RELU)

    def _pooled(self, x: torch.Tensor, size: int) -> torch.Tensor:
        if size == 1:
            return x
        return self.opentrans_average(x, size) if self.opentrans_planar else F.avg_pool2d(x, size)

    def extra_repr(self) -> str:
        return "fused" if self.opentrans_unfused is None else f"not fused: {self.opentrans_unfused}"


class _Folded(Replacement):
    """Passes on what the convolution before it computed, unless that ran densely."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.opentrans_watch: Watch | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        watch = self.opentrans_watch
        if watch is None or watch.changed() is None:
            return x
        return self.opentrans_original(x)


class FoldedBatchNorm(_Folded):
    """In the place of a batch norm that was folded into the convolution before it."""


class FoldedActivation(_Folded):
    """In the place of an activation that the convolution before it already applied."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.opentrans_activation = activation_of(original)
        self._register()

    def _register(self) -> None:
        #: By which compilers know it: a string is a constant to them.
        self.opentrans_number = str(next(_numbers))
        _FOLDED[self.opentrans_number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"opentrans_activation": RELU, **state})
        self._register()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _same_settings(self.opentrans_number):
            raise UnsupportedModelError(
                f"the activation was {self.opentrans_activation} when it was folded into the "
                f"convolution before it, and its settings were changed since. {_FIX}, and "
                "accelerate again."
            )
        return super().forward(x)


_numbers = itertools.count(1)
_FOLDED: weakref.WeakValueDictionary[str, FoldedActivation] = weakref.WeakValueDictionary()


def _same_settings(number: str) -> bool:
    folded = _FOLDED[number]
    return activation_of(folded.opentrans_original) == folded.opentrans_activation


# As torch.compiler.assume_constant_result does, which would import the compiler, and triton.
_same_settings._dynamo_marked_constant = True  # type: ignore[attr-defined]


def watch_together(
    model: nn.Module, parts: Mapping[str, Replacement], masks: Mapping[str, torch.Tensor],
    undo: str = RESTORE, through: Iterable[tuple[str, nn.Module]] = (),
) -> None:  # fmt: skip
    """Let a convolution and what is folded into it run densely together; names as in the model.

    through: modules that see a value between them, so that a hook of theirs counts as well.

    One that is exchanged is an error of the others: a folded norm alone would pass everything on.
    """
    places: dict[str, nn.Module] = {**parts, **dict(through)}

    def parent(name: str) -> nn.Module:
        path = name.rpartition(".")[0]
        return parts[path] if path in parts else model.get_submodule(path)

    parents = {name: parent(name)._modules for name in places}
    watch = Watch([(name, part, parents[name]) for name, part in places.items()], masks, undo)
    for part in parts.values():
        part.opentrans_watch = watch
