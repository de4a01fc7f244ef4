"""Masked transformer decoders of the Mask2Former trees, written for detectron2.

``transformer_cross_attention_layers``, ``transformer_self_attention_layers`` and
``transformer_ffn_layers`` around a ``forward_prediction_heads``, which differs from tree to tree
(classes, text, pooled masks): two are known, any other is called as it is, once, for the last
layer. The predictions of the layers before feed losses alone; ``aux_outputs`` has them all the
same, computed when read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..topology.behaviour import added_behaviour
from .deferred import Deferred, fingerprint, once, require_same
from .masked import (
    Layer,
    Level,
    Positions,
    decode,
    mask_product,
    pixels,
    plain_attention,
    require_attention,
)
from .parts import Found, HeadPart, NotTheSame, prove
from .trial import features_of_trial, levels_of_trial

__all__ = ["KIND", "MaskedDecoder", "TreeDecoder", "find"]

KIND = "masked decoder"
_STACKS = tuple(
    f"transformer_{name}_layers" for name in ("cross_attention", "self_attention", "ffn")
)
_CHILDREN = (*_STACKS, "decoder_norm", "query_feat", "query_embed", "level_embed", "input_proj")
_HEADS = ("output", "mask_features", "attn_mask_target_size")

_CLASSIFY = "get_classification_logits"

Tensor = torch.Tensor


class MaskedDecoder(HeadPart):
    """What the forms of the decoder share: which modules are bypassed, levels and positions.

    The modules that are called see what they saw: the projections of the levels, and the layers
    from queries to mask embeddings. All others are bypassed, the class head included, which is
    not called for every layer.
    """

    what = KIND
    how = (
        "fused attention; masks at the size they are used; predictions before the last one are "
        "computed when read"
    )
    #: Paths of children that are called as ever.
    called: tuple[str, ...] = ()
    #: Why the children are not those of this form; None if they are.
    unknown: Callable[[], str | None]
    #: The layers, with the modules that are there at this moment.
    layers_now: Callable[[], list[Layer]]

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.__dict__["opentrans_positions"] = Positions(self.positions)
        self.__dict__["opentrans_types"] = {}
        if why := self.unknown():
            raise NotTheSame(why)
        self.__dict__["opentrans_types"] = {
            name: type(module) for name, module in self.bypassed() if _owns(module)
        }
        if why := self.changed():
            raise NotTheSame(why)

    @staticmethod
    def positions(module: nn.Module, size: tuple[int, int], like: Tensor) -> Tensor:
        """Position embedding ``[1, C, H, W]`` by the module's own rule."""
        return module(like, None)

    def bypassed(self) -> Iterable[tuple[str, nn.Module]]:
        for name, module in self.named_modules():
            if name and not any(f"{name}.".startswith(f"{path}.") for path in self.called):
                yield name, module

    def changed(self) -> str | None:
        types = self.opentrans_types
        for name, module in self.bypassed():
            if extra := added_behaviour(module):
                return f"{name} {extra}"
            if module.training:
                return f"{name} is in training mode"
            if types.get(name, type(module)) is not type(module):
                return f"{name} is a {type(module).__name__}"
        return None

    def levels(
        self, maps: Sequence[Tensor], project: Any, embed: Tensor, embedder: nn.Module
    ) -> list[Level]:
        """The maps ``[B, C, H, W]``, projected, as pixels with their level's embedding."""
        made = []
        for index, feature in enumerate(maps):
            size = (feature.shape[-2], feature.shape[-1])
            tokens = pixels(project[index](feature)) + embed[index]
            position = self.opentrans_positions(embedder, size, tokens)
            made.append(Level(tokens, tokens + position, size))
        return made


def _owns(module: nn.Module) -> bool:
    """Whether the module's class computes with children or with weights of more than one layer."""
    return bool(module._modules) and not isinstance(module, (nn.ModuleList, nn.Sequential))


class TreeDecoder(MaskedDecoder):
    """forward(x, mask_features, mask=None, ...) of the trees; further arguments are passed on."""

    called = ("input_proj", "mask_embed")

    def unknown(self) -> str | None:
        original = self.opentrans_original
        if not getattr(original, "mask_classification", True):
            return "has no class head"
        heads = getattr(original, "forward_prediction_heads", None)
        if heads is None:
            return "has no forward_prediction_heads"
        if not isinstance(getattr(original, "num_feature_levels", None), int):
            return "has no num_feature_levels"
        if next(self.pe_layer.parameters(), None) is not None:
            return "its position embeddings are learned"
        names = list(inspect.signature(heads).parameters)
        if tuple(names[:3]) != _HEADS:
            return f"its forward_prediction_heads takes {', '.join(names)}"
        own = {"signature": inspect.signature(original.forward), "passed": tuple(names[3:])}
        self.__dict__.update({f"opentrans_{key}": value for key, value in own.items()})
        counts = {len(getattr(self, name)) for name in _STACKS}
        if len(counts) != 1 or counts == {0}:
            return "has not as many layers of each kind, one or more"
        for index in range(len(self.transformer_ffn_layers)):
            cross, attend, feed = (getattr(self, name)[index] for name in _STACKS)
            for name, found in (("cross", cross.multihead_attn), ("self", attend.self_attn)):
                if why := require_attention(found):
                    return f"{name}-attention {index} {why}"
            if len({cross.normalize_before, attend.normalize_before, feed.normalize_before}) > 1:
                return f"layer {index} has norms before and after"
        return None

    def layers_now(self) -> list[Layer]:
        return [
            Layer(
                cross.multihead_attn,
                cross.norm,
                _self_attention(attend.self_attn),
                attend.norm,
                _feed(feed),
                feed.norm,
                feed.normalize_before,
            )
            for cross, attend, feed in zip(*(getattr(self, name) for name in _STACKS), strict=True)
        ]

    def fast(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = self.opentrans_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        x, features = given["x"], given["mask_features"]
        passed = {name: given[name] for name in self.opentrans_passed}
        if len(x) != self.num_feature_levels:
            return self.as_it_was(*args, **kwargs)
        levels = self.levels(x, self.input_proj, self.level_embed.weight, self.pe_layer)
        batch = x[0].shape[0]
        queries = self.query_feat.weight.repeat(batch, 1, 1)
        position = self.query_embed.weight.unsqueeze(0)
        found = decode(
            self.layers_now(), queries, position, levels, features, self.decoder_norm,
            self.mask_embed,
        )  # fmt: skip

        def predict(index: int) -> tuple[Tensor, Tensor]:
            return self.predict(found.states[index], found.normed[index], features, passed)

        used = [
            *self.parameters(), features, *found.states,
            *(value for value in passed.values() if isinstance(value, Tensor)),
        ]  # fmt: skip
        before = fingerprint(used)

        def later(index: int) -> dict[str, Tensor]:
            def predict_later() -> tuple[Tensor, Tensor]:
                require_same(before, used)
                return predict(index)

            both = once(predict_later)
            return {
                "pred_logits": Deferred(logits, lambda: both()[0]),
                "pred_masks": Deferred(masks, lambda: both()[1]),
            }

        logits, masks = predict(-1)
        auxiliary = [later(index) for index in range(len(found.states) - 1)]
        return {"pred_logits": logits, "pred_masks": masks, "aux_outputs": auxiliary}

    def predict(
        self, state: Tensor, normed: Tensor, features: Tensor, passed: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Class logits and masks of a state ``[B, Q, C]``, by the original's own class head."""
        original = self.opentrans_original
        original._modules.update(self._modules)
        # The attention mask that it makes as well is not read: a small one.
        found = original.forward_prediction_heads(
            state.transpose(0, 1), features, attn_mask_target_size=(1, 1), **passed
        )
        return found[0], found[1]


class PlainDecoder(TreeDecoder):
    """Mask2Former's class head: ``class_embed`` of the query."""

    def predict(
        self, state: Tensor, normed: Tensor, features: Tensor, passed: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self.class_embed(normed), mask_product(self.mask_embed(normed), features)


class PooledDecoder(TreeDecoder):
    """FC-CLIP's: query and mean of the features under its mask, compared with text.

    Text and templates are compared by the tree's own get_classification_logits.
    """

    def predict(
        self, state: Tensor, normed: Tensor, features: Tensor, passed: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        masks = mask_product(self.mask_embed(normed), features)
        with torch.no_grad():
            inside = (masks.flatten(2) > 0).to(masks.dtype)
            count = inside.sum(dim=-1, keepdim=True) + 1e-8
        pooled = torch.matmul(inside, features.flatten(2).transpose(1, 2)) / count
        embedded = self.class_embed(self._mask_pooling_proj(pooled) + normed)
        classify = self.opentrans_original.forward_prediction_heads.__globals__[_CLASSIFY]
        text, templates = passed["text_classifier"], passed["num_templates"]
        return classify(embedded, text, self.logit_scale, templates), masks


def _self_attention(module: nn.MultiheadAttention) -> Any:
    def attend(x: Tensor, position: Tensor) -> Tensor:
        both = x + position
        return plain_attention(module, both, both, x)

    return attend


def _feed(layer: Any) -> Any:
    return lambda x: layer.linear2(layer.activation(layer.linear1(x)))


def find(model: nn.Module) -> Iterator[Found]:
    """Every decoder of the trees' form."""
    for name, module in model.named_modules():
        if all(child in module._modules for child in _CHILDREN):
            yield _prove(name, module)


def _prove(name: str, module: nn.Module) -> Found:
    known = PooledDecoder if "_mask_pooling_proj" in module._modules else PlainDecoder
    for kind in (known, TreeDecoder):
        found = prove(name, KIND, module, kind, lambda dtype: _arguments(module, dtype), _outputs)
        if found.replacement is not None:
            break
    return found


def _arguments(module: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    made = torch.Generator().manual_seed(0)
    width = module.level_embed.weight.shape[1]
    widths = [getattr(one, "in_channels", width) for one in module.input_proj]
    maps = levels_of_trial(made, widths, dtype)
    features = features_of_trial(made, _last_width(module.mask_embed), dtype)
    named: dict[str, Any] = {}
    if "text_classifier" in inspect.signature(module.forward).parameters:
        counts = [1, 3, 2]  # prompts of each class; one more is for none of them
        text = torch.randn(sum(counts) + 1, _last_width(module.class_embed), generator=made)
        named["text_classifier"] = nn.functional.normalize(text, dim=-1).to(dtype)
        named["num_templates"] = counts
    return (maps, features), named


def _last_width(module: nn.Module) -> int:
    linear = [one for one in module.modules() if isinstance(one, nn.Linear)]
    if not linear:
        raise NotTheSame(f"its {type(module).__name__} has no linear layer")
    return linear[-1].out_features


def _outputs(out: dict[str, Any]) -> list[Tensor]:
    if sorted(out) != ["aux_outputs", "pred_logits", "pred_masks"]:
        raise NotTheSame(f"its results are {', '.join(out)}")
    keys = ("pred_logits", "pred_masks")
    # Earlier layers as one: twenty maxima are twenty chances that two roundings differ by two.
    earlier = [torch.stack([one[key] for one in out["aux_outputs"]]) for key in keys]
    return [*(out[key] for key in keys), *earlier]
