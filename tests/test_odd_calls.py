"""Odd models and arguments: each works and is exact, or gets one clear error of our own."""

from __future__ import annotations

from collections.abc import Callable

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import (
    CheckpointError,
    MaskError,
    OpenTransError,
    Plan,
    PlanError,
    SparseConv2d,
    UnsupportedModelError,
    accelerate,
    load_accelerated,
    make_plan,
    restore,
    save_accelerated,
)
from opentrans_kernels.audit import audit


def small() -> nn.Module:
    return nets.randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    )


MODEL = small()
MASKS = nets.random_masks(MODEL, 0.4)
X = torch.randn(2, 3, 16, 16)


def refused(kind: type[OpenTransError], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=words) as info:
        call()
    assert type(info.value) is kind


@pytest.mark.parametrize("masks", [5, [1], ("a",), b"x", torch.ones(3)])
def test_masks_of_a_wrong_type(masks: object) -> None:
    for call in (accelerate, make_plan):
        refused(MaskError, "recipe such as 'global:0.90'", lambda c=call: c(small(), masks))
    refused(MaskError, "load_masks", lambda: audit(masks, small()))


def test_texts_that_name_no_masks() -> None:
    refused(MaskError, "neither a file nor a recipe", lambda: accelerate(small(), "nofile.pt"))
    refused(MaskError, "Did you mean global:0.9", lambda: accelerate(small(), "global:90"))
    refused(CheckpointError, "is a directory", lambda: accelerate(small(), "/"))


@pytest.mark.parametrize("call", [accelerate, make_plan])
def test_a_recipe_is_taken_and_called_synthetic(call: Callable[..., object]) -> None:
    model = small()
    found = call(model, "uniform:0.5", input_size=(16, 16), measure=False)
    plan = found if isinstance(found, Plan) else found.plan  # type: ignore[attr-defined]
    assert "SYNTHETIC" in str(found) and "spec: uniform:0.5" in plan.masks_label
    kept = next(row for row in plan.rows if row.name == "3")
    assert kept.nnz == kept.numel // 2
    assert any(note.startswith("SYNTHETIC mask") for note in plan.notes)


OPTIONS = [
    ({"input_size": "224"}, "height, width"),
    ({"input_size": (16.0, 16)}, "height, width"),
    ({"input_size": (True, 16)}, "height, width"),
    ({"input_size": (16, 16, 3)}, "height, width"),
    ({"input_size": (10**9, 10**9)}, "pixels"),
    ({"batch": 0}, "at least 1"),
    ({"batch": "1"}, "at least 1"),
    ({"batch": True}, "at least 1"),
    ({"threads": "2"}, "at least 1"),
    ({"threads": 1.5}, "at least 1"),
    ({"device": "tpu"}, "is no device"),
    ({"device": "meta"}, "no kernels for it"),
    ({"device": object()}, "is no device"),
]


@pytest.mark.parametrize("options,words", OPTIONS)
def test_options_of_a_wrong_kind(options: dict, words: str) -> None:
    for call in (accelerate, make_plan):
        refused(PlanError, words, lambda c=call: c(small(), MASKS, measure=False, **options))


@pytest.mark.parametrize("plan", [{}, "plan", 5])
def test_plans_of_a_wrong_type(plan: object) -> None:
    refused(PlanError, r"Plan\.from_dict", lambda: accelerate(small(), MASKS, plan=plan))


def test_plan_records_with_odd_entries() -> None:
    record = make_plan(small(), MASKS, input_size=(16, 16), measure=False).to_dict()
    for change, words in (
        ({"batch": "x"}, "'batch' of the plan is 'x'"),
        ({"input_size": ["a", 1]}, "'input_size' of the plan is"),
        ({"units": [5]}, "not a plan record"),
    ):
        refused(
            PlanError, words,
            lambda c=change: accelerate(small(), MASKS, plan=Plan.from_dict({**record, **c})),
        )  # fmt: skip
    report = accelerate(small(), MASKS, plan=Plan.from_dict({**record, "totals": {}}))
    assert report.accelerated


@pytest.mark.parametrize("model", [None, 5, "m", {}, nn.Conv2d])
def test_things_that_are_no_module(model: object) -> None:
    for call in (
        accelerate, make_plan, restore, lambda m: save_accelerated("x.safetensors", m),
        lambda m: load_accelerated("x.safetensors", m),
    ):  # fmt: skip
        refused(UnsupportedModelError, r"torch\.nn\.Module is needed", lambda c=call: c(model))
    if model is not None:
        refused(MaskError, r"torch\.nn\.Module", lambda: audit(MASKS, model))


def test_paths_and_masks_of_a_wrong_type(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = small()
    accelerate(model, MASKS, input_size=(16, 16), measure=False)
    refused(CheckpointError, "is no path", lambda: save_accelerated(None, model))
    refused(CheckpointError, "is no path", lambda: load_accelerated(5, small()))
    path = tmp_path / "x.safetensors"
    refused(MaskError, "must be a MaskSet", lambda: save_accelerated(path, model, masks=5))
    assert not path.exists()


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3)).eval()


def _scripted() -> nn.Module:
    return torch.jit.script(small())


def _traced() -> nn.Module:
    return torch.jit.trace(small(), X)


def _compiled() -> nn.Module:
    return torch.compile(small(), backend="eager")


def _compiled_in_place() -> nn.Module:
    model = small()
    model.compile(backend="eager")
    return model


def _compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(small(), backend="eager"), nn.Conv2d(8, 8, 1)).eval()


def _exported() -> object:
    return torch.export.export(small(), (X,))


def _exported_module() -> nn.Module:
    return _exported().module()


def _used_twice() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3)
    return nn.Sequential(conv, nn.ReLU(), conv).eval()


MODELS = [
    (_lazy, "no shape yet"),
    (_scripted, "TorchScript"),
    (_traced, "TorchScript"),
    (_compiled, "Accelerate first, then compile"),
    (_compiled_in_place, "Accelerate first, then compile"),
    (_compiled_part, "'0' is compiled already"),
    (_exported, "then export it"),
    (_exported_module, "no Conv2d"),
    (_used_twice, "used at 2 places"),
    (lambda: nn.Sequential(), "no Conv2d"),
    (lambda: nn.Sequential(nn.Conv3d(3, 4, 3)).eval(), "no Conv2d"),
    (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)).eval(), "no Conv2d"),
    (lambda: small().bfloat16(), "bfloat16"),
    (lambda: small().half(), "float16"),
    (lambda: small().to("meta"), "meta"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64)).eval(), "complex64"),
]


@pytest.mark.parametrize("make,words", MODELS)
def test_models_that_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    for call in (accelerate, make_plan):
        refused(UnsupportedModelError, words, lambda c=call: c(make(), input_size=(16, 16)))


def _distributed(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def _script_beside(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, torch.jit.script(nn.ReLU())).eval()


def _quantized_beside(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8),
                         torch.ao.nn.quantized.DeQuantize()).eval()  # fmt: skip


WORKING = [
    _distributed,
    _script_beside,
    torch.fx.symbolic_trace,
    lambda model: model.to(memory_format=torch.channels_last),
    lambda model: model.requires_grad_(True),
]


@pytest.mark.parametrize("wrap", WORKING)
def test_models_that_work(wrap: Callable[[nn.Module], nn.Module]) -> None:
    base = small()
    dense = nets.masked(base, MASKS)
    model = wrap(base)
    report = accelerate(model, MASKS, input_size=(16, 16), measure=False)
    assert report.accelerated
    torch.testing.assert_close(model(X), wrap(dense)(X), rtol=1e-4, atol=1e-5)


def test_a_quantised_end_does_not_hinder() -> None:
    base = small()
    model = _quantized_beside(base)
    report = accelerate(model, MASKS, input_size=(16, 16), measure=False)
    assert report.accelerated and model(X).shape == (2, 8, 12, 12)


FROM_CONV = [
    ((5,), UnsupportedModelError, "is int"),
    ((nn.Linear(3, 3),), UnsupportedModelError, "is Linear"),
    ((nn.Conv2d(3, 8, 3), 5), MaskError, "a int"),
    ((nn.Conv2d(3, 8, 3), [1]), MaskError, "a list"),
    ((nn.Conv2d(3, 8, 3), torch.ones(8, 3, 3, 3, device="meta")), MaskError, "on meta"),
    ((nn.Conv2d(3, 8, 3), None, 5), UnsupportedModelError, "bn=None"),
    ((nn.Conv2d(3, 8, 3), None, nn.BatchNorm2d(5).eval()), UnsupportedModelError, "5 channels"),
    ((nn.LazyConv2d(8, 3),), UnsupportedModelError, "no shape yet"),
    ((nn.Conv2d(3, 8, 3).to("meta"),), UnsupportedModelError, "meta"),
]


@pytest.mark.parametrize("given,kind,words", FROM_CONV)
def test_from_conv(given: tuple, kind: type[OpenTransError], words: str) -> None:
    refused(kind, words, lambda: SparseConv2d.from_conv(*given))


def test_a_network_that_answers_differently_each_time() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.randn(())

    model = nets.randomise(Noisy(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    report = accelerate(model, nets.random_masks(model), input_size=(12, 12), measure=False)
    assert report.accelerated and report.max_rel_err is None
    assert any("differently from call to call" in note for note in report.notes)
