"""Pixel decoders: a deformable encoder over coarse maps, and a feature pyramid on top of it.

What is left to gain around the parts inside: positions, reference points and sizes are made once
per size; nothing is padded, so no mask is looked up; and the encoder's tokens become maps in a form
that interpolation takes as channels_last. (A view of one image's tokens has a batch stride that
makes ``F.interpolate`` copy its result twice and return it planar.)

Two forms: Mask2Former's and its relatives' (a dict of features, ``forward_features``), and
transformers' (a list of features). Both keep the pyramid's convolutions under ``adapter_N`` and
``layer_N``, and beside that in lists, which go on holding the original modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .deform import is_deformable
from .masked import Positions
from .parts import Found, HeadPart, NotTheSame, prove

__all__ = ["NamedPixelDecoder", "PixelDecoder", "find"]

KIND = "pixel decoder"
_KEPT = 12  # sizes whose reference points are kept
_RESULT = ("mask_features", "multi_scale_features")
#: Of arguments that change nothing of the result, the values for which that holds.
_NO_PART = {"output_hidden_states": (None, False, True), "return_dict": (None, True)}

Tensor = torch.Tensor


class _Pyramid(HeadPart):
    what, how = KIND, "positions and reference points once per size, maps channels_last"
    #: Paths of children: projections, encoder, positions, mask features.
    places: tuple[str, str, str, str]
    #: Further containers that are not called.
    containers: tuple[str, ...] = ()

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.__dict__["opentrans_positions"] = Positions(_positions)
        self.__dict__["opentrans_grids"] = {}

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        for path in (self.places[1], self.places[2], *self.containers):
            yield path, self.get_submodule(path)

    def _encode(self, sources: Sequence[Tensor], level_embed: Tensor) -> list[Tensor]:
        """Maps ``[B, C, H, W]`` of all levels, coarse to fine, from features in that order."""
        projections, encoder, positions, _ = (self.get_submodule(path) for path in self.places)
        maps = [project(x) for project, x in zip(projections, sources, strict=True)]
        tokens = [x.flatten(2).transpose(1, 2) for x in maps]
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        position = torch.cat(
            [
                self.opentrans_positions(positions, size, x) + level_embed[level]
                for level, (size, x) in enumerate(zip(sizes, tokens, strict=True))
            ],
            1,
        )
        shapes, starts, reference = self._grid(tuple(sizes), tokens[0])
        reference = reference.expand(len(tokens[0]), -1, len(sizes), -1)
        position = position.expand(len(tokens[0]), -1, -1)
        x = torch.cat(tokens, 1)
        for layer in encoder.layers:
            x = self._layer(layer, x, position, reference, shapes, starts)
        parts = x.split([h * w for h, w in sizes], 1)
        return [
            part.unflatten(1, size).permute(0, 3, 1, 2)
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _grid(self, sizes: tuple[tuple[int, int], ...], like: Tensor) -> tuple[Tensor, ...]:
        """Shapes ``[L, 2]``, first pixels ``[L]`` and reference points ``[1, S, 1, 2]``."""
        kept, key = self.opentrans_grids, (sizes, like.dtype, like.device)
        if key not in kept:
            while len(kept) >= _KEPT:
                del kept[next(iter(kept))]
            with torch.inference_mode(False), torch.no_grad():
                shapes = torch.tensor(sizes, device=like.device)
                pixels = shapes.prod(1)
                points = [_centres(h, w, like) for h, w in sizes]
                kept[key] = (shapes, pixels.cumsum(0) - pixels, torch.cat(points)[None, :, None])
        return kept[key]

    def _pyramid(self, maps: list[Tensor], fine: Sequence[Tensor]) -> list[Tensor]:
        """The maps, and one for each finer feature (coarse to fine)."""
        count = self.num_fpn_levels
        for index, x in enumerate(fine):
            lateral, smooth = (
                self._modules[f"{name}_{count - index}"] for name in ("adapter", "layer")
            )
            y = lateral(x)  # type: ignore[misc]
            grown = F.interpolate(maps[-1], y.shape[-2:], mode="bilinear", align_corners=False)
            y = grown.add_(y) if grown.stride() == y.stride() else y + grown
            maps.append(smooth(y))  # type: ignore[misc]
        return maps

    @staticmethod
    def _layer(
        layer: nn.Module, x: Tensor, position: Tensor, reference: Tensor, shapes: Tensor,
        starts: Tensor,
    ) -> Tensor:  # fmt: skip
        return layer(x, position, reference, shapes, starts, None)


class PixelDecoder(_Pyramid):
    """Mask2Former's form: ``forward_features(dict)``."""

    places = ("input_proj", "transformer.encoder", "pe_layer", "mask_features")
    containers = ("transformer",)

    def forward_features(self, features: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """(mask features, coarsest map, maps of three levels)."""
        if self.ready([features[name] for name in self.in_features]):
            return self.fast(features)
        original = self.unready()
        return original.forward_features(features)  # type: ignore[operator]

    def fast(self, features: Mapping[str, Tensor]) -> tuple[Any, ...]:
        sources = [features[name] for name in self.transformer_in_features[::-1]]
        fine = [features[name] for name in self.in_features[: self.num_fpn_levels][::-1]]
        maps = self._pyramid(self._encode(sources, self.transformer.level_embed), fine)
        levels = maps[: self.maskformer_num_feature_levels]
        return self.mask_features(maps[-1]), maps[0], levels


class NamedPixelDecoder(_Pyramid):
    """transformers' form: ``forward(list)``."""

    places = ("input_projections", "encoder", "position_embedding", "mask_projection")
    #: Class of the results, as the original returned it in its trial.
    opentrans_result: Any = None

    def fast(self, features: Sequence[Tensor], *given: Any, **named: Any) -> Any:
        if self._wants_more(given, named):
            return self.as_it_was(features, *given, **named)
        sources = list(features[::-1])[: self.num_feature_levels]
        maps = self._encode(sources, self.level_embed)
        maps = self._pyramid(maps, features[: self.num_fpn_levels][::-1])
        return self.opentrans_result(
            mask_features=self.mask_projection(maps[-1]),
            multi_scale_features=tuple(maps[: self.num_feature_levels]),
            attentions=None,
        )

    def _wants_more(self, given: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Whether a call asks for what only the original makes: attention weights, say.

        Hidden states of the encoder are no part of the result, asked for or not; models that keep
        those of their decoder for auxiliary losses ask for them here as well.
        """
        call = inspect.signature(self.opentrans_original.forward).bind(None, *given, **named)
        asked = list(call.arguments.items())[1:]
        return self.config.output_attentions or any(
            value not in _NO_PART.get(name, (None, False)) for name, value in asked
        )

    @staticmethod
    def _layer(
        layer: nn.Module, x: Tensor, position: Tensor, reference: Tensor, shapes: Tensor,
        starts: Tensor,
    ) -> Tensor:  # fmt: skip
        sizes = [(int(h), int(w)) for h, w in shapes.tolist()]
        return layer(
            x, None, position_embeddings=position, reference_points=reference,
            spatial_shapes_list=sizes, level_start_index=starts, output_attentions=False,
        )[0]  # fmt: skip


def _centres(h: int, w: int, like: Tensor) -> Tensor:
    """(x, y) in [0, 1] of the centres of all pixels, ``[h * w, 2]``."""
    y, x = (
        torch.linspace(0.5, size - 0.5, size, dtype=like.dtype, device=like.device) / size
        for size in (h, w)
    )
    return torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1)


def _positions(module: nn.Module, size: tuple[int, int], like: Tensor) -> Tensor:
    if next(iter(inspect.signature(module.forward).parameters)) == "shape":
        return module(like.shape, like.device, like.dtype)
    return module(like)


def find(model: nn.Module) -> Iterator[Found]:
    """Modules of either form."""
    for name, module in model.named_modules():
        for kind in (PixelDecoder, NamedPixelDecoder):
            if _has(module, kind) and isinstance(getattr(module, "num_fpn_levels", None), int):
                yield _prove(name, module, kind)


def _has(module: nn.Module, kind: type[_Pyramid]) -> bool:
    try:
        encoder = module.get_submodule(kind.places[1])
        for path in kind.places:
            module.get_submodule(path)
    except AttributeError:
        return False
    layers = encoder._modules.get("layers")
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    return all(
        (attention := layer._modules.get("self_attn")) is not None and is_deformable(attention)
        for layer in layers
    )


def _prove(name: str, module: Any, kind: type[_Pyramid]) -> Found:
    positional = kind is PixelDecoder
    widths = list(module.feature_channels)
    named = list(module.in_features) if positional else []
    results: list[type] = []

    def make(original: nn.Module) -> HeadPart:
        for index in range(module.num_fpn_levels):
            if not {f"adapter_{index + 1}", f"layer_{index + 1}"} <= original._modules.keys():
                raise NotTheSame("has no adapter_N and layer_N of its pyramid")
        if next(module.get_submodule(kind.places[2]).parameters(), None) is not None:
            raise NotTheSame("its position embeddings are learned")
        new = kind(original)
        new.__dict__["opentrans_result"] = lambda **parts: results[0](**parts)
        return new

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = torch.Generator().manual_seed(0)
        count = len(widths)
        maps = [
            torch.randn(2, width, 3 << (count - level), 2 << (count - level), generator=made)
            for level, width in enumerate(widths)
        ]
        maps = [x.to(dtype) for x in maps]
        if positional:
            return (dict(zip(named, maps, strict=True)),), {}
        known = inspect.signature(module.forward).parameters
        return (maps,), {name: True for name in _NO_PART if name in known}

    def outputs(out: Any) -> list[Tensor]:
        if positional:
            return [out[0], out[1], *out[2]]
        if more := [key for key, value in out.items() if value is not None and key not in _RESULT]:
            raise NotTheSame(f"its result holds {', '.join(more)} as well")
        results.append(type(out))  # of the original in float64 first
        return [out.mask_features, *out.multi_scale_features]

    part = prove(
        name, KIND, module, make, inputs, outputs,
        call=(lambda m: m.forward_features) if positional else (lambda m: m),
    )  # fmt: skip
    if part.replacement is not None and results:
        part.replacement.__dict__["opentrans_result"] = results[0]
    return part
