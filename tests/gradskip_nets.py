"""Networks, freeze sets and the memory counter for the tests of gradient skipping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from accel_nets import randomise, tower
from torch import nn

SETS = ("none", "all", "odd", "even", "first", "last", "3x3", "middle")


def conv_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def freeze_set(model: nn.Module, kind: str) -> list[str]:
    names = conv_names(model)
    half = len(names) // 2
    threes = [n for n in names if model.get_submodule(n).kernel_size == (3, 3)]
    return {
        "none": [],
        "all": names,
        "odd": names[1::2],
        "even": names[::2],
        "first": names[:half],
        "last": names[half:],
        "3x3": threes,
        # The prefix ends inside a block: the stem and the first two convolutions of layer1.0.
        "middle": names[:5],
    }[kind]


class Trunk(nn.Module):
    """The tower without its attention pool."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.visual = tower(seed)
        self.visual.attnpool = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def small_trunk(seed: int = 0) -> nn.Module:
    """The CLIP trunk of ``accel_nets``, narrow, with everything trainable."""
    return randomise(Trunk(seed), seed).requires_grad_(True)


class FrozenNorm(nn.Module):
    """The frozen batch norm of the baseline: buffers, scale and shift computed in each forward."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = bn.eps
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(bn, key).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def baseline(model: nn.Module, frozen: Iterable[str]) -> nn.Module:
    """A copy with frozen batch norms and ``requires_grad = False``, in plain PyTorch."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, FrozenNorm(child))
    for name in frozen:
        twin.get_submodule(name).requires_grad_(False)
    return twin


def saved_bytes(
    model: nn.Module, run: Callable[[], torch.Tensor], constants: Iterable[torch.Tensor] = ()
) -> int:
    """Bytes that ``run`` keeps for backward: each storage once, parameters and buffers left out.

    constants: further tensors that live as long as the model.
    """
    lasting = (*model.parameters(), *model.buffers(), *constants)
    own = {t.untyped_storage().data_ptr() for t in lasting}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            seen[storage.data_ptr()] = (storage.nbytes(), t)  # t: or its address could come again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(nbytes for nbytes, _ in seen.values())


def gradients(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, input gradient and every parameter's gradient, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.backward(g)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found}
