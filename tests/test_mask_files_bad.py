"""Bad mask files: each is one clear error, and nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from mask_cases import Tower, pruned_state, random_masks, write_kind
from safetensors.torch import save_file
from torch import nn

from opentrans_kernels.errors import CheckpointError, MaskError, OpenTransError
from opentrans_kernels.masks import READERS, MaskSet, load_masks, packed, read_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


class Touch:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"{sys.executable} -c \"open({str(self.path)!r}, 'w')\"",)


def with_records(path: Path, changes: dict[str, bytes]) -> None:
    """Rewrite a zip archive with some records (by ending) replaced."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for ending, data in changes.items():
        [name] = [n for n in records if n.partition("/")[2] == ending]
        records[name] = data
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Conv2d(2, 3, 1), torch.ones(1, 2, 1, 1)), str(path))


@pytest.fixture
def masks() -> dict[str, torch.Tensor]:
    return random_masks(Tower())


def test_the_pickle_used_below_is_really_harmful(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("container", ["pickle", "zip", "old", "nested", "torchscript"])
def test_malicious_pickle_is_refused_and_not_run(container, masks, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    payload = pickle.dumps(Touch(marker), protocol=2)
    if container == "pickle":
        path.write_bytes(payload)
    elif container == "torchscript":
        script(path)
        with_records(path, {"data.pkl": payload})
    elif container == "nested":
        torch.save({"state_dict": masks, "extra": [Touch(marker)]}, path)
    else:
        new = container == "zip"
        torch.save(masks | {"x": Touch(marker)}, path, _use_new_zipfile_serialization=new)
    for read in (load_masks, read_state_dict):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert not marker.exists()
        assert "system" in str(error.value) and "trust" in str(error.value)


@pytest.mark.parametrize(
    "name", ["builtins.getattr", "torch.load", "torch.jit.load", "os.system", "__torch__x.Y"]
)
def test_torchscript_reader_knows_no_other_names(name, tmp_path):
    script(tmp_path / "ts.pt")
    module, _, attribute = name.rpartition(".")
    pickled = b"\x80\x02c" + f"{module}\n{attribute}\n.".encode()
    with_records(tmp_path / "ts.pt", {"data.pkl": pickled})
    with pytest.raises(CheckpointError, match=f"asks for {name}.*not run"):
        load_masks(tmp_path / "ts.pt")


def test_torchscript_tensors_cannot_reach_beyond_their_storage(tmp_path):
    script(tmp_path / "ts.pt")
    with zipfile.ZipFile(tmp_path / "ts.pt") as archive:
        [name] = [n for n in archive.namelist() if n.partition("/")[2] == "data.pkl"]
        pickled = archive.read(name)
    stretched = pickled.replace(b"K\x03K\x02K\x01K\x01", b"K\xffK\x02K\x01K\x01")
    assert stretched != pickled
    with_records(tmp_path / "ts.pt", {"data.pkl": stretched})
    with pytest.raises(CheckpointError, match="out of bounds"):
        load_masks(tmp_path / "ts.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes.*Get it again"),
        (b"hello, this is no checkpoint", "not a checkpoint: it begins with.*Pass a .pth"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!doctype html><html>", "web page. Download the file"),
        (b"\x1f\x8b\x08abc", "gunzip"),
        (b"\x93NUMPY\x01", "NumPy array. Save a dict"),
        (b"\x80", "truncated, damaged.*again"),
        (b"PK\x03\x04 but not a zip", "truncated, damaged.*again"),
        ((10**6).to_bytes(8, "little") + b'{"a"', "header needs.*again"),
        (pickle.dumps([1, 2]), "truncated, damaged or not a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(content, words, tmp_path):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load_masks(tmp_path / "f.pth")


def test_missing_file_directory_and_unreadable_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist. Check the path"):
        load_masks(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="is a directory. Pass the checkpoint file"):
        load_masks(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_masks("a\0b")
    if os.geteuid():  # root may read anything
        (tmp_path / "secret").write_bytes(b"x")
        (tmp_path / "secret").chmod(0)
        with pytest.raises(CheckpointError, match="permissions"):
            load_masks(tmp_path / "secret")


def test_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("a/photo.jpg", b"x")
    with pytest.raises(CheckpointError, match=r"zip archive but not.*a/photo\.jpg.*Pass"):
        load_masks(tmp_path / "f.pth")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", [*READERS, "torchscript"])
def test_truncated_files_of_every_kind(kind, share, masks, tmp_path):
    path = tmp_path / "f"
    script(path) if kind == "torchscript" else write_kind(kind, path, Tower(), masks)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="truncated, damaged or not a checkpoint.*again"):
        load_masks(path)


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    weight = torch.arange(1.0, 37.0).reshape(4, 1, 3, 3)
    torch.save({"c.weight": weight}, tmp_path / "f.pth")
    data = bytearray((tmp_path / "f.pth").read_bytes())
    at = data.index(weight.numpy().tobytes())
    data[at + 2] ^= 1
    (tmp_path / "f.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have its recorded checksum.*again"):
        load_masks(tmp_path / "f.pth")


@pytest.mark.parametrize("kind", [*READERS, "torchscript"])
def test_random_damage_never_gives_anything_but_an_error_or_masks(kind, masks, tmp_path):
    path = tmp_path / "f"
    script(path) if kind == "torchscript" else write_kind(kind, path, Tower(), masks)
    data, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 4, 64])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert isinstance(load_masks(path), MaskSet)
        except OpenTransError:
            refused += 1
    assert refused > 20


def test_objects_that_are_not_tensors_are_refused_by_name(tmp_path):
    torch.save({"model": Tower()}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"asks for .*Tower.*Nothing was executed.*state_"):
        load_masks(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "holds a list.*Save the masks or weights as a dict"),
        (torch.ones(2), "holds a Tensor"),
        ({"epoch": 3}, "no tensors"),
        ({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}, r"several dicts.*\(a, b\)"),
    ],
)
def test_checkpoints_without_one_dict_of_tensors(content, words, tmp_path):
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(OpenTransError):
        load_masks(tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=words):
        read_state_dict(tmp_path / "f.pth")


def test_readable_files_without_masks(tmp_path):
    torch.save({"bias": torch.randn(3), "fc.weight": torch.randn(3, 3)}, tmp_path / "f.pth")
    with pytest.raises(MaskError, match="no masks, no convolution weights .*Known kinds: packed"):
        load_masks(tmp_path / "f.pth")


@pytest.mark.parametrize("bad", [2.0, -1.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["plain", "prune", "opentrans"])
def test_values_other_than_0_and_1(kind, bad, masks, tmp_path):
    values = {n: m.float() for n, m in masks.items()}
    values["layer1.0.conv2"][1, 2, 0, 0] = bad
    if kind == "plain":
        content = values
    else:
        content = pruned_state(Tower(), masks)
        content |= {f"{n}.weight_mask": m for n, m in values.items()}
        if kind == "opentrans":
            content = {"backbone": content, "first_conv": {}, "sem_seg_head": {}}
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(MaskError) as error:
        load_masks(tmp_path / "f.pth")
    for word in ("layer1.0.conv2", "1 values other than 0 and 1", f"{bad:g}", "(1, 2, 0, 0)"):
        assert word in str(error.value)
    assert "threshold" in str(error.value)


def test_integer_masks_with_other_values(masks, tmp_path):
    values = {n: m.to(torch.uint8) * 255 for n, m in masks.items()}  # an image's idea of a mask
    torch.save(values, tmp_path / "f.pth")
    with pytest.raises(MaskError, match="other than 0 and 1, the first 255"):
        load_masks(tmp_path / "f.pth")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_dense_weights_that_are_not_finite(bad, masks, tmp_path):
    state = Tower().state_dict()
    state["layer2.0.conv3.weight"][0, 0, 0, 0] = bad
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(MaskError, match=r"layer2\.0\.conv3.*1 values.*NaN or inf.*earlier"):
        load_masks(tmp_path / "f.pth")


def test_mask_and_weight_of_different_shapes(masks, tmp_path):
    state = pruned_state(Tower(), masks)
    state["conv2.weight_mask"] = torch.ones(8, 5, 1, 1)
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(MaskError, match=r"conv2\.weight_mask.*\(8, 5, 1, 1\).*\(8, 5, 3, 3\)"):
        load_masks(tmp_path / "f.pth")


def test_masks_that_are_no_ordinary_tensors(tmp_path):
    torch.save({"c.weight_mask": torch.ones(2, 2, 1, 1).to_sparse()}, tmp_path / "f.pth")
    with pytest.raises(MaskError, match="sparse.*Save masks as ordinary"):
        load_masks(tmp_path / "f.pth")
    torch.save({"c.weight_mask": torch.ones(0, 2, 1, 1)}, tmp_path / "f.pth")
    with pytest.raises(MaskError, match=r"is empty, of shape \(0, 2, 1, 1\)"):
        load_masks(tmp_path / "f.pth")
    twice = {"c": torch.ones(2, 2, 1, 1), "c.weight": torch.ones(2, 2, 1, 1)}
    torch.save(twice, tmp_path / "f.pth")
    with pytest.raises(MaskError, match="two masks for module 'c'"):
        load_masks(tmp_path / "f.pth")


def repacked(path: Path, change) -> None:
    """Write a packed file whose header and tensors went through ``change``."""
    import json

    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[packed.METADATA_KEY])
    change(header, tensors)
    save_file(tensors, path, {packed.METADATA_KEY: json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, t: t["conv2"].__setitem__(0, t["conv2"][0] ^ 1), "content hash.*save the masks"),
        (lambda h, t: t.__setitem__("conv2", t["conv2"][1:]), "conv2.*needs 45 bytes"),
        (lambda h, t: t.__setitem__("conv2", t["conv2"].short()), "conv2.*int16"),
        (lambda h, t: t.pop("conv2"), "disagree about.*conv2"),
        (lambda h, t: t.__setitem__("more", torch.ones(1)), "disagree about.*more"),
        (lambda h, t: h["shapes"].__setitem__("conv2", [5, 8, 3, 3]), "content hash"),
        (lambda h, t: h["shapes"].__setitem__("conv2", [-8, -5, 3, 3]), "wrong kind"),
        (lambda h, t: h["shapes"].__setitem__("conv2", ["8"]), "wrong kind"),
        (lambda h, t: h.pop("content_sha256"), "lacks entries"),
        (lambda h, t: h["order"].pop(), "lacks entries"),
        (lambda h, t: h.pop("format_version"), "header is not readable"),
        (lambda h, t: h.__setitem__("format_version", 9), "version 9.*reads 1.*Update"),
    ],
)
def test_packed_files_that_were_changed(change, words, masks, tmp_path):
    MaskSet(masks).save(tmp_path / "m")
    repacked(tmp_path / "m", lambda header, tensors: None)
    assert load_masks(tmp_path / "m").content_hash() == MaskSet(masks).content_hash()
    repacked(tmp_path / "m", change)
    with pytest.raises(MaskError, match=words):
        load_masks(tmp_path / "m")


def test_packed_header_that_is_no_json(tmp_path):
    save_file({"c": torch.ones(1, dtype=torch.uint8)}, tmp_path / "m", {packed.METADATA_KEY: "{"})
    with pytest.raises(MaskError, match="header is not readable"):
        load_masks(tmp_path / "m")


def test_no_torch_load_without_weights_only(masks, tmp_path, monkeypatch):
    seen = []
    real = torch.load

    def spy(*args, **kwargs):
        seen.append(kwargs.get("weights_only"))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    torch.save(masks, tmp_path / "new.pth")
    torch.save(masks, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "old.pth"):
        load_masks(tmp_path / name)
    assert seen == [True, True]
    with pytest.raises(CheckpointError):
        (tmp_path / "io.pth").write_bytes(io.BytesIO(b"\x80\x02}.").getvalue())
        load_masks(tmp_path / "io.pth")
