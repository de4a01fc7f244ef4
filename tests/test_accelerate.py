"""``accelerate`` and ``restore``: exact, in place, measured, reversible, never half done."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import (
    MaskSet,
    PlanError,
    UnsupportedModelError,
    accelerate,
    make_plan,
    restore,
)
from opentrans_kernels.nn import AcceleratedBlock, FoldedActivation, FoldedBatchNorm, SparseConv2d
from opentrans_kernels.timing.rounds import PairTiming
from opentrans_kernels.topology import find_trunk

COMPARE = sys.modules["opentrans_kernels.accelerate.compare"]  # the package's name is a function
SIZES = [(64, 64), (33, 47), (97, 65), (128, 96)]


class Trunk(nn.Module):
    """Stem to layer4, walked by attribute as users of CLIP towers do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        net = self.net
        for i in (1, 2, 3):
            x = getattr(net, f"conv{i}")(x)
            x = getattr(net, f"act{i}")(getattr(net, f"bn{i}")(x))
        x = net.avgpool(x)
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@pytest.mark.parametrize("kind", ["random", "killing"])
@pytest.mark.parametrize("measure", [False, True])
def test_exact_in_place_and_restored_bit_for_bit(kind: str, measure: bool) -> None:
    model = nets.tower()
    masks = nets.random_masks(model) if kind == "random" else nets.killing_masks(model)
    dense, before = nets.masked(model, masks), nets.snapshot(model)
    report = accelerate(model, masks, measure=measure)
    assert report.accelerated and report.max_rel_err is not None
    now = model.state_dict()
    assert list(now) == list(before[0])
    assert all(torch.equal(now[key], before[0][key]) for key in now)
    for size in SIZES:
        for batch in (1, 3):
            nets.check_exact(Trunk(model), Trunk(dense), torch.randn(batch, 3, *size))
    nets.check_exact(model, dense, torch.randn(2, 3, 64, 64))
    last = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    nets.check_exact(model, dense, last)
    assert Trunk(model)(torch.randn(0, 3, 64, 64)).shape == (0, 256, 2, 2)
    restore(model)
    nets.check_unchanged(model, before)


def test_the_weights_own_zeros_are_the_mask_by_default() -> None:
    model = nets.tower()
    nets.random_masks(model).apply_(model)
    dense = copy.deepcopy(model)
    report = accelerate(model, measure=False)
    assert {row.kind for row in report.plan.rows} == {"sparse"}
    nets.check_exact(model, dense, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("kind", ["compact", "sparse"])
def test_every_kind_is_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"compact": "sparse", "sparse": "compact"}[kind]
    ms = {kind: 0.1, other: 0.2, "dense": 1.0, "dense here": 1.0, "winograd": 0.3}
    monkeypatch.setattr(
        "opentrans_kernels.plan.choose.interleaved_ms",
        lambda calls, *a: {name: [ms[name]] for name in calls},
    )
    model = nets.tower()
    masks = nets.killing_masks(model)
    dense = nets.masked(model, masks)
    report = accelerate(model, masks, plan=make_plan(model, masks), measure=False)
    assert {row.kind for row in report.plan.rows} == {kind}
    for size in SIZES:
        nets.check_exact(Trunk(model), Trunk(dense), torch.randn(2, 3, *size))
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    other_x = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    dense(other_x).square().sum().backward()
    scale = float(other_x.grad.abs().max())
    assert scale > 0
    assert float((x.grad - other_x.grad).abs().max()) < 1e-4 * scale


def test_modules_are_replaced_under_their_names() -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    assert isinstance(model.conv2, SparseConv2d)
    assert isinstance(model.bn2, FoldedBatchNorm) and isinstance(model.act2, FoldedActivation)
    assert isinstance(model.layer3[0], AcceleratedBlock)
    assert type(model.layer3) is nn.Sequential and model.layer3[0].stride == 2
    trunk = find_trunk(model)  # sees through the replacements
    assert len(trunk.blocks) == 4 and trunk.stem is not None
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(twin(x), model(x))
    restore(twin)
    assert type(twin.conv2) is nn.Conv2d and isinstance(model.conv2, SparseConv2d)


def _emptied(model: nn.Module, *names: str) -> MaskSet:
    masks = dict(nets.random_masks(model).masks)
    return MaskSet.from_tensors({n: m & (n not in names) for n, m in masks.items()})


def test_an_all_zero_layer_is_legal() -> None:
    model = nets.tower()
    masks = _emptied(model, "layer2.0.conv2", "layer3.0.conv1", "layer1.0.conv3")
    dense = nets.masked(model, masks)
    accelerate(model, masks, measure=False)
    nets.check_exact(Trunk(model), Trunk(dense), torch.randn(2, 3, 65, 64))


def test_an_all_zero_layer_that_cuts_the_network_makes_its_output_constant() -> None:
    model = nets.tower()
    masks = _emptied(model, "conv2")
    dense = nets.masked(model, masks)
    accelerate(model, masks, measure=False)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x)[0], model(x)[1])
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)


def test_no_zeros_changes_nothing_and_says_so() -> None:
    model = nets.tower()
    before = nets.snapshot(model)
    report = accelerate(model)
    nets.check_unchanged(model, before)
    assert not report.accelerated and report.speedup is None
    assert "nothing to gain" in str(report) and "everything" in str(report)
    restore(model)  # fine after accelerate, whatever it decided
    with pytest.raises(PlanError, match="no accelerated module"):
        restore(model)


def test_twice_is_an_error_and_restore_makes_room() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    accelerate(model, masks, measure=False)
    before = nets.snapshot(model)
    for call in (accelerate, make_plan):
        with pytest.raises(UnsupportedModelError, match="restore"):
            call(model, masks)
    nets.check_unchanged(model, before)
    restore(model)
    accelerate(model, masks, measure=False)


def test_report_is_measured_and_readable() -> None:
    model = nets.tower()
    report = accelerate(model, nets.random_masks(model, 0.1))
    assert report.speedup is not None and report.speedup > 0
    text, record = str(report), report.to_dict()
    assert f"{report.speedup:.2f}x" in text
    assert ("bytes per nonzero" in text) == (report.bytes_per_nonzero is not None)
    assert record["speedup"] == report.speedup and record["plan"]["units"]
    assert report.packed_bytes > 0


def _clock(before: float, after: float):  # type: ignore[no-untyped-def]
    def measure(*calls: Callable[[], object]) -> PairTiming:
        for call in calls:
            call()
        return PairTiming(before, after, before / after, before / after, 3)

    return measure


def test_a_slower_whole_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPARE, "measure_pair", _clock(1.0, 1.5))
    model = nets.tower()
    nets.random_masks(model).apply_(model)
    before = nets.snapshot(model)
    report = accelerate(model)
    nets.check_unchanged(model, before)
    assert not report.accelerated and report.speedup == 1.0
    assert {row.kind for row in report.plan.rows} == {"dense"}
    assert "would be slower" in str(report)


def test_a_slower_whole_keeps_masks_that_are_not_in_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COMPARE, "measure_pair", _clock(1.0, 1.5))
    model = nets.tower()
    masks = nets.random_masks(model)
    dense, before = nets.masked(model, masks), nets.snapshot(model)
    report = accelerate(model, masks)
    assert {row.kind for row in report.plan.rows} == {"compact"}
    assert "with the masks applied" in str(report)
    nets.check_exact(model, dense, torch.randn(1, 3, 64, 64))
    restore(model)
    nets.check_unchanged(model, before)


@pytest.mark.parametrize("fail_at", [0, 5, 18])
def test_a_failure_midway_changes_nothing(fail_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentrans_kernels.pack import SparseWeight

    pack, calls = SparseWeight.from_dense.__func__, []

    def failing(cls: type, *args: object, **kwargs: object) -> SparseWeight:
        calls.append(1)
        if len(calls) > fail_at:
            raise MemoryError("no room")
        return pack(cls, *args, **kwargs)

    monkeypatch.setattr(SparseWeight, "from_dense", classmethod(failing))
    model = nets.tower()
    before = nets.snapshot(model)
    with pytest.raises(MemoryError):
        accelerate(model, nets.random_masks(model), measure=False)
    nets.check_unchanged(model, before)


@pytest.mark.parametrize("stage", ["error", "timing"])
def test_a_failure_while_measuring_changes_nothing(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_before: object, after: Callable[[], object]) -> None:
        after()
        raise KeyboardInterrupt

    if stage == "timing":
        monkeypatch.setattr(COMPARE, "measure_pair", failing)
        expected: type[BaseException] = KeyboardInterrupt
    else:
        monkeypatch.setattr(COMPARE, "BROKEN", 1e-12)
        expected = UnsupportedModelError
    model = nets.tower()
    before = nets.snapshot(model)
    with pytest.raises(expected):
        accelerate(model, nets.random_masks(model))
    nets.check_unchanged(model, before)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_other_resnets(family: str, name: str) -> None:
    if family == "torchvision":
        models = pytest.importorskip("torchvision.models.resnet")
        block = models.BasicBlock if name == "resnet18" else models.Bottleneck
        model = models.ResNet(block, [1, 1, 1, 1], num_classes=5)
    else:
        models = pytest.importorskip("timm.models.resnet")
        block = models.BasicBlock if name == "resnet18" else models.Bottleneck
        model = models.ResNet(block, (1, 1, 1, 1), num_classes=5)
    nets.randomise(model)
    masks = nets.random_masks(model, 0.1)
    dense = nets.masked(model, masks)
    report = accelerate(model, masks, input_size=(64, 64), measure=False)
    assert {row.kind for row in report.plan.rows} == {"sparse"}
    for size in ((64, 64), (45, 75)):
        nets.check_exact(model, dense, torch.randn(2, 3, *size))


def test_a_tower_inside_a_clip_model_and_loose_convolutions() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nets.tower()
            self.text = nn.Linear(4, 64)
            self.head = nn.Sequential(nn.Conv2d(2, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU())

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.visual(image) @ self.text(text).T + self.head(image[:, :2]).mean()

    model = nets.randomise(Clip())
    tower_masks = nets.random_masks(model.visual)
    dense = copy.deepcopy(model)
    tower_masks.apply_(dense.visual)
    report = accelerate(model, tower_masks, measure=False)
    assert report.plan.kind("visual.layer1.0") == "sparse"
    image, text = torch.randn(2, 3, 64, 64), torch.randn(3, 4)
    with torch.no_grad():
        reference = copy.deepcopy(dense).double()(image.double(), text.double())
        error = (model(image, text).double() - reference).abs().max() / reference.abs().max()
    assert float(error) < 2e-6


def test_any_module_with_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Conv2d(8, 4, 2, dilation=(2, 1)),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
    )  # fmt: skip
    nets.randomise(model)
    masks = nets.random_masks(model, 0.3)
    dense = nets.masked(model, masks)
    report = accelerate(model, masks, input_size=(20, 20))
    kinds = {unit.name: unit.kind for unit in report.plan.units}
    assert kinds["4"] == kinds["5"] == "compact"  # masked, but not on the kernels
    nets.check_exact(model, dense, torch.randn(2, 3, 19, 23))


def test_a_network_without_a_recognised_stem_is_measured_through_its_own_forward() -> None:
    models = pytest.importorskip("timm.models.resnet")
    options = {"stem_type": "deep", "avg_down": True, "num_classes": 5}
    model = nets.randomise(models.ResNet(models.Bottleneck, (1, 1, 1, 1), **options))
    masks = nets.random_masks(model, 0.1)
    dense = nets.masked(model, masks)
    report = accelerate(model, masks, input_size=(64, 64))
    assert report.measured == "model at 64x64" and report.speedup is not None
    nets.check_exact(model, dense, torch.randn(2, 3, 50, 64))


def test_pruned_modules_work_and_keep_their_keys() -> None:
    from torch.nn.utils import prune

    model = nets.tower()
    for conv in nets.convs(model).values():
        prune.random_unstructured(conv, "weight", 0.8)
    model.requires_grad_(False)
    keys = list(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    report = accelerate(model, measure=False)
    assert {row.kind for row in report.plan.rows} == {"sparse"}
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_channels_last_model() -> None:
    model = nets.tower().to(memory_format=torch.channels_last)
    masks = nets.random_masks(model, 0.5)
    dense = nets.masked(model, masks)
    accelerate(model, masks)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    nets.check_exact(model, dense, x)


def test_export_with_a_dynamic_batch() -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    x = torch.randn(3, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(x), model(x))


def test_compiles_into_one_graph() -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compiled(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_inductor_compiles_the_accelerated_model() -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_no_allocation_growth() -> None:
    resource = pytest.importorskip("resource")
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(50):
            model(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(1000):
            model(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # KB
