"""Zip archives of PyTorch: damage and contradictions are found before PyTorch reads anything.

Python's zipfile, PyTorch and a memory map each find a record in their own way. A file that is not
the same to all is refused, whether damage or intent made it so; PyTorch is given a plain copy.
"""

from __future__ import annotations

import bisect
import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

from opentrans_kernels.masks.limits import PICKLE_BYTES, Malformed

UNPACKED_BYTES, UNPACKED_RATIO = 256 << 20, 100  # deflate reaches 1000
_LOCAL, _CENTRAL = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L")
_WIDE = 0xFFFFFFFF  # the number stands in the 64-bit extension
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8


def read_archive(archive: zipfile.ZipFile, file: BinaryIO, size: int) -> dict[str, bytes]:
    """Every record by its path below the one folder that holds all: "data.pkl", "data/0".

    Directories, sizes and places are compared first. A CRC that does not hold is an error, unless
    no record has one: PyTorch can write archives without, in which every CRC is 0. Raises
    Malformed, or what zipfile raises.
    """
    records = archive.infolist()
    if not records:
        raise Malformed("it holds no records")
    names = [record.filename.lower() for record in records]  # PyTorch ignores case
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Malformed(f"record {twice!r} is there twice")
    end, previous = 0, "its beginning"
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < end or (end == 0) != (record.header_offset == 0):
            raise Malformed(f"record {record.filename!r} overlaps {previous}")
        end, previous = _end_of(record, file), repr(record.filename)
    if end > archive.start_dir:
        raise Malformed(f"record {previous} reaches into the directory")
    unpacked = sum(record.file_size for record in records)
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * size):
        raise Malformed(f"{size} bytes that unpack to {unpacked} are more than is allowed")
    for record in records:
        if record.filename.endswith("/data.pkl") and record.file_size > PICKLE_BYTES:
            raise Malformed(
                f"{record.filename} has {record.file_size} bytes; {PICKLE_BYTES} are allowed"
            )
    if not any(record.CRC for record in records):
        for record in records:
            del record.CRC  # zipfile then reads without
    root = records[0].filename.partition("/")[0] + "/"
    read = {record.filename: _content(archive, record) for record in records}
    return {name.removeprefix(root): data for name, data in read.items() if name.startswith(root)}


class PlainArchive(io.RawIOBase):
    """A file, read only, that is a zip archive of the given records and nothing else.

    Given to PyTorch in place of the original, so that it reads exactly the records that were
    checked. They are not copied. Without CRCs, which were compared before.
    """

    def __init__(self, records: Mapping[str, bytes]) -> None:
        self._parts: list[bytes] = []
        self._starts: list[int] = []
        self._size = self._place = 0
        directory = []
        for name, data in records.items():
            path, offset, length = b"archive/" + name.encode(), self._size, len(data)
            wide = struct.pack("<HHQQ", 1, 16, length, length)
            self._add(_LOCAL.pack(b"PK\3\4", 45, 0x800, 0, 0, 33, 0, _WIDE, _WIDE, len(path), 20))
            self._add(path + wide)
            self._add(data)
            wide = struct.pack("<HHQQQ", 1, 24, length, length, offset)
            fixed = (b"PK\1\2", 45, 45, 0x800, 0, 0, 33, 0, _WIDE, _WIDE, len(path), 28)
            directory.append(_CENTRAL.pack(*fixed, 0, 0, 0, 0, _WIDE) + path + wide)
        start, count = self._size, len(directory)
        self._add(b"".join(directory))
        length, end = self._size - start, self._size
        self._add(
            struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
        )
        self._add(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        self._add(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, _WIDE, _WIDE, 0))

    def _add(self, part: bytes) -> None:
        if part:
            self._starts.append(self._size)
            self._parts.append(part)
            self._size += len(part)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._place < self._size:
            number = bisect.bisect_right(self._starts, self._place) - 1
            at = self._place - self._starts[number]
            part = memoryview(self._parts[number])[at : at + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)
            self._place += len(part)
        return done


def _end_of(record: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Where the record's bytes end; compares its own header with the directory's."""
    what = f"record {record.filename!r}"
    if record.flag_bits & _ENCRYPTED:
        raise Malformed(f"{what} is encrypted")
    if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Malformed(f"{what} is compressed by method {record.compress_type}")
    if record.compress_type == zipfile.ZIP_STORED and record.compress_size != record.file_size:
        raise Malformed(f"{what} is not compressed, but has two sizes")
    file.seek(record.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise Malformed(f"{what} lies beyond the end")
    _, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = _LOCAL.unpack(
        header
    )
    same = method == record.compress_type and not flags & _ENCRYPTED
    if not flags & _SIZES_FOLLOW:  # else they stand behind the record, and here may be zeros
        sizes = ((packed, record.compress_size), (unpacked, record.file_size))
        same &= crc == record.CRC and all(a in (b, _WIDE) for a, b in sizes)
    if not same:
        raise Malformed(f"{what} is described differently in the directory")
    return record.header_offset + _LOCAL.size + name_length + extra_length + record.compress_size


def _content(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytes:
    try:
        data = archive.read(record)  # no more than the recorded size is unpacked
    except zipfile.BadZipFile as error:
        if "CRC" not in str(error):
            raise
        raise Malformed(f"record {record.filename!r} does not have its recorded checksum") from (
            error
        )
    if len(data) != record.file_size:
        raise Malformed(f"record {record.filename!r} has {len(data)} bytes, not {record.file_size}")
    return data
