"""What bench_training.py compares: freeze sets, and the trunk in plain PyTorch or skip_frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from opentrans import skip_frozen
from opentrans.systems_training import published_half
from opentrans_kernels.topology import find_trunk

SETS = ("none", "published", "odd", "even", "3x3", "first27", "stem-layer2", "last28")


def freeze_set(model: nn.Module, kind: str) -> list[str]:
    """Names of the frozen convolutions, in registration order of the tower."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    threes = [n for n in names if model.get_submodule(n).kernel_size == (3, 3)]
    sets = {
        "none": [],
        "published": [n for n in names if n in published_half(threes)],
        "odd": names[1::2],
        "even": names[::2],
        "3x3": threes,
        "first27": names[:27],
        "stem-layer2": [n for n in names if not n.startswith(("layer3", "layer4"))],
        "last28": names[27:],
    }
    return sets[kind]


class FrozenNorm(nn.Module):
    """Frozen batch norm of the baseline: one native call without gradients, else scale and shift
    computed from buffers in each forward.
    """

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = bn.eps
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(bn, key).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def freeze_plainly(model: nn.Module, names: Sequence[str], frozen_norms: str) -> nn.Module:
    """frozen_norms: "all" as scale and shift in buffers, those "behind frozen" convolutions only
    (the others stay eval-mode batch norms whose scale and shift train), or "none".
    """
    for node in list(find_trunk(model).convs()):
        if frozen_norms == "all" or (frozen_norms == "behind frozen" and node.name in names):
            head, _, key = str(node.bn_name).rpartition(".")
            setattr(model.get_submodule(head), key, FrozenNorm(node.bn))
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


class SelectiveConv(torch.autograd.Function):
    """Convolution that saves its input only for a weight gradient, and its weight only for an input
    gradient; torch's own saves both whenever either is needed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any):
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.shapes, ctx.stride, ctx.padding = (x.shape, weight.shape), stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        needs = [x_or_weight is not None for x_or_weight in (weight, x)]
        # Neither gradient reads the tensor it is of: one element stands for all of it.
        image, kernel = (
            grad.new_empty(1).expand(shape) if known is None else known
            for known, shape in zip((x, weight), ctx.shapes, strict=True)
        )
        found = torch.ops.aten.convolution_backward(
            grad, image, kernel, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1,
            [*needs, False],
        )  # fmt: skip
        return found[0], found[1], None, None


def save_selectively(model: nn.Module) -> nn.Module:
    """Let every convolution of ``model`` run as :class:`SelectiveConv`."""

    def forward_of(conv: nn.Conv2d) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: SelectiveConv.apply(x, conv.weight, conv.stride, conv.padding)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = forward_of(module)  # type: ignore[method-assign]
    return model


def variants(masks: Any, names: Sequence[str]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Variant -> what turns a trainable tower into it."""

    def skip(model: nn.Module, **arguments: Any) -> nn.Module:
        skip_frozen(model, names, **arguments)
        return model

    found = {
        "baseline": lambda m: freeze_plainly(m, names, "all"),
        "baseline, affine trains": lambda m: freeze_plainly(m, names, "behind frozen"),
        "plain": lambda m: freeze_plainly(m, names, "none"),
        "selective saving": lambda m: save_selectively(freeze_plainly(m, names, "all")),
        "skip": skip,
        "skip, affine trains": lambda m: skip(m, bn="affine"),
    }
    if masks is not None:
        found["skip, sparse kernels"] = lambda m: skip(m, masks=masks)
    return found
