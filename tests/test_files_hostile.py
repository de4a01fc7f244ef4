"""Files that are consistent in one view and not in another, or ask for far more than they hold."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_cases import Tower, random_masks
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import (
    MaskSet,
    archive,
    limits,
    load_masks,
    open_checkpoint,
    pickles,
    read_state_dict,
)
from opentrans_kernels.masks.limits import Malformed, check_nesting, parse_json

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(random_masks(Tower()), tmp_path / "f.pth")
    return tmp_path / "f.pth"


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def rewrite(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in records.items():
            opened.writestr(name, data)


def refused(path: Path, words: str) -> None:
    for read in (load_masks, read_state_dict, open_checkpoint):
        with pytest.raises(CheckpointError, match=words):
            read(path)


# Checksums


@pytest.mark.parametrize("ending", ["data.pkl", "data/0", "data/5", "version", "byteorder"])
def test_one_flipped_bit_in_any_record_is_noticed(ending: str, saved: Path) -> None:
    """Also in the pickle: a renamed mask would be dropped, and hide damage beside it."""
    data = bytearray(saved.read_bytes())
    record = next(r for n, r in records_of(saved).items() if n.partition("/")[2] == ending)
    at = data.index(record, data.index(ending.encode()))
    data[at + len(record) // 2] ^= 1
    saved.write_bytes(data)
    refused(saved, f"{ending}' does not have its recorded checksum")


def test_a_renamed_mask_beside_a_changed_one_is_noticed(saved: Path) -> None:
    data = saved.read_bytes().replace(b"layer1.0.conv2", b"layer1.0.conv9")
    saved.write_bytes(data)
    refused(saved, "data.pkl' does not have its recorded checksum")


def test_files_written_without_checksums_are_read(tmp_path: Path) -> None:
    masks = random_masks(Tower())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(masks, tmp_path / "f.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "f.pth") as opened:
        assert not any(info.CRC for info in opened.infolist())
    found = load_masks(tmp_path / "f.pth")
    assert found.content_hash() == MaskSet(masks).content_hash()


# Zip archives


def test_compressed_archives_are_read_right(saved: Path) -> None:
    """Mapped, their compressed bytes would become values."""
    expected = load_masks(saved).content_hash()
    rewrite(saved, records_of(saved), zipfile.ZIP_DEFLATED)
    assert load_masks(saved).content_hash() == expected


def read_altered(path: Path, alter: Any) -> dict[str, bytes]:
    """Read a valid archive whose directory, once in memory, says something else."""
    with path.open("rb") as file, zipfile.ZipFile(file) as opened:
        alter(opened.filelist)
        return archive.read_archive(opened, file, path.stat().st_size)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compress_type": zipfile.ZIP_DEFLATED}, "described differently"),
        ({"compress_type": 12}, "compressed by method 12"),
        ({"flag_bits": 1}, "encrypted"),
        ({"file_size": 5}, "two sizes"),
        ({"CRC": 7}, "described differently"),
        ({"header_offset": 0}, "overlaps|described differently"),
        ({"compress_size": 10**6, "file_size": 10**6}, "described differently"),
    ],
)
def test_a_directory_that_does_not_describe_its_records(
    fields: dict[str, int], words: str, saved: Path
) -> None:
    rewrite(saved, records_of(saved))

    def alter(records: list[zipfile.ZipInfo]) -> None:
        for name, value in fields.items():
            setattr(records[1], name, value)

    assert "data.pkl" in read_altered(saved, lambda records: None)
    with pytest.raises(Malformed, match=words):
        read_altered(saved, alter)


@pytest.mark.parametrize("magic", [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])
def test_every_byte_of_a_header(magic: bytes, saved: Path) -> None:
    """A damaged header is noticed, or makes no difference."""
    expected, data = load_masks(saved).content_hash(), saved.read_bytes()
    place = data.index(magic, data.index(magic) + 1) if data.count(magic) > 1 else data.index(magic)
    refusals = 0
    for at in range(place, min(place + 46, len(data))):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        saved.write_bytes(changed)
        try:
            assert load_masks(saved).content_hash() == expected
        except CheckpointError:
            refusals += 1
    assert refusals > 0


def test_pytorch_is_given_the_checked_records_only() -> None:
    records = {"data.pkl": b"abc" * 1000, "empty": b"", "data/0": bytes(range(256)) * 300}
    file = io.BufferedReader(archive.PlainArchive(records))
    with zipfile.ZipFile(file) as opened:
        names = opened.namelist()
        for info in opened.infolist():
            del info.CRC
        found = {name.removeprefix("archive/"): opened.read(name) for name in names}
    assert found == records


@pytest.mark.parametrize("other", [str, str.upper])
def test_a_record_that_is_there_twice(other: Any, saved: Path) -> None:
    def alter(records: list[zipfile.ZipInfo]) -> None:
        again = copy.copy(records[1])
        again.filename = other(again.filename)
        records.append(again)

    with pytest.raises(Malformed, match="is there twice"):
        read_altered(saved, alter)


def test_something_in_front_of_the_archive(saved: Path) -> None:
    saved.write_bytes(b"PK\x03\x04" + b"\0" * 60 + saved.read_bytes())
    refused(saved, "overlaps its beginning")


def _with_pickle(path: Path, change: Any) -> None:
    records = records_of(path)
    name = next(n for n in records if n.endswith("/data.pkl"))
    records[name] = change(records[name])
    rewrite(path, records)


@pytest.mark.parametrize("kind", ["zip", "torchscript"])
def test_a_storage_larger_than_its_record(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    if kind == "zip":
        torch.save({"c.weight": torch.ones(7, 3, 1, 1)}, path)
    else:
        torch.jit.save(torch.jit.trace(nn.Conv2d(3, 7, 1), torch.ones(1, 3, 1, 1)), str(path))

    def stretched(pickled: bytes) -> bytes:
        changed = pickled.replace(b"K\x15", b"K\x63")  # 21 values announced as 99
        assert changed != pickled
        return changed

    _with_pickle(path, stretched)
    refused(path, "84 bytes where (396|99)")


def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    torch.save({"c.weight": torch.ones(7, 3, 1, 1)}, tmp_path / "f.pth")
    _with_pickle(tmp_path / "f.pth", lambda p: p.replace(b"(K\x07K\x03", b"(K\x6fK\x03", 1))
    refused(tmp_path / "f.pth", r"shape \(111, 3, 1, 1\) is out of bounds")


def test_a_legacy_file_whose_storages_exceed_it(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(21)}, tmp_path / "f", _use_new_zipfile_serialization=False)
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data.replace(b"K\x15", b"J\xff\xff\xff\x7f"))
    refused(tmp_path / "f", "announce more bytes than the file has")


# Resources


def test_a_pickle_that_unpacks_to_too_much_is_not_unpacked(saved: Path, monkeypatch) -> None:
    rewrite(saved, records_of(saved), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archive, "PICKLE_BYTES", 100)
    monkeypatch.setattr(archive, "_content", None)  # nothing is read
    refused(saved, "100 are allowed")


def test_records_that_unpack_to_too_much_are_not_unpacked(saved: Path, monkeypatch) -> None:
    rewrite(saved, records_of(saved) | {"f/more": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archive, "UNPACKED_BYTES", 1000)
    monkeypatch.setattr(archive, "UNPACKED_RATIO", 10)
    monkeypatch.setattr(archive, "_content", None)
    refused(saved, "more than is allowed")


def _holders(levels: int) -> bytes:
    """A TorchScript pickle of objects that refer to the same child twice, level after level."""
    body = b"\x80\x02"
    for level in range(levels):
        child = b"K\x00" if level == 0 else b"h" + bytes([level - 1])
        state = b"}(X\x01\x00\x00\x00a" + child + b"X\x01\x00\x00\x00b" + child + b"u"
        body += b"c__torch__.M\nM\n)\x81" + state + b"bq" + bytes([level]) + b"0"
    return body + b"h" + bytes([levels - 1]) + b"."


@pytest.mark.parametrize("levels", [20, 30, 60, 100])
def test_modules_shared_level_after_level(levels: int, tmp_path: Path) -> None:
    path = tmp_path / "ts.pt"
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 7, 1), torch.ones(1, 3, 1, 1)), str(path))
    _with_pickle(path, lambda _: _holders(levels))
    refused(path, "unfold to more than|nest more than|nests too deeply")


def test_a_module_in_two_places_has_two_names(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Conv2d(2, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    torch.jit.save(torch.jit.script(Twice()), str(tmp_path / "ts.pt"))
    found = read_state_dict(tmp_path / "ts.pt")
    assert {"a.weight", "a.bias"} <= set(found)


def _nested(levels: int, width: int) -> Any:
    content: Any = {"w": torch.ones(2)}
    for _ in range(levels):
        content = dict.fromkeys(map(str, range(width)), content)
    return content


@pytest.mark.parametrize(("levels", "width"), [(8, 50), (30, 2), (70, 1)])
def test_dicts_shared_level_after_level(levels: int, width: int, tmp_path: Path) -> None:
    torch.save(_nested(levels, width), tmp_path / "f.pth")
    refused(tmp_path / "f.pth", "unfold to more than|nest more than|nests too deeply")


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.ones(2)}
    content["self"] = content
    torch.save(content, tmp_path / "f.pth")
    refused(tmp_path / "f.pth", "holds itself")


def test_nesting_is_counted_once_per_object() -> None:
    visits = []

    def inside(node: Any) -> Any:
        visits.append(node)
        return limits.inner(node)

    content: Any = []
    for _ in range(20):
        content = [content, content]
    check_nesting(content, inside)
    assert len(visits) < 100
    with pytest.raises(Malformed, match="unfold"):
        check_nesting([content] * 4)


def test_deep_pickles_and_large_memos_are_not_built() -> None:
    for pickled, words in (
        (b"\x80\x02)" + b"\x85" * 1000 + b".", "nests too deeply"),
        (b"\x80\x02Nr\xa0\x86\x01\x00.", "memo of 100000 entries"),
        (b"\x80\x02N", "broken"),
        (b"\x80\x02h\x05.", "broken"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "broken"),
    ):
        with pytest.raises(Malformed, match=words):
            pickles.scan(io.BytesIO(pickled))
    flat = pickle.dumps({str(i): list(range(i % 5)) for i in range(5000)}, protocol=2)
    assert pickles.scan(io.BytesIO(flat)) == flat


def test_values_repeated_without_end(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 13, 1 << 13)}, tmp_path / "f.pth")
    refused(tmp_path / "f.pth", "unfold 4 bytes to 268435456")
    torch.save({"w": torch.ones(1).expand(4, 4)}, tmp_path / "f.pth")
    assert torch.equal(read_state_dict(tmp_path / "f.pth")["w"], torch.ones(4, 4))


@pytest.mark.parametrize(
    "call",
    [
        b"c__builtin__\nbytearray\nK\x05\x85R",
        b"ctorch\nFloatTensor\nK\x05\x85R",
        b"ctorch\nTensor\nK\x05\x85R",
        b"ctorch\nTensor\nK\x05\x85\x81",
    ],
)
def test_nothing_is_made_out_of_a_number(call: bytes, saved: Path) -> None:
    _with_pickle(saved, lambda _: b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.")
    refused(saved, "bytearray of a number|no values|asks for torch.FloatTensor")


def test_json_in_brackets() -> None:
    with pytest.raises(Malformed, match="nests"):
        parse_json("[" * 200_000 + "]" * 200_000)
    with pytest.raises(Malformed, match="nest more than"):
        parse_json("[" * 100 + "]" * 100)
    with pytest.raises(Malformed, match="not JSON"):
        parse_json("9" * 10_000)
    assert parse_json('{"a": [1]}') == {"a": [1]}


def test_brackets_in_the_header_of_a_packed_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    text = "[" * 200_000 + "]" * 200_000
    save_file({"c": torch.ones(1, dtype=torch.uint8)}, tmp_path / "m", {"opentrans_masks": text})
    with pytest.raises(OpenTransError, match="nests"):
        load_masks(tmp_path / "m")


# Memory


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "torchscript"])
def test_tensors_outlive_their_file(kind: str, tmp_path: Path) -> None:
    """A mapped tensor would end the process when the file is cut short."""
    from safetensors.torch import save_file

    path = tmp_path / "f"
    weight = torch.randn(64, 32, 3, 3)
    if kind == "safetensors":
        save_file({"weight": weight}, path)
    elif kind == "torchscript":
        conv = nn.Conv2d(32, 64, 3)
        weight = conv.weight.detach().clone()
        torch.jit.save(torch.jit.trace(conv, torch.ones(1, 32, 3, 3)), str(path))
    else:
        torch.save({"weight": weight}, path, _use_new_zipfile_serialization=kind == "zip")
    found, content = read_state_dict(path)["weight"], open_checkpoint(path).content["weight"]
    path.write_bytes(b"")
    assert torch.equal(found, weight) and torch.equal(content, weight)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()
