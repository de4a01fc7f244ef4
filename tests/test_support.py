"""Which weights of a layer are kept: best subsets for a least squares fit."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from opentrans.least_squares import reconstruct
from opentrans.support import best_support
from opentrans_kernels.errors import PlanError
from opentrans_kernels.masks import MaskSet


def problem(rows: int, inputs: int, outputs: int, seed: int, mixed: float = 1.0):  # type: ignore[no-untyped-def]
    """Correlated inputs X, weights W, and ``X^T X``, ``X^T X W``."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=made)
    x = x + mixed * x @ torch.randn(inputs, inputs, generator=made) / inputs**0.5
    w = torch.randn(inputs, outputs, generator=made)
    gram = x.t() @ x / rows
    return x, w, gram, gram @ w


def error(x: Tensor, w: Tensor, support: Tensor) -> float:
    """Of the least squares fit on a support, over all outputs."""
    found = 0.0
    for k in range(w.shape[1]):
        kept = x[:, support[:, k]].double()
        y = (x @ w[:, k : k + 1]).double()
        fit = kept @ torch.linalg.lstsq(kept, y).solution if kept.shape[1] else 0 * y
        found += float((y - fit).square().sum())
    return found / float((x @ w).square().sum())


def largest(w: Tensor, count: int) -> Tensor:
    return w.abs() >= w.abs().flatten().topk(count).values[-1]


def test_of_inputs_that_are_apart_the_largest_stay() -> None:
    made = torch.Generator().manual_seed(0)
    scale = torch.rand(12, generator=made) + 0.5
    w = torch.randn(12, 7, generator=made)
    gram = torch.diag(scale.square())
    found = best_support(gram, gram @ w, w, 20, 30)
    assert torch.equal(found, largest(scale[:, None] * w, 20))


def test_near_the_best_of_all_subsets() -> None:
    found, best, by_size = 0.0, 0.0, 0.0
    for seed in range(12):
        x, w, gram, right = problem(200, 9, 1, seed)
        support = best_support(gram, right, w, 4, 60)
        assert int(support.sum()) == 4
        errors = []
        for kept in combinations(range(9), 4):
            other = torch.zeros(9, 1, dtype=torch.bool)
            other[list(kept)] = True
            errors.append(error(x, w, other))
        found, best = found + error(x, w, support), best + min(errors)
        by_size += error(x, w, largest(w, 4))
    assert best <= found < 0.5 * (best + by_size)


def test_much_better_than_the_largest_where_inputs_are_correlated() -> None:
    x, w, gram, right = problem(4000, 60, 40, 1, mixed=3.0)
    for count in (240, 480):
        kept = best_support(gram, right, w, count, 30)
        assert int(kept.sum()) == count
        assert error(x, w, kept) < 0.7 * error(x, w, largest(w, count))


def test_the_ends() -> None:
    _, w, gram, right = problem(50, 6, 4, 0)
    assert best_support(gram, right, w, 24, 30).all()
    assert not best_support(gram, right, w, 0, 30).any()
    one = best_support(gram, right, w, 1, 30)
    assert int(one.sum()) == 1
    assert torch.equal(best_support(gram, right, w, 10, 30), best_support(gram, right, w, 10, 30))


# --- in a network ------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1, groups=2),
        nn.Flatten(), nn.Linear(12 * 25, 10),
    ).eval()  # fmt: skip


def by_magnitude(model: nn.Module, density: float) -> MaskSet:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "0":
            weight = module.weight.detach()
            found[name] = largest(weight, int(density * weight.numel()))
    return MaskSet.from_tensors(found)


def test_a_network_agrees_better_and_keeps_as_many_weights() -> None:
    dense = network()
    masks = by_magnitude(dense, 0.2)
    x, unseen = torch.rand(40, 3, 12, 12), torch.rand(20, 3, 12, 12)
    x, unseen = (nn.functional.avg_pool2d(t, 3, 1, 1) for t in (x, unseen))  # as images are
    apart = {}
    for select in (0, 30):
        model = copy.deepcopy(dense)
        report = reconstruct(model, dense, masks, x, select=select)
        kept = report.masks
        for name, mask in kept.masks.items():
            weight = model.get_submodule(name).weight
            assert not weight[~mask].any() and weight[mask].all()
            assert int(mask.sum()) == int(masks.masks[name].sum())
        assert all((row.moved > 0.05) == bool(select) for row in report.layers)
        assert (kept.content_hash() == masks.content_hash()) == (not select)
        assert ("least squares, 30 turns" in str(kept.source)) == bool(select)
        with torch.no_grad():
            apart[select] = float((model(unseen) - dense(unseen)).square().mean())
    assert apart[30] < 0.7 * apart[0]
    groups = kept.masks["5"].flatten(1).view(2, -1).sum(1)
    assert groups.tolist() == masks.masks["5"].flatten(1).view(2, -1).sum(1).tolist()


def test_inputs_that_never_change_leave_the_largest() -> None:
    dense = nn.Sequential(nn.Linear(8, 4)).eval()
    masks = MaskSet.from_tensors({"0": largest(dense[0].weight.detach(), 9)})
    model = copy.deepcopy(dense)
    found = reconstruct(model, dense, masks, torch.ones(30, 8), select=30).masks
    assert torch.equal(found.masks["0"], masks.masks["0"])
    assert torch.allclose(model(torch.ones(2, 8)), dense(torch.ones(2, 8)), atol=1e-5)


def test_turns_that_make_no_sense() -> None:
    dense = network()
    with pytest.raises(PlanError, match="select is -1"):
        reconstruct(copy.deepcopy(dense), dense, by_magnitude(dense, 0.2), torch.ones(1), select=-1)
