"""Multiply-adds of a training step, from one weightless trace of the model's own forward.

Counted are convolutions and matrix products, which are nearly all of the work; norms, activations
and pools are not. In backward autograd forms, for each factor of a product that needs a gradient,
one more product of the same size. Which factors those are follows from the graph, so detached and
``no_grad`` parts, shared trunks and frozen prefixes are counted as PyTorch runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology import find_trunk
from opentrans_kernels.topology.tracing import meta_copy


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product of the forward.

    macs: multiply-adds of the forward, all images of the traced batch together.
    weights: names of the parameters one factor is made of; empty for two activations.
    feeds: per factor, the parameters a gradient for this factor would reach, as a bit set over
        ``Work.parameters``; 0 if none, or if no gradient of the output comes by here.
    """

    macs: int
    weights: tuple[str, ...]
    feeds: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What one forward computes, in execution order.

    parameters: every parameter the forward reads, in order of first use.
    pairs: batch norm module -> the one module whose output it normalises directly.
    failure: why the trace ended early ("" if it did not); what came before is counted.
    """

    products: tuple[Product, ...]
    parameters: tuple[str, ...]
    pairs: Mapping[str, str]
    failure: str = ""

    def layer_macs(self) -> dict[str, int]:
        """Forward multiply-adds per module that owns a weight, in execution order."""
        totals: dict[str, int] = {}
        for product in self.products:
            for module in {owner(name) for name in product.weights}:
                totals[module] = totals.get(module, 0) + product.macs
        return totals

    def forward_macs(self) -> int:
        """Multiply-adds of the forward."""
        return sum(product.macs for product in self.products)

    def training_macs(self, trainable: Collection[str]) -> int:
        """Forward plus backward, if exactly the parameters called ``trainable`` train.

        forward + wgrad of trainable weights + dgrad where something trainable feeds the input.
        """
        bits = self.bits(trainable)
        return sum(
            product.macs * (1 + sum(1 for feed in product.feeds if feed & bits))
            for product in self.products
        )

    def published_macs(self, trainable: Collection[str]) -> int:
        """The paper's rule: forward + dgrad everywhere, wgrad for layers that train."""
        chosen = set(trainable)
        return sum(
            product.macs * (2 if product.weights and not chosen & set(product.weights) else 3)
            for product in self.products
        )

    def first_trainable(self, trainable: Collection[str]) -> str | None:
        """Name of the first parameter in execution order that trains."""
        chosen = set(trainable)
        return next((name for name in self.parameters if name in chosen), None)

    def without_backward(self, trainable: Collection[str]) -> list[str]:
        """Modules with a weight of which no backward runs at all: nothing trains up to them."""
        bits = self.bits(trainable)
        busy = {
            owner(name)
            for product in self.products
            for name in product.weights
            if any(feed & bits for feed in product.feeds)
        }
        return [module for module in self.layer_macs() if module not in busy]

    def bits(self, names: Collection[str]) -> int:
        """The bit set of ``names``; those the forward does not read are left out."""
        chosen = set(names)
        return sum(1 << index for index, name in enumerate(self.parameters) if name in chosen)


def owner(parameter: str) -> str:
    """The module a parameter belongs to: 'conv1' for 'conv1.weight' and 'conv1.weight_orig'."""
    module, parametrized, _ = parameter.partition(".parametrizations.")
    return module if parametrized else parameter.rpartition(".")[0]


def trace_work(
    model: nn.Module,
    input_size: tuple[int, int] | None = None,
    inputs: Sequence[torch.Tensor] | None = None,
) -> Work:
    """Trace ``model`` on the meta device: no arithmetic, no data; the model is not touched.

    Args:
        model: any module. Of a model that holds a recognised ResNet trunk inside (a CLIP model),
            the module with the trunk is traced, unless ``inputs`` are given.
        input_size: (height, width) in pixels of one image, for models that take an image.
        inputs: example arguments of the forward instead; only shapes and dtypes are used.

    Raises:
        UnsupportedModelError: the forward fails before its first product.
    """
    prefix, root = "", model
    if inputs is None:
        prefix, root = _image_root(model)
        attempts = [[image] for image in _images(root, input_size)]
    else:
        attempts = [[value.detach().to("meta") for value in inputs]]
    best: Work | None = None
    for arguments in attempts:
        work = _run(root, prefix, arguments)
        if best is None or len(work.products) > len(best.products):
            best = work
        if not work.failure:
            break
    if best is None or not best.products:
        shapes = ", ".join(str(tuple(value.shape)) for value in attempts[0])
        reason = best.failure if best is not None else ""
        raise UnsupportedModelError(
            f"{type(root).__name__} cannot be traced with inputs of shape {shapes}: "
            f"{reason or 'its forward computes no convolution and no matrix product'}. Pass the "
            "size it takes as input_size=(height, width), or its arguments as inputs=[...]."
        )
    return best


def _run(root: nn.Module, prefix: str, arguments: Sequence[torch.Tensor]) -> Work:
    twin = meta_copy(root)
    recorder = _Recorder(twin, prefix)
    failure, live = "", -1  # without a result every product may matter
    try:
        with torch.enable_grad(), recorder:
            result = twin(*arguments)
        live = recorder.through(result)
    except Exception as error:  # the head may refuse the size; what came before is counted
        failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    products = tuple(
        product if live >> index & 1 else replace(product, feeds=(0, 0))
        for index, product in enumerate(recorder.products)
    )
    return Work(
        products,
        tuple(recorder.order),
        {norm: layer for norm, layer in recorder.pairs.items() if layer},
        failure,
    )


def _image_root(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that takes an image: the one with the trunk, else the model itself."""
    try:
        prefix = find_trunk(model).prefix
    except UnsupportedModelError:
        return "", model
    return prefix, model.get_submodule(prefix.rstrip("."))


def _images(root: nn.Module, size: tuple[int, int] | None) -> list[torch.Tensor]:
    """Images to try; the convolution registered first need not be the one that reads the image."""
    height, width = size or (224, 224)
    if height < 1 or width < 1:
        raise UnsupportedModelError(
            f"input size {height}x{width} has no pixels; give (height, width) such as 224, 224."
        )
    convs = [module for module in root.modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        raise UnsupportedModelError(
            f"{type(root).__name__} has no Conv2d, so it is not known what its input looks like. "
            "Pass example arguments of its forward as inputs=[...]."
        )
    channels = dict.fromkeys([convs[0].in_channels, 3, 1])
    known = {conv.in_channels for conv in convs}
    dtype = convs[0].weight.dtype
    return [
        torch.empty((1, count, height, width), dtype=dtype, device="meta")
        for count in channels
        if count in known
    ]


_NORMS = (
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_batch_norm_with_update",
    "aten::_batch_norm_no_update",
    "aten::cudnn_batch_norm",
)


def _convolution(args: Sequence[Any], out: torch.Tensor) -> int:
    image, weight = args[0], args[1]
    transposed = bool(args[6])
    pixels = (image if transposed else out).shape[2:]
    return out.shape[0] * math.prod(weight.shape) * math.prod(pixels)


def _matrix(left: int, right: int) -> Callable[[Sequence[Any], torch.Tensor], int]:
    def count(args: Sequence[Any], out: torch.Tensor) -> int:
        return math.prod(args[left].shape) * args[right].shape[-1]

    return count


# Operator -> positions of its two factors, and its multiply-adds from arguments and result.
_PRODUCTS: dict[str, tuple[tuple[int, int], Callable[[Sequence[Any], torch.Tensor], int]]] = {
    "aten::convolution": ((0, 1), _convolution),
    "aten::mm": ((0, 1), _matrix(0, 1)),
    "aten::addmm": ((1, 2), _matrix(1, 2)),
    "aten::bmm": ((0, 1), _matrix(0, 1)),
    "aten::baddbmm": ((1, 2), _matrix(1, 2)),
}


class _Recorder(TorchDispatchMode):
    """Follows, by storage, which parameters every tensor depends on through the autograd graph."""

    def __init__(self, twin: nn.Module, prefix: str) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.order: list[str] = []
        self.pairs: dict[str, str] = {}
        self._bit: dict[str, int] = {}
        self._name: dict[int, str] = {}
        self._feeds: dict[int, int] = {}
        self._through: dict[int, int] = {}
        self._made_of: dict[int, tuple[str, ...]] = {}
        self._produced_by: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # keeps storages, and so their addresses, in use
        for name, parameter in twin.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
            self._own(parameter, prefix + name)
        for path, module in twin.named_modules():
            # torch.nn.utils.prune keeps the parameter as NAME_orig and a plain tensor as NAME.
            for key, parameter in module._parameters.items():
                plain = vars(module).get(key.removesuffix("_orig"))
                if parameter is not None and isinstance(plain, torch.Tensor):
                    vars(module)[key.removesuffix("_orig")] = shadow = plain.detach()
                    shadow.requires_grad_(True)
                    self._own(shadow, f"{prefix}{path}.{key}" if path else f"{prefix}{key}")

    def _own(self, tensor: torch.Tensor, name: str) -> None:
        key = self._key(tensor)
        self._name[key] = name
        self._made_of[key] = (name,)

    def _key(self, tensor: torch.Tensor) -> int:
        self._alive.append(tensor)
        return tensor.untyped_storage()._cdata

    def _use(self, tensor: torch.Tensor) -> int:
        """Parameters that a gradient for ``tensor`` reaches, as bits."""
        key = self._key(tensor)
        name = self._name.get(key)
        if name is not None and name not in self._bit:
            self._bit[name] = 1 << len(self.order)
            self.order.append(name)
        if not tensor.requires_grad:
            return 0
        return self._bit.get(name or "", 0) | self._feeds.get(key, 0)

    def through(self, result: Any) -> int:
        """Products that a gradient of ``result`` comes by, as bits over ``products``."""
        found = 0
        for value in _tensors(result):
            if value.requires_grad:
                found |= self._through.get(self._key(value), 0)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        bits, through = 0, self.through(tensors)
        for tensor in tensors:
            bits |= self._use(tensor)
        made = [self._made_of.get(self._key(tensor)) for tensor in tensors]
        result = func(*args, **kwargs)
        name = func._schema.name
        outputs = list(_tensors(result))
        inplace = name.endswith("_") and not name.endswith("__")
        sources = {self._key(tensor) for tensor in tensors}
        produced = ""
        if name in _PRODUCTS:
            produced = self._product(name, args, outputs[0])
            through |= 1 << (len(self.products) - 1)
        elif name in _NORMS:
            self._norm(args)
        for output in outputs:
            key = self._key(output)
            fresh = key not in sources
            self._feeds[key] = bits if fresh else self._feeds.get(key, 0) | bits
            self._through[key] = through if fresh else self._through.get(key, 0) | through
            if fresh and key not in self._name:
                # A cast, product or reshape of parameters alone is still a weight.
                only = tensors and all(one is not None for one in made)
                if only:
                    self._made_of[key] = tuple(dict.fromkeys(n for one in made for n in one or ()))
                else:
                    self._made_of.pop(key, None)
            if fresh or inplace:
                self._produced_by.pop(key, None)
            if produced:
                self._produced_by[key] = produced
        return result

    def _product(self, name: str, args: Sequence[Any], out: torch.Tensor) -> str:
        """Record one product; returns the module whose weight it uses, "" without one."""
        positions, count = _PRODUCTS[name]
        factors = [args[position] for position in positions]
        weights = [self._made_of.get(self._key(factor)) for factor in factors]
        both = all(one is not None for one in weights)  # parameters only: nothing of the input
        names = () if both else next((one for one in weights if one), ())
        feeds = tuple(self._use(factor) for factor in factors)
        self.products.append(Product(count(args, out), names, feeds))
        modules = {owner(name) for name in names}
        return modules.pop() if len(modules) == 1 else ""

    def _norm(self, args: Sequence[Any]) -> None:
        source = self._produced_by.get(self._key(args[0]))
        weight = next((v for v in args[1:3] if isinstance(v, torch.Tensor)), None)
        name = self._name.get(self._key(weight)) if weight is not None else None
        if source is not None and name is not None:
            # One that serves two layers belongs to neither.
            known = self.pairs.get(owner(name), source)
            self.pairs[owner(name)] = source if known == source else ""


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, type)):
        yield from _tensors(list(vars(value).values()))  # a dataclass of outputs
