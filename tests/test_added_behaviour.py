"""Hooks and forwards that users set: always called, or the part stays dense and says why."""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import SparseConv2d, UnsupportedModelError, accelerate, make_plan, restore
from opentrans_kernels.accelerate.cuda import accelerate_cuda
from opentrans_kernels.nn import AcceleratedBlock, AcceleratedConv2d
from opentrans_kernels.stage import AcceleratedStage

KINDS = ("forward", "forward kwargs", "pre", "pre kwargs", "backward", "backward pre")
#: Convolution, norm, activation, pool, block, inner convolution, norm and activation, stage.
PLACES = (
    "conv2", "bn2", "act2", "avgpool", "layer2.0", "layer2.0.conv2", "layer2.0.bn3",
    "layer2.0.act1", "layer2.0.downsample.0", "layer2",
)  # fmt: skip


def register(module: nn.Module, kind: str, seen: list[str]) -> object:
    """A hook of a kind; those of the forward also change what is computed."""
    if kind == "forward":
        return module.register_forward_hook(lambda m, a, out: (seen.append(kind), out * 1.5 - 1)[1])
    if kind == "forward kwargs":
        return module.register_forward_hook(
            lambda m, a, kw, out: (seen.append(kind), out * 1.5 - 1)[1], with_kwargs=True
        )
    if kind == "pre":
        return module.register_forward_pre_hook(lambda m, a: (seen.append(kind), a[0] * 1.5 - 1)[1])
    if kind == "pre kwargs":
        return module.register_forward_pre_hook(
            lambda m, a, kw: (seen.append(kind), ((a[0] * 1.5 - 1,), kw))[1], with_kwargs=True
        )
    if kind == "backward":
        return module.register_full_backward_hook(lambda m, a, b: seen.append(kind))
    return module.register_full_backward_pre_hook(lambda m, a: seen.append(kind))


def run(model: nn.Module, seen: list[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient of the input, and how often the hook was called."""
    before = len(seen)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), x.grad, len(seen) - before


def alike(model: nn.Module, dense: nn.Module, seen: list[str], seen_dense: list[str]) -> None:
    out, grad, calls = run(model, seen)
    want, want_grad, want_calls = run(dense, seen_dense)
    assert calls == want_calls >= 1
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    scale = float(want_grad.abs().max())
    torch.testing.assert_close(grad, want_grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_hook_is_called_wherever_it_is(kind: str, when: str) -> None:
    base = nets.tower()
    nets.random_masks(base).apply_(base)  # so that a part may stay dense
    for module in base.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torch itself refuses backward hooks otherwise
    for place in PLACES if kind == "forward" else ("bn2", "layer2.0.conv2", "layer2"):
        model, dense, seen, seen_dense = copy.deepcopy(base), copy.deepcopy(base), [], []
        if when == "before":
            register(model.get_submodule(place), kind, seen)
            report = accelerate(model, measure=False)
            assert report.accelerated
            if place not in ("avgpool", "layer2"):
                unit = "conv2" if place in ("bn2", "act2") else place
                unit = "layer2.0" if place.startswith("layer2.0") else unit
                reason = next(u.reason for u in report.plan.units if u.name == unit)
                assert reason == f"dense: {place} has hooks, which would not run"
        else:
            accelerate(model, measure=False)
            register(model.get_submodule(place), kind, seen)
        register(dense.get_submodule(place), kind, seen_dense)
        alike(model, dense, seen, seen_dense)


def test_hooks_after_acceleration_see_the_masked_network_and_say_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    dense = nets.masked(model, masks)
    accelerate(model, masks, measure=False)
    x = torch.randn(1, 3, 64, 64)
    fast = model(x)
    handles = []
    for place in ("bn1", "layer3.0.conv2"):
        handles.append(register(model.get_submodule(place), "forward", []))
        register(dense.get_submodule(place), "forward", [])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" since ")[0] for text in told] == [
        "bn1 has hooks", "layer3.0.conv2 has hooks",
    ]  # fmt: skip
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), fast)


def test_hooks_on_the_whole_trunk_and_model_are_called() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nets.tower()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.visual(x)

    model = Wrapper().eval()
    masks = nets.random_masks(model.visual)
    seen: list[str] = []
    register(model, "forward", seen)
    accelerate(model, masks, measure=False)
    register(model.visual, "pre", seen)
    seen.clear()
    model(torch.randn(1, 3, 64, 64))
    assert seen == ["pre", "forward"]


def _five_per_cent(module: nn.Module) -> None:
    dense = module.forward
    module.forward = lambda x: dense(x) * 1.05


def _method(module: nn.Module) -> None:
    dense = type(module).forward
    module.forward = types.MethodType(lambda self, x: dense(self, x) * 1.05, module)


def _conv_forward(module: nn.Module) -> None:
    dense = module._conv_forward
    module._conv_forward = lambda x, w, b: dense(x, w, b) * 1.05


CHANGES: list[tuple[str, str, Callable[[nn.Module], None]]] = [
    ("layer1.0.conv2", "layer1.0", _five_per_cent),
    ("layer1.0.conv2", "layer1.0", _method),
    ("layer1.0.conv2", "layer1.0", _conv_forward),
    ("layer1.0.bn2", "layer1.0", _method),
    ("layer1.0.act2", "layer1.0", _method),
    ("layer1.0", "layer1.0", _method),
    ("conv2", "conv2", _method),
    ("bn2", "conv2", _method),
    ("act2", "conv2", _method),
    ("layer1", "", _method),
]


@pytest.mark.parametrize("place,unit,change", CHANGES)
def test_a_forward_set_on_an_instance_is_what_runs(
    place: str, unit: str, change: Callable[[nn.Module], None]
) -> None:
    base = nets.tower()
    masks = nets.random_masks(base)
    masks.apply_(base)
    x = torch.randn(2, 3, 64, 64)
    for when in ("before", "after"):
        model, dense = copy.deepcopy(base), copy.deepcopy(base)
        change(dense.get_submodule(place))
        if when == "before":
            change(model.get_submodule(place))
        report = accelerate(model, measure=False)
        if when == "after":
            change(model.get_submodule(place))
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
        assert report.accelerated
        if when == "before" and unit:
            inside = [u for u in report.plan.units if u.name == unit or u.name == place]
            assert all(u.kind == "dense" for u in inside)


def test_where_the_mask_must_be_applied_too_the_part_is_named() -> None:
    # Where a block differs from what its names say, it is called, and its convolutions replaced.
    called = ("layer1", "layer1.0", "layer1.0.act2")
    for place, _, change in (case for case in CHANGES if case[0] not in called):
        model = nets.tower()
        change(model.get_submodule(place))
        before = nets.snapshot(model)
        with pytest.raises(UnsupportedModelError) as info:
            accelerate(model, nets.random_masks(model), measure=False)
        assert place in str(info.value) and "report this" not in str(info.value)
        nets.check_unchanged(model, before)


def test_weights_computed_by_others_stay_right() -> None:
    x = torch.randn(1, 3, 64, 64)
    for wrap in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        model = nets.tower()
        nets.random_masks(model, 0.8).apply_(model)
        wrap(model.layer1[0].conv1)
        wrap(model.conv2)
        with torch.no_grad():
            expected = model(x)
            report = accelerate(model, measure=False)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert report.plan.kind("layer1.0") in ("dense", "compact")


def test_a_class_that_overrides_the_call_stays_dense() -> None:
    class Loud(nn.Conv2d):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * 3

    model = nn.Sequential(Loud(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    for conv in nets.convs(model).values():
        conv.weight.data[:, :2] = 0
    x = torch.randn(1, 3, 12, 12)
    expected = model(x)
    report = accelerate(model, input_size=(12, 12), measure=False)
    assert "__call__" in report.dense["0"] and report.plan.kind("1") == "sparse"
    torch.testing.assert_close(model(x), expected)


def test_a_part_that_is_wrong_stays_dense_with_both_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What no check of names or hooks can know: the replacement computes something else."""
    forward = AcceleratedBlock.forward

    def wrong(self: AcceleratedBlock, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return out * (1 + 1e-5) if self.opentrans_original.conv1.in_channels == 32 else out

    monkeypatch.setattr(AcceleratedBlock, "forward", wrong)
    model = nets.tower()
    masks = nets.random_masks(model)
    with pytest.raises(UnsupportedModelError, match=r"layer2\.0 .*against float64"):
        accelerate(model, masks, measure=False)
    masks.apply_(model)
    dense = copy.deepcopy(model)
    report = accelerate(model, measure=False)
    kinds = {u.name: u.kind for u in report.plan.units}
    assert kinds.pop("layer2.0") == "dense" and set(kinds.values()) == {"sparse"}
    assert "a replacement would differ" in report.dense["layer2.0"]
    nets.check_exact(model, dense, torch.randn(2, 3, 64, 64))


def test_the_report_shows_the_worst_part_beside_denses_own_error() -> None:
    model = nets.tower()
    report = accelerate(model, nets.random_masks(model), measure=False)
    worst = report.worst_part
    assert worst is not None and report.parts_checked == 7
    assert worst.name in {u.name for u in report.plan.units}
    assert 0 < worst.error <= worst.bound and worst.dense_error > 0
    assert f"{worst.name}: {worst.error:.1e} against float64" in str(report)
    assert report.to_dict()["worst_part"]["dense_error"] == worst.dense_error


def _functional(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.last(nn.functional.conv2d(x, self.first[0].weight, padding=1))


def _norm_skipped(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert bool(x.isfinite().all())  # no trace gets behind this, so nothing is known of the calls
    return self.last(self.first(x) + self.first[0](x))


class Custom(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6))
        self.last = nn.Conv2d(6, 4, 3)
        self.run = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def test_layers_that_a_forward_uses_in_another_way() -> None:
    x = torch.randn(2, 3, 20, 20)
    model = nets.randomise(Custom(_norm_skipped))
    masks = nets.random_masks(model, 0.3)
    dense = nets.masked(model, masks)
    report = accelerate(model, masks, input_size=(20, 20), measure=False)
    assert "its norm stays" in report.plan.units[0].reason
    nets.check_exact(model, dense, x)

    model = nets.randomise(Custom(_functional))
    masks = nets.random_masks(model, 0.3)
    with pytest.raises(UnsupportedModelError, match=r"first\.0: the model's output changes"):
        accelerate(model, masks, input_size=(20, 20), measure=False)
    masks.apply_(model)
    dense = copy.deepcopy(model)
    assert accelerate(model, input_size=(20, 20), measure=False).accelerated
    nets.check_exact(model, dense, x)


def test_an_activation_that_the_head_uses_too() -> None:
    models = pytest.importorskip("torchvision.models.resnet")

    class Head(models.ResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(super().forward(x))

    model = nets.randomise(Head(models.BasicBlock, [1, 1, 1, 1], num_classes=5))
    masks = nets.random_masks(model, 0.2)
    dense = nets.masked(model, masks)
    accelerate(model, masks, input_size=(64, 64), measure=False)
    x = torch.randn(2, 3, 64, 64)
    assert bool((model(x) == 0).any())
    nets.check_exact(model, dense, x)


def test_an_exchanged_child_is_refused_with_the_fix() -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    model.layer1[0].bn1 = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layer1\.0\.bn1 was .*replaced.*restore"):
        model(torch.randn(1, 3, 64, 64))


def test_from_conv_refuses_what_it_would_not_call() -> None:
    for change in (_method, lambda conv: register(conv, "forward", [])):
        conv = nn.Conv2d(3, 4, 3).eval()
        change(conv)
        with pytest.raises(UnsupportedModelError, match="the convolution has"):
            SparseConv2d.from_conv(conv)


@pytest.mark.parametrize("place", ["act2", "avgpool", "layer2", "layer2.0", "layer2.0.bn1"])
def test_a_planned_trunk_refuses_hooks_before_and_after(place: str) -> None:
    from gpu_cases import Prices

    options = {"device": "cpu", "precision": "float32", "cache": None}
    model = nets.tower()
    handle = register(model.get_submodule(place), "forward", [])
    with pytest.raises(UnsupportedModelError, match=f"{place} has hooks"):
        accelerate_cuda(model, None, timer=Prices(gemm=1.0), **options)
    handle.remove()
    accelerate_cuda(model, None, timer=Prices(gemm=1.0, **{"whole trunk, planned": 1.0}), **options)
    x, seen = torch.randn(1, 3, 64, 64), []
    with torch.no_grad():
        model(x)
        handle = register(model.get_submodule(place), "forward", seen)
        if place == "layer2":  # a stage is called as it was
            model(x)
            assert seen
        else:
            with pytest.raises(UnsupportedModelError, match=f"{place} has hooks since"):
                model(x)
        handle.remove()
        model(x)


def test_compiled_code_sees_hooks_that_are_there() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    masks.apply_(model)
    dense = copy.deepcopy(model)
    accelerate(model, measure=False)
    for net in (model, dense):
        net.layer1[0].conv2.register_forward_hook(lambda m, a, out: out * 1.5)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(x), rtol=1e-4, atol=1e-5)


def test_plans_keep_parts_with_hooks_dense_and_restore_works() -> None:
    model = nets.tower()
    nets.random_masks(model).apply_(model)
    register(model.act2, "forward", [])
    before = nets.snapshot(model)
    assert make_plan(model, measure=False).kind("conv2") == "dense"
    accelerate(model, measure=False)
    assert type(model.conv2) is nn.Conv2d and isinstance(model.conv1, AcceleratedConv2d)
    assert not isinstance(model.layer1, AcceleratedStage)
    restore(model)
    nets.check_unchanged(model, before)
