"""Linear layers of a model, and pairs of them that make up a module with an activation between.

Recognition is by structure, never by a foreign class: a module whose parts are two linear layers,
one activation and what does nothing in eval mode. It is then proved: the module's own forward,
traced on the meta device, must be the expression second(activation(first(x))).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from opentrans_kernels.activations import NONE, Activation, Kind, activation_of
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology.cover import switched
from opentrans_kernels.topology.find import walk_modules
from opentrans_kernels.topology.nodes import ConvShape, original
from opentrans_kernels.topology.tracing import ShapesOnly, meta_copy, same_expression

__all__ = [
    "AttentionNode",
    "LinearNode",
    "Linears",
    "MlpNode",
    "Projections",
    "block_linears",
    "find_linears",
    "is_pruned",
    "kind_of",
    "linear_modules",
    "packed_projections",
    "parameter_name",
    "proved_activation",
    "pruned_linears",
    "token_counts",
]

#: Share of zeros from which a linear layer counts as pruned: initialisations make single ones.
PRUNED = 0.01
#: Largest difference of an activation in float64 that is rounding, relative to its largest value.
_ROUNDING = 1e-9
#: Activations of other libraries by the name of their class; the probe has to agree.
_NAMED = {
    "GELU": Kind.GELU,
    "GELUActivation": Kind.GELU,
    "GELUTanh": Kind.GELU_TANH,
    "NewGELUActivation": Kind.GELU_TANH,
    "FastGELUActivation": Kind.GELU_TANH,
    "AccurateGELUActivation": Kind.GELU_TANH,
    "PytorchGELUTanh": Kind.GELU_TANH,
    "QuickGELU": Kind.QUICK_GELU,
    "QuickGELUActivation": Kind.QUICK_GELU,
    "SiLUActivation": Kind.SILU,
    "Swish": Kind.SILU,
}
_NOTHING = (nn.Dropout, nn.Identity)  # in eval mode


@dataclass(frozen=True)
class LinearNode:
    """One linear layer; name: module path in the model."""

    name: str
    module: nn.Linear


@dataclass(frozen=True)
class MlpNode:
    """A module that computes second(activation(first(x)))."""

    name: str
    module: nn.Module
    first: LinearNode
    second: LinearNode
    activation: Activation


@dataclass(frozen=True)
class AttentionNode:
    """An ``nn.MultiheadAttention`` with one weight for queries, keys and values."""

    name: str
    module: nn.MultiheadAttention


@dataclass(frozen=True)
class Projections:
    """The weight for queries, keys and values of an ``nn.MultiheadAttention``, as a layer."""

    attention: nn.MultiheadAttention

    @property
    def weight(self) -> torch.Tensor:
        """[3 width, width]."""
        return self.attention.in_proj_weight


@dataclass(frozen=True)
class Linears:
    """What can be replaced, in order of definition; ``mlps`` hold some of ``layers``.

    left_alone: name of a linear layer -> why it cannot be replaced alone.
    """

    layers: tuple[LinearNode, ...]
    mlps: tuple[MlpNode, ...]
    attentions: tuple[AttentionNode, ...]
    left_alone: Mapping[str, str]


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The model's Linear modules by name, each once, in definition order.

    A replacement counts as the layer it stands for.
    """
    found = {name: module for name, module in walk_modules(model) if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not is_lazy(module.weight)}


def packed_projections(model: nn.Module) -> dict[str, Projections]:
    """ "ATTENTION.in_proj" -> the weight of that name of each ``nn.MultiheadAttention``."""
    return {
        f"{name}.in_proj".lstrip("."): Projections(module)
        for name, module in walk_modules(model)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    }


def parameter_name(layer: str, known: Container[str] = ()) -> str:
    """The parameter of a layer: its ``weight``, or the ``in_proj_weight`` of an attention.

    known: names of parameters; without them a layer called "in_proj" is taken for a module.
    """
    plain = f"{layer}.weight".lstrip(".")
    packed = f"{layer}_weight"
    ends = layer.rpartition(".")[2] == "in_proj"
    return packed if ends and plain not in known and packed in known else plain


def pruned_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of which at least a hundredth of the weights is zero."""
    return {
        name: module for name, module in linear_modules(model).items() if is_pruned(module.weight)
    }


def is_pruned(weight: torch.Tensor) -> bool:
    """Whether at least a hundredth of the weights is zero."""
    zeros = weight.numel() - int(torch.count_nonzero(weight.detach()))
    return zeros >= max(1, PRUNED * weight.numel())


def kind_of(module: nn.Module | Projections) -> str:
    """What messages call a layer."""
    if isinstance(module, Projections):
        return "attention"
    return "conv" if isinstance(module, nn.Conv2d) else "linear layer"


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a vision transformer's blocks; none for any other network.

    A vision transformer is a network whose only convolutions cut the image into patches: their
    window is their stride, and larger than 1. Blocks stand in lists, so a number is in the path.
    """
    convs = [module for _, module in walk_modules(model) if isinstance(module, nn.Conv2d)]
    if not convs or not all(c.stride == c.kernel_size and max(c.kernel_size) > 1 for c in convs):
        return {}
    inside = {
        f"{name}.{child}".lstrip(".")
        for name, module in walk_modules(model)
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
    }
    return {
        name: module
        for name, module in linear_modules(model).items()
        if name not in inside and any(part.isdigit() for part in name.split("."))
    }


def find_linears(model: nn.Module) -> Linears:
    """Every linear layer that calling the model may run, and the MLPs they make up."""
    uses = Counter(id(original(m)) for _, m in model.named_modules(remove_duplicate=False))
    read_by_others = {
        id(part)
        for _, module in walk_modules(model)
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    layers: dict[str, LinearNode] = {}
    alone: dict[str, str] = {}
    for name, module in linear_modules(model).items():
        if id(module) in read_by_others:
            alone[name] = "is read by nn.MultiheadAttention, not called"
        elif type(module).forward is not nn.Linear.forward:
            alone[name] = f"is a {type(module).__name__} with a forward of its own"
        elif uses[id(module)] > 1:
            alone[name] = f"is used at {uses[id(module)]} places"
        elif "_orig_mod" in name.split("."):
            alone[name] = "is inside a compiled module; accelerate first, then compile"
        elif not name:
            alone[name] = "is the model itself; wrap it in nn.Sequential"
        else:
            layers[name] = LinearNode(name, module)
    known = {id(node.module): node for node in layers.values()}
    mlps: list[MlpNode] = []
    for name, module in walk_modules(model):
        within = any(mlp.name == name or mlp.name.startswith(f"{name}.") for mlp in mlps)
        if name and not within and uses[id(module)] == 1:
            node = _mlp(name, module, known)
            if node is not None:
                mlps = [one for one in mlps if not name.startswith(f"{one.name}.")] + [node]
    attentions: list[AttentionNode] = []
    for name, module in walk_modules(model):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if why := _not_packed(name, module, uses[id(module)]):
            alone |= {f"{name}.{part}".lstrip("."): why for part in ("in_proj", "out_proj")}
        else:
            attentions.append(AttentionNode(name, module))
            alone.pop(f"{name}.out_proj", None)
    return Linears(tuple(layers.values()), tuple(mlps), tuple(attentions), alone)


def _not_packed(name: str, attention: nn.MultiheadAttention, uses: int) -> str | None:
    """Why an attention cannot be replaced as a whole; None if it can."""
    if type(attention) is not nn.MultiheadAttention:
        return f"belongs to a {type(attention).__name__} of another make"
    if not name:
        return "belongs to the model itself; wrap it in nn.Sequential"
    if attention.in_proj_weight is None:
        return "belongs to an nn.MultiheadAttention whose keys have another width"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "belongs to an nn.MultiheadAttention that adds keys (add_bias_kv, add_zero_attn)"
    return f"belongs to an nn.MultiheadAttention at {uses} places" if uses > 1 else None


def _mlp(name: str, module: nn.Module, known: Mapping[int, LinearNode]) -> MlpNode | None:
    """``module`` as an MLP, or None if it is anything else."""
    parts = [original(m) for m in module.modules() if m is not module]
    ends = [m for m in parts if not any(True for _ in m.children())]
    linears = [m for m in ends if isinstance(m, nn.Linear)]
    others = [m for m in ends if m not in linears and type(m) not in _NOTHING]
    if len(linears) != 2 or len(others) != 1 or not all(id(m) in known for m in linears):
        return None
    owned = sum(1 for m in linears for _ in m.parameters())
    if sum(1 for _ in module.parameters()) != owned or next(module.buffers(), None) is not None:
        return None
    activation = proved_activation(others[0])
    paths = {id(original(m)): path for path, m in module.named_modules()}
    for first, second in (linears, linears[::-1]):
        if activation and first.out_features == second.in_features:
            steps = [paths[id(m)] for m in (first, others[0], second)]
            if _same(module, steps, first.in_features):
                return MlpNode(name, module, known[id(first)], known[id(second)], activation)
    return None


def _same(module: nn.Module, steps: Iterable[str], width: int) -> bool:
    """Whether the module's forward is ``steps`` one after the other."""
    try:
        twin = meta_copy(module)
        parts = [twin.get_submodule(step) for step in steps]

        def claim(x: torch.Tensor) -> torch.Tensor:
            for part in parts:
                x = part(x)
            return x

        x = torch.empty(2, 3, width, dtype=next(twin.parameters()).dtype, device="meta")
        return same_expression(twin, claim, x)
    except Exception:  # foreign code that takes something else: no MLP
        return False


def proved_activation(module: nn.Module) -> Activation:
    """What ``module`` computes, by its class, and by a probe in float64; ``NONE`` if unknown."""
    found = activation_of(module)
    if not found and type(module).__name__ in _NAMED:
        found = Activation(_NAMED[type(module).__name__])
    if not found or next(module.parameters(), None) is not None:
        return NONE
    probe = torch.linspace(-30.0, 30.0, 4801, dtype=torch.float64)
    try:
        with torch.no_grad():
            given, claimed = module(probe.clone()), found.apply_(probe.clone())
    except Exception:  # foreign code that takes something else
        return NONE
    same = isinstance(given, torch.Tensor) and given.shape == claimed.shape
    return found if same and bool((given - claimed).abs().max() <= 30 * _ROUNDING) else NONE


class _Known(Exception):
    """Ends a forward in which every layer was seen."""


def token_counts(
    model: nn.Module, names: Iterable[str], input_size: tuple[int, int]
) -> tuple[dict[str, ConvShape], str | None]:
    """Tokens that reach each layer for one image (as ``tokens`` x 1 pixels), and what went wrong.

    Layers that an image does not reach are absent. Where tokens are reduced, those that are left
    count. Runs on the meta device.
    """
    wanted = set(names)
    found: dict[str, ConvShape] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, torch.Tensor) and x.dim() and name not in found:
                tokens = x.numel() // max(1, x.shape[-1])
                found[name] = ConvShape(tokens, 1, tokens, 1)
            if len(found) == len(wanted):
                raise _Known

        return hook

    try:
        twin = meta_copy(model)
        first = next(m for m in twin.modules() if isinstance(m, nn.Conv2d))
        for name in wanted:
            twin.get_submodule(name).register_forward_pre_hook(record(name))
        shape = (1, first.in_channels, *input_size)
        with torch.no_grad(), switched(twin, paused=False), ShapesOnly():
            twin(torch.empty(shape, dtype=first.weight.dtype, device="meta"))
    except _Known:
        return found, None
    except UnsupportedModelError as error:
        return found, str(error)
    except Exception as error:  # the model's own forward
        return found, f"{type(error).__name__} in the model's own forward: {error}"
    return found, None
