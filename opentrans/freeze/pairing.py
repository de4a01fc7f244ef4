"""Which batch norm belongs to which layer: by tracing the forward, by names where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .work import Work, owner

# Ends of names that stand side by side: conv2 and bn2, conv and norm.
_NAMES = (("conv", "bn"), ("conv", "norm"), ("conv", "batchnorm"), ("fc", "bn"), ("linear", "bn"))
_CHILDREN = ("norm", "bn")  # of a convolution that carries its norm, as detectron2's wrapper does


@dataclass(frozen=True)
class NormPairs:
    """Batch norms with trainable affine parameters, and the layer each one follows.

    layer_of: batch norm -> layer.
    lonely: batch norms for which no layer was found; they are never frozen with a layer.
    notes: how the pairs were found, and what could not be paired.
    """

    layer_of: Mapping[str, str]
    lonely: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, layer: str) -> tuple[str, ...]:
        """The batch norms behind ``layer``."""
        return tuple(norm for norm, one in self.layer_of.items() if one == layer)


def pair_norms(model: nn.Module, work: Work | None = None) -> NormPairs:
    """Pair every batch norm that has parameters with the layer whose output it normalises.

    ``work``, a trace of the forward, decides. Norms it does not reach are paired by name: a
    ``norm`` or ``bn`` inside the layer, the layer just before it in an ``nn.Sequential``, or
    ``bnN`` beside ``convN``; numbers of channels must agree.
    """
    norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    if not norms:
        return NormPairs({})
    notes: list[str] = []
    traced = dict(work.pairs) if work is not None else {}
    reached = {owner(name) for name in work.parameters} if work is not None else set()
    pairs = {norm: traced[norm] for norm in norms if norm in traced}
    # What was traced and follows no layer (a norm before its convolution) must stay alone.
    named = {n: layer for n, layer in _by_name(model) if n not in pairs and n not in reached}
    if named:
        shown = ", ".join(list(named)[:4]) + (", ..." if len(named) > 4 else "")
        notes.append(f"{len(named)} batch norms are paired by name, not by tracing: {shown}")
    pairs.update(named)
    lonely = tuple(norm for norm in norms if norm not in pairs)
    if lonely:
        shown = ", ".join(lonely[:4]) + (", ..." if len(lonely) > 4 else "")
        notes.append(f"{len(lonely)} batch norms follow no single layer and keep training: {shown}")
    return NormPairs(pairs, lonely, tuple(notes))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm with trainable scale or shift (a frozen one has none)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.weight is not None or module.bias is not None
    keeps_mean = isinstance(getattr(module, "running_mean", None), torch.Tensor)
    return keeps_mean and isinstance(module._parameters.get("weight"), nn.Parameter)


def _by_name(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, parent in model.named_modules():
        children = {key: child for key, child in parent.named_children() if child is not None}
        before = ""
        for key, child in children.items():
            full = f"{path}.{key}" if path else key
            if is_batch_norm(child):
                for found in _candidates(path, parent, key, before):
                    if _same_width(model.get_submodule(found), child):
                        yield full, found
                        break
            before = key


def _candidates(path: str, parent: nn.Module, key: str, before: str) -> Iterator[str]:
    dot = f"{path}." if path else ""
    if key in _CHILDREN and path and isinstance(getattr(parent, "weight", None), torch.Tensor):
        yield path
    if isinstance(parent, nn.Sequential) and before:
        yield dot + before
    for layer, norm in _NAMES:
        if key.startswith(norm) and layer + key.removeprefix(norm) in parent._modules:
            yield dot + layer + key.removeprefix(norm)


def _same_width(layer: nn.Module, norm: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    affine = norm._parameters.get("weight")
    if affine is None:
        affine = norm._parameters.get("bias")
    if not isinstance(weight, torch.Tensor) or weight.dim() < 2 or affine is None:
        return False
    width = getattr(layer, "out_channels", weight.shape[0])
    return bool(width == affine.numel())
