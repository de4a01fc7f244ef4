"""``accelerate(..., device="cuda")`` carried out on the CPU: exact, in place, restored, refused."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import accel_nets as nets
import gpu_cases as cases
import pytest
import torch
from torch import nn

from opentrans_kernels import accelerate, restore
from opentrans_kernels.accelerate.cuda import accelerate_cuda
from opentrans_kernels.errors import KernelUnavailable, PlanError, UnsupportedModelError
from opentrans_kernels.gpu import PRECISIONS

OURS = {"gemm": 1.0, "gather": 1.5, "whole trunk, planned": 1.0}


def planned(model, masks, **options):
    given = dict(device="cpu", precision="float32", cache=None, timer=cases.Prices(**OURS))
    return accelerate_cuda(model, masks, **(given | options))


def walk(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    for i in (1, 2, 3):
        x = getattr(net, f"act{i}")(getattr(net, f"bn{i}")(getattr(net, f"conv{i}")(x)))
    found = [net.avgpool(x)]
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        found.append(stage(found[-1]))
    return found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_exact_and_restored_bit_for_bit(mode) -> None:
    model = nets.tower()
    masks = nets.killing_masks(model)
    dense, before = nets.masked(model, masks), nets.snapshot(model)
    report = planned(model, masks)
    assert report.chosen == "planned" and report.speedup == 2.0
    assert "1.000 ms as planned" in str(report) and "error against float64" in str(report)
    json.dumps(report.to_dict())
    assert list(model.state_dict()) == list(before[0])
    x = torch.randn(2, 3, 64, 96)
    with mode():
        found = walk(model, x)
        cases.check_trunk(found, dense, x, "float32")
        # A stage's own input, and one that was written to, are computed from what is in them.
        fresh = found[1].clone()
        torch.testing.assert_close(model.layer2(fresh), found[2])
        found[1].mul_(2)
        expected = forward_like(dense.layer2, found[1])
        torch.testing.assert_close(model.layer2(found[1]), expected, rtol=1e-4, atol=1e-4)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    with pytest.raises(UnsupportedModelError, match="already accelerated"):
        planned(model, masks)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(x[:, :, :, :64]), model(x[:, :, :, :64]))
    with pytest.raises(UnsupportedModelError, match="cannot be pickled"):
        pickle.dumps(model)
    restore(model)
    nets.check_unchanged(model, before)


def forward_like(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return stage(x.clone())


@pytest.mark.parametrize("path", ["conv2.weight", "layer3.0.bn2.running_mean"])
def test_written_weights_are_refused_by_name(path: str) -> None:
    model = nets.tower()
    planned(model, nets.killing_masks(model))
    x, twin = torch.randn(1, 3, 64, 64), copy.deepcopy(model)
    with torch.no_grad():
        want = model(x)
        owner, _, key = path.rpartition(".")
        getattr(model.get_submodule(owner), key).data.add_(1)
        for call in (lambda: model(x), lambda: model.layer2(torch.randn(1, 32, 16, 16))):
            with pytest.raises(UnsupportedModelError, match="restore") as info:
                call()
            assert path in str(info.value)
        assert torch.equal(twin(x), want), "a copy has its own weights"


def test_where_planned_is_not_faster_the_dense_program_runs() -> None:
    model = nets.tower()
    prices = {"gemm": 1.0, "whole trunk, planned": 3.0, "whole trunk, dense": 3.0}
    report = planned(model, None, timer=cases.Prices(**prices))
    assert report.chosen == "dense" and report.speedup == 1.0
    assert any("not faster than the dense one" in note for note in report.notes)
    assert planned(nets.tower(), None, measure=False).speedup is None


def test_half_models_and_outputs_in_the_images_dtype() -> None:
    model = nets.tower().to(torch.bfloat16)
    planned(model, None, precision="bfloat16")
    with torch.no_grad():
        assert walk(model, torch.randn(1, 3, 64, 64))[-1].dtype == torch.float32
        assert walk(model, torch.randn(1, 3, 64, 64).half())[-1].dtype == torch.float16


def test_what_a_planned_trunk_cannot_serve_is_refused_with_the_fix() -> None:
    model = nets.tower()
    planned(model, None)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(UnsupportedModelError, match="torch.no_grad"):
        model(x.requires_grad_())
    x = x.detach()
    with pytest.raises(UnsupportedModelError, match=r"x\.float\(\)"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.int64))
    with pytest.raises(UnsupportedModelError, match=r"Pass x\.to\('cpu'\)"):
        model(x.to("meta"))
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        model(x)
    with pytest.raises(UnsupportedModelError, match="restore"):
        model.eval().load_state_dict(nets.tower(seed=3).state_dict())


def test_bad_arguments_are_refused_and_change_nothing() -> None:
    model = nets.tower()
    before = nets.snapshot(model)
    with pytest.raises(PlanError, match="Use one of float16, bfloat16, tf32, float32"):
        planned(model, None, precision="int8")
    with pytest.raises(PlanError, match="no timer for cpu"):
        planned(model, None, timer=None)
    with pytest.raises(PlanError, match="only mean something with device='cuda'"):
        accelerate(model, None, precision="float16")
    with pytest.raises(PlanError, match="Leave them out"):
        accelerate(model, None, device="cuda", threads=2)
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="sees no CUDA device"):
            accelerate(model, None, device="cuda")
    handle = model.layer2[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="has hooks"):
        planned(model, None)
    handle.remove()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(UnsupportedModelError, match="no recognised stem"):
        planned(plain, None, input_size=(32, 32))
    nets.check_unchanged(model, before)


def _spoiled(make):
    """A maker of programs whose second stage is off by a hundredth."""

    def wrong(*given):
        program = make(*given)
        run = program.stages[1][0].runs[0]
        program.stages[1][0].runs = (lambda *xs: run(*xs) * 1.01, *program.stages[1][0].runs[1:])
        return program

    return wrong


@pytest.mark.parametrize("measure", [True, False])
def test_where_only_the_dense_program_is_exact_it_runs_and_says_so(
    measure: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = nets.tower(), torch.randn(1, 3, 64, 64)
    dense = nets.masked(model, None)
    module = sys.modules[accelerate_cuda.__module__]
    monkeypatch.setattr(module, "program_of", _spoiled(module.program_of))
    report = planned(model, None, measure=measure)
    assert report.chosen == "dense" and report.speedup == (1.0 if measure else None)
    assert any("the planned trunk errs by" in note for note in report.notes)
    assert "the planned trunk errs by" in caplog.text, "never silent"
    with torch.no_grad():
        cases.check_trunk(walk(model, x), dense, x, "float32")


@pytest.mark.parametrize("strict", [True, False])
def test_an_inexact_program_is_never_swapped_in(
    strict: bool, monkeypatch: pytest.MonkeyPatch, set_env
) -> None:
    model = nets.tower()
    before = nets.snapshot(model)
    module = sys.modules[accelerate_cuda.__module__]
    monkeypatch.setattr(module, "program_of", _spoiled(module.program_of))
    if strict:  # the dense program would be right, but it is not what was asked for
        set_env(OPENTRANS_STRICT="1")
    else:
        monkeypatch.setattr(module, "dense_program", _spoiled(module.dense_program))
    with pytest.raises(KernelUnavailable, match="computes something else on this machine"):
        planned(model, None)
    nets.check_unchanged(model, before)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_device(precision: str) -> None:
    model = nets.tower()
    masks = nets.killing_masks(model)
    dense = nets.masked(model, masks)
    accelerate(model.cuda(), masks, device="cuda", precision=precision, cache=None)
    for size in ((1, 64, 64), (2, 96, 64), (1, 64, 64), (1, 64, 64)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            found = [y.cpu() for y in walk(model, x.cuda())]
        cases.check_trunk(found, dense, x, "float16" if precision == "tf32" else precision)
