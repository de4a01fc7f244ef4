"""Decoders of DeepLabV3+: coarse maps are enlarged, joined with fine ones and convolved.

The convolution of the enlarged half is computed from the coarse map (``enlarged``), batch norms go
into weights and ReLUs into products, and an embedding that only meets words is never made
(``embeddings``). Weights are folded at every call, so they may be written to at any time; those in
another form are watched. Modules are read at every call as well: exchanged ones are used, or run.

Three forms: that of ``opentrans.ovs.DeepLabHead``, that of detectron2's ``DeepLabV3PlusHead``, and
the decoder of two inputs that ZS3 and others took from one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..activations import NONE, RELU
from ..topology.fold import is_plain_bn, scale_shift
from .embeddings import late_embeddings
from .enlarged import add_convolution_of_enlarged, pays
from .linear import has_kernel
from .packed import Copied, Transformed, transformable
from .parts import Found, HeadPart, NotTheSame, prove
from .zeros import CopiedConv

__all__ = ["AlignedAtrousDecoder", "AtrousDecoder", "AtrousHead", "StagedAtrousHead", "find"]

KIND = "DeepLab decoder"
Tensor = torch.Tensor
Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Link:
    """A convolution, the batch norm and the ReLU behind it.

    copied: its weight in another form, if it was replaced itself.
    """

    conv: nn.Conv2d
    norm: nn.Module | None
    relu: bool
    copied: Copied | None = None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm in them."""
        weight, bias = self.conv.weight, self.conv.bias
        if self.norm is None:
            return weight, bias
        scale, shift = scale_shift(self.norm, "batch norm")
        if bias is not None:
            shift = shift + bias.double() * scale
        return weight * scale.float().view(-1, 1, 1, 1), shift.float()

    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        conv = self.conv
        return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups

    def key(self) -> Key:
        """What a form of weight and norm together depends on, beside their numbers."""
        conv = self.conv
        return conv, self.norm, conv.padding, conv.stride, conv.dilation, conv.groups

    def run(self, x: Tensor, smooth: Mapping[Key, Transformed]) -> Tensor:
        """Of a map; smooth: key -> form with the norm in it."""
        other = smooth.get(self.key())
        if other is not None and other.serves(x):
            return other.convolve(x, RELU if self.relu else NONE)
        if self.copied is not None and self.copied.serves(x):
            out = self.copied.convolve(x)
            out = out if self.norm is None else self.norm(out)
            return out.relu_() if self.relu else out
        weight, bias = self.folded()
        act = "relu" if self.relu else "none"
        return _convolution(x, weight, bias, *self.geometry(), act, [], "")

    def run_joined(self, fine: Tensor, coarse: Tensor, *, first: bool, align: bool) -> Tensor:
        """Of the fine map and the coarse one at its size, side by side; ``first``: fine first."""
        weight, bias = self.folded()
        size = (fine.shape[2], fine.shape[3])
        padding, stride, dilation, groups = self.geometry()
        out = tuple(
            size[i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)
        )
        at = fine.shape[1] if first else coarse.shape[1]
        parts = (weight[:, :at], weight[:, at:])
        of_fine, of_coarse = parts if first else parts[::-1]
        if (*stride, groups) != (1, 1, 1) or not pays(coarse, of_coarse, size, out):
            full = F.interpolate(coarse, size, mode="bilinear", align_corners=align)
            return self.run(torch.cat([fine, full] if first else [full, fine], 1), {})
        sums = _convolution(fine, of_fine, bias, padding, stride, dilation, 1, "none", [], "")
        sums = add_convolution_of_enlarged(
            sums, coarse, of_coarse, size, padding=(padding[0], padding[1]),
            dilation=(dilation[0], dilation[1]), align_corners=align,
        )  # fmt: skip
        return sums.relu_() if self.relu else sums


def _convolution(x: Tensor, *rest: Any) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise.default(x, *rest)


def links_of(module: nn.Module) -> list[_Link]:
    """The convolutions of a chain of them; NotTheSame for anything else in it."""
    links: list[_Link] = []
    for child in _flat(module):
        copied = None
        if isinstance(child, CopiedConv):  # put in when this part was: its dense weight is the same
            copied, child = child.opentrans_copied, child.opentrans_original
        if isinstance(child, nn.Conv2d):
            if child.padding_mode != "zeros" or isinstance(child.padding, str):
                raise NotTheSame(f"has a convolution with padding {child.padding_mode}")
            norm, activation = child._modules.get("norm"), getattr(child, "activation", None)
            if activation not in (None, F.relu, torch.relu) and type(activation) is not nn.ReLU:
                raise NotTheSame("has a convolution with an activation other than ReLU")
            if norm is not None and not _is_scale(norm):
                raise NotTheSame(f"has a {type(norm).__name__} behind a convolution")
            links.append(_Link(child, norm, activation is not None, copied))
        elif type(child) is nn.ReLU and links and not links[-1].relu:
            links[-1] = replace(links[-1], relu=True)
        elif links and links[-1].norm is None and not links[-1].relu and _is_scale(child):
            links[-1] = replace(links[-1], norm=child)
        elif not isinstance(child, (nn.Dropout, nn.Dropout2d, nn.Identity)):
            raise NotTheSame(f"has a {type(child).__name__} between convolutions")
    if not links:
        raise NotTheSame("has no convolutions to fuse")
    return links


def _is_scale(norm: nn.Module) -> bool:
    """Whether it is a batch norm with statistics of its own."""
    stored = (getattr(norm, key, None) for key in ("running_mean", "running_var"))
    return all(tensor is not None for tensor in stored) and is_plain_bn(norm)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flat(child)
    else:
        yield module


class _Atrous(HeadPart):
    what, how = KIND, "enlarged maps convolved before they are enlarged, norms folded"
    #: Whether the fine map comes first, and how the coarse one is enlarged.
    opentrans_first, opentrans_align = True, False

    #: Convolutions and norms that have another form; none in parts that were pickled without.
    opentrans_smooth: Mapping[Key, Transformed] = MappingProxyType({})

    #: Path -> chain of convolutions, which are not called.
    fuse_modules: Callable[[], dict[str, nn.Module]]

    def transform(self, name: str) -> None:
        """Find what Winograd's method computes, and make its weights; ``name``: of this part."""
        smooth: dict[Key, Transformed] = {}
        for path, module in self.fuse_modules().items():
            names = {child: f"{name}.{path}.{at}" for at, child in module.named_modules()}
            for link in links_of(module)[1:]:
                if link.copied is None and transformable(link.conv):
                    at = names[link.conv]
                    norm = None if link.norm is None else (names[link.norm], link.norm)
                    smooth[link.key()] = Transformed(at, link.conv, norm)
        self.__dict__["opentrans_smooth"] = smooth
        if smooth:
            self.__dict__["how"] = f"{self.how}; the 3x3 behind by Winograd's method"

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self.fuse_modules().items():
            for name, child in module.named_modules():
                yield f"{path}.{name}".rstrip("."), child

    def chains(self) -> dict[str, list[_Link]] | None:
        """Path -> links; None if the modules are to run as they are."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        found = {}
        for path, module in self.fuse_modules().items():
            try:
                found[path] = links_of(module)
            except NotTheSame as different:  # something was exchanged
                self.tell(f"{path} {different}")
                return None
        return found

    def fused(self, links: list[_Link], fine: Tensor, coarse: Tensor) -> Tensor:
        head, *rest = links
        x = head.run_joined(fine, coarse, first=self.opentrans_first, align=self.opentrans_align)
        for link in rest:
            x = link.run(x, self.opentrans_smooth)
        return x


class AtrousHead(_Atrous):
    """``forward(features)`` with ``pyramid``, ``project``, ``fuse`` and ``embed``."""

    def fuse_modules(self) -> dict[str, nn.Module]:
        return {f"fuse.{name}": self.fuse[name] for name in self.shallow}

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().bypassed()
        yield "embed", self.embed

    def fast(self, features: Mapping[str, Tensor]) -> Tensor:
        if (chains := self.chains()) is None:
            return self.as_it_was(features)
        x = self.pyramid(features[self.deep])
        for name in self.shallow:
            x = self.fused(chains[f"fuse.{name}"], self.project[name](features[name]), x)
        return late_embeddings(x, self.embed)


class StagedAtrousHead(_Atrous):
    """detectron2's: stages by feature, each with ``project_conv`` and perhaps ``fuse_conv``."""

    def fuse_modules(self) -> dict[str, nn.Module]:
        stages = {f"decoder.{name}.fuse_conv": self.decoder[name] for name in self.in_features}
        return {
            path: stage["fuse_conv"]
            for path, stage in stages.items()
            if stage._modules["fuse_conv"] is not None
        }

    def fast(self, features: Mapping[str, Tensor], targets: Any = None) -> Any:
        if (chains := self.chains()) is None:
            return self.as_it_was(features, targets)
        x: Tensor | None = None
        for name in self.in_features[::-1]:
            fine = self.decoder[name]["project_conv"](features[name])
            links = chains.get(f"decoder.{name}.fuse_conv")
            x = fine if links is None or x is None else self.fused(links, fine, x)
        if self.decoder_only:
            return x
        x = self.predictor(x)
        enlarged = F.interpolate(
            x, scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )
        return enlarged, {}


class AtrousDecoder(_Atrous):
    """``forward(coarse, fine)`` with ``conv1``, ``bn1``, ``relu`` and ``last_conv``."""

    opentrans_first = False

    def fuse_modules(self) -> dict[str, nn.Module]:
        return {"last_conv": self.last_conv}

    def fast(self, x: Tensor, low_level_feat: Tensor) -> Tensor:
        if (chains := self.chains()) is None:
            return self.as_it_was(x, low_level_feat)
        fine = self.relu(self.bn1(self.conv1(low_level_feat)))
        return self.fused(chains["last_conv"], fine, x)


class AlignedAtrousDecoder(AtrousDecoder):
    """The same with ``align_corners``."""

    opentrans_align = True


def find(model: nn.Module) -> Iterator[Found]:
    """Modules of any form."""
    if not has_kernel() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return
    for name, module in model.named_modules():
        children = module._modules.keys()
        if {"pyramid", "project", "fuse", "embed"} <= children:
            yield _prove_head(name, module)
        elif "decoder" in children and hasattr(module, "decoder_only"):
            yield _prove_staged(name, module)
        elif {"conv1", "bn1", "relu", "last_conv"} <= children:
            yield _prove_decoder(name, module)


def _checked(kind: type[_Atrous], name: str) -> Any:
    def make(original: nn.Module) -> HeadPart:
        part = kind(original)
        part.transform(name)
        return part

    return make


def _maps(widths: Mapping[str, int], deep: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The deep one of a few pixels; the others have enough of them for every form of a weight."""
    made = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            2, width, *((3, 2) if name == deep else (17, 16)), generator=made
        ).to(dtype)
        for name, width in widths.items()
    }  # fmt: skip


def _prove_head(name: str, module: Any) -> Found:
    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        widths = {key: _width(module.project[key]) for key in module.shallow}
        widths[module.deep] = _width(module.pyramid)
        return (_maps(widths, module.deep, dtype),), {}

    return prove(name, KIND, module, _checked(AtrousHead, name), inputs)


def _prove_staged(name: str, module: Any) -> Found:
    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = list(module.in_features)
        widths = {key: _width(module.decoder[key]["project_conv"]) for key in names}
        return (_maps(widths, names[-1], dtype),), {}

    return prove(
        name, KIND, module, _checked(StagedAtrousHead, name), inputs,
        lambda out: [out if isinstance(out, Tensor) else out[0]],
    )  # fmt: skip


def _prove_decoder(name: str, module: Any) -> Found:
    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        low, joined = module.conv1, _width(module.last_conv)
        widths = {"coarse": joined - low.out_channels, "fine": low.in_channels}
        maps = _maps(widths, "coarse", dtype)
        return (maps["coarse"], maps["fine"]), {}

    found = prove(name, KIND, module, _checked(AlignedAtrousDecoder, name), inputs)
    if found.replacement is None:
        found = prove(name, KIND, module, _checked(AtrousDecoder, name), inputs)
    return found


def _width(module: nn.Module) -> int:
    return next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
