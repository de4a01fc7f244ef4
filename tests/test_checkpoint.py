"""The sparse checkpoint: round trip, size, and files that are wrong in every way."""

from __future__ import annotations

import json
from pathlib import Path

import accel_nets as nets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opentrans_kernels import (
    CheckpointError,
    PlanError,
    UnsupportedModelError,
    accelerate,
    restore,
)
from opentrans_kernels.checkpoint import METADATA_KEY, load_accelerated, save_accelerated


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tower.safetensors"
    model = nets.tower()
    masks = nets.random_masks(model, 0.1)
    accelerate(model, masks, measure=False)
    save_accelerated(path, model, masks, {"run": "unit test"})
    return path


@pytest.mark.parametrize("given", [True, False])
def test_round_trip(given: bool, tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    model = nets.tower()
    masks = nets.random_masks(model, 0.1)
    dense = nets.masked(model, masks)
    if not given:
        masks.apply_(model)
    accelerate(model, masks if given else None, measure=False)
    save_accelerated(path, model)
    dense_bytes = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    assert path.stat().st_size < 0.75 * dense_bytes  # the attention pool stays dense
    fresh = nets.tower(seed=5)
    report = load_accelerated(path, fresh)
    assert report.accelerated and {row.kind for row in report.plan.rows} == {"sparse"}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    restore(fresh)
    state, expected = fresh.state_dict(), dense.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_masks_of_another_run_are_refused(tmp_path: Path) -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    accelerate(model, masks, measure=False)
    with pytest.raises(PlanError, match="are not those"):
        save_accelerated(tmp_path / "x", model, nets.random_masks(model, seed=7))
    assert not list(tmp_path.iterdir())


def test_only_an_accelerated_model_is_saved(tmp_path: Path) -> None:
    model = nets.tower()
    with pytest.raises(PlanError, match="Call accelerate"):
        save_accelerated(tmp_path / "x", model)
    outer = nn.Sequential(model)
    accelerate(model, nets.random_masks(model), measure=False)
    with pytest.raises(PlanError, match="as a whole"):
        save_accelerated(tmp_path / "x", outer)
    assert not list(tmp_path.iterdir())


def test_a_model_left_dense_can_be_saved_too(tmp_path: Path) -> None:
    model = nets.tower()
    accelerate(model)
    save_accelerated(tmp_path / "x", model)
    fresh = nets.tower(seed=5)
    assert not load_accelerated(tmp_path / "x", fresh).accelerated
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("target", [".", "missing/file"])
def test_unwritable_paths(target: str, tmp_path: Path) -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_accelerated(tmp_path / target, model)
    assert not list(tmp_path.iterdir())


def _refused(path: Path, model: nn.Module, error: type[Exception], words: str) -> None:
    before = nets.snapshot(model)
    with pytest.raises(error, match=words):
        load_accelerated(path, model)
    nets.check_unchanged(model, before)


def test_damaged_files(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    path = tmp_path / "bad.safetensors"
    for content in (b"", data[: len(data) // 2], b"hello"):
        path.write_bytes(content)
        _refused(path, nets.tower(), CheckpointError, "bad.safetensors")
    flipped = bytearray(data)
    flipped[-100] ^= 1
    path.write_bytes(bytes(flipped))
    _refused(path, nets.tower(), CheckpointError, "SHA-256")
    save_file({"conv1.weight": torch.zeros(2)}, path)
    _refused(path, nets.tower(), CheckpointError, "save_accelerated wrote")
    _refused(tmp_path / "none", nets.tower(), CheckpointError, "none")


@pytest.mark.parametrize(
    "change,words",
    [
        ("version", "Update"),
        ("no plan", "not readable"),
        ("not json", "not readable"),
        ("shapes", "recorded sizes"),
        ("plan", "another network"),
    ],
)
def test_damaged_headers(change: str, words: str, saved: Path, tmp_path: Path) -> None:
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if change == "version":
        header["format_version"] = 9
    elif change == "no plan":
        del header["plan"]
    elif change == "shapes":
        header["shapes"]["conv1"] = [1, 2, 3, 3]
    elif change == "plan":
        header["plan"]["architecture"] = "0" * 64
    text = "{" if change == "not json" else json.dumps(header)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, {METADATA_KEY: text})
    error = PlanError if change == "plan" else CheckpointError
    _refused(path, nets.tower(), error, words)


def test_another_architecture_or_state(saved: Path) -> None:
    other = nets.clip_resnet.ModifiedResNet((1, 2, 1, 1), 64, 4, image_size=64, width=8).eval()
    _refused(saved, other, CheckpointError, "another architecture")
    wider = nets.clip_resnet.ModifiedResNet((1, 1, 1, 1), 64, 4, image_size=64, width=16).eval()
    _refused(saved, wider, CheckpointError, "other shapes")
    _refused(saved, nets.tower().train(), UnsupportedModelError, "eval")
    _refused(saved, nets.tower().double(), UnsupportedModelError, "float")
    done = nets.tower()
    accelerate(done, nets.random_masks(done), measure=False)
    _refused(saved, done, UnsupportedModelError, "restore")


def test_provenance_is_kept(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    assert header["provenance"]["run"] == "unit test"
    assert header["provenance"]["model"] == "ModifiedResNet"
