"""Tensors of a TorchScript archive (such as OpenAI's RN50.pt), read without running its code.

``torch.jit.load`` has no safe mode, and ``torch.load(weights_only=True)`` refuses such archives.
The archive's ``data.pkl`` is an ordinary pickle of attribute dictionaries, so it is read here with
an unpickler that knows five names: two that rebuild a tensor, OrderedDict, a list constructor, and
storage type labels. Every class of the archive itself becomes an inert holder of attributes; any
other name ends the read. The code stored in the archive is never opened.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.limits import check_nesting
from opentrans_kernels.masks.pickles import EXPANDED_BYTES, EXPANDED_RATIO, scan

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MOST_ATTRIBUTES = 1 << 17  # of all modules, one in two places counted twice


class _Holder:
    """Stands for an instance of any class of the archive; pickle fills its ``__dict__``."""


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a zip file holds compiled code beside its data, as torch.jit.save writes it."""
    names = [name.partition("/")[2] for name in archive.namelist()]
    return "constants.pkl" in names and "data.pkl" in names


def read_torchscript(records: Mapping[str, bytes], path: str) -> dict[str, torch.Tensor]:
    """Dotted attribute path -> tensor, parameters and buffers alike (a state dict).

    records: of ``read_archive``. Raises CheckpointError if they are damaged or ask for anything
    but tensors.
    """
    try:
        top = _unpickler(records, scan(io.BytesIO(records["data.pkl"]))).load()
        check_nesting(top, _attributes, MOST_ATTRIBUTES)
        return dict(_walk(top, ""))
    except Exception as exc:  # hostile input: unpickling may raise anything
        raise CheckpointError(
            f"{path} is a TorchScript archive whose tensors cannot be read safely: {exc}. Its code "
            "was not run. If you trust the file, convert it once with: torch.save(torch.jit."
            "load(FILE, map_location='cpu').state_dict(), 'weights.pth')"
        ) from exc


def _unpickler(records: Mapping[str, bytes], pickled: bytes) -> pickle.Unpickler:
    # Everything callable is made here, per read: a pickle can set attributes of what it can name.
    storages: dict[str, torch.Tensor] = {}
    held = expanded = 0

    def rebuild_tensor(
        storage: torch.Tensor, offset: int, size: Any, stride: Any, *_ignored: Any
    ) -> torch.Tensor:
        nonlocal expanded
        tensor = storage.as_strided(tuple(size), tuple(stride), offset)  # checks the bounds
        expanded += tensor.nbytes
        if expanded > max(EXPANDED_BYTES, EXPANDED_RATIO * held):
            raise pickle.UnpicklingError(f"its tensors unfold {held} bytes to {expanded}")
        return tensor.detach()

    def rebuild_parameter(data: torch.Tensor, *_ignored: Any) -> torch.Tensor:
        return data

    def same(value: Any, *_ignored: Any) -> Any:
        return value

    allowed: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            ("torch.jit._pickle", name): same
            for name in (
                "build_intlist",
                "build_doublelist",
                "build_boollist",
                "build_tensorlist",
                "restore_type_tag",
            )
        },
    }

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "__torch__" or module.startswith("__torch__."):
                return type("Holder", (_Holder,), {})
            if module == "torch" and name in STORAGE_DTYPES:
                return name
            if (module, name) in allowed:
                return allowed[module, name]
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a tensor")

        def persistent_load(self, pid: Any) -> torch.Tensor:
            nonlocal held
            _tag, kind, key, _device, count = pid
            if key not in storages:
                dtype = STORAGE_DTYPES[kind]
                raw = bytearray(records[f"data/{key}"])
                if len(raw) != count * dtype.itemsize:
                    raise pickle.UnpicklingError(
                        f"storage {key} has {len(raw)} bytes where {count} values of "
                        f"{dtype} are announced"
                    )
                held += len(raw)
                empty = torch.empty(0, dtype=dtype)
                storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else empty
            return storages[key]

    return Restricted(io.BytesIO(pickled))


def _attributes(node: Any) -> Iterable[Any] | None:
    return vars(node).values() if isinstance(node, _Holder) else None


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors below a holder, depth first; a module in two places has two names."""
    for name, value in vars(node).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Holder):
            yield from _walk(value, f"{prefix}{name}.")
