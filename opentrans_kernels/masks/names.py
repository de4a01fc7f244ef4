"""Matching masks to the convolutions and linear layers of a model by module name.

Positions are never used: the shortcut conv of a CLIP block is *named* ``downsample.0`` but sits at
index 1. What differs between towers is a dotted prefix (``module.``, ``backbone.``,
``clip_model.visual.`` ...), so one pair (prefix taken off the mask's names, prefix put on for the
model's) is searched for the whole file: the pair under which most names and shapes agree exactly.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks.files import shorten
from opentrans_kernels.masks.wrappers import without_wrappers
from opentrans_kernels.topology import (
    Projections,
    linear_modules,
    original,
    packed_projections,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MaskMatch:
    """Which mask belongs to which Conv2d or Linear of a model, and what found no partner.

    ``masks``: model layer name -> bool tensor of the weight's shape. ``mask_names``: model conv
    name -> name in the file. ``prefix_mask`` was taken off the file's names and ``prefix_model``
    put in its place ("" for none). ``unmatched_masks``: names in the file that were not used, with
    ``reasons``. ``unmasked_convs``: convs of the model without a mask. ``reason``: one sentence.
    """

    masks: Mapping[str, torch.Tensor]
    mask_names: Mapping[str, str]
    prefix_model: str
    prefix_mask: str
    unmatched_masks: list[str]
    reasons: Mapping[str, str]
    unmasked_convs: list[str]
    reason: str

    @property
    def complete(self) -> bool:
        """Whether every mask found its conv."""
        return not self.unmatched_masks

    def require_complete(self) -> MaskMatch:
        """Return self. Raises MaskError, naming the masks, if any found no conv."""
        if self.complete:
            return self
        first = "; ".join(self.reasons[name] for name in self.unmatched_masks[:3])
        raise MaskError(
            f"the masks do not fit the model: {self.reason} Without a partner: "
            f"{shorten(repr(n) for n in self.unmatched_masks)}. {first}. Masks are matched by "
            "module name: use the architecture the masks were made for."
        )

    def __str__(self) -> str:
        lines = [self.reason]
        for name in self.unmatched_masks:
            lines.append(f"  not used: {self.reasons[name]}")
        if self.unmasked_convs:
            lines.append(f"  convs without a mask (stay dense): {shorten(self.unmasked_convs)}")
        return "\n".join(lines)


def conv_modules(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The model's Conv2d modules by name, each once, in definition order.

    A replacement (accelerated, or skipping gradients) counts as the conv it stands for.
    """
    modules = ((name, original(module)) for name, module in model.named_modules())
    return {name: module for name, module in modules if isinstance(module, nn.Conv2d)}


MaskedLayer = nn.Conv2d | nn.Linear | Projections


def masked_modules(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, MaskedLayer]:
    """What ``masks`` may be for: Conv2d, and, if one of them is a matrix, Linear and the packed
    projections of attention."""
    convs: dict[str, MaskedLayer] = {**conv_modules(model)}
    if any(mask.dim() == 2 for mask in masks.values()):
        convs |= {**packed_projections(model), **linear_modules(model)}
    return convs


def owner_of(layer: MaskedLayer) -> tuple[nn.Module, str]:
    """The module that holds a layer's weight, and what it calls it."""
    if isinstance(layer, Projections):
        return layer.attention, "in_proj_weight"
    return layer, "weight"


def match_masks(masks: Mapping[str, torch.Tensor], model: nn.Module) -> MaskMatch:
    """Find the layer of every mask. Raises MaskError only if two places fit equally well."""
    found = masked_modules(model, masks)
    convs = {without_wrappers(name): tuple(conv.weight.shape) for name, conv in found.items()}
    real = {without_wrappers(name): name for name in found}
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    bare = {name: without_wrappers(name) for name in masks}
    prefix_mask, prefix_model = find_prefixes({bare[n]: s for n, s in shapes.items()}, convs)
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    matched: dict[str, torch.Tensor] = {}
    mask_names: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, shape in shapes.items():
        target = rename(bare[name], prefix_mask, prefix_model)
        if target is not None and convs.get(target) == shape:
            matched[real[target]] = masks[name]
            mask_names[real[target]] = name
        else:
            reasons[name] = _why_not(name, shape, target, prefix_mask, modules, convs)
    matched = {name: matched[name] for name in found if name in matched}
    change = ""
    if prefix_mask:
        change += f", {prefix_mask + '.'!r} taken off the mask's names"
    if prefix_model:
        change += f", {prefix_model + '.'!r} put in front"
    return MaskMatch(
        masks=matched,
        mask_names={name: mask_names[name] for name in matched},
        prefix_model=prefix_model,
        prefix_mask=prefix_mask,
        unmatched_masks=list(reasons),
        reasons=reasons,
        unmasked_convs=[
            name
            for name, module in found.items()
            if name not in matched and isinstance(module, nn.Conv2d)
        ],
        reason=f"{len(matched)} of {len(masks)} masks match one of the model's {_counted(found)} "
        f"by name and shape{change}.",
    )


def require_one_mask(masks: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Raise MaskError where layers that share one weight would not all be masked alike.

    masks: by the model's names. Weights that are zero anyway make no difference.
    """
    shared: dict[int, list[str]] = defaultdict(list)
    layers = masked_modules(model, masks)
    for name, layer in layers.items():
        module, parameter = owner_of(layer)
        weight = module._parameters.get(parameter)
        if weight is not None and not weight.is_meta:
            shared[id(weight)].append(name)
    for names in shared.values():
        if len(names) == 1 or not any(name in masks for name in names):
            continue
        live = layers[names[0]].weight.detach() != 0
        kept = [live & masks[n].to(live.device) if n in masks else live for n in names]
        if not all(torch.equal(kept[0], other) for other in kept[1:]):
            without = [name for name in names if name not in masks]
            what = f"{shorten(without)} has no mask" if without else "their masks differ"
            raise MaskError(
                f"{shorten(names)} share one weight, and {what}: a weight that is removed in one "
                "of them and used in another cannot be stored. Give all of them the same mask, or "
                "untie them: module.weight = nn.Parameter(module.weight.detach().clone())."
            )


def _counted(found: Mapping[str, MaskedLayer]) -> str:
    kinds = Counter(
        type(module) if isinstance(module, Projections) else isinstance(module, nn.Linear)
        for module in found.values()
    )
    linear, packed = kinds[True], kinds[Projections]
    more = f" and {linear} linear layers" if linear else ""
    more += f" and {packed} packed projections of attention" if packed else ""
    return f"{kinds[False]} convs{more}"


def rename(name: str, prefix_mask: str, prefix_model: str) -> str | None:
    """A mask's name in the model; None if it does not begin with ``prefix_mask``."""
    parts, off = _split(name), _split(prefix_mask)
    if parts[: len(off)] != off:
        return None
    return ".".join(_split(prefix_model) + parts[len(off) :])


def find_prefixes(masks: Mapping[str, Shape], convs: Mapping[str, Shape]) -> tuple[str, str]:
    """The pair (prefix to take off mask names, prefix to put on) with most exact matches.

    Every mask and conv with a common dotted ending vote for the pair of prefixes before it, so a
    pair's votes are its matches. Pairs with fewer than half of the most name matches are left out
    (one shape that fits by chance in a network of other widths); then exact name and shape matches
    count. Ties: names as they are; else the shortest prefix taken off. If two places in the model
    are still equal, MaskError lists them: choosing one would be a guess.
    """
    by_ending: dict[str, list[str]] = defaultdict(list)
    for conv in convs:
        by_ending[conv.rpartition(".")[2]].append(conv)
    exact: Counter[tuple[str, str]] = Counter()
    named: Counter[tuple[str, str]] = Counter()
    for mask, shape in masks.items():
        for conv in by_ending.get(mask.rpartition(".")[2], ()):
            pair = _prefixes(_split(mask), _split(conv))
            if pair is not None:
                named[pair] += 1
                exact[pair] += shape == convs[conv]
    if not named:
        return "", ""
    most = max(named.values())

    def rank(pair: tuple[str, str]) -> tuple[bool, int, int, bool, int]:
        plausible = 2 * named[pair] >= most
        as_is = pair == ("", "")
        return plausible, exact[pair], named[pair], as_is, -len(_split(pair[0]))

    best = max(named, key=rank)
    equal = sorted(pair for pair in named if rank(pair) == rank(best))
    if exact[best] and len(equal) > 1:
        options = (f"{off or '(nothing)'} -> {on or '(nothing)'}" for off, on in equal)
        raise MaskError(
            f"the masks fit the model equally well in {len(equal)} ways, {exact[best]} of "
            f"{len(masks)} each, by replacing a prefix of their names: {shorten(options)}. Pass "
            f"the part of the model that is meant (model.get_submodule({equal[0][1]!r}), say), or "
            "rename the masks to the model's module names."
        )
    return best


def _prefixes(mask: list[str], conv: list[str]) -> tuple[str, str] | None:
    """What stands before the longest common ending of two names; None if that is no prefix.

    ``layer3.6`` for ``layer3.5`` is no change of prefix but of position: two remainders that part
    at a number only are another block, however well its shapes fit.
    """
    count = 0
    while count < min(len(mask), len(conv)) and mask[-count - 1] == conv[-count - 1]:
        count += 1
    off, on = mask[: len(mask) - count], conv[: len(conv) - count]
    if off and on and re.sub(r"\d+", "#", off[-1]) == re.sub(r"\d+", "#", on[-1]):
        return None
    return ".".join(off), ".".join(on)


def _split(name: str) -> list[str]:
    return name.split(".") if name else []


def _why_not(
    name: str,
    shape: Shape,
    target: str | None,
    prefix_mask: str,
    modules: Mapping[str, nn.Module],
    convs: Mapping[str, Shape],
) -> str:
    mask = f"mask {name!r} of shape {shape}"
    if target is None:
        return f"{mask}: its name does not begin with {prefix_mask!r} like the others"
    if target in convs:
        kind = "conv" if len(convs[target]) == 4 else "linear layer"
        return f"{mask}: the model's {kind} {target!r} has a weight of shape {convs[target]}"
    if target in modules:
        kind = type(modules[target]).__name__
        return (
            f"{mask}: the model's {target!r} is a {kind}, and only Conv2d, Linear and the "
            "in_proj_weight of nn.MultiheadAttention are masked"
        )
    close = difflib.get_close_matches(target, convs, n=1)
    hint = f" (closest: {close[0]!r})" if close else ""
    return f"{mask}: the model has no module {target!r}{hint}"
