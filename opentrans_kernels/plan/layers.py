"""Layers of units: one weight each, of a convolution or of a linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import MaskError, UnsupportedModelError
from ..finite import count_non_finite
from ..masks import make_permanent
from ..masks.files import shorten
from ..topology import (
    ConvShape,
    Linears,
    MlpNode,
    linear_modules,
    packed_projections,
    token_counts,
)
from ..topology.behaviour import added_behaviour, first_changed, own_behaviour
from ..topology.linears import PRUNED as PRUNED
from ..topology.linears import is_pruned

__all__ = [
    "Layer",
    "LinearUnit",
    "linear_units",
    "nonzero",
    "reached",
    "removes_nothing",
    "require_own_weight",
]

#: An MLP runs as one op if both of its layers are at most this dense.
PAIRED = 0.85


@dataclass(frozen=True)
class Layer:
    """One weight and the module that holds it.

    name: module path in the model, "ATTENTION.in_proj" for ``in_proj_weight``. inside: path of the
    module below what runs the unit densely. parameter: what the module calls the weight.
    """

    name: str
    module: nn.Conv2d | nn.Linear | nn.MultiheadAttention
    inside: str
    parameter: str = "weight"

    @property
    def weight(self) -> torch.Tensor:
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, self.parameter.replace("weight", "bias"))

    @property
    def path(self) -> str:
        """Path of the weight in the model."""
        return self._inside(self.name.removesuffix(".in_proj"))

    @property
    def below(self) -> str:
        """Path of the weight below what runs the unit densely."""
        return self._inside(self.inside)

    def _inside(self, module: str) -> str:
        return f"{module}.{self.parameter}".lstrip(".")

    @property
    def shape(self) -> tuple[int, ...]:
        """``[cout, cin / groups, kh, kw]``; a linear layer is a 1x1."""
        shape = tuple(self.weight.shape)
        return shape if len(shape) == 4 else (*shape, 1, 1)

    @property
    def numel(self) -> int:
        return self.weight.numel()

    @property
    def cin(self) -> int:
        return getattr(self.module, "in_channels", self.shape[1])

    @property
    def cout(self) -> int:
        return self.shape[0]

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def stride(self) -> int:
        return self.module.stride[0] if isinstance(self.module, nn.Conv2d) else 1


@dataclass(frozen=True)
class LinearUnit:
    """A linear layer ("linear"), a module that is two of them with an activation ("mlp"), or the
    projections of an ``nn.MultiheadAttention`` ("attention").

    name: module path. module: what is replaced. nnz: layer name -> nonzero weights after masking.
    must_mask: the mask removes weights that are not zero in the model.
    """

    name: str
    role: str
    module: nn.Module
    layers: tuple[Layer, ...]
    mlp: MlpNode | None
    nnz: Mapping[str, int]
    must_mask: bool

    #: None of these: what is asked of units of convolutions as well.
    block = None
    unsupported = None

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of nonzero weights, 0 to 1."""
        return sum(self.nnz.values()) / max(1, self.numel)

    @property
    def changed(self) -> str | None:
        """What a replacement would not call; None if there is none."""
        if self.role == "linear":
            extra = own_behaviour(self.module)
            return f"{self.name} {extra}" if extra else None
        if extra := added_behaviour(self.module):
            return f"{self.name} {extra}"
        inner = self.module.named_modules()
        return first_changed((f"{self.name}.{n}", m) for n, m in inner if n)

    @property
    def places(self) -> frozenset[str]:
        """Paths of what a replacement takes the place of."""
        return frozenset((self.name,))


def nonzero(name: str, weight: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """bool: weights that are not zero after masking."""
    kept = weight.detach() != 0
    return kept & masks[name] if name in masks else kept


def require_own_weight(layer: Layer) -> None:
    """Raise UnsupportedModelError unless the weight is a parameter, which a mask can be put on."""
    if layer.parameter not in layer.module._parameters:
        raise UnsupportedModelError(
            f"{layer.name}: its weight is computed from others (pruned or parametrized) and a "
            "further mask is given. Make it permanent first: "
            f"{make_permanent(layer.module, layer.parameter)}."
        )


def removes_nothing(model: nn.Module, name: str, mask: torch.Tensor) -> bool:
    """Whether the weights of the linear layer ``name`` that the mask removes are zero already."""
    module = {**packed_projections(model), **linear_modules(model)}.get(name)
    if module is None or module.weight.shape != mask.shape:
        return False
    return not bool((module.weight.detach()[~mask] != 0).any())


def linear_units(
    linears: Linears, pruned: Mapping[str, nn.Linear], masks: Mapping[str, torch.Tensor]
) -> Iterator[LinearUnit]:
    """The units of a model's linear layers, of those only that have a mask or enough zeros.

    pruned: those with enough zeros of their own. Raises UnsupportedModelError for weights that the
    kernels do not take.
    """
    nodes = {n.name: n for n in linears.layers if n.name in masks or n.name in pruned}
    kept = {}
    for name, node in nodes.items():
        _check(name, node.module, node.module.weight, node.module.bias)
        kept[name] = int(torch.count_nonzero(nonzero(name, node.module.weight, masks)))

    def unit(
        name: str, role: str, module: nn.Module, *layers: Layer, mlp: MlpNode | None = None
    ) -> LinearUnit:
        counts = {layer.name: kept[layer.name] for layer in layers}
        before = sum(int(torch.count_nonzero(layer.weight.detach())) for layer in layers)
        must_mask = sum(counts.values()) != before
        return LinearUnit(name, role, module, layers, mlp, counts, must_mask)

    paired: dict[str, MlpNode] = {}
    for mlp in linears.mlps:
        both = (mlp.first.name, mlp.second.name)
        if all(n in kept and kept[n] <= PAIRED * nodes[n].module.weight.numel() for n in both):
            paired |= dict.fromkeys(both, mlp)
    for name, node in nodes.items():
        found = paired.get(name)
        if found is None:
            yield unit(name, "linear", node.module, Layer(name, node.module, ""))
        elif found.first.name == name:
            cut = len(found.name) + 1
            own = (Layer(n.name, n.module, n.name[cut:]) for n in (found.first, found.second))
            yield unit(found.name, "mlp", found.module, *own, mlp=found)
    for attention in linears.attentions:
        module = attention.module
        projections = (
            Layer(f"{attention.name}.in_proj", module, "attention", "in_proj_weight"),
            Layer(f"{attention.name}.out_proj", module.out_proj, "attention.out_proj"),
        )
        if not any(layer.name in masks or is_pruned(layer.weight) for layer in projections):
            continue
        for layer in projections:
            _check(layer.name, module, layer.weight, layer.bias)
            kept[layer.name] = int(torch.count_nonzero(nonzero(layer.name, layer.weight, masks)))
        yield unit(attention.name, "attention", module, *projections)


def reached(
    model: nn.Module,
    units: tuple[LinearUnit, ...],
    input_size: tuple[int, int],
) -> tuple[tuple[LinearUnit, ...], dict[str, ConvShape], list[str]]:
    """The units whose modules an image reaches, the tokens of each layer, and notes.

    Raises MaskError for a mask of a layer whose module is never called.
    """
    if not units:
        return (), {}, []
    called = {unit.name: unit.name if unit.role != "mlp" else unit.layers[0].name for unit in units}
    counts, why = token_counts(model, called.values(), input_size)
    tokens = {name: counts[path] for name, path in called.items() if path in counts}
    if why is not None:
        return units, {}, [f"no token counts and no timings of linear layers: {why}"]
    missed = [unit for unit in units if unit.name not in tokens]
    for unit in missed:
        if unit.must_mask:
            raise MaskError(
                f"the mask of {unit.layers[0].name!r} cannot be applied: calling the model on an "
                "image does not call that layer (its weight may be read by another module). Leave "
                "this mask out, or multiply it into the weights first (MaskSet.apply_)."
            )
    notes = []
    if missed:
        notes.append(
            f"{len(missed)} linear layers with zeros are not called for an image and stay as they "
            f"are: {shorten(unit.name for unit in missed)}"
        )
    kept = tuple(unit for unit in units if unit.name in tokens)
    shapes = {layer.name: tokens[unit.name] for unit in kept for layer in unit.layers}
    return kept, shapes, notes


def _check(name: str, module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point() or type(tensor) not in (torch.Tensor, nn.Parameter):
            raise UnsupportedModelError(
                f"{name}: its {label} is a {type(tensor).__name__} of {tensor.dtype}, no plain "
                "floating-point tensor (quantised?). Accelerate the model as it was before."
            )
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise UnsupportedModelError(
                f"{name}: its {label} is {tensor.dtype} on {tensor.device}; the sparse kernels "
                "compute in float32 on the CPU. Call model.float().cpu() first."
            )
        if bad := count_non_finite(tensor):
            raise UnsupportedModelError(
                f"{name}: {bad} of {tensor.numel()} {label} values are NaN or Inf. The checkpoint "
                "is damaged or diverged; load a sound one."
            )
    if module.training:
        raise UnsupportedModelError(
            f"{name} is in training mode; acceleration packs weights for inference. Call "
            "model.eval() first."
        )
