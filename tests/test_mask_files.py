"""Reading every kind of mask file; writing the packed one."""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import Tower, masked_state, pruned_state, random_masks, write_kind
from torch import nn

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import (
    READERS,
    MaskSet,
    Provenance,
    load_masks,
    open_checkpoint,
    read_state_dict,
)


@pytest.fixture
def tower() -> nn.Module:
    torch.manual_seed(0)
    return Tower()


@pytest.mark.parametrize("kind", list(READERS))
def test_every_kind_is_detected_and_gives_the_same_masks(kind, tower, tmp_path):
    masks = random_masks(tower)
    path = tmp_path / "masks.any"  # the name tells nothing
    write_kind(kind, path, tower, masks)
    loaded = load_masks(path)
    assert loaded.source.kind == kind
    assert loaded.content_hash() == MaskSet(masks).content_hash()
    for name, mask in masks.items():
        assert loaded.masks[name].dtype == torch.bool
        assert torch.equal(loaded.masks[name], mask)
    assert loaded.nnz == sum(int(m.sum()) for m in masks.values())
    assert loaded.density() == pytest.approx(loaded.nnz / loaded.numel)
    assert loaded.source.path == str(path) and len(loaded.source.sha256) == 64
    assert not loaded.source.synthetic


def test_opentrans_sections_other_than_backbone_keep_their_name(tower, tmp_path):
    masks = random_masks(tower)
    head = {f"conv2.weight_{kind}": torch.ones(8, 5, 3, 3) for kind in ("mask", "orig")}
    path = tmp_path / "a.pth"
    torch.save({"backbone": pruned_state(tower, masks), "sem_seg_head": head}, path)
    loaded = load_masks(path)
    assert torch.equal(loaded.masks["conv2"], masks["conv2"])  # not overwritten by the head's
    assert loaded.match(Tower()).unmatched_masks == ["sem_seg_head.conv2"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
@pytest.mark.parametrize("suffix", ["", ".weight", ".weight_mask", ".mask"])
def test_plain_masks_of_any_dtype_and_key(dtype, suffix, tower, tmp_path):
    masks = random_masks(tower)
    torch.save({"masks": {k + suffix: m.to(dtype) for k, m in masks.items()}}, tmp_path / "m.pt")
    loaded = load_masks(tmp_path / "m.pt")
    assert loaded.content_hash() == MaskSet(masks).content_hash()
    assert loaded.source.kind == ("prune" if suffix == ".weight_mask" else "plain")


def test_old_pth_format_and_safetensors(tower, tmp_path):
    from safetensors.torch import save_file

    masks = random_masks(tower)
    expected = MaskSet(masks).content_hash()
    state = masked_state(tower, masks)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "d.safetensors")
    save_file({k: m.to(torch.uint8) for k, m in masks.items()}, tmp_path / "p.safetensors")
    kinds = {"old.pth": "dense", "d.safetensors": "dense", "p.safetensors": "plain"}
    for file, kind in kinds.items():
        loaded = load_masks(tmp_path / file)
        found = {n: m for n, m in loaded.masks.items() if n != "conv1"}
        assert (MaskSet(found).content_hash(), loaded.source.kind) == (expected, kind), file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_torchscript_archive_is_read_as_weights(dtype, traced, tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 5, 1)))
    model = wrapped_sequential(layers).eval()
    with torch.no_grad():
        layers[0].weight[1] = 0
    script = torch.jit.trace(model, torch.randn(1, 3, 5, 5)) if traced else torch.jit.script(model)
    script.to(dtype).save(str(tmp_path / "ts.pt"))
    monkeypatch.setattr(torch.jit, "load", None)  # must not be needed
    assert open_checkpoint(tmp_path / "ts.pt").container == "torchscript"
    state = read_state_dict(tmp_path / "ts.pt")
    expected = model.to(dtype).state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in expected.items())
    loaded = load_masks(tmp_path / "ts.pt")
    assert loaded.source.kind == "dense"
    assert loaded.content_hash() == MaskSet.from_model_zeros(model).content_hash()
    assert loaded.numel - loaded.nnz == 27


def wrapped_sequential(layers: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(OrderedDict(visual=layers))


def test_pth_written_without_checksums(tower, tmp_path):
    masks = random_masks(tower)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(masks, tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_masks(tmp_path / "m.pth").content_hash() == MaskSet(masks).content_hash()


def test_read_state_dict_folds_pruned_weights(tower, tmp_path):
    masks = random_masks(tower)
    expected = masked_state(tower, masks)
    torch.save(pruned_state(tower, masks), tmp_path / "p.pth")
    state = read_state_dict(tmp_path / "p.pth")
    assert set(state) == set(expected)
    assert all(torch.equal(state[k], v) for k, v in expected.items())


def test_entries_passed_over_are_noted(tower, tmp_path):
    masks = random_masks(tower)
    state = pruned_state(tower, masks)
    head = {"bias_mask": torch.zeros(7), "bias_orig": torch.zeros(7)}
    state |= {f"head.{key}": value for key, value in head.items()}
    file = {"model": state, "ema": {"x": torch.ones(2)}, "step": 7}
    torch.save(file, tmp_path / "p.pth")
    notes = load_masks(tmp_path / "p.pth").source.notes
    assert notes["taken from entry"] == "model"
    assert notes["entries passed over"] == "ema"
    assert notes["masks of other parameters, not used"] == "head.bias_mask"


def test_masks_that_remove_nothing_from_norms_are_left_out(tower, tmp_path):
    file = random_masks(tower) | {"layer1.0.bn1.weight": torch.ones(3)}
    torch.save(file, tmp_path / "p.pth")
    loaded = load_masks(tmp_path / "p.pth")
    assert loaded.match(tower, strict=True).complete
    assert "layer1.0.bn1.weight" in loaded.source.notes["entries that remove nothing"]


def test_all_zero_layer_and_no_zeros_are_legal(tower, tmp_path):
    masks = random_masks(tower)
    masks["layer1.0.conv2"] = torch.zeros_like(masks["layer1.0.conv2"])
    masks["layer1.0.conv3"] = torch.ones_like(masks["layer1.0.conv3"])
    for kind in READERS:
        write_kind(kind, tmp_path / kind, Tower(), masks)
        loaded = load_masks(tmp_path / kind)
        assert not loaded.masks["layer1.0.conv2"].any() and loaded.masks["layer1.0.conv3"].all()
    full = {n: torch.ones_like(m) for n, m in masks.items()}
    empty = {n: torch.zeros_like(m) for n, m in masks.items()}
    for kind in READERS:
        write_kind(kind, tmp_path / "full", Tower(), full)
        assert load_masks(tmp_path / "full").density() == 1.0, kind
        write_kind(kind, tmp_path / "empty", Tower(), empty)
        assert load_masks(tmp_path / "empty").density() == 0.0, kind
    write_kind("dense", tmp_path / "full", Tower(), full)
    assert "none" in load_masks(tmp_path / "full").source.notes["zeros of the weights"]


@settings(max_examples=40)
@given(
    shapes=st.lists(
        st.tuples(*[st.integers(1, 9)] * 2, *[st.sampled_from([1, 3])] * 2), min_size=1, max_size=5
    ),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_packed_roundtrip_of_any_shapes(shapes, density, tmp_path_factory):
    masks = {f"m{i}": torch.rand(shape) < density for i, shape in enumerate(reversed(shapes))}
    path = tmp_path_factory.mktemp("packed") / "m"
    MaskSet(masks).save(path)
    loaded = load_masks(path)
    assert list(loaded.masks) == list(masks)
    assert all(torch.equal(loaded.masks[n], m) for n, m in masks.items())


def test_packed_keeps_non_contiguous_masks_in_logical_order(tmp_path):
    mask = (torch.rand(4, 6, 3, 3) < 0.5).to(memory_format=torch.channels_last)
    MaskSet({"c": mask}).save(tmp_path / "m")
    assert torch.equal(load_masks(tmp_path / "m").masks["c"], mask)


def test_same_masks_same_bytes_and_provenance_is_handed_on(tower, tmp_path):
    masks = random_masks(tower)
    torch.save(masks, tmp_path / "origin.pth")
    loaded = load_masks(tmp_path / "origin.pth")
    loaded.save(tmp_path / "a", provenance={"run": "imp-10"})
    loaded.save(tmp_path / "b", provenance={"run": "imp-10"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a").read_bytes()  # no private folders
    load_masks(tmp_path / "a").save(tmp_path / "c")
    notes = load_masks(tmp_path / "c").source.notes
    assert (notes["run"], notes["origin_file"]) == ("imp-10", "origin.pth")
    assert (notes["origin_kind"], notes["origin_sha256"]) == ("plain", loaded.source.sha256)


def test_synthetic_label_survives_saving(tmp_path):
    mask = torch.ones(2, 2, 1, 1, dtype=torch.bool)
    MaskSet({"c": mask}, Provenance("synthetic", synthetic=True)).save(tmp_path / "m")
    loaded = load_masks(tmp_path / "m")
    assert loaded.source.synthetic and "SYNTHETIC" in str(loaded)


def test_rn50_file_is_small_and_loads_fast(tmp_path):
    shapes = [(512, 512, 3, 3)] * 9 + [(2048, 1024, 1, 1)]  # as many weights as an RN50 prunes
    masks = {f"layer.{i}": torch.rand(shape) < 0.1 for i, shape in enumerate(shapes)}
    MaskSet(masks).save(tmp_path / "m")
    numel = sum(m.numel() for m in masks.values())
    assert 23e6 < numel < 24e6
    assert numel / 8 <= (tmp_path / "m").stat().st_size < numel / 8 + 8192
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_masks(tmp_path / "m")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_save_is_all_or_nothing(tower, tmp_path, monkeypatch):
    masks = MaskSet(random_masks(tower))
    target = tmp_path / "m"
    target.write_bytes(b"precious")

    def fail(*_args):
        raise OSError(28, "No space left on device")

    for step in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(CheckpointError, match="No space left.*Nothing was written.*room"):
                masks.save(target)
        assert target.read_bytes() == b"precious"
        assert os.listdir(tmp_path) == ["m"]
    masks.save(target)
    assert load_masks(target).content_hash() == masks.content_hash()
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_paths_that_cannot_be_written(tower, tmp_path):
    masks = MaskSet(random_masks(tower))
    with pytest.raises(CheckpointError, match="directory that exists"):
        masks.save(tmp_path / "missing" / "m")
    with pytest.raises(CheckpointError, match="is a directory. Add a file name"):
        masks.save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="directory that exists"):
        masks.save(tmp_path / "file" / "m")
    assert os.listdir(tmp_path) == ["file"]
