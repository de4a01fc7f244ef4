"""Small networks, masks and the float64 oracle for the tests of plan, accelerate and checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from opentrans_kernels import MaskSet

clip_resnet = pytest.importorskip("open_clip.modified_resnet")
FLOOR = 5e-7  # a few float32 roundings: no error below this is a defect


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch norms of both signs at sane scales; eval mode, no gradients."""
    gen = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=gen) / fan_in**0.5
        elif isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.weight.data = torch.randn(n, generator=gen)
            module.bias.data = torch.randn(n, generator=gen)
            module.running_mean = torch.randn(n, generator=gen)
            module.running_var = torch.rand(n, generator=gen) + 0.5
    return model.eval().requires_grad_(False)


def tower(seed: int = 0) -> nn.Module:
    """A CLIP ResNet with one narrow block per stage, for 64x64 images."""
    net = clip_resnet.ModifiedResNet((1, 1, 1, 1), 64, 4, image_size=64, width=8)
    return randomise(net, seed)


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def random_masks(model: nn.Module, density: float = 0.2, seed: int = 1) -> MaskSet:
    gen = torch.Generator().manual_seed(seed)
    return MaskSet.from_tensors(
        {n: torch.rand(c.weight.shape, generator=gen) < density for n, c in convs(model).items()}
    )


def killing_masks(model: nn.Module) -> MaskSet:
    """Masks that empty whole rows and columns, so that channels die, are unread or constant."""
    gen = torch.Generator().manual_seed(2)
    masks = {}
    for name, conv in convs(model).items():
        mask = torch.rand(conv.weight.shape, generator=gen) < 0.6
        if mask.shape[1] > 3:  # the image's channels stay, or nothing would be left to compute
            mask[torch.rand(mask.shape[0], generator=gen) < 0.3] = False
            mask[:, torch.rand(mask.shape[1], generator=gen) < 0.3] = False
        masks[name] = mask
    return MaskSet.from_tensors(masks)


def masked(model: nn.Module, masks: MaskSet | None) -> nn.Module:
    twin = copy.deepcopy(model)
    if masks is not None:
        masks.apply_(twin)
    return twin


def check_exact(
    accelerated: nn.Module, dense: nn.Module, x: torch.Tensor, factor: float = 2.0
) -> None:
    """Error against the float64 masked network: at most twice that of dense float32."""
    with torch.no_grad():
        reference = copy.deepcopy(dense).double()(x.double())
        found, own = accelerated(x), dense(x)
    assert found.shape == own.shape and found.dtype == own.dtype
    if not reference.numel():
        return
    if len(x) > 1 and x.dim() == 4 and not torch.equal(x[0], x[1]):
        assert not torch.equal(reference[0], reference[1]), "a constant network proves nothing"
    scale = reference.abs().max().clamp_min(1e-30)
    error = float((found.double() - reference).abs().max() / scale)
    own_error = float((own.double() - reference).abs().max() / scale)
    assert error <= max(factor * own_error, FLOOR), f"{error:.2e} against dense's {own_error:.2e}"


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Every tensor's bits and every module's identity."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, {name: id(module) for name, module in model.named_modules()}


def check_unchanged(
    model: nn.Module, before: tuple[dict[str, torch.Tensor], dict[str, int]]
) -> None:
    state, modules = before
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert {name: id(module) for name, module in model.named_modules()} == modules
