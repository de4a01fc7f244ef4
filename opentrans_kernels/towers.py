"""Networks by name: CLIP's ResNets, the edge detector HED, and towers of open_clip, torchvision,
timm and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .clip_resnet import ARCHS
from .errors import OpenTransError, UnsupportedModelError
from .hed import Hed
from .lazy import optional_module
from .synthetic import clip_resnet_on_meta, synthetic_hed, synthetic_rn50, with_storage

__all__ = [
    "NAMED",
    "build_tower",
    "check_named",
    "clip_image_size",
    "empty_tower",
    "fill_storage",
    "shapes_of",
]

_FAMILIES = ("torchvision", "timm", "transformers")
HED = "HED"
_PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
#: What transformers has no names for without its hub: depths and kind of block.
_TRANSFORMERS = {
    "resnet18": ((2, 2, 2, 2), "basic"),
    "resnet34": ((3, 4, 6, 3), "basic"),
    "resnet50": ((3, 4, 6, 3), "bottleneck"),
    "resnet101": ((3, 4, 23, 3), "bottleneck"),
    "resnet152": ((3, 8, 36, 3), "bottleneck"),
}

#: What a file may name. A fixed list, because the libraries' own builders also take names that
#: download weights or settings.
NAMED = (
    *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", HED),
    *(f"{family}:{name}" for family in _FAMILIES[:2] for name in (*_PLAIN, "wide_resnet50_2")),
    *(f"transformers:{name}" for name in _TRANSFORMERS),
)


def empty_tower(arch: str) -> nn.Module:
    """The network ``arch`` of ``NAMED`` on the meta device, eval mode: shapes without storage.

    Raises OpenTransError for another name, or if the library that has it is missing.
    """
    if arch not in NAMED:
        raise OpenTransError(
            f"arch {arch!r} is not built by its name alone. Known are {', '.join(NAMED)}."
        )
    family, colon, name = arch.partition(":")
    if not colon and arch != HED:
        return clip_resnet_on_meta(arch, clip_image_size(arch)).eval().requires_grad_(False)
    with torch.device("meta"):
        model = Hed() if arch == HED else _of_library(arch, family, name)
    return model.eval().requires_grad_(False)


def fill_storage(model: nn.Module) -> nn.Module:
    """Give a network on the meta device storage on the CPU, all zero; returns it."""
    with_storage(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def check_named(arch: str, model: nn.Module) -> None:
    """Raise UnsupportedModelError unless ``arch`` is in ``NAMED`` and has the model's tensors."""
    if arch not in NAMED:
        raise UnsupportedModelError(
            f"arch {arch!r} is not one of those that are built by name ({', '.join(NAMED)}). Leave "
            "it out; the file is then loaded with the model, or with build=FUNCTION."
        )
    named, own = shapes_of(empty_tower(arch).state_dict()), shapes_of(model.state_dict())
    if differ := sorted(key for key in named | own if named.get(key) != own.get(key)):
        key = differ[0]
        raise UnsupportedModelError(
            f"the model is not {arch}: {len(differ)} tensors differ, {key} is "
            f"{own.get(key, 'absent')} in the model and {named.get(key, 'absent')} in {arch}. Name "
            "its architecture, or leave arch out."
        )


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def build_tower(arch: str, *, seed: int = 0, empty: bool = False) -> nn.Module:
    """A tower without trained weights, eval mode, float32, no gradients.

    CLIP ResNets and HED get synthetic weights, or with ``empty`` uninitialised ones, for callers
    that load a checkpoint; CLIP's other towers ("ViT-L-14", also "open_clip:ViT-L-14"),
    "torchvision:NAME", "timm:NAME" and "transformers:NAME" (the ResNets of ``NAMED``, as backbones
    that return their last map) their library's random initialisation under ``seed``.

    Raises:
        OpenTransError: the library is missing or does not know the name.
    """
    arch = arch.removeprefix("open_clip:")
    family, colon, name = arch.partition(":")
    if not colon and arch.startswith("ViT"):
        return _vision_transformer(arch, seed)
    if arch == HED:
        return (
            with_storage(empty_tower(arch)).requires_grad_(False) if empty else synthetic_hed(seed)
        )
    if not colon and empty:
        tower = with_storage(clip_resnet_on_meta(arch, clip_image_size(arch)))
        return tower.eval().requires_grad_(False)
    if not colon:
        return synthetic_rn50(arch, seed=seed, image_size=clip_image_size(arch))
    if family not in _FAMILIES:
        raise OpenTransError(
            f"arch {arch!r}: {family!r} is not a known library. Write RN50, RN101, RN50x4 or "
            "ViT-B-32 for CLIP, HED, or torchvision:resnet50, timm:resnet50, transformers:resnet50."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _of_library(arch, family, name).eval().requires_grad_(False)


def _of_library(arch: str, family: str, name: str) -> nn.Module:
    library = optional_module(family, f"arch {arch!r} needs {family}")
    if family == "transformers":
        return _transformers_backbone(library, name)
    try:
        if family == "torchvision":
            return library.models.get_model(name, weights=None)
        return library.create_model(name, pretrained=False)
    except (ValueError, RuntimeError) as error:
        raise OpenTransError(
            f"{family} does not know {name!r} ({error}). Write for example {family}:resnet50."
        ) from error


def _transformers_backbone(library: Any, name: str) -> nn.Module:
    if name not in _TRANSFORMERS:
        raise OpenTransError(
            f"transformers has no network {name!r} that is built without its hub. Known are "
            f"{', '.join(_TRANSFORMERS)}."
        )
    depths, kind = _TRANSFORMERS[name]
    widths = [256, 512, 1024, 2048] if kind == "bottleneck" else [64, 128, 256, 512]
    config = library.ResNetConfig(depths=list(depths), hidden_sizes=widths, layer_type=kind)
    return library.ResNetBackbone(config)


def _vision_transformer(arch: str, seed: int) -> nn.Module:
    open_clip = optional_module("open_clip", f"arch {arch!r} needs open_clip")
    if arch not in open_clip.list_models():
        known = ", ".join([n for n in open_clip.list_models() if n.startswith("ViT")][:8])
        raise OpenTransError(f"open_clip does not know {arch!r}. Use for example one of: {known}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(arch, pretrained=None).visual
    return model.eval().requires_grad_(False)


def clip_image_size(arch: str) -> int:
    """Side in pixels that ``arch``'s attention pool is made for; 224 where that is unknown.

    Raises OpenTransError if a tower of open_clip is asked for, and it is missing.
    """
    arch = arch.removeprefix("open_clip:")
    known = ARCHS.get(arch.removesuffix("-quickgelu"))
    if known is not None:
        return known.image_size
    if not arch.startswith("ViT"):
        return 224  # no CLIP tower: who builds it says so
    open_clip = optional_module("open_clip", f"arch {arch!r} needs open_clip")
    config = open_clip.get_model_config(arch) or {}
    return int(config.get("vision_cfg", {}).get("image_size", 224))
