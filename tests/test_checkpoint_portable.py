"""Sparse checkpoints for other machines: values in half precision, and no plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accel_nets as nets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels import CheckpointError, PlanError, UnsupportedModelError, checkpoint
from opentrans_kernels.checkpoint import METADATA_KEY, provenance_of
from opentrans_kernels.hed import Hed
from opentrans_kernels.towers import build_tower

NOTICE = "Trained from weights of others. Their licence: MIT."


def parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        return header, {key: file.get_tensor(key) for key in file.keys()}


def rewritten(source: Path, target: Path, change: Any) -> Path:
    header, tensors = parts(source)
    change(header, tensors)
    header["sha256"] = checkpoint.digest(tensors, header)
    save_file(tensors, target, {METADATA_KEY: json.dumps(header)})
    return target


@pytest.fixture(scope="module")
def rounded() -> tuple[nn.Module, nn.Module]:
    """A tower whose weights are half precision's, accelerated, and the same masked and dense."""
    model = nets.tower()
    otk.round_to_half(model)
    masks = nets.random_masks(model, 0.1)
    dense = nets.masked(model, masks)
    otk.accelerate(model, masks, measure=False)
    return model, dense


@pytest.fixture(scope="module")
def portable(rounded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "tower.safetensors"
    otk.save_accelerated(
        path, rounded[0], provenance={"notice": NOTICE}, values=torch.float16, plan=False
    )
    return path


def test_half_values_come_back_as_the_same_float32(rounded: Any, tmp_path: Path) -> None:
    model, dense = rounded
    whole, half = tmp_path / "whole", tmp_path / "half"
    otk.save_accelerated(whole, model)
    otk.save_accelerated(half, model, values=torch.float16)
    header, tensors = parts(half)
    assert parts(whole)[0]["format_version"] == 2, "older versions still read what they can"
    assert (header["format_version"], header["values"]) == (3, "float16")
    values = [t for key, t in tensors.items() if key.startswith("values/")]
    assert {t.dtype for t in values} == {torch.float16}
    saved = sum(2 * t.numel() for t in values)
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(saved, abs=200)
    fresh = [nets.tower(seed=5), nets.tower(seed=6)]
    for path, one in zip((whole, half), fresh, strict=True):
        otk.load_accelerated(path, one)
        otk.restore(one)
    for key, tensor in dense.state_dict().items():
        for one in fresh:
            found = one.state_dict()[key]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_values_that_would_change_are_refused_by_layer(tmp_path: Path) -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    otk.round_to_half(model)
    conv = model.layer2[0].conv2
    conv.weight.data[0, 0, 0, 0] = 1 + 2**-12
    masks.masks["layer2.0.conv2"][0, 0, 0, 0] = False
    otk.accelerate(model, masks, measure=False)
    otk.save_accelerated(tmp_path / "pruned", model, values=torch.float16)  # it is not stored
    otk.restore(model)
    masks.masks["layer2.0.conv2"][0, 0, 0, 0] = True
    otk.accelerate(model, masks, measure=False)
    with pytest.raises(
        UnsupportedModelError, match=r"layer2\.0\.conv2, by up to 2\.4e-04.*round_to_half"
    ):
        otk.save_accelerated(tmp_path / "x", model, values=torch.float16)
    with pytest.raises(UnsupportedModelError, match="values=torch.int8 is none"):
        otk.save_accelerated(tmp_path / "x", model, values=torch.int8)
    with pytest.raises(CheckpointError, match="provenance must be text entries"):
        otk.save_accelerated(tmp_path / "x", model, provenance="a run")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_rounding_says_what_it_changed_and_refuses_what_it_cannot() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-10, 3e-8]).view(2, 2, 1, 1)
    model[2].weight.data.fill_(0.5)
    bias = model[0].bias.data.fill_(1 + 2**-12).clone()
    assert otk.round_to_half(model) == {"0": 2**-11, "2": 0.0}
    assert model[0].weight.flatten()[:3].tolist() == [1.0, 1.0, 1 + 2**-10]
    assert model[0].weight.dtype == torch.float32 and torch.equal(model[0].bias, bias)
    for value in (65505.0, -1e6, float("nan"), float("inf")):
        before = model[0].weight.detach().clone()
        model[2].weight.data[0, 0] = value
        model[0].weight.data[0, 0] = 1 + 2**-11
        with pytest.raises(UnsupportedModelError, match="2 has .*Keep this network in float32"):
            otk.round_to_half(model)
        assert model[0].weight.flatten().tolist()[0] == 1 + 2**-11
        model[0].weight.data = before
    with pytest.raises(UnsupportedModelError, match="got str"):
        otk.round_to_half("model")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="computed from others"):
        otk.round_to_half(torch.nn.utils.prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5))
    with pytest.raises(UnsupportedModelError, match="no weights yet"):
        otk.round_to_half(nn.LazyConv2d(2, 1))


def test_an_accelerated_model_is_not_rounded(rounded: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"restore\(model\) first"):
        otk.round_to_half(rounded[0])


def test_without_a_plan_one_is_measured_here(
    portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, _ = parts(portable)
    assert header["plan"] is None
    times = {"sparse": 0.5, "compact": 2.0, "dense": 1.0, "dense here": 1.0, "winograd": 2.0}
    monkeypatch.setattr(
        "opentrans_kernels.plan.choose.interleaved_ms",
        lambda calls, *_: {name: [times[name]] for name in calls},
    )
    model = nets.tower(seed=5)
    report = otk.load_accelerated(portable, model)
    assert report.plan.measured and report.timing is not None
    assert report.plan.input_size == (64, 64)  # the tower's own
    assert "other conditions" not in str(report)
    times["sparse"] = 3.0  # a machine on which sparse loses
    model = nets.tower(seed=5)
    report = otk.load_accelerated(portable, model, input_size=(32, 64))
    assert report.plan.input_size == (32, 64)
    assert "sparse" not in {unit.kind for unit in report.plan.units}


def test_a_plan_of_the_file_is_carried_out_unless_asked(
    rounded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "planned"
    otk.save_accelerated(path, rounded[0])
    path = rewritten(path, tmp_path / "elsewhere", lambda h, _: h["plan"].update(isa="other"))
    report = otk.load_accelerated(path, nets.tower(seed=5))
    assert report.timing is None and "made under other conditions (isa other ->" in str(report)
    with pytest.raises(PlanError, match="the plan is for"):
        otk.load_accelerated(path, nets.tower(), input_size=(32, 32))
    model = nets.tower(seed=5)
    report = otk.load_accelerated(path, model, replan=True, input_size=(32, 32))
    assert report.timing is not None and report.plan.input_size == (32, 32)
    assert "other conditions" not in str(report)


def test_notices_are_kept_with_the_file(portable: Path, tmp_path: Path) -> None:
    found = provenance_of(portable)
    assert found["notice"] == NOTICE and found["model"] == "ModifiedResNet"
    odd = rewritten(portable, tmp_path / "odd", lambda h, _: h.update(provenance=[1]))
    assert provenance_of(odd) == {}
    with pytest.raises(CheckpointError, match="none"):
        provenance_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, _: h.update(values="float64"), "values is 'float64'"),
        (lambda h, _: h.update(values=["float16"]), "values is"),
        (lambda h, _: h.pop("values"), "values is None"),
        (lambda h, _: h.pop("plan"), "plan is None"),
        (lambda h, _: h.update(plan=3), "plan is 3"),
        (lambda h, _: h.update(format_version=2), "plan is None"),
        (lambda h, _: h.update(values="float32"), "recorded sizes"),
        (lambda h, t: t.update({"values/conv1": t["values/conv1"].float()}), "recorded sizes"),
        (lambda h, t: t.update({"values/conv1": t["values/conv1"].view(torch.int16)}), "recorded"),
        (lambda h, t: t.update({"values/conv1": t["values/conv1"][1:]}), "another mask"),
    ],
)
def test_damaged_files(change: Any, words: str, portable: Path, tmp_path: Path) -> None:
    path = rewritten(portable, tmp_path / "bad", change)
    model = nets.tower()
    before = nets.snapshot(model)
    with pytest.raises(CheckpointError, match=words):
        otk.load_accelerated(path, model)
    nets.check_unchanged(model, before)


def test_the_edge_detector_by_its_name_is_five_megabytes(tmp_path: Path) -> None:
    model = build_tower("HED", seed=1)
    masks = otk.MaskSet.from_tensors(
        {
            name: torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.1
            for name, conv in nets.convs(model).items()
            if conv.kernel_size == (3, 3) and name != "blocks.0.0"
        }
    )
    otk.round_to_half(model)
    masks.apply_(model)
    dense = nets.masked(model, None)
    otk.accelerate(model, masks, input_size=(32, 32), measure=False)
    path = tmp_path / "hed.safetensors"
    otk.save_accelerated(path, model, masks, {"notice": NOTICE}, arch="HED", values=torch.float16)
    assert path.stat().st_size < 5.2e6
    loaded, report = otk.load_accelerated(path)
    assert type(loaded) is Hed and report.accelerated
    x = 60 * torch.randn(1, 3, 31, 43)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    otk.restore(loaded)
    state = dense.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in loaded.state_dict().items())
