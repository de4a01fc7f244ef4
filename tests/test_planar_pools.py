"""Pools that ``accelerate`` replaces: which, what they compute, and what brings them back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import accelerate, restore
from opentrans_kernels.accelerate import pools as decisions
from opentrans_kernels.plan.choose import Choice
from opentrans_kernels.plan.subject import prepare
from opentrans_kernels.pools import (
    PlanarAvgPool2d,
    PlanarMaxPool2d,
    PlanarPool,
    PlanarWindowAvgPool2d,
    planar_pool,
)

KINDS = (
    (nn.MaxPool2d(3, 2, 1), PlanarMaxPool2d),
    (nn.MaxPool2d((2, 3), ceil_mode=True), PlanarMaxPool2d),
    (nn.AvgPool2d(2), PlanarAvgPool2d),
    (nn.AvgPool2d(3, 1, 1, count_include_pad=False), PlanarWindowAvgPool2d),
    (nn.AvgPool2d(3, 2, ceil_mode=True), PlanarWindowAvgPool2d),
    (nn.AvgPool2d((2, 1), 2, divisor_override=3), PlanarWindowAvgPool2d),
)


def stem() -> nn.Module:
    """Two stages of torchvision's ResNet: 7x7 stem, max pool, stride in the 3x3."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    net = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], width_per_group=8)
    net.layer3, net.layer4, net.fc = nn.Sequential(), nn.Sequential(), nn.Linear(512, 5)
    return nets.randomise(net)


def vgg() -> nn.Module:
    """Convolutions and pools of every kind in a row."""
    parts: list[nn.Module] = []
    for cin, cout, pool in ((3, 8, 0), (8, 9, 3), (9, 8, 1), (8, 6, 2)):
        parts += [nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU()]
        parts.append(copy.deepcopy(KINDS[pool][0]))
    return nets.randomise(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def replaced(model: nn.Module) -> dict[str, type]:
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, PlanarPool)}


@pytest.mark.parametrize("make", [stem, vgg])
@pytest.mark.parametrize("measure", [False, True, "winograd"])
def test_exact_and_the_same_objects_come_back(
    make: Callable, measure: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms = {"sparse": 0.1, "compact": 0.2, "dense": 1.0, "dense here": 1.0}
    ms["winograd"] = 0.05 if measure == "winograd" else 0.3
    faster = {"before": [2.0], "planar": [1.0]}
    monkeypatch.setattr(
        "opentrans_kernels.plan.choose.interleaved_ms",
        lambda calls, *a: {name: [ms[name]] for name in calls},
    )
    monkeypatch.setattr(decisions, "interleaved_ms", lambda calls: faster)
    model = make()
    masks, before = nets.random_masks(model), nets.snapshot(model)
    dense, modules = nets.masked(model, masks), dict(model.named_modules())
    report = accelerate(model, masks, input_size=(64, 64), measure=bool(measure))
    kinds = {unit.kind for unit in report.plan.units}
    tried = make is vgg and measure == "winograd" and bool(replaced(model))
    assert ("winograd" in kinds) == tried
    if not replaced(model):
        said = " ".join(report.notes)
        assert measure and ("it was left as it was" in said or "it runs densely" in said)
        pytest.skip("the narrow network is faster dense on this machine")
    expected = {"maxpool": PlanarMaxPool2d} if make is stem else {
        "2": PlanarMaxPool2d, "5": PlanarWindowAvgPool2d, "8": PlanarMaxPool2d,
        "11": PlanarAvgPool2d,
    }  # fmt: skip
    assert replaced(model) == expected
    said = [note for note in report.notes if "pools in the kernels' layout" in note]
    assert len(said) == (len(expected) if measure else 0)
    for size in ((64, 64), (65, 47), (97, 65)):
        x = torch.randn(2, 3, *size)
        nets.check_exact(model, dense, x)
        nets.check_exact(model, dense, x.contiguous(memory_format=torch.channels_last))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    one, other = (x.clone().requires_grad_() for _ in range(2))
    model(one).square().sum().backward()
    dense(other).square().sum().backward()
    assert (one.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max()
    restore(model)
    nets.check_unchanged(model, before)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[n] is modules[n] for n in modules)


def test_strided_blocks_are_fused_with_their_stage() -> None:
    model = stem()
    accelerate(model, nets.random_masks(model), input_size=(64, 64), measure=False)
    assert model.layer2[0].opentrans_unfused is None and model.layer2[0].stride == 2
    assert "2 blocks at a time" in repr(model.layer2)
    x = torch.randn(2, 256, 17, 16)
    with torch.no_grad():
        expected = model.layer2[1](model.layer2[0](x))
        assert torch.equal(model.layer2(x), expected)
    dense = nets.masked(stem(), nets.random_masks(stem()))
    nets.check_exact(model.layer2, dense.layer2, x)


def test_the_small_dense_stem_is_tried_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def times(calls, *rest):
        tried.append(set(calls))
        return {name: [1.0] for name in calls}

    monkeypatch.setattr("opentrans_kernels.plan.choose.interleaved_ms", times)
    model = stem()
    masks = dict(nets.random_masks(model).masks)
    del masks["conv1"]
    accelerate(model, masks, input_size=(64, 64))
    assert "sparse" in tried[0], "the 7x7 stem has no zeros, and is small enough to try"


@pytest.mark.parametrize("planar_ms", [1.0, 3.0])
def test_a_slower_pool_is_left_alone_and_said(
    monkeypatch: pytest.MonkeyPatch, planar_ms: float
) -> None:
    monkeypatch.setattr(
        decisions, "interleaved_ms", lambda calls: {"before": [2.0], "planar": [planar_ms]}
    )
    model = stem()
    subject = prepare(model, nets.random_masks(model), (64, 64))
    kinds = {unit.name: Choice("sparse", "") for unit in subject.units}
    swaps, notes = decisions.pool_swaps(subject, kinds, True, 1)
    assert set(swaps) == ({"maxpool"} if planar_ms < 2 else set())
    text = "pools in the kernels' layout, 1.00" if planar_ms < 2 else "left as it was"
    assert len(notes) == 1 and notes[0].startswith("maxpool") and text in notes[0]
    dense = {name: Choice("dense", "") for name in kinds}
    assert decisions.pool_swaps(subject, dense, True, 1) == ({}, [])


@pytest.mark.parametrize("what", ["hook", "forward", "dilation", "indices", "subclass"])
def test_a_pool_that_does_more_stays(what: str) -> None:
    model = stem()
    pool = model.maxpool
    if what == "hook":
        seen = []
        pool.register_forward_hook(lambda *_: seen.append(1))
    elif what == "forward":
        pool.forward = lambda x, run=pool.forward: run(x)
    elif what == "dilation":
        pool.dilation = 2
        pool.padding = 1
    elif what == "indices":
        assert planar_pool(nn.MaxPool2d(2, return_indices=True)) is None
        return
    else:
        pool = model.maxpool = type("Mine", (nn.MaxPool2d,), {})(3, 2, 1)
    assert planar_pool(pool) is None
    accelerate(model, nets.random_masks(model), input_size=(64, 64), measure=False)
    assert model.maxpool is pool
    model(torch.randn(1, 3, 64, 64))
    assert what != "hook" or seen


def test_a_hook_added_later_runs() -> None:
    model, seen = stem(), []
    accelerate(model, nets.random_masks(model), input_size=(64, 64), measure=False)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    model.maxpool.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
    assert torch.equal(model(x), expected) and seen == [16]


@pytest.mark.parametrize(("pool", "kind"), KINDS)
def test_what_the_kernels_do_not_take_goes_to_pytorch(pool: nn.Module, kind: type) -> None:
    new = planar_pool(pool)
    assert type(new) is kind and new.kernel_size == pool.kernel_size
    for x in (torch.randn(2, 3, 12, 9), torch.randn(3, 12, 9), torch.randn(2, 3, 12, 9).double()):
        torch.testing.assert_close(new(x), pool(x))
    x = torch.randn(2, 3, 12, 9)
    assert new(x.to("meta")).shape == pool(x).shape
    with pytest.raises(RuntimeError, match=r"small|size"):
        new(torch.randn(1, 3, 0, 9))
    again = pickle.loads(pickle.dumps(new))
    assert torch.equal(again(x), new(x))


def test_compiled_and_exported_with_the_convolution_before_it() -> None:
    model = nets.randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1)))
    accelerate(model, nets.random_masks(model), input_size=(16, 16), measure=False)
    assert replaced(model) == {"1": PlanarMaxPool2d}
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert any("max_pool2d" in str(node.target) for node in program.graph.nodes)


def test_pools_of_one_pixel_and_wide_padding_stay() -> None:
    assert planar_pool(nn.AvgPool2d(1)) is None
    assert planar_pool(nn.MaxPool2d(2, padding=2)) is None  # torch refuses it when it is called
    assert planar_pool(nn.AdaptiveAvgPool2d(1)) is None
