"""Iterative magnitude pruning: rounds on a small network, allocations and patterns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from opentrans.imp import (
    ALLOCATIONS,
    PATTERNS,
    Allocation,
    ImpConfig,
    ImpSchedule,
    NotFiniteLoss,
    Pattern,
    Pruner,
)
from opentrans.imp.allocation import choose
from opentrans.imp.cost import LayerCost, layer_costs
from opentrans_kernels.audit.rows import outside_two_four
from opentrans_kernels.errors import MaskError, PlanError
from opentrans_kernels.masks import MaskSet


class Net(nn.Module):
    """Four convolutions of other sizes; the first is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.a = nn.Conv2d(8, 12, 1, bias=False)
        self.b = nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False)
        self.c = nn.Conv2d(20, 7, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(self.stem(x)).relu()).relu()).mean((2, 3))


def run(net: nn.Module, **parts: object) -> Pruner:
    """A pruner driven without training until it is finished."""
    config = ImpConfig(**{"schedule": ImpSchedule(rounds=4, rate=0.3, period=1), **parts})
    pruner = Pruner(net, config)
    steps = 0
    while not pruner.finished:
        steps += 1
        pruner.after_step(steps)
    return pruner


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_round_keeps_its_count_and_never_regrows(allocation: str, pattern: str) -> None:
    net = Net()
    config = ImpConfig(
        ImpSchedule(rounds=5, rate=0.25, period=1),
        Allocation(allocation),
        Pattern(pattern, block=4),
        input_size=(16, 16),
    )
    pruner = Pruner(net, config)
    assert list(pruner.masks.masks) == ["a", "b", "c"]
    before = pruner.masks.masks
    for step in range(1, 6):
        record = pruner.after_step(step)
        after = pruner.masks.masks
        for name in after:
            assert not bool((after[name] & ~before[name]).any()), "a removed weight came back"
            weight = net.get_submodule(name).weight
            assert not bool(weight[~after[name]].any())
            assert bool(weight[after[name]].all())
        target, largest = pruner.targets[step - 1], {"channel": 180, "block": 4}.get(pattern, 0)
        if allocation == "uniform":  # at most the count, by less than a unit in each of 3 layers
            assert 0 <= record.kept - target <= 3 * largest
        else:
            assert 0 <= target - record.kept <= largest
        before = after
    assert pruner.finished and pruner.after_step(99) is None


def test_global_is_one_threshold_and_uniform_one_share() -> None:
    net = Net()
    weights = torch.cat([net.get_submodule(n).weight.detach().abs().flatten() for n in "abc"])
    masks = run(copy.deepcopy(net), schedule=ImpSchedule(rounds=1, rate=0.4, period=1)).masks.masks
    joined = torch.cat([masks[name].flatten() for name in "abc"])
    assert weights[joined].min() >= weights[~joined].max()
    alone = run(copy.deepcopy(net), allocation=Allocation("uniform")).masks
    for mask in alone.masks.values():
        assert abs(float(mask.float().mean()) - alone.density()) < 1 / mask.numel() * 2


def test_a_weighted_ranking_is_magnitude_over_worth() -> None:
    """Against a float64 sort of |w| / pixels ** strength, floor off."""
    net = Net()
    pixels = {"a": 16 * 16, "b": 8 * 8, "c": 8 * 8}
    strength = 0.7
    parts = {"allocation": Allocation("macs", strength, floor=0.0), "input_size": (16, 16)}
    scores = torch.cat(
        [
            net.get_submodule(n).weight.detach().double().abs().flatten() / pixels[n] ** strength
            for n in pixels
        ]
    )
    pruner = run(copy.deepcopy(net), schedule=ImpSchedule(1, 0.5, period=1), **parts)
    kept = torch.cat([m.flatten() for m in pruner.masks.masks.values()])
    assert int(kept.sum()) == pruner.targets[0]
    assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-6)
    # Fewer weights stay where they cost more, than without the weighting.
    plain = run(copy.deepcopy(net), schedule=ImpSchedule(1, 0.5, period=1)).masks.masks["a"]
    assert int(pruner.masks.masks["a"].sum()) < int(plain.sum())


def test_no_layer_falls_below_its_floor() -> None:
    net = Net()
    with torch.no_grad():
        net.a.weight.mul_(1e-4)  # would go first, completely
    schedule = ImpSchedule(rounds=3, rate=0.4, period=1)
    assert int(run(copy.deepcopy(net), schedule=schedule).masks.masks["a"].sum()) == 0
    for pattern in PATTERNS:
        kept = run(
            copy.deepcopy(net),
            schedule=schedule,
            allocation=Allocation(floor=0.5),
            pattern=Pattern(pattern, block=4),
        ).masks
        assert float(kept.masks["a"].float().mean()) >= 0.5 * kept.density()


def test_a_floor_that_leaves_too_little() -> None:
    weights = {"a": torch.rand(4, 4, 1, 1), "b": torch.rand(4, 4, 1, 1)}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    masks["a"][1:] = False
    masks["a"][0, 1:] = False
    with pytest.raises(PlanError, match="Use a lower floor"):
        choose(
            weights, masks, 16, allocation=Allocation(floor=0.1), pattern=Pattern(),
            factors={"a": 1.0, "b": 1.0},
        )  # fmt: skip


def test_two_four_holds_from_half_density_on() -> None:
    pruner = run(
        Net(), pattern=Pattern("2:4"), schedule=ImpSchedule(8, 0.2, target_density=0.45, period=1)
    )
    for name, mask in pruner.masks.masks.items():
        assert outside_two_four(mask) == 0, name
    assert pruner.kept == round(0.45 * pruner.total)
    half = run(Net(), pattern=Pattern("2:4"), schedule=ImpSchedule(8, 0.2, 0.5, period=1))
    # 8, 12 and 20 input channels are whole groups: exactly two of four stay in each.
    for mask in half.masks.masks.values():
        assert set(mask.view(mask.shape[0], -1, 4, *mask.shape[2:]).sum(2).unique().tolist()) == {2}
    with pytest.raises(PlanError, match=r"Use at most 0\.5"):
        ImpConfig(ImpSchedule(target_density=0.6), pattern=Pattern("2:4"))


def test_channels_and_blocks_go_as_a_whole() -> None:
    channel = run(Net(), pattern=Pattern("channel")).masks
    assert channel.density() < 0.3
    for mask in channel.masks.values():
        assert bool((mask.flatten(1).all(1) | ~mask.flatten(1).any(1)).all())
    block = run(Net(), pattern=Pattern("block", block=5)).masks
    for mask in block.masks.values():
        for rows in mask.split(5):
            assert bool((rows.all(0) | ~rows.any(0)).all())


def test_the_worth_of_a_zero() -> None:
    cost = LayerCost("x", 3, 10_000, 49, dense_ms=2.0)
    assert cost.ms(10_000) == 2.0, "above the crossover a layer runs dense"
    assert cost.ms(100) < cost.ms(1000) < 2.0
    assert cost.worth(10_000, 1000) == pytest.approx((2.0 - cost.ms(1000)) / 9000)
    costs = layer_costs(Net(), "abc", (16, 16))
    assert (costs["a"].pixels, costs["b"].pixels) == (256, 64)
    assert costs["a"].dense_ms / costs["c"].dense_ms == pytest.approx(8 * 12 * 256 / 20 / 7 / 64)
    with pytest.raises(PlanError, match="Leave it out of the scope"):
        net = Net()
        net.extra = nn.Conv2d(2, 2, 1)
        layer_costs(net, ["extra"], (16, 16))


def test_removed_weights_stay_zero_under_momentum_and_decay() -> None:
    """Weight, gradient and optimizer state; the gradient before anybody can read it."""
    for make in (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ):
        net = Net()
        optimizer = make(net.parameters())
        config = ImpConfig(ImpSchedule(rounds=2, rate=0.5, period=3))
        pruner = Pruner(net, config, optimizer=optimizer)
        assert not pruner._guard, "with the optimizer known, no step has to set zeros again"
        for step in range(1, 12):
            optimizer.zero_grad()
            (net(torch.randn(2, 3, 8, 8)) * 50).pow(2).sum().backward()
            for name, mask in pruner.masks.masks.items():
                assert not bool(net.get_submodule(name).weight.grad[~mask].any())
            optimizer.step()
            pruner.after_step(step)
            for name, mask in pruner.masks.masks.items():
                weight = net.get_submodule(name).weight
                assert not bool(weight[~mask].any())
                state = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
                assert state and not any(bool(v[~mask].any()) for v in state)
        pruner.close()
        net(torch.randn(1, 3, 8, 8)).sum().backward()
        assert pruner.round == 2


def test_an_unknown_optimizer_is_guarded_against() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(net, ImpConfig(ImpSchedule(rounds=1, rate=0.5, period=2)))
    for step in range(1, 6):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 8, 8)).pow(2).sum().backward()
        optimizer.step()
        pruner.after_step(step)
    for name, mask in pruner.masks.masks.items():
        assert not bool(net.get_submodule(name).weight[~mask].any())


def test_a_start_from_given_masks() -> None:
    net = Net()
    first = run(copy.deepcopy(net)).masks
    pruner = Pruner(net, ImpConfig(ImpSchedule(rounds=1, rate=0.5, period=1)), masks=first)
    assert pruner.kept == first.nnz and pruner.masks.content_hash() == first.content_hash()
    pruner.after_step(1)
    assert pruner.kept == first.nnz - round(0.5 * first.nnz)
    with pytest.raises(MaskError, match="use the architecture the masks were made for"):
        Pruner(net, masks=MaskSet({"other": torch.ones(2, 2, dtype=torch.bool)}))
    wrong = MaskSet({"b": torch.ones(20, 13, 3, 3, dtype=torch.bool)})
    with pytest.raises(MaskError, match="use the architecture the masks were made for"):
        Pruner(net, masks=wrong)
    with pytest.raises(MaskError, match="Add it to scope"):
        Pruner(net, masks=first, scope=["a", "b"])


def test_momentum_from_before_cannot_bring_masked_weights_back() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3, 8, 8)).pow(2).sum().backward()
    optimizer.step()
    masks = run(copy.deepcopy(net)).masks
    Pruner(
        net, ImpConfig(ImpSchedule(rounds=1, rate=0.5, period=9)), optimizer=optimizer, masks=masks
    )
    optimizer.step()  # with the gradient of before, too
    for name, mask in masks.masks.items():
        assert not bool(net.get_submodule(name).weight[~mask].any())


def test_bad_scopes_and_weights() -> None:
    net = Net()
    with pytest.raises(MaskError, match="named_modules"):
        Pruner(net, scope=["a", "nosuch"])
    with pytest.raises(MaskError, match="Pass names of Conv2d"):
        Pruner(net, scope=[])
    with pytest.raises(MaskError, match="holds the convolutions"):
        Pruner(nn.Linear(2, 2))
    assert list(Pruner(net, scope=["c", "stem"]).masks.masks) == ["stem", "c"]
    torch.nn.utils.prune.identity(net.a, "weight")
    with pytest.raises(MaskError, match=r"prune\.remove"):
        Pruner(net)
    net = Net()
    pruner = Pruner(net, ImpConfig(ImpSchedule(rounds=1, rate=0.5, period=2)))
    net.b.weight.data[0, 0, 0, 0] = torch.nan
    assert pruner.after_step(1) is None
    with pytest.raises(MaskError, match="continue from the round before"):
        pruner.after_step(2)
    assert pruner.round == 0 and pruner.kept == pruner.total


def test_a_loss_that_is_not_a_number_ends_the_round() -> None:
    pruner = Pruner(Net(), ImpConfig(ImpSchedule(rounds=2, rate=0.5, period=2)))
    pruner.after_step(1, 0.5)
    pruner.after_step(2, torch.tensor(1.5))
    assert pruner.records[0].loss == 1.0
    with pytest.raises(NotFiniteLoss, match=r"step 3, in round 2 of 2.*lower learning rate"):
        pruner.after_step(3, float("inf"))
    assert pruner.round == 1


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: Allocation("even"), "Use one of global"),
        (lambda: Allocation(strength=-1.0), "at least 0"),
        (lambda: Allocation(floor=1.5), "between 0"),
        (lambda: Pattern("1:4"), "Use one of unstructured"),
        (lambda: Pattern("block", block=1), "at least 2"),
        (lambda: ImpConfig(rewind=1000), "from 0 to 999"),
        (lambda: ImpConfig(input_size=(0, 4)), "height, width"),
    ],
)
def test_settings_that_do_not_exist(make: object, fix: str) -> None:
    with pytest.raises(PlanError, match=fix):
        make()
