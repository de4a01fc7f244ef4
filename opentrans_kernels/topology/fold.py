"""Folding an eval-mode batch norm into the convolution before it, in float64."""

from __future__ import annotations

import torch
from torch import nn

from opentrans_kernels.activations import NONE, Activation, activation_of
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.topology.nodes import ConvNode


def is_plain_bn(module: nn.Module | None) -> bool:
    """True if ``module`` in eval mode is nothing but scale and shift from running statistics."""
    return norm_activation(module) == NONE


def norm_activation(module: nn.Module | None) -> Activation | None:
    """What ``module``, a scale and shift from running statistics in eval mode, applies afterwards.

    None for anything else. ``BatchNorm2d`` and ``SyncBatchNorm`` are known. Others with the same
    tensors (the frozen batch norms of torchvision, detectron2 and others, and timm's with their
    activation in ``act``) are tried on a few numbers of both signs and must agree with the formula.
    """
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return NONE
    tensors = [getattr(module, key, None) for key in ("running_mean", "running_var")]
    if any(not isinstance(t, torch.Tensor) for t in tensors) or not hasattr(module, "eps"):
        return None
    try:
        scale, shift = scale_shift(module, "norm")
    except UnsupportedModelError:
        own = isinstance(module, nn.BatchNorm2d) and type(module).forward is nn.BatchNorm2d.forward
        return NONE if own else None
    mean = tensors[0]
    probe = torch.tensor([-7.0, -0.5, 0.5, 7.0], dtype=mean.dtype, device=mean.device)
    probe = probe.view(1, 1, 1, 4).expand(1, mean.numel(), 1, 4).contiguous()
    with torch.no_grad():
        got = type(module).forward(module, probe.clone())
    act = activation_of(getattr(module, "act", None))
    want = act.apply_(probe.double() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    tolerance = 1e-2 if mean.dtype in (torch.float16, torch.bfloat16) else 1e-4
    same = torch.allclose(
        got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max())
    )
    return act if same else None


def uses_batch_statistics(node: ConvNode) -> bool:
    """Whether the norm behind a convolution is in training mode."""
    # A frozen batch norm keeps its training flag but has no train-mode behaviour.
    bn = node.bn
    return bn is not None and bn.training and isinstance(bn, nn.modules.batchnorm._BatchNorm)


def scale_shift(bn: nn.Module, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [C] scale and shift of an eval-mode batch norm."""
    mean, var = getattr(bn, "running_mean", None), getattr(bn, "running_var", None)
    if mean is None or var is None:
        raise UnsupportedModelError(
            f"{where}: {type(bn).__name__} has no running statistics (track_running_stats=False), "
            "so it normalises with the statistics of each batch and cannot be folded into a "
            "convolution. Use a checkpoint with running_mean and running_var, or leave this layer "
            "out."
        )
    weight, bias = getattr(bn, "weight", None), getattr(bn, "bias", None)
    if getattr(bn, "affine", True) and (weight is None or bias is None):
        missing = " and ".join(k for k, v in (("weight", weight), ("bias", bias)) if v is None)
        raise UnsupportedModelError(
            f"{where}: {type(bn).__name__} says it is affine but has no {missing}. Restore the "
            "missing tensors from the checkpoint, or build the norm with affine=False."
        )
    scale = (var.detach().double() + float(bn.eps)).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    return scale, shift


def fold_bn(node: ConvNode, weight64: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one convolution that computes ``bn(conv(x))`` in eval mode.

    weight64: float64 [Cout, Cin, kh, kw], already masked; the module's own weight is not read.
    Returns (weight float64 [Cout, Cin, kh, kw], bias float64 [Cout]). Zeros stay exactly zero.
    Without a batch norm the weight comes back unchanged with the convolution's bias (zeros if it
    has none).

    Raises UnsupportedModelError for a batch norm in training mode, without running statistics or
    with missing affine tensors, and for NaN or Inf among the numbers. affine=False means scale 1,
    shift 0.
    """
    if weight64.dtype != torch.float64 or weight64.shape != node.conv.weight.shape:
        raise UnsupportedModelError(
            f"{node.name}: fold_bn needs a float64 weight of shape "
            f"{tuple(node.conv.weight.shape)}, got {weight64.dtype} {tuple(weight64.shape)}. Pass "
            "conv.weight.double(), masked."
        )
    bias = torch.zeros(weight64.shape[0], dtype=torch.float64, device=weight64.device)
    if node.conv.bias is not None:
        bias = bias + node.conv.bias.detach().double()
    if node.bn is not None:
        where = f"{node.name} with {node.bn_name}"
        if uses_batch_statistics(node):
            raise UnsupportedModelError(
                f"{where}: the batch norm is in training mode, where it uses batch statistics. "
                "Call model.eval() first."
            )
        scale, shift = scale_shift(node.bn, where)
        if scale.numel() != weight64.shape[0]:
            raise UnsupportedModelError(
                f"{where}: the norm has {scale.numel()} channels, the convolution "
                f"{weight64.shape[0]}. The two do not belong together; check how the model was "
                "assembled."
            )
        weight64 = weight64 * scale.view(-1, 1, 1, 1)
        bias = bias * scale + shift
    for label, values in (("weight", weight64), ("bias", bias)):
        bad = count_non_finite(values)
        if bad:
            raise UnsupportedModelError(
                f"{node.name}: {bad} of {values.numel()} folded {label} values are NaN or Inf. The "
                "checkpoint is damaged or a norm has a negative variance; load a sound one."
            )
    return weight64, bias
