"""What a pickle would build, found out without building it.

``scan`` walks over the opcodes; ``inspect`` then runs the pickle with stand-ins for everything it
names, and compares the tensors it announces with the bytes that are there. Only what passes both
is given to ``torch.load(weights_only=True)``, which trusts sizes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from opentrans_kernels.masks import arrays
from opentrans_kernels.masks.limits import (
    DEEPEST,
    PICKLE_BYTES,
    Malformed,
    Refused,
    check_dtype,
    check_nesting,
)

STORAGE_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    "ComplexDoubleStorage": 16,
}
# A tensor may repeat its values (expand); as dense copies all of them must stay near the file.
EXPANDED_BYTES, EXPANDED_RATIO = 64 << 20, 16
_UNKNOWN = frozenset(
    ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
)
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))
_GROW = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"))
_MARK = object()


@dataclass
class Announced:
    """Storages by key with their bytes, names that need stand-ins, and the bytes of all tensors."""

    content: Any = None
    storages: dict[str, int] = field(default_factory=dict)
    stand_ins: set[str] = field(default_factory=set)
    expanded: int = 0


def scan(stream: BinaryIO, most: int = PICKLE_BYTES) -> bytes:
    """The bytes of the pickle at the stream's place, opcodes and memo checked.

    Raises Malformed: cut short, an unusual opcode, a memo that would need more memory than the
    pickle has bytes, or nested values, over which C code recurses without looking.
    """
    start, count = stream.tell(), 0
    depths: list[Any] = []
    memo: dict[int, int] = {}
    try:
        for opcode, value, at in pickletools.genops(stream):
            name, count = opcode.name, count + 1
            if name in _UNKNOWN or at - start > most:
                raise Malformed(f"its pickle uses {name} at byte {at - start}")
            if name in _PUT:
                index = len(memo) if name == "MEMOIZE" else int(value)
                if not 0 <= index <= count + 256:
                    raise Malformed(f"its pickle has a memo of {index} entries after {count} steps")
                memo[index] = depths[-1]
            elif name in _GET:
                depths.append(memo[int(value)])
            elif name == "MARK":
                depths.append(_MARK)
            elif name == "DUP":
                depths.append(depths[-1])
            else:
                _step(opcode, depths)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise error if isinstance(error, Malformed) else Malformed(
            f"its pickle is broken ({type(error).__name__}: {error})"
        ) from error  # fmt: skip
    end = stream.tell()
    stream.seek(start)
    return stream.read(end - start)


def _step(opcode: Any, depths: list[Any]) -> None:
    """What an opcode does to the stack of nesting depths."""
    before, deepest = opcode.stack_before, 0
    grows = opcode.name in _GROW
    if pickletools.stackslice in before:
        while (top := depths.pop()) is not _MARK:
            deepest = max(deepest, top)
    else:
        for _ in range(len(before) - grows):
            top = depths.pop()
            deepest = max(deepest, 0 if top is _MARK else top)
    if grows:
        depths[-1] = deepest = max(depths[-1], deepest + 1)
    else:
        depths.extend([deepest + bool(before)] * len(opcode.stack_after))
    if deepest > 4 * DEEPEST:  # a tuple, a call and its result are one level to the reader
        raise Malformed("its pickle nests too deeply")


def inspect(
    pickled: bytes, size_of: Callable[[str], int | None] | None, encoding: str = "ASCII"
) -> Announced:
    """Run a pickle of torch.save with stand-ins that compute nothing.

    size_of: bytes of the storage with this key, None if there is none; without it a storage of
    any size is taken, for the caller to add up. Raises Refused for a name that is not data,
    Malformed if sizes disagree or anything else is odd.
    """
    found = Announced()
    try:
        found.content = _Inspector(pickled, size_of, found, encoding).load()
        check_nesting(found.content)
    except Malformed:
        raise
    except Exception as error:  # hostile input: a broken pickle may raise anything
        raise Malformed(f"its pickle is broken ({type(error).__name__}: {error})") from error
    held = sum(found.storages.values())
    if found.expanded > max(EXPANDED_BYTES, EXPANDED_RATIO * held):
        raise Malformed(f"its tensors unfold {held} bytes to {found.expanded}")
    return found


class _Inspector(pickle.Unpickler):
    def __init__(
        self,
        pickled: bytes,
        size_of: Callable[[str], int | None] | None,
        found: Announced,
        encoding: str,
    ) -> None:
        super().__init__(io.BytesIO(pickled), encoding=encoding)
        self.size_of, self.found = size_of, found
        # Made per read: a pickle can set attributes of what it can name.
        self.numpy = arrays.stand_ins(len(pickled))
        self.names = _torch_names(found)

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if module.startswith("torch"):
            if name in STORAGE_BYTES:
                return name
            kind = vars(torch).get(name) if module == "torch" else None
            if isinstance(kind, torch.dtype):
                check_dtype(kind)
                return kind
        if full in self.names:
            return self.names[full]
        if full in self.numpy:
            self.found.stand_ins.add(full)
            return self.numpy[full]
        raise Refused(full.removeprefix("builtins."))

    def persistent_load(self, pid: Any) -> tuple[str, int]:
        tag, kind, key, _place, count, *view = pid
        if tag != "storage" or type(count) is not int or count < 0 or any(view):
            raise Malformed("one of its storages is announced in an unknown way")
        needed = count * STORAGE_BYTES[kind]
        held = needed if self.size_of is None else self.size_of(str(key))
        if held != needed or self.found.storages.setdefault(str(key), needed) != needed:
            raise Malformed(f"storage {key} has {held} bytes where {needed} are announced")
        return kind, needed


def _torch_names(found: Announced) -> dict[str, Any]:
    """Stand-ins for what torch.save writes beside storages and dtypes."""

    def tensor(storage: tuple[str, int], offset: int, size: Any, stride: Any, *rest: Any) -> str:
        kind, held = storage
        width = STORAGE_BYTES[kind]
        if kind == "UntypedStorage":
            width = next((d.itemsize for d in rest if isinstance(d, torch.dtype)), 1)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if min((offset, *size, *stride)) < 0 or (count and (last + 1) * width > held):
            raise Malformed(f"a tensor of shape {tuple(size)} is out of bounds of its storage")
        found.expanded += count * width
        return "tensor"

    def first(value: Any, *_rest: Any) -> Any:
        return value

    def text(*_given: Any) -> str:
        return "value"

    def encode(value: str, coding: str = "latin1") -> bytes:
        return value.encode("latin1") if coding in ("latin1", "latin-1") else b""

    def bytes_of(value: Any = b"", *_rest: Any) -> str:
        if not isinstance(value, str | bytes | list):
            raise Malformed("it makes a bytearray of a number")  # of any length
        return "value"

    def of_type(function: Callable[..., Any], _kind: Any, given: Any, _state: Any) -> Any:
        return function(*given)

    class Mapped(OrderedDict[Any, Any]):
        pass

    class Kind:
        """A tensor class, named but not to be called: it would make tensors of any size."""

        def __new__(cls, *_given: Any) -> Any:
            raise Malformed("it makes a tensor that has no values")

    names = {
        "collections.OrderedDict": Mapped,
        "collections.Counter": dict,
        "builtins.set": set,
        "builtins.complex": text,
        "builtins.bytearray": bytes_of,
        "_codecs.encode": encode,
        "torch.Size": tuple,
        "torch.device": text,
        "torch.serialization._get_layout": text,
        "torch._utils._rebuild_sparse_tensor": text,
        "torch._tensor._rebuild_from_type_v2": of_type,
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch.Tensor": Kind,
        "torch.nn.parameter.Parameter": Kind,
        **dict.fromkeys(
            ("torch.per_tensor_affine", "torch.per_channel_affine", "torch.per_tensor_symmetric"),
            "scheme",
        ),
    }
    rebuild = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
    return names | {f"torch._utils.{name}": tensor for name in rebuild}
