"""Models and masks that cannot be accelerated: one clear error each, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import (
    KernelUnavailable,
    MaskError,
    MaskSet,
    OpenTransError,
    UnsupportedModelError,
    accelerate,
    make_plan,
)


def _poison(where: str, value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        tensor = model.state_dict()[where]
        tensor.view(-1)[0] = value

    return change


def _train_one(model: nn.Module) -> None:
    model.layer2[0].bn1.train()


def _negative_variance(model: nn.Module) -> None:
    model.layer3[0].bn2.running_var[1] = -1.0


def _no_statistics(model: nn.Module) -> None:
    model.layer1[0].bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()


def _meta(model: nn.Module) -> None:
    model.to("meta")


CASES: list[tuple[str, Callable[[nn.Module], object], str, str]] = [
    ("nan weight", _poison("layer2.0.conv2.weight", float("nan")), r"layer2\.0\.conv2", "load a"),
    ("inf weight", _poison("conv1.weight", float("inf")), "conv1", "load a"),
    ("nan norm", _poison("layer4.0.bn3.bias", float("nan")), r"layer4\.0", "load a"),
    ("negative variance", _negative_variance, r"layer3\.0\.conv2", "variance"),
    ("training", lambda model: model.train(), "training mode", r"model\.eval\(\)"),
    ("one norm training", _train_one, r"layer2\.0\.bn1", r"model\.eval\(\)"),
    ("no statistics", _no_statistics, r"layer1\.0\.bn1", "running_mean"),
    ("bfloat16", lambda model: model.bfloat16(), "bfloat16", r"model\.float\(\)"),
    ("float16", lambda model: model.half(), "float16", r"model\.float\(\)"),
    ("float64", lambda model: model.double(), "float64", r"model\.float\(\)"),
    ("another device", _meta, "meta", r"model\.cpu\(\)"),
]


@pytest.mark.parametrize("what,change,names,fix", CASES, ids=[case[0] for case in CASES])
def test_models_in_a_bad_state(
    what: str, change: Callable[[nn.Module], object], names: str, fix: str
) -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    change(model)
    modules = {name: id(module) for name, module in model.named_modules()}
    for call in (make_plan, accelerate):
        with pytest.raises(UnsupportedModelError, match=names) as info:
            call(model, masks, measure=False)
        assert re.search(fix, str(info.value)), info.value
    assert {name: id(module) for name, module in model.named_modules()} == modules


def test_things_that_are_no_network_with_convolutions() -> None:
    with pytest.raises(UnsupportedModelError, match=r"SparseConv2d\.from_conv"):
        accelerate(nn.Conv2d(3, 3, 3).eval())
    with pytest.raises(UnsupportedModelError, match="no Conv2d"):
        accelerate(nn.Linear(3, 3).eval())
    with pytest.raises(UnsupportedModelError, match="torch.nn.Module"):
        accelerate({"weights": 1})  # type: ignore[arg-type]


def _refused(masks: object, words: str, model: nn.Module | None = None) -> None:
    model = model or nets.tower()
    before = nets.snapshot(model)
    with pytest.raises(MaskError, match=words):
        accelerate(model, masks, measure=False)  # type: ignore[arg-type]
    nets.check_unchanged(model, before)


def test_masks_of_another_architecture_are_named() -> None:
    other = nets.clip_resnet.ModifiedResNet((1, 2, 1, 1), 64, 4, image_size=64, width=8)
    _refused(nets.random_masks(other), r"layer2\.1\.conv1")


def test_masks_with_wrong_shapes_values_and_names() -> None:
    good = {n: m.float() for n, m in nets.random_masks(nets.tower()).masks.items()}
    _refused({**good, "conv1": torch.ones(4, 3, 1, 1)}, "conv1")
    _refused({**good, "conv1": good["conv1"] * 0.5}, "conv1")
    _refused({**good, "conv1": good["conv1"] * float("nan")}, "conv1")
    _refused({**good, "layer9.0.conv1": torch.ones(4, 3, 1, 1)}, r"layer9\.0\.conv1")
    reads = torch.ones(64, 256).triu()  # the pool reads this layer's weight without calling it
    _refused({**good, "attnpool.c_proj": reads}, "attnpool.*does not call that layer")
    _refused({}, "at least one")


def test_a_mask_for_a_convolution_that_is_left_alone() -> None:
    class Odd(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Odd(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    _refused(MaskSet.from_tensors({"0": torch.zeros(4, 3, 3, 3)}), "left alone", model)


def test_an_image_too_small_for_the_network() -> None:
    model = nets.tower()
    with pytest.raises(OpenTransError, match="larger image"):
        accelerate(model, nets.random_masks(model), input_size=(4, 4))


def test_a_forced_backend_without_its_extension(set_env, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from opentrans_kernels import dispatch, native

    model = nets.tower()
    masks = nets.random_masks(model)
    before = nets.snapshot(model)
    set_env(OPENTRANS_BACKEND="cpu", OPENTRANS_CPU_CAPABILITY=None)
    dispatch._resolve.cache_clear()
    monkeypatch.setattr(native, "load", lambda: False)
    with pytest.raises(KernelUnavailable, match="OPENTRANS_BACKEND"):
        accelerate(model, masks, measure=False)
    dispatch._resolve.cache_clear()
    nets.check_unchanged(model, before)


def test_the_reference_backend_gives_the_same(set_env) -> None:  # type: ignore[no-untyped-def]
    set_env(OPENTRANS_BACKEND="reference")
    model = nets.tower()
    masks = nets.random_masks(model)
    dense = nets.masked(model, masks)
    accelerate(model, masks, measure=False)
    nets.check_exact(model, dense, torch.randn(1, 3, 64, 64))
