"""What the benchmarks work on: towers, weights and masks with honest labels; and layer rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from opentrans_kernels.bench import layers, subject
from opentrans_kernels.errors import CheckpointError, MaskError, OpenTransError
from opentrans_kernels.masks import MaskSet

TINY = "torchvision:resnet18"


@pytest.fixture(scope="module")
def tiny() -> subject.Subject:
    return subject.load_subject("uniform:0.80", arch=TINY)


def test_subject_is_labelled_and_counts(tiny: subject.Subject) -> None:
    assert tiny.synthetic and "SYNTHETIC weights and mask" in str(tiny.banner())
    assert "synthetic" in tiny.mask and tiny.describe()["synthetic_weights"]
    density = tiny.densities((64, 64))
    first = tiny.model.conv1.weight.numel()
    others = (
        sum(one.weight.numel() for one in tiny.model.modules() if isinstance(one, nn.Conv2d))
        - first
    )
    assert density["parameters"] == pytest.approx(
        (first + 0.2 * others) / (first + others), rel=1e-3
    )
    assert density["flops"] > density["parameters"], "the dense stem has most pixels"
    zeros = tiny.masked_copy().layer1[0].conv1.weight
    assert float((zeros == 0).double().mean()) == pytest.approx(0.8, abs=1e-3)


def test_weights_are_loaded_under_any_prefix(tmp_path: Path) -> None:
    source, target = subject.build_tower(TINY, seed=1), subject.build_tower(TINY, seed=2)
    state = {f"module.visual.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.pth")
    subject.load_weights(target, tmp_path / "weights.pth")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_wrong_weights_change_nothing(tmp_path: Path) -> None:
    model = subject.build_tower(TINY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dict(before)
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="lacks 1 of 122 tensors.*--arch"):
        subject.load_weights(model, tmp_path / "short.pth")
    wide = {
        **before,
        "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1),
        "bn1.weight": before["bn1.bias"],
    }
    torch.save(wide, tmp_path / "wide.pth")
    with pytest.raises(OpenTransError, match="layer1.0.conv1.weight is .64, 64, 1, 1. in the file"):
        subject.load_weights(model, tmp_path / "wide.pth")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_bad_subjects_are_explained(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="recipe such as global:0.90"):
        subject.load_subject("no-such-file.pth", arch=TINY)
    with pytest.raises(MaskError, match="Pass a mask file"):
        subject.load_subject(None, arch=TINY)
    with pytest.raises(OpenTransError, match="not a known library"):
        subject.load_subject("global:0.9", arch="jax:resnet18")
    with pytest.raises(OpenTransError, match="torchvision does not know 'resnet999'"):
        subject.load_subject("global:0.9", arch="torchvision:resnet999")
    foreign = MaskSet({"encoder.0": torch.ones(4, 4, 3, 3, dtype=torch.bool)})
    foreign.save(tmp_path / "foreign.safetensors")
    with pytest.raises(MaskError, match="no mask of .* fits"):
        subject.load_subject(str(tmp_path / "foreign.safetensors"), arch=TINY)


def test_layer_rows_are_exact_and_complete(tiny: subject.Subject) -> None:
    seen: list[str] = []
    rows = layers.measure_layers(
        tiny, (32, 32), rounds=1, warmup_s=0, on_layer=lambda done, total, name: seen.append(name)
    )
    assert [row.name for row in rows] == seen == list(tiny.masks.masks)
    for row in rows:
        assert row.exact, (row.name, row.error, row.dense_error)
        assert row.nnz == int(tiny.masks.masks[row.name].sum())
        assert row.dense_ms > 0 and row.sparse_ms > 0
        assert row.to_dict()["loses"] == (row.speedup < 1)
