"""Layers that share one weight: one mask for all of them, or an error that names them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import MaskSet


class Tied(nn.Module):
    """Two 3x3 convolutions, two linear layers; the second of each has the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.up, self.down = (nn.Linear(16, 16) for _ in range(2))
        self.two.weight, self.down.weight = self.one.weight, self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(F.relu(self.one(self.stem(x)))).mean((2, 3))
        return self.down(F.gelu(self.up(x)))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


def mask(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
ODD = {
    "two masks": ({"one": mask(1, 16, 16, 3, 3), "two": mask(2, 16, 16, 3, 3)}, "one, two share"),
    "one mask": ({"two": mask(1, 16, 16, 3, 3)}, "one has no mask"),
    "linear": ({"up": mask(1, 16, 16), "down": mask(2, 16, 16)}, "up, down share"),
}


@pytest.mark.parametrize("case", ODD)
def test_different_masks_of_one_weight_are_refused(case: str) -> None:
    masks, message = ODD[case]
    model = tied()
    before = copy.deepcopy(model.state_dict())
    for refused in (
        lambda: otk.accelerate(model, masks, input_size=(8, 8), measure=False),
        lambda: MaskSet.from_tensors(masks).apply_(model),
    ):
        with pytest.raises(MaskError, match=re.escape(message)):
            refused()
    assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
    assert type(model.one) is nn.Conv2d


def test_the_same_mask_for_both_is_exact_and_survives_a_checkpoint(tmp_path) -> None:
    conv, linear = mask(1, 16, 16, 3, 3), mask(2, 16, 16)
    masks = {"one": conv, "two": conv, "up": linear, "down": linear}
    model = tied()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        exact.one.weight.mul_(conv)
        exact.up.weight.mul_(linear)
        wanted = exact(IMAGE.double())
        report = otk.accelerate(model, masks, input_size=(8, 8), measure=False)
        assert report.max_rel_err is not None  # the whole was compared
        otk.save_accelerated(tmp_path / "tied.safetensors", model)
        loaded = tied()
        otk.load_accelerated(tmp_path / "tied.safetensors", loaded)
        for found in (model, loaded):
            assert float((found(IMAGE).double() - wanted).abs().max()) < 1e-6


def test_a_tied_mlp_is_exact_and_stays_so_after_a_hook() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    mlp[2].weight = mlp[0].weight
    model = nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Flatten(2), mlp).eval()  # 4x4 pixels
    keep = mask(1, 16, 16)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        exact[2][0].weight.mul_(keep)
        wanted = exact(IMAGE.double())
        otk.accelerate(model, {"2.0": keep, "2.2": keep}, input_size=(8, 8), measure=False)
        assert float((model(IMAGE).double() - wanted).abs().max()) < 1e-6
        model[2][1].register_forward_hook(lambda *_: None)  # now it runs densely, masks applied
        assert float((model(IMAGE).double() - wanted).abs().max()) < 1e-6


def test_a_mask_of_zeros_that_are_there_already_needs_no_partner() -> None:
    model = tied()
    keep = mask(1, 16, 16, 3, 3)
    with torch.no_grad():
        model.one.weight.mul_(keep)
    report = otk.accelerate(model, {"one": keep}, input_size=(8, 8), measure=False)
    assert report.accelerated
