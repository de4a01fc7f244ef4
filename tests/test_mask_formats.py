"""Files as other tools write them, built from the structures recorded in tests/formats."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_cases import compressed
from safetensors.torch import save_file

from opentrans import cli
from opentrans_kernels.errors import CheckpointError, MaskError
from opentrans_kernels.masks import load_masks, read_state_dict

FOLDER = Path(__file__).parent / "formats"
RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
CONVS = {
    "conv1": (8, 3, 7, 7),
    "layer1.0.conv1": (8, 8, 3, 3),
    "layer1.0.conv2": (8, 8, 3, 3),
    "layer2.0.conv1": (16, 8, 3, 3),
    "layer2.0.conv2": (16, 16, 3, 3),
    "layer2.0.downsample.0": (16, 8, 1, 1),
}
#: What to read in place of what the tool's own objects keep from being opened.
INSIDE = {
    "mmengine-ema": "dense",
    "mmengine-pruned": "prune",
    "nni-masks": "plain",
    "torch.ao-both": "plain",
    "torch.ao-sparsifier": "plain",
}
ABSENT = "torch.ao-fake_sparsity"
SEVERAL = ("mmengine-ema", "timm-ema")


def mask_of(conv: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same mask wherever the same convolution's stands."""
    generator = torch.Generator().manual_seed(zlib.crc32(conv.encode()))
    return torch.rand(shape, generator=generator) < 0.4


def conv_of(key: str) -> str:
    """Which layer an entry belongs to, under whatever a tool makes of its name."""
    plain = re.sub(r"\._orig_mod|\._nni_wrapper", "", key.replace(":", "."))
    return max((c for c in (*CONVS, "fc") if re.search(rf"\b{c}\b", plain)), key=len, default="")


def built(recorded: Any, dense: bool, key: str = "") -> Any:
    """Tensors of the recorded shapes; weights of ``dense`` files hold the masks as zeros."""
    if recorded is None:
        return None
    if isinstance(recorded, dict):
        return {k: built(v, dense, f"{key}.{k}") for k, v in recorded.items()}
    dtype, shape, *flags = recorded.split(" ")
    sizes = () if shape == "-" else tuple(map(int, shape.split("x")))
    if flags and len(sizes) > 1:
        return mask_of(conv_of(key), sizes).to(getattr(torch, dtype))
    if flags or not dtype.startswith("float"):
        return torch.ones(sizes, dtype=getattr(torch, dtype))
    weight = torch.randn(sizes) + 1e-3
    if key.endswith(".mask"):  # logits
        return torch.where(mask_of(conv_of(key), sizes), weight.abs(), -weight.abs())
    zeros = dense and len(sizes) == 4 and conv_of(key) != "conv1"
    return weight * mask_of(conv_of(key), sizes) if zeros else weight


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str) -> Path:
        torch.manual_seed(0)
        kind, path = RECORDS[name]["kind"] or INSIDE.get(name), tmp_path / f"{name}.any"
        if kind == "compressed-tensors":
            weights = {f"{conv}.weight": torch.randn(shape) for conv, shape in CONVS.items()}
            masks = {c: mask_of(c, shape) for c, shape in CONVS.items() if c != "conv1"}
            state = compressed(weights, masks)
            recorded = RECORDS[name]["content"]
            for (
                key,
                value,
            ) in state.items():  # what is spelt out in the tests is what the tool wrote
                dtype, sizes, *_ = recorded[key].split(" ")
                assert str(value.dtype) == f"torch.{dtype}" and value.ndim == len(sizes.split("x"))
            save_file({k: v.contiguous() for k, v in state.items()}, path)
        else:
            torch.save(built(RECORDS[name]["content"], kind == "dense"), path)
        return path

    return write


@pytest.mark.parametrize("name", [name for name in RECORDS if name != ABSENT])
def test_recorded_file_gives_its_masks_and_its_masked_weights(name: str, write) -> None:
    record, path = RECORDS[name], write(name)
    loaded = load_masks(path)
    assert loaded.source.kind == (record["kind"] or INSIDE[name])
    if record["kind"]:
        assert sorted(loaded.masks) == record["masks"]
    assert len({conv_of(module) for module in loaded.masks}) >= 2
    whole = ("conv1",) if loaded.source.kind == "dense" else ()
    for module, mask in loaded.masks.items():
        conv = conv_of(module)
        expected = mask_of(conv, tuple(mask.shape))
        if conv in whole:
            expected = torch.ones_like(mask)
        assert torch.equal(mask, expected), module
    if name in SEVERAL:
        with pytest.raises(CheckpointError, match=r"same network 2 times.*state_dict.*after a col"):
            read_state_dict(path)
        path = Path(f"{path}:{'ema_state_dict' if name.startswith('mm') else 'state_dict_ema'}")
    if name in ("nni-masks", "torch.ao-sparsifier"):
        return  # masks alone
    state = read_state_dict(path)
    assert not any("mask" in key or "_orig" in key or "parametri" in key for key in state)
    for module, mask in loaded.masks.items():
        found = [w for k, w in state.items() if k.endswith(f"{conv_of(module)}.weight")]
        assert found and any(torch.equal(weight != 0, mask) for weight in found), module


def test_masks_that_a_tool_leaves_out_of_its_file_are_asked_for_by_name(write) -> None:
    path = write(ABSENT)
    for read in (load_masks, read_state_dict):
        with pytest.raises(MaskError) as error:
            read(path)
        for words in ("layer1.0.conv1.parametrizations.weight.original", "FakeSparsity",
                      "sparsifier.state_dict()", "squash_mask"):  # fmt: skip
            assert words in str(error.value)


@pytest.mark.parametrize("name", list(RECORDS))
def test_every_recorded_file_can_be_inspected(name: str, write, capsys) -> None:
    code = cli.main(["inspect", str(write(name)), "--size", "64"])
    said = capsys.readouterr()
    refusals = {
        ABSENT: "FakeSparsity",
        "torch-parametrize_partly": "--arch",
        "torch-student_teacher": "two networks, student and teacher; FILE:student",
    }
    if name in refusals:
        assert code == 2 and refusals[name] in said.err
        return
    assert code == 0, said.err
    assert "weights kept" in said.out
    loaded = RECORDS[name]
    if loaded["kind"] not in (None, "dense", "plain") and len(loaded["masks"]) < len(CONVS):
        assert "kept of all convolutions in the file" in said.out


def test_a_student_is_inspected_by_name(write, capsys) -> None:
    path = write("torch-student_teacher")
    assert cli.main(["inspect", f"{path}:student", "--size", "64"]) == 0
    assert "6 masks" in capsys.readouterr().out


def test_every_recorded_tool_is_in_the_documentation() -> None:
    text = (FOLDER.parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    for record in RECORDS.values():
        assert f"| {record['tool']} {record['version']} |" in text
