"""Layers of units: one weight each, of a convolution or of a linear layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import MaskError, UnsupportedModelError
from ..finite import count_non_finite
from ..masks import make_permanent
from ..masks.files import shorten
from ..topology import ConvShape, LinearNode, Linears, MlpNode, token_counts
from ..topology.behaviour import added_behaviour, first_changed, own_behaviour
from ..topology.find import walk_modules

__all__ = [
    "Layer",
    "LinearUnit",
    "linear_units",
    "nonzero",
    "other_zeros",
    "reached",
    "require_own_weight",
]

#: An MLP runs as one op if both of its layers are at most this dense.
PAIRED = 0.85


@dataclass(frozen=True)
class Layer:
    """One weight and the module that holds it.

    name: module path in the model. inside: path of the module below what runs the unit densely.
    """

    name: str
    module: nn.Conv2d | nn.Linear
    inside: str

    @property
    def shape(self) -> tuple[int, ...]:
        """``[cout, cin / groups, kh, kw]``; a linear layer is a 1x1."""
        shape = tuple(self.module.weight.shape)
        return shape if len(shape) == 4 else (*shape, 1, 1)

    @property
    def numel(self) -> int:
        return self.module.weight.numel()

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
    """A linear layer ("linear"), or a module that is two of them with an activation ("mlp").

    name: module path. nnz: layer name -> nonzero weights after masking. must_mask: the mask removes
    weights that are not zero in the model.
    """

    name: str
    role: str
    nodes: tuple[LinearNode, ...]
    mlp: MlpNode | None
    nnz: Mapping[str, int]
    must_mask: bool

    #: None of these: what is asked of units of convolutions as well.
    block = None
    unsupported = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        cut = 0 if self.mlp is None else len(self.name) + 1
        return tuple(
            Layer(node.name, node.module, node.name[cut:] if cut else "") for node in self.nodes
        )

    @property
    def module(self) -> nn.Module:
        """What is replaced."""
        return self.nodes[0].module if self.mlp is None else self.mlp.module

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
        if self.mlp is None:
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


def nonzero(
    name: str, module: nn.Conv2d | nn.Linear, masks: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """bool: weights that are not zero after masking."""
    kept = module.weight.detach() != 0
    return kept & masks[name] if name in masks else kept


def require_own_weight(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError unless the weight is a parameter, which a mask can be put on."""
    if "weight" not in module._parameters:
        raise UnsupportedModelError(
            f"{name}: its weight is computed from others (pruned or parametrized) and a "
            f"further mask is given. Make it permanent first: {make_permanent(module)}."
        )


def linear_units(
    linears: Linears, pruned: Mapping[str, nn.Linear], masks: Mapping[str, torch.Tensor]
) -> Iterator[LinearUnit]:
    """The units of a model's linear layers, of those only that have a mask or enough zeros.

    pruned: those with enough zeros of their own. Raises UnsupportedModelError for weights that the
    kernels do not take.
    """
    nodes = {n.name: n for n in linears.layers if n.name in masks or n.name in pruned}
    for node in nodes.values():
        _check(node.name, node.module)
    kept = {
        name: int(torch.count_nonzero(nonzero(name, node.module, masks)))
        for name, node in nodes.items()
    }

    def unit(name: str, *own: LinearNode, mlp: MlpNode | None = None) -> LinearUnit:
        counts = {node.name: kept[node.name] for node in own}
        before = sum(int(torch.count_nonzero(node.module.weight.detach())) for node in own)
        role = "linear" if mlp is None else "mlp"
        return LinearUnit(name, role, own, mlp, counts, sum(counts.values()) != before)

    paired: dict[str, MlpNode] = {}
    for mlp in linears.mlps:
        both = (mlp.first.name, mlp.second.name)
        if all(n in kept and kept[n] <= PAIRED * nodes[n].module.weight.numel() for n in both):
            paired |= dict.fromkeys(both, mlp)
    for name, node in nodes.items():
        mlp = paired.get(name)
        if mlp is None:
            yield unit(name, node)
        elif mlp.first.name == name:
            yield unit(mlp.name, mlp.first, mlp.second, mlp=mlp)


def reached(
    model: nn.Module,
    units: tuple[LinearUnit, ...],
    input_size: tuple[int, int],
    masks: Mapping[str, torch.Tensor],
) -> tuple[tuple[LinearUnit, ...], dict[str, ConvShape], list[str]]:
    """The units whose modules an image reaches, the tokens of each layer, and notes.

    Raises MaskError for a mask of a layer whose module is never called.
    """
    if not units:
        return (), {}, []
    first = {unit.name: unit.layers[0].name for unit in units}
    tokens, why = token_counts(model, first, input_size)
    if why is not None:
        return units, {}, [f"no token counts and no timings of linear layers: {why}"]
    missed = [unit for unit in units if unit.name not in tokens]
    for layer in (layer for unit in missed for layer in unit.layers):
        if layer.name in masks:
            raise MaskError(
                f"the mask of {layer.name!r} cannot be applied: calling the model on an image does "
                "not call that layer (its weight may be read by another module). Leave this mask "
                "out, or multiply it into the weights first (MaskSet.apply_)."
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


def other_zeros(model: nn.Module, names: Collection[str]) -> str | None:
    """Where zeros are outside of the layers ``names``: "ConvTranspose3d: ..."; None for none."""
    found: dict[str, tuple[int, int, int]] = {}
    for path, module in walk_modules(model):
        for key, weight in module._parameters.items():
            if weight is None or weight.dim() < 2 or path in names or weight.is_meta:
                continue
            if not key.endswith("weight") or not weight.is_floating_point():
                continue
            zeros = weight.numel() - int(torch.count_nonzero(weight.detach()))
            layers, all_zeros, all_weights = found.get(type(module).__name__, (0, 0, 0))
            if zeros:
                found[type(module).__name__] = (
                    layers + 1, all_zeros + zeros, all_weights + weight.numel()
                )  # fmt: skip
    if not found:
        return None
    return "; ".join(
        f"{zeros} of {weights} weights of {layers} {kind} layer{'s' if layers > 1 else ''}"
        for kind, (layers, zeros, weights) in found.items()
    )


def _check(name: str, module: nn.Linear) -> None:
    for label, tensor in (("weight", module.weight), ("bias", module.bias)):
        if tensor is None:
            continue
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
