"""Accelerated linear layers, and MLPs that run as one op; see ``nn`` for what all replacements do.

Tokens ``[..., channels]`` go in and come out as they lie; nothing is transposed around the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .activations import NONE, Activation
from .engines import Engine, SparseEngine
from .nn import Replacement
from .pack import SparseWeight
from .watch import Watch

__all__ = ["AcceleratedLinear", "AcceleratedMlp", "DenseLinear", "SparseLinear"]


class SparseLinear(SparseEngine):
    """A packed linear layer on the sparse kernels."""

    OPERATORS = {"operator": "sparse_linear"}

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> SparseLinear:
        """weight: ``[out, in]``; its exact zeros are dropped."""
        return cls(SparseWeight.from_dense(weight.detach()[:, :, None, None], bias))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        return self.operator(
            x, self.structure, self.values, self.bias, residual, self.cout,
            activation.kind, activation.slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.cin}, {self.cout}, nnz={self.nnz}"


class DenseLinear(Engine):
    """A linear layer with its mask in the weight, run densely by PyTorch."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._hold(weight=weight)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.nnz = int(torch.count_nonzero(weight))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return activation.apply_(y if residual is None else y + residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, masked"


class AcceleratedLinear(Replacement):
    """A linear layer on an engine: float32 ``[..., in]`` -> ``[..., out]``."""

    PREPARED = "its weight is packed"

    def __init__(self, original: nn.Linear, engine: Engine) -> None:
        super().__init__(original)
        self.opentrans_engine = engine

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as nn.Linear does
        return self.opentrans_engine.forward(self._checked(input))


class AcceleratedMlp(Replacement):
    """Two linear layers with an activation between them: float32 ``[..., in]`` -> ``[..., out]``.

    With sparse engines it is one op, which never holds the wide tensor between the layers as a
    whole; where gradients are needed the layers run one by one. masks, name: see
    :class:`~opentrans_kernels.watch.Watch`.
    """

    OPERATORS = {"opentrans_operator": "sparse_mlp"}
    PREPARED = "its weights are packed"

    def __init__(
        self,
        original: nn.Module,
        engines: Mapping[str, Engine],
        activation: Activation,
        masks: Mapping[str, torch.Tensor],
        name: str,
    ) -> None:
        """engines: "first" and "second"."""
        super().__init__(original)
        self.opentrans_watch = Watch.inside(original, name, self._modules, masks)
        self.opentrans_engines = nn.ModuleDict(engines)
        self.opentrans_activation = activation
        self.opentrans_fused = all(isinstance(e, SparseEngine) for e in engines.values())
        self._resolve()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._checked(x)
        if (why := self.opentrans_watch.changed()) is not None:
            return self.opentrans_watch.dense(self.opentrans_original, x, why)
        one, two = self.opentrans_engines["first"], self.opentrans_engines["second"]
        act = self.opentrans_activation
        if not self.opentrans_fused or (torch.is_grad_enabled() and x.requires_grad):
            return two.forward(one.forward(x, None, act))
        return self.opentrans_operator(
            x, one.structure, one.values, one.bias, two.structure, two.values, two.bias, None,
            two.cout, act.kind, act.slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.opentrans_activation}, {'one op' if self.opentrans_fused else 'masked'}"
