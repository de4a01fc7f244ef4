"""The edge detector as accelerate sees it: thirteen 3x3 convolutions, each block's value read twice
(by its side map and by the next block's pool), ReLUs in place, pools that round up.
"""

from __future__ import annotations

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import accelerate, restore
from opentrans_kernels.bench.subject import load_subject
from opentrans_kernels.hed import Hed
from opentrans_kernels.nn import FoldedActivation, SparseConv2d
from opentrans_kernels.plan import prepare
from opentrans_kernels.plan.build import Builder
from opentrans_kernels.plan.choose import Chooser
from opentrans_kernels.pools import PlanarMaxPool2d
from opentrans_kernels.synthetic import synthetic_hed, synthetic_masks
from opentrans_kernels.topology import find_trunk
from opentrans_kernels.towers import build_tower, empty_tower

SMALL = ((8, 8), (16, 16), (16, 16, 24), (24, 24, 24), (24, 24, 24))
SIZES = ((61, 83), (1, 1), (17, 64), (2, 33))


def small() -> Hed:
    return nets.randomise(Hed(SMALL))


def body(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {n: c for n, c in nets.convs(model).items() if n.startswith("blocks.")}


def check_same_maps(model: Hed, dense: Hed, size: tuple[int, int]) -> None:
    """All six maps within twice float32's own error."""
    x = 60 * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    given = x.clone()
    with torch.no_grad():
        own, found = dense.maps(x), model.maps(x)
        exact = dense.double().maps(x.double())
        dense.float()
    assert torch.equal(x, given), "a ReLU in place wrote to the image"
    for mine, theirs, truth in zip(found, own, exact, strict=True):
        scale = float(truth.abs().max())
        bound = max(2 * float((theirs - truth).abs().max()), nets.FLOOR * scale)
        assert mine.shape == (1, 1, *size)
        assert float((mine - truth).abs().max()) <= bound


def check_replaced(model: Hed) -> None:
    for block in model.blocks:
        for layer in block:
            assert isinstance(layer, SparseConv2d | FoldedActivation | PlanarMaxPool2d)


def test_the_whole_body_runs_on_the_kernels_and_comes_back() -> None:
    model = small()
    masks = nets.random_masks(model, 0.15)
    dense = nets.masked(model, masks)
    before, modules = nets.snapshot(model), dict(model.named_modules())
    accelerate(model, masks, input_size=(61, 83), measure=False)
    check_replaced(model)
    for size in SIZES:
        check_same_maps(model, dense, size)
    restore(model)
    nets.check_unchanged(model, before)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[n] is modules[n] for n in modules)


def test_at_full_width_by_its_name() -> None:
    model = build_tower("HED", seed=3)
    assert not model.training and not model.fuse.weight.requires_grad
    with torch.no_grad():
        maps = model.maps(torch.randn(1, 3, 64, 64))
    assert all(0.01 < float(m.std()) < 100 for m in maps)
    masks = synthetic_masks(model, "uniform:0.90")
    assert set(masks.masks) == set(body(model)) - {"blocks.0.0"}  # no map of a single channel
    dense = nets.masked(model, masks)
    accelerate(model, masks, input_size=(61, 83), measure=False)
    engines = [layer for block in model.blocks for layer in block if type(layer) is SparseConv2d]
    assert len(engines) >= 12  # without zeros, the first stays dense unless it is measured
    check_same_maps(model, dense, (61, 83))


def test_a_value_read_twice_is_one_that_went_through_the_relu() -> None:
    trunk = find_trunk(small())
    last = ["blocks.0.2", "blocks.1.3", "blocks.2.5", "blocks.3.5", "blocks.4.5"]
    for number, name in enumerate(last):
        assert trunk.conv(name).act_name == name[:-1] + str(int(name[-1]) + 1)
        assert trunk.conv(f"sides.{number}").sources == (name,)
    assert trunk.conv("blocks.0.2").sources == ("blocks.0.0",)
    # Behind a pool, behind the image, behind a concatenation: not the value of a convolution.
    assert not any(trunk.conv(n).sources for n in ("blocks.1.1", "blocks.0.0", "fuse"))
    assert [pool.name for pool in trunk.pools] == [f"blocks.{i}.0" for i in range(1, 5)]


def test_a_layer_is_timed_on_the_layout_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense side map behind a sparse convolution copies its input first."""
    asked: list[set[str]] = []

    def clock(calls: dict, *_: object) -> dict[str, list[float]]:
        asked.append(set(calls))
        slow = {"dense": 1.0, "dense here": 3.0, "compact": 3.0}
        return {name: [slow.get(name, 2.0 if len(asked) > 13 else 0.5)] for name in calls}

    monkeypatch.setattr("opentrans_kernels.plan.choose.interleaved_ms", clock)
    model = small()
    subject = prepare(model, nets.random_masks(model, 0.15).apply_(model).masks, (32, 32))
    chooser = Chooser(subject, Builder(subject), 1, True)
    choices = {unit.name: chooser.choose(unit) for unit in subject.units}
    behind = {
        unit.name for unit, calls in zip(subject.units, asked, strict=True) if "dense here" in calls
    }
    assert behind == {n for n in choices if subject.trunk.conv(n).sources}
    assert choices["sides.1"].kind == "sparse" and "3.00 ms behind" in choices["sides.1"].reason
    assert choices["fuse"].kind == "dense"


def test_the_same_seed_gives_the_same_weights() -> None:
    one, again = synthetic_hed(1), build_tower("HED", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    meta, empty = empty_tower("HED"), build_tower("HED", empty=True)
    assert all(p.is_meta for p in meta.parameters())
    shapes = {k: t.shape for k, t in one.state_dict().items()}
    assert shapes == {k: t.shape for k, t in empty.state_dict().items()}


def test_commands_know_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentrans_kernels.towers.synthetic_hed", lambda seed: small())
    subject = load_subject("uniform:0.90", arch="HED")
    assert subject.arch == "HED" and subject.match.complete and subject.synthetic
    assert 0.1 < subject.densities((32, 32))["flops"] < 0.2
