"""A pruned network refitted to the dense one's outputs: least squares, nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from opentrans.least_squares import reconstruct
from opentrans_kernels.errors import MaskError, OpenTransError, PlanError
from opentrans_kernels.hed import Hed
from opentrans_kernels.masks import MaskSet

RIDGE = 1e-9


def masks_for(model: nn.Module, density: float = 0.4, skip: tuple[str, ...] = ()) -> MaskSet:
    generator = torch.Generator().manual_seed(3)
    return MaskSet.from_tensors(
        {
            name: torch.rand(module.weight.shape, generator=generator) < density
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name not in skip
        }
    )


def of_one(layer: nn.Module, x: Tensor, **options: object) -> tuple[nn.Module, MaskSet, object]:
    dense = nn.Sequential(layer).eval()
    model, masks = copy.deepcopy(dense), masks_for(dense)
    report = reconstruct(model, dense, masks, x, ridge=RIDGE, positions=10**6, **options)
    return model, masks, report


LAYERS = {
    "1x1": (nn.Conv2d(6, 5, 1), (2, 6, 7, 9)),
    "3x3 stride 2": (nn.Conv2d(4, 6, 3, 2, padding=1), (3, 4, 15, 16)),
    "dilated, no bias": (nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False), (4, 3, 11, 12)),
    "oblong window": (nn.Conv2d(3, 4, (3, 5), (2, 1), padding=(0, 2)), (3, 3, 13, 12)),
    "padding same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 3, 12, 9)),
    "groups": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 9, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 8)),
    "linear": (nn.Linear(12, 7), (5, 11, 12)),
    "linear, no bias": (nn.Linear(12, 7, bias=False), (60, 12)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_solution_is_that_of_lstsq(name: str) -> None:
    """Every output channel alone, over the inputs it keeps, with a column of ones for the bias."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.5
    model, masks, report = of_one(layer, x)
    got, mask = model[0], masks.masks["0"].flatten(1)
    if isinstance(layer, nn.Conv2d):
        whole = copy.deepcopy(layer).double()
        y = whole(x.double()).movedim(1, -1).reshape(-1, layer.out_channels).detach()
        padded = nn.functional.pad(x.double(), layer._reversed_padding_repeated_twice)
        seen = nn.functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = seen.movedim(1, -1).reshape(len(y), layer.groups, -1)
    else:
        y = copy.deepcopy(layer).double()(x.double()).reshape(-1, layer.out_features).detach()
        rows = x.double().reshape(len(y), 1, -1)
    groups = rows.shape[1]
    for k in range(len(mask)):
        kept = rows[:, k * groups // len(mask)][:, mask[k]]
        if layer.bias is not None:
            kept = torch.cat((kept, torch.ones(len(kept), 1, dtype=torch.float64)), 1)
        wanted = torch.linalg.lstsq(kept, y[:, k : k + 1]).solution.squeeze(1)
        weights = got.weight.detach().flatten(1)[k][mask[k]].double()
        assert torch.allclose(weights, wanted[: len(weights)], rtol=1e-3, atol=1e-4), (name, k)
        if layer.bias is not None:
            assert torch.allclose(got.bias[k].double(), wanted[-1], rtol=1e-3, atol=1e-3)
    assert not got.weight[~masks.masks["0"]].any()
    (row,) = report.layers
    assert 0 < row.after < row.before and row.shifted == ("bias" if layer.bias is not None else "")
    assert "error before" in str(report) and not report.skipped


class Block(nn.Module):
    """Convolution without bias, batch norm, ReLU, then a second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


@pytest.fixture
def block() -> Block:
    torch.manual_seed(2)
    model = Block().eval().requires_grad_(False)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


def test_a_constant_goes_into_the_norm_that_reads_the_output(block: Block) -> None:
    x = torch.randn(6, 3, 20, 20) + 1
    model, masks = copy.deepcopy(block), masks_for(block)
    mean = model.norm.running_mean.clone()
    pruned = copy.deepcopy(block)
    masks.apply_(pruned)
    report = reconstruct(model, block, masks, x)
    assert [(row.name, row.shifted) for row in report.layers] == [
        ("first", "norm"),
        ("second", "bias"),
    ]
    assert not torch.equal(model.norm.running_mean, mean)
    assert torch.equal(model.norm.weight, block.norm.weight)
    unseen = torch.randn(4, 3, 20, 20) + 1
    assert error(model, block, unseen) < 0.6 * error(pruned, block, unseen)
    with torch.no_grad():  # the norm's input has the dense network's mean again
        apart = model.first(x).mean((0, 2, 3)) - model.norm.running_mean
        wanted = block.first(x).mean((0, 2, 3)) - block.norm.running_mean
    assert torch.allclose(apart, wanted, atol=1e-3)


def test_later_layers_see_the_errors_of_earlier_ones(block: Block) -> None:
    """Fitted on what the refitted network feeds them, not on what the dense one would."""
    x = torch.randn(6, 3, 20, 20) + 1
    masks = masks_for(block, skip=("second",))
    both = MaskSet.from_tensors(
        {**masks.masks, "second": torch.ones(block.second.weight.shape, dtype=torch.bool)}
    )
    one, two = copy.deepcopy(block), copy.deepcopy(block)
    reconstruct(one, block, masks, x)
    reconstruct(two, block, both, x)
    assert error(two, block, x) < error(one, block, x), "a whole layer behind a pruned one helps"


def test_everything_kept_stays_as_it_was(block: Block) -> None:
    masks = MaskSet.from_tensors(
        {n: torch.ones(block.get_submodule(n).weight.shape).bool() for n in ("first", "second")}
    )
    x, model = torch.randn(4, 3, 16, 16), copy.deepcopy(block)
    report = reconstruct(model, block, masks, x)
    assert torch.allclose(model(x), block(x), atol=1e-4)
    assert all(row.before < 1e-9 and row.after < 1e-9 for row in report.layers)


def test_channels_that_share_a_support_are_solved_together(block: Block) -> None:
    mask = torch.zeros(block.second.weight.shape, dtype=torch.bool)
    mask[:, :5] = True
    alone = mask.clone()
    alone[0, 5, 0, 0] = True
    x = torch.randn(6, 3, 20, 20)
    got = []
    for each in (mask, alone):
        model = copy.deepcopy(block)
        reconstruct(model, block, MaskSet.from_tensors({"second": each}), x)
        got.append(model.second.weight)
    assert torch.allclose(got[0][1:], got[1][1:], atol=1e-6)
    assert not torch.allclose(got[0][0], got[1][0], atol=1e-6)


def test_empty_rows_layers_and_constant_inputs(block: Block) -> None:
    masks = masks_for(block)
    masks.masks["first"][:] = False
    masks.masks["second"][1] = False
    model, x = copy.deepcopy(block), torch.randn(3, 3, 12, 12)
    reconstruct(model, block, masks, x)
    y = model(x)
    assert torch.isfinite(y).all() and not model.first.weight.any()
    wanted = block(x).mean((0, 2, 3))  # nothing but constants are left, and those are right
    assert torch.allclose(y[:, 1].mean(), wanted[1], atol=1e-3)


def test_an_edge_detector_whose_weights_are_noise() -> None:
    torch.manual_seed(0)
    dense = Hed(((8, 8), (12, 12))).eval().requires_grad_(False)
    masks = masks_for(dense, 0.5, skip=tuple(n for n, _ in dense.named_modules() if "side" in n))
    model, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    masks.apply_(pruned)
    reconstruct(model, dense, masks, torch.randn(4, 3, 32, 32) * 20)
    x = torch.randn(2, 3, 32, 32) * 20
    assert error(model, dense, x) < 0.8 * error(pruned, dense, x)


def test_the_same_call_gives_the_same_bits(block: Block) -> None:
    x, masks = torch.randn(4, 3, 20, 20), masks_for(block)
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(block)
        reconstruct(model, block, masks, x, positions=200, seed=seed)
        found.append(model.second.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_cannot_be_fitted_stays_and_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.odd = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
            self.good = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.good(self.odd(self.shared(self.shared(x))))

    dense = Twice().eval()
    model, masks = copy.deepcopy(dense), masks_for(dense)
    report = reconstruct(model, dense, masks, torch.randn(2, 3, 8, 8))
    assert {row.name: row.why for row in report.skipped} == {
        "shared": "it runs 2 times in a forward",
        "idle": "it runs 0 times in a forward",
        "odd": "it pads with 'reflect'",
    }
    assert "as it was: it runs 2 times" in str(report)
    with pytest.raises(PlanError, match="no masked layer can be refitted: shared: it runs 2"):
        reconstruct(model, dense, masks_for(dense, skip=("good",)), torch.randn(2, 3, 8, 8))


def test_another_way_to_call_the_network(block: Block) -> None:
    """Here half of it: what does not run is not fitted, and what runs is."""
    x, model = torch.randn(3, 3, 12, 12), copy.deepcopy(block)
    report = reconstruct(
        model, block, masks_for(block), x, forward=lambda network, batch: network.first(batch)
    )
    rows = {row.name: row.why for row in report.layers}
    assert rows == {"first": "", "second": "it runs 0 times in a forward"}


def test_bad_input(block: Block) -> None:
    model, masks, x = copy.deepcopy(block), masks_for(block), torch.randn(2, 3, 8, 8)
    with pytest.raises(PlanError, match="positions is 1"):
        reconstruct(model, block, masks, x, positions=1)
    with pytest.raises(PlanError, match="ridge 0"):
        reconstruct(model, block, masks, x, ridge=0)
    with pytest.raises(MaskError, match="no layer first"):
        reconstruct(model, nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), masks, x)
    with pytest.raises(OpenTransError, match="first gives values that are not finite"):
        reconstruct(model, block, masks, x * float("inf"))
    with pytest.raises(PlanError, match="output is empty"):
        reconstruct(model, block, masks, x[:0])
    with pytest.raises(PlanError, match="first: its weights are torch.bfloat16"):
        reconstruct(copy.deepcopy(model).bfloat16(), block, masks, x)
    with pytest.raises(PlanError, match="no unique solution to rounding"):
        reconstruct(model, block, masks, torch.ones(2, 3, 8, 8) + 1e-4 * x, ridge=1e-30)
    for networks in ((copy.deepcopy(model).train(), block), (model, copy.deepcopy(block).train())):
        with pytest.raises(PlanError, match="network is in training mode .itself."):
            reconstruct(*networks, masks, x)
    broken = copy.deepcopy(model)
    broken.norm.weight[0] = float("nan")
    with pytest.raises(OpenTransError, match="feeds layer second values that are not finite"):
        reconstruct(broken, block, masks, x)
