"""Synthetic CLIP ResNets, edge detectors and pruning masks, for demos, tests and benchmarks.

No trained weights are needed, and none are imitated beyond their scales: every object made here is
labelled synthetic. Weights are N(0, 1) / sqrt(fan_in) times a lognormal(0.5) factor per output and
per input channel, so that a global magnitude mask spreads unevenly over layers and kills whole
channels, as masks of trained networks do.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from opentrans_kernels.clip_resnet import ModifiedResNet, arch_of
from opentrans_kernels.errors import MaskError, OpenTransError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.hed import Hed
from opentrans_kernels.topology import block_linears
from opentrans_kernels.topology.linears import kind_of

if TYPE_CHECKING:
    from opentrans_kernels.masks import MaskSet

CHANNEL_SIGMA = 0.5  # lognormal spread of the channel factors
NEGATIVE_GAMMA_SHARE = 0.03
CALIBRATION_SIZE = 128  # pixels; BN statistics come from one forward at this size
ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class MaskSpec:
    """A recipe for a magnitude mask.

    ``allocation`` "global" ranks all weights together, "uniform" ranks each layer on its own;
    ``sparsity`` is the share of weights removed, in [0, 1].
    """

    allocation: Literal["global", "uniform"]
    sparsity: float

    def __str__(self) -> str:
        return f"{self.allocation}:{self.sparsity:g}"


def is_mask_spec(text: str) -> bool:
    """Whether ``text`` is meant as a recipe ("global:...", "uniform:...") and not as a file."""
    return text.partition(":")[0] in ALLOCATIONS and ":" in text


def parse_mask_spec(text: str) -> MaskSpec:
    """Parse "global:0.90" or "uniform:0.90". Raises MaskError naming the accepted forms."""
    allocation, colon, number = text.strip().partition(":")
    if not colon or allocation not in ALLOCATIONS:
        raise MaskError(
            f"mask spec {text!r} is not understood: it must be ALLOCATION:SPARSITY with the "
            f"allocation one of {', '.join(ALLOCATIONS)}. Write for example global:0.90."
        )
    try:
        sparsity = float(number)
    except ValueError:
        sparsity = math.nan
    if not 0.0 <= sparsity <= 1.0:  # also catches nan
        hint = (
            f" Did you mean {allocation}:{sparsity / 100:g}?"
            if 1.0 < sparsity <= 100.0
            else f" Write for example {allocation}:0.90."
        )
        raise MaskError(
            f"mask spec {text!r}: the sparsity is the share of weights removed and must be a "
            f"number from 0 to 1, got {number!r}.{hint}"
        )
    return MaskSpec(allocation, sparsity)  # type: ignore[arg-type]


def read_masks(text: str | os.PathLike[str]) -> MaskSet | MaskSpec:
    """What a text names: a recipe, or the masks of a file, read now.

    Raises MaskError if it is neither or holds no valid masks, CheckpointError if the file cannot be
    read safely.
    """
    if isinstance(text, str) and is_mask_spec(text):
        return parse_mask_spec(text)
    return load_masks_file(text)


def load_masks_file(path: str | os.PathLike[str]) -> MaskSet:
    """Masks of FILE, or of FILE:ENTRY.

    Raises:
        MaskError: ``path`` is no file, or holds no valid masks.
        CheckpointError: the file cannot be read safely.
    """
    from opentrans_kernels.masks import MaskSet, split_entry

    if not os.path.exists(split_entry(path)[0]):
        raise MaskError(
            f"mask {os.fspath(path)!r} is neither a file nor a recipe. Pass an existing file, or "
            "a recipe such as global:0.90 or uniform:0.90."
        )
    return MaskSet.load(path)


def masks_for(text: str | os.PathLike[str], model: nn.Module) -> MaskSet:
    """The masks a text names: of a file under its own names, or of a recipe for ``model``."""
    found = read_masks(text)
    return synthetic_masks(model, found) if isinstance(found, MaskSpec) else found


def synthetic_rn50(arch: str = "RN50", seed: int = 0, image_size: int = 224) -> nn.Module:
    """CLIP's visual tower ``arch`` (RN50, RN101, RN50x4 ...) with synthetic weights.

    Returns a ``ModifiedResNet`` in eval mode, float32, without gradients; ``image_size`` (pixels,
    a multiple of 32) only fixes the size the attention pool accepts. The global random state is
    neither used nor changed. Batch norms hold the statistics of one forward on noise, disturbed a
    little, so activations keep a sensible scale at any depth. Raises OpenTransError if ``arch`` is
    not a CLIP ResNet or the size is not valid.
    """
    if image_size < 32 or image_size % 32:
        raise OpenTransError(
            f"image_size {image_size} is not a positive multiple of 32, the stride of a CLIP "
            "ResNet. Use for example 224."
        )
    model = with_storage(clip_resnet_on_meta(arch, image_size))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _fill_parameters(model, generator)
        _calibrate_batch_norms(model, generator)
    return model.eval().requires_grad_(False)


def synthetic_hed(seed: int = 0) -> Hed:
    """The edge detector with synthetic weights: eval mode, float32, without gradients.

    The scale is that of He et al. for convolutions behind ReLUs, so values keep a sensible size at
    any depth; biases are small. The global random state is neither used nor changed.
    """
    with torch.device("meta"):
        model = Hed()
    with_storage(model)
    generator = torch.Generator().manual_seed(seed)
    spread = math.exp(2 * CHANNEL_SIGMA**2)  # what the channel factors do to the variance
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                weight = _conv_weight(module.weight.shape, generator)
                module.weight.copy_(weight.mul_(math.sqrt(2 / spread)))
                module.bias.copy_(0.02 * _randn(module.bias.shape, generator))
    return model.eval().requires_grad_(False)


def clip_resnet_on_meta(arch: str, image_size: int) -> ModifiedResNet:
    """CLIP's visual tower ``arch`` on the meta device: shapes without storage or an init.

    Raises OpenTransError if ``arch`` is not a CLIP ResNet.
    """
    shape = arch_of(arch)
    with torch.device("meta"):
        return ModifiedResNet(shape.layers, shape.output_dim, image_size, shape.width)


def with_storage(model: nn.Module) -> nn.Module:
    """Give a network on the meta device storage on the CPU; returns it.

    Parameters are uninitialised, for a caller that fills them; buffers are zero, since some
    checkpoints lack the counters of batch norms.
    """
    for module in model.modules():
        # Not by ``to_empty``: it loads all of torch's compiler to copy a shape.
        for key, value in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
        for key, value in module.named_buffers(recurse=False):
            setattr(module, key, torch.zeros(value.shape, dtype=value.dtype))
    return model


def _randn(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _fill_parameters(model: nn.Module, generator: torch.Generator) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(_conv_weight(module.weight.shape, generator))
        elif isinstance(module, nn.BatchNorm2d):
            _fill_batch_norm(name, module, generator)
        elif isinstance(module, nn.Linear):
            module.weight.copy_(_randn(module.weight.shape, generator) / module.in_features**0.5)
            module.bias.copy_(0.02 * _randn(module.bias.shape, generator))
    table = model.attnpool.positional_embedding
    table.copy_(_randn(table.shape, generator) / table.shape[1] ** 0.5)


def _conv_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    cout, cin = shape[0], shape[1]
    fan_in = cin * shape[2] * shape[3]
    rows = torch.exp(CHANNEL_SIGMA * _randn((cout, 1, 1, 1), generator))
    columns = torch.exp(CHANNEL_SIGMA * _randn((1, cin, 1, 1), generator))
    return _randn(shape, generator).div_(fan_in**0.5).mul_(rows).mul_(columns)


def _fill_batch_norm(name: str, bn: nn.BatchNorm2d, generator: torch.Generator) -> None:
    # The last norm of a residual branch is smaller, so that the sum over a stage stays bounded.
    scale = 0.4 if name.endswith("bn3") and name.startswith("layer") else 0.8
    channels = bn.num_features
    gamma = scale * torch.exp(0.3 * _randn((channels,), generator))
    negative = torch.rand((channels,), generator=generator) < NEGATIVE_GAMMA_SHARE
    bn.weight.copy_(torch.where(negative, -gamma, gamma))
    bn.bias.copy_(0.25 * _randn((channels,), generator))
    bn.running_mean.zero_()
    bn.running_var.fill_(1.0)


def _calibrate_batch_norms(model: nn.Module, generator: torch.Generator) -> None:
    """One forward on noise; each norm takes the statistics of its input before it normalises."""

    def take_statistics(bn: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
        # A few pixels only at the last stage: keep the variance of every channel off zero.
        var = var + 0.05 * var.mean() + 1e-6
        wobble = torch.exp(0.1 * _randn(var.shape, generator))
        bn.running_var.copy_(var * wobble)
        bn.running_mean.copy_(mean + 0.05 * var.sqrt() * _randn(mean.shape, generator))

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [bn.register_forward_pre_hook(take_statistics) for bn in norms]
    model.eval()
    try:
        x = _randn((1, 3, CALIBRATION_SIZE, CALIBRATION_SIZE), generator)
        x = model.stem(x)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
    finally:
        for handle in handles:
            handle.remove()


def maskable_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The Conv2d modules a synthetic mask covers, by module name in definition order.

    All but the first (the first conv of a stem, never pruned in practice), none below an
    ``attnpool``, and none that gives out a single map, whose few weights cost nothing. A model
    with a single conv keeps it.
    """
    convs = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "attnpool" not in name.split(".")
    }
    convs = {name: conv for name, conv in convs.items() if conv.out_channels > 1} or convs
    if len(convs) > 1:
        convs.pop(next(iter(convs)))
    return convs


def maskable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """What a synthetic mask covers: of a vision transformer the linear layers of its blocks, of any
    other network :func:`maskable_convs`."""
    return {**(block_linears(model) or maskable_convs(model))}


def synthetic_masks(model: nn.Module, spec: str | MaskSpec) -> MaskSet:
    """Magnitude (L1) masks for ``model`` from a recipe such as "global:0.90".

    Exactly round(sparsity x weights) weights are removed, over all covered convs together
    ("global") or in each ("uniform"); ties go by position. Covers :func:`maskable_layers`. The
    result says ``source.synthetic``. Raises MaskError if the model has no Conv2d or if a weight
    is NaN or infinite.
    """
    from opentrans_kernels.masks import MaskSet, Provenance

    spec = parse_mask_spec(spec) if isinstance(spec, str) else spec
    layers = maskable_layers(model)
    if not layers:
        raise MaskError(
            f"{type(model).__name__} has no Conv2d module, so there is nothing to mask. Pass the "
            "network that holds the convolutions."
        )
    magnitudes = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        if count_non_finite(weight):
            raise MaskError(
                f"the weight of {kind_of(layer)} {name!r} holds NaN or infinity, so magnitudes "
                "cannot be ranked. Load finite weights first."
            )
        magnitudes[name] = weight.abs().float().cpu().reshape(-1).numpy()
    if spec.allocation == "global":
        kept = _keep_largest(np.concatenate(list(magnitudes.values())), spec.sparsity)
        ends = np.cumsum([m.size for m in magnitudes.values()])[:-1]
        parts = np.split(kept, ends)
    else:
        parts = [_keep_largest(m, spec.sparsity) for m in magnitudes.values()]
    masks = {
        name: torch.from_numpy(part.reshape(tuple(layers[name].weight.shape)).copy())
        for name, part in zip(layers, parts, strict=True)
    }
    notes = {"spec": str(spec), "model": type(model).__name__}
    return MaskSet(masks, Provenance(kind="synthetic", notes=notes, synthetic=True))


def _keep_largest(magnitude: np.ndarray, sparsity: float) -> np.ndarray:
    """Bool array, False at the round(sparsity * n) smallest entries; ties by position."""
    remove = round(sparsity * magnitude.size)
    if remove == 0:
        return np.ones(magnitude.shape, dtype=bool)
    threshold = np.partition(magnitude, remove - 1)[remove - 1]
    kept = magnitude > threshold
    surplus = int(magnitude.size - kept.sum()) - remove  # more than `remove` are <= threshold
    if surplus:
        ties = np.flatnonzero(magnitude == threshold)
        kept[ties[ties.size - surplus :]] = True
    return kept
