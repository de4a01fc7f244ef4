"""What a checkpoint may hold beside tensors, and model-zoo pickles of NumPy arrays."""

from __future__ import annotations

import argparse
import collections
import contextlib
import pickle
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_cases import Tower, random_masks
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import MaskSet, load_masks, open_checkpoint, read_state_dict


def refused(path: Path, words: str) -> None:
    for read in (load_masks, read_state_dict, open_checkpoint):
        with pytest.raises(CheckpointError, match=words):
            read(path)


def test_dict_classes_and_numpy_numbers_are_data(tmp_path: Path) -> None:
    masks = random_masks(Tower())
    before = set(torch.serialization.get_safe_globals())
    content = collections.defaultdict(dict, {"masks": dict(masks)})
    content["score"] = np.float32(0.5)
    content["meta"]["counts"] = np.arange(6, dtype=">i4").reshape(2, 3)
    content["sizes"] = {torch.Size([2])}
    for new in (True, False):
        torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=new)
        found = open_checkpoint(tmp_path / "f.pth").content
        assert type(found) is dict and found["score"] == 0.5
        assert torch.equal(
            found["meta"]["counts"], torch.arange(6, dtype=torch.int32).reshape(2, 3)
        )
        loaded = load_masks(tmp_path / "f.pth")
        assert loaded.content_hash() == MaskSet(masks).content_hash()
    assert set(torch.serialization.get_safe_globals()) == before


class AttributeDict(dict):
    """As Lightning keeps its settings."""


def test_settings_of_known_tools_are_dicts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(AttributeDict, "__module__", "lightning.fabric.utilities.data")
    # torch.save looks the class up under its name.
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = AttributeDict
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": AttributeDict(lr=0.1)}
    torch.save(content, tmp_path / "f.ckpt")
    assert open_checkpoint(tmp_path / "f.ckpt").content["hyper_parameters"] == {"lr": 0.1}


def test_files_with_stand_ins_are_read_by_several_threads(tmp_path: Path) -> None:
    torch.save(collections.defaultdict(list, {"w": torch.ones(2)}), tmp_path / "f.pth")
    errors = []

    def read() -> None:
        try:
            for _ in range(10):
                open_checkpoint(tmp_path / "f.pth")
        except OpenTransError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (frozenset([1]), "frozenset"),
        (Path("a"), r"pathlib\.\w*Path"),
        (slice(1, 2), "slice"),
        (collections.deque([1]), "collections.deque"),
        (np.array([{}], dtype=object), "a NumPy array of dtype 'O8'"),
        (np.zeros(2, dtype=[("a", "f4")]), "a NumPy array of dtype 'V4'"),
        (torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
    ],
)
def test_other_objects_are_refused_by_name(value: Any, name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": value}, tmp_path / "f.pth")
    refused(tmp_path / "f.pth", f"asks for {name}, .*Nothing was executed.*torch.save")


def test_a_namespace_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "f.pth")
    refused(tmp_path / "f.pth", "asks for argparse.Namespace")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_model_zoo_pickles_of_arrays(protocol: int, package: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    weight *= weight > 0
    content = {
        "model": {"stem.conv1.weight": weight, "columns": np.asfortranarray(weight[0, 0])},
        "__author__": "Caffe2",
        "matching_heuristics": True,
    }
    pickled = pickle.dumps(content, protocol=protocol)
    if protocol < 4:  # later ones keep lengths, and names of this NumPy only
        pickled = pickled.replace(b"numpy._core", package.encode())
    (tmp_path / "R-50.pkl").write_bytes(pickled)
    file = open_checkpoint(tmp_path / "R-50.pkl")
    assert file.container == "numpy" and file.content["__author__"] == "Caffe2"
    state = read_state_dict(tmp_path / "R-50.pkl")
    assert torch.equal(state["stem.conv1.weight"], torch.from_numpy(weight))
    assert torch.equal(state["columns"], torch.from_numpy(weight[0, 0]))
    masks = load_masks(tmp_path / "R-50.pkl")
    assert torch.equal(masks.masks["stem.conv1"], torch.from_numpy(weight != 0))


def test_pickles_of_arrays_of_python_2(tmp_path: Path) -> None:
    """Their bytes are strings, which only latin-1 gives back."""
    weight = np.arange(4, dtype=np.float32).reshape(2, 2)
    pickled = pickle.dumps({"w": weight}, protocol=2)
    raw = weight.tobytes()
    old = pickled[: pickled.rindex(b"h\x05X")] + b"U" + bytes([len(raw)]) + raw + b"tbs."
    (tmp_path / "old.pkl").write_bytes(old)
    assert torch.equal(read_state_dict(tmp_path / "old.pkl")["w"], torch.from_numpy(weight))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": np.array([{}], dtype=object)}, "asks for a NumPy array of dtype 'O8'"),
        ({"w": np.array(["a"])}, "asks for a NumPy array of dtype 'U1'"),
        ({"w": np.array(["2020"], dtype="M8[D]")}, "asks for a NumPy array of dtype 'M8'"),
        ({"w": np.ones(2), "x": nn.ReLU()}, "asks for torch.nn.modules.activation.ReLU"),
        ({"w": np.ones(2), "x": print}, "asks for builtins.print"),
        ({"w": 1}, "not of a dict with arrays"),
        ([np.ones(2)], "not of a dict with arrays"),
    ],
)
def test_pickles_of_anything_else(content: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(content, protocol=4))
    refused(tmp_path / "f.pkl", words)


def test_arrays_that_do_not_fit_their_bytes(tmp_path: Path) -> None:
    pickled = pickle.dumps({"w": np.arange(3, dtype=np.float32)}, protocol=2)
    changed = pickled.replace(b"K\x03\x85", b"K\x63\x85", 1)
    assert changed != pickled
    (tmp_path / "f.pkl").write_bytes(changed)
    refused(tmp_path / "f.pkl", r"shape \(99,\) and float32 has 12 bytes")


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of odd dtypes
@pytest.mark.parametrize("key", ["c.weight", "c.weight_mask"])
def test_every_dtype_is_read_or_refused(key: str, tmp_path: Path) -> None:
    tried = 0
    for dtype in DTYPES:
        for shape in ((2, 2, 3, 3), (3,)):
            try:
                tensor = torch.empty(shape, dtype=dtype)
                tensor.untyped_storage().fill_(0)
                torch.save({key: tensor, "c.weight_orig": torch.ones(shape)}, tmp_path / "f")
            except (RuntimeError, KeyError):  # PyTorch cannot make or save it
                continue
            tried += 1
            for read in (load_masks, read_state_dict):
                with contextlib.suppress(OpenTransError):
                    read(tmp_path / "f")
    assert tried > 20


def test_dtypes_that_hold_no_values_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"c.weight": torch.empty(2, 2, 3, 3, dtype=torch.bits8)}, tmp_path / "f")
    refused(tmp_path / "f", "asks for torch.bits8, ")


def test_float8_weights_are_masks_by_their_zeros(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 1, 1) * (torch.arange(12).reshape(4, 3, 1, 1) % 3 == 0)
    torch.save({"c.weight": weight.to(torch.float8_e5m2)}, tmp_path / "f")
    assert torch.equal(load_masks(tmp_path / "f").masks["c"], weight != 0)
