"""NumPy arrays and dict classes in pickles, read with stand-ins of our own.

Model zoos (detectron2's ``.pkl``) hold plain arrays, other tools a ``defaultdict`` or a NumPy
number beside their tensors. All of it is data; here it becomes tensors, dicts and numbers without
calling anything that the pickle names.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from opentrans_kernels.masks.limits import Malformed, Refused, check_nesting

# Subclasses of dict that tools write in place of a dict.
DICTS = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
)
FACTORIES = ("dict", "list", "int", "float", "bool", "str", "tuple")  # of a defaultdict
COPIED_BYTES, COPIED_RATIO = 64 << 20, 2  # several arrays may come from the same bytes
_PLAIN = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")


class _Dtype:
    kind: np.dtype[Any]


class _Array:
    value: np.ndarray | None = None


def stand_ins(size: int) -> dict[str, Any]:
    """Name -> what takes its place, for a pickle of ``size`` bytes.

    New ones at each call: a pickle can set their attributes.
    """
    left = max(COPIED_BYTES, COPIED_RATIO * size)

    class Dtype(_Dtype):
        def __init__(self, code: Any, *_options: Any) -> None:
            code = code.decode("ascii") if isinstance(code, bytes) else code
            if not isinstance(code, str) or not _PLAIN.fullmatch(code):
                raise Refused(f"a NumPy array of dtype {code!r}")
            self.kind = np.dtype(code)

        def __setstate__(self, state: Any) -> None:
            order, subarray, names, fields = state[1:5]
            order = order.decode("ascii") if isinstance(order, bytes) else order
            if order not in ("<", ">", "=", "|") or not subarray is names is fields is None:
                raise Refused("a NumPy array of records")
            self.kind = self.kind.newbyteorder(order)

        def read(self, raw: Any, shape: tuple[int, ...], by_columns: bool) -> np.ndarray:
            raw = raw.encode("latin1") if isinstance(raw, str) else raw  # of Python 2
            whole = all(type(n) is int and n >= 0 for n in shape) and len(shape) <= 64
            if not isinstance(raw, bytes | bytearray) or not whole:
                raise Malformed("it holds an array that is not written as bytes")
            if math.prod(shape) * self.kind.itemsize != len(raw):
                raise Malformed(f"an array of shape {shape} and {self.kind} has {len(raw)} bytes")
            nonlocal left
            left -= len(raw)
            if left < 0:
                raise Malformed("its arrays share their bytes, and unfold to more than is allowed")
            flat = np.frombuffer(raw, self.kind)
            native = flat.astype(self.kind.newbyteorder("="), copy=True)
            return native.reshape(shape, order="F" if by_columns else "C")

    class Array(_Array):
        def __setstate__(self, state: Any) -> None:
            _version, shape, dtype, by_columns, raw = state
            self.value = dtype.read(raw, tuple(shape), bool(by_columns))

    class PlainDict:
        def __new__(cls, *given: Any) -> Any:
            return OrderedDict(*(one for one in given[-1:] if isinstance(one, Mapping)))

    def reconstruct(*_given: Any) -> Array:
        return Array()

    def from_buffer(raw: Any, dtype: Dtype, shape: Any, order: str = "C") -> Array:
        array = Array()
        array.value = dtype.read(raw, tuple(shape), order == "F")
        return array

    def scalar(dtype: Dtype, raw: Any) -> Any:
        return dtype.read(raw, (), False).item()

    names: dict[str, Any] = {"numpy.dtype": Dtype, "numpy.ndarray": Array}
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray._reconstruct"] = reconstruct
        names[f"{package}.multiarray.scalar"] = scalar
        names[f"{package}.numeric._frombuffer"] = from_buffer
    names |= dict.fromkeys(DICTS, PlainDict)
    return names | {f"builtins.{name}": name for name in FACTORIES}


def plain(content: Any) -> Any:
    """The same content with dicts for mappings, tensors for arrays, and text for their dtypes.

    ``content`` must have passed ``check_nesting``.
    """
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(plain(value) for value in content)
    if isinstance(content, _Array):
        if content.value is None:
            raise Malformed("one of its arrays has no values")
        return torch.from_numpy(content.value)
    return str(content.kind) if isinstance(content, _Dtype) else content


def read_arrays(pickled: bytes) -> dict[Any, Any]:
    """The dict in a pickle (opcodes already checked) that holds arrays and plain values only.

    Raises Malformed, Refused, or what pickle raises.
    """
    names = stand_ins(len(pickled))
    latin1 = ("_codecs", "encode")

    def encode(text: str, coding: str = "latin1") -> bytes:
        if coding not in ("latin1", "latin-1"):
            raise Malformed(f"its bytes are written as {coding}")
        return text.encode("latin1")

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            module = "builtins" if module == "__builtin__" else module
            if (module, name) == latin1:
                return encode
            if (module, name) == ("collections", "OrderedDict"):
                return names["collections.defaultdict"]
            if f"{module}.{name}" in names:
                return names[f"{module}.{name}"]
            raise Refused(f"{module}.{name}")

    content = Restricted(io.BytesIO(pickled), encoding="latin1").load()
    check_nesting(content)
    found = plain(content)
    if not isinstance(found, dict) or not _holds_tensor(found):
        raise Malformed("it is a pickle, but not of a dict with arrays")
    return found


def _holds_tensor(content: Any) -> bool:
    if isinstance(content, dict):
        return any(_holds_tensor(value) for value in content.values())
    return isinstance(content, torch.Tensor)
