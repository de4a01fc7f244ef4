"""The sparse checkpoint: round trip, size, and files that are wrong in every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    checkpoint,
    restore,
)
from opentrans_kernels.accelerate.compare import Whole
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


def _parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        return header, {key: file.get_tensor(key) for key in file.keys()}


def _edited(
    saved: Path, path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
) -> Path:
    """A file whose header and tensors went through ``change``, with a hash that fits again."""
    header, tensors = _parts(saved)
    change(header, tensors)
    older = header["format_version"] == 1
    header["sha256"] = checkpoint.digest(tensors, None if older else header)
    save_file(tensors, path, {METADATA_KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "change,words",
    [
        ("version", "version 9.*reads 1 to 3.*Update"),
        ("older", "SHA-256"),
        ("no plan", "not readable: plan is None"),
        ("not json", "not readable: it is not JSON"),
        ("brackets", "not readable: its JSON nests"),
        ("shapes", "SHA-256"),
        ("plan", "SHA-256"),
        ("provenance", "SHA-256"),
        ("masks_given", "SHA-256"),
    ],
)
def test_damaged_headers(change: str, words: str, saved: Path, tmp_path: Path) -> None:
    header, tensors = _parts(saved)
    if change == "version":
        header["format_version"] = 9
    elif change == "older":
        header["format_version"] = 1
    elif change == "no plan":
        del header["plan"]
    elif change == "shapes":
        header["shapes"]["conv1"] = [1, 2, 3, 3]
    elif change == "plan":
        header["plan"]["architecture"] = "0" * 64
    elif change == "provenance":
        header["provenance"]["run"] = "another"
    elif change == "masks_given":
        header["masks_given"] = False
    text = {"not json": "{", "brackets": "[" * 200_000 + "]" * 200_000}.get(change)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, {METADATA_KEY: text or json.dumps(header)})
    _refused(path, nets.tower(), CheckpointError, words)


def test_files_of_version_1_are_read(saved: Path, tmp_path: Path) -> None:
    path = _edited(saved, tmp_path / "old", lambda h, t: h.__setitem__("format_version", 1))
    models = [nets.tower(seed=5), nets.tower(seed=6)]
    for one, model in zip((saved, path), models, strict=True):
        assert load_accelerated(one, model).accelerated
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(models[0](x), models[1](x))


def _set(*path: Any, value: Any) -> Callable[..., None]:
    def change(header: Any, _tensors: Any) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


HUGE = 10**400


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "change,error,words",
    [
        (_set("shapes", "conv1", value=[1, 2, 3, 3]), CheckpointError, "other shapes, conv1"),
        (_set("shapes", "conv1", value=[2**30] * 4), CheckpointError, "other shapes, conv1"),
        (_set("shapes", "conv1", value=[HUGE]), CheckpointError, "table of shapes"),
        (_set("shapes", "conv1", value="4"), CheckpointError, "table of shapes"),
        (_set("shapes", value=[]), CheckpointError, "shapes is"),
        (_set("masks_given", value=0), CheckpointError, "masks_given is 0"),
        (_set("plan", value=[]), CheckpointError, "plan is"),
        (_set("plan", "architecture", value="0" * 64), PlanError, "another network"),
        (_set("plan", "architecture", value=7), PlanError, "'architecture' of the plan is 7"),
        (_set("plan", "masks_hash", value=None), PlanError, "'masks_hash'"),
        (_set("plan", "masks_hash", value="0"), PlanError, "other masks"),
        (_set("plan", "input_size", value=[0, 64]), PlanError, "'input_size'"),
        (_set("plan", "input_size", value=[64]), PlanError, "'input_size'"),
        (_set("plan", "input_size", value=[HUGE, 64]), PlanError, "'input_size'"),
        (_set("plan", "input_size", value="64"), PlanError, "'input_size'"),
        (_set("plan", "batch", value=0), PlanError, "'batch'"),
        (_set("plan", "batch", value=True), PlanError, "'batch'"),
        (_set("plan", "batch", value=HUGE), PlanError, "'batch'"),
        (_set("plan", "threads", value="1"), PlanError, "'threads'"),
        (_set("plan", "measured", value=1), PlanError, "'measured'"),
        (_set("plan", "units", value=None), PlanError, "'units'"),
        (_set("plan", "units", 0, value=3), PlanError, "unit 0 is 3"),
        (_set("plan", "units", 0, "kind", value="magic"), PlanError, "unknown kind 'magic'"),
        (_set("plan", "units", 0, "kind", value=[]), PlanError, "unknown kind"),
        (_set("plan", "units", 0, "kind", value="dense"), PlanError, "row 'conv1' is sparse"),
        (_set("plan", "units", 0, "name", value="x"), PlanError, "its unit 'conv1' None"),
        (_set("plan", "units", 1, "name", value="conv1"), PlanError, "twice"),
        (_set("plan", "units", 0, "density", value=float("nan")), PlanError, "'density'"),
        (_set("plan", "units", 0, "dense_ms", value=float("inf")), PlanError, "'dense_ms'"),
        (_set("plan", "units", 0, "reason", value={}), PlanError, "'reason'"),
        (_set("plan", "rows", value=[]), PlanError, "layers are not those"),
        (_set("plan", "rows", 0, "cin", value=-3), PlanError, "'cin' of row 0 is -3"),
        (_set("plan", "rows", 0, "nnz", value=HUGE), PlanError, "'nnz'"),
        (_set("plan", "rows", 0, "nnz", value=2**40), PlanError, "nonzeros of"),
        (_set("plan", "rows", 0, "numel", value=2**40), PlanError, "layers are not those"),
        (_set("plan", "rows", 0, "predicted_ms", value="1"), PlanError, "'predicted_ms'"),
        (_set("plan", "rows", 0, "unit", value=[]), PlanError, "'unit'"),
        (_set("plan", "notes", value=[1]), PlanError, "'notes'"),
        (_set("plan", "totals", value=3), PlanError, "'totals'"),
        (lambda h, t: h["plan"].pop("isa"), PlanError, "lacks 'isa'"),
        (lambda h, t: h["plan"]["units"][0].pop("kind"), PlanError, "lacks 'kind'"),
        (lambda h, t: t.pop("values/conv1"), CheckpointError, "recorded sizes"),
        (lambda h, t: t.pop("mask/conv1"), CheckpointError, "disagree"),
        (lambda h, t: t.__setitem__("values/conv1", torch.ones(1)), CheckpointError, "1 values"),
        (
            lambda h, t: t.__setitem__("values/conv1", t["values/conv1"].double()),
            CheckpointError,
            "recorded sizes",
        ),
        (
            lambda h, t: t.__setitem__(
                "dense/bn1.bias", torch.ones_like(t["dense/bn1.bias"]).int()
            ),
            CheckpointError,
            "bn1.bias is torch.int32",
        ),
        (
            lambda h, t: t["values/conv1"].__setitem__(0, float("nan")),
            UnsupportedModelError,
            "NaN",
        ),
    ],
)
def test_consistent_edits_end_in_an_error(
    change: Any, error: type[Exception], words: str, version: int, saved: Path, tmp_path: Path
) -> None:
    def both(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        header["format_version"] = version
        change(header, tensors)

    path = _edited(saved, tmp_path / "bad.safetensors", both)
    _refused(path, nets.tower(), error, words)


def test_batch_and_size_of_the_plan_cost_nothing(saved: Path, tmp_path: Path, monkeypatch) -> None:
    """The comparison on loading runs on one image of modest size, whatever the plan says."""
    seen = []
    real = Whole.forward

    def spy(self: Whole, x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return real(self, x)

    monkeypatch.setattr(Whole, "forward", spy)

    def change(header: dict[str, Any], _tensors: Any) -> None:
        header["plan"] |= {"batch": 500, "input_size": [2048, 64]}
        header["plan"]["totals"] = {"nnz": None}  # sums are made again

    path = _edited(saved, tmp_path / "x", change)
    report = load_accelerated(path, nets.tower(seed=5))
    assert report.plan.batch == 500 and report.max_rel_err is not None
    assert set(seen) == {(1, 3, 512, 64)}
    assert "weights are nonzero" in str(report.plan)


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
