"""The dispatch table: every (op, backend) row with what it requires, and how one is chosen.

Rows are data. Kernels are named as ``module:function`` strings and imported when first used, so
importing this module loads no kernel. Tests, benchmarks, ``opentrans info`` and the docs iterate
over :data:`TABLE`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import native, settings
from .errors import KernelUnavailable

__all__ = ["TABLE", "Resolution", "Row", "backends", "explain", "resolve"]


@dataclass(frozen=True)
class Row:
    """One implementation of one op.

    Attributes:
        op, backend: names; ``OPENTRANS_BACKEND`` forces a backend.
        device: device type whose tensors it takes.
        dtypes: dtypes of the activations.
        layouts: input layouts read without a copy; others are repacked inside the kernel.
        needs: ``"extension"`` or ``""``.
        rank: lower is preferred.
        target: ``module:function``; the private op of a compiled row.
    """

    op: str
    backend: str
    device: str
    dtypes: tuple[str, ...]
    layouts: str
    needs: str
    rank: int
    target: str


_ANY = ("float32", "float64", "bfloat16", "float16")
_OPS = "opentrans_kernels.ops"
_NATIVE = f"{_OPS}.library"

TABLE: tuple[Row, ...] = tuple(
    row
    for op, kernel in (
        ("sparse_conv2d", "sparse_conv2d"),
        ("sparse_conv2d_wgrad", "sparse_conv2d"),
        ("sparse_bottleneck", "sparse_bottleneck"),
        ("avg_pool2d", "avg_pool2d"),
    )
    for row in (
        Row(op, "cpu", "cpu", ("float32",), "planar, rows dense", "extension", 0, f"{_NATIVE}:{op}"),
        Row(op, "reference", "any", _ANY, "any", "", 9, f"{_OPS}.{kernel}.reference:{op}"),
    )
)


@dataclass(frozen=True)
class Resolution:
    """The chosen row and, for every other row of the op, why it was not chosen."""

    row: Row
    rejected: tuple[tuple[Row, str], ...]

    def function(self) -> Callable[..., Any]:
        module, name = self.row.target.split(":")
        return getattr(importlib.import_module(module), name)


def _reject(row: Row, device: str, dtype: str, forced: str) -> str | None:
    if forced != "auto" and row.backend != forced:
        return f"OPENTRANS_BACKEND={forced}"
    if row.device not in ("any", device):
        return f"takes {row.device} tensors, not {device}"
    if dtype not in row.dtypes:
        return f"takes {', '.join(row.dtypes)}, not {dtype}"
    if row.needs == "extension" and not native.load():
        return f"the compiled extension is not loaded: {native.reason()}"
    return None


@lru_cache(maxsize=64)
def _resolve(op: str, device: str, dtype: str, forced: str) -> Resolution:
    accepted, rejected = [], []
    for row in TABLE:
        if row.op != op:
            continue
        why = _reject(row, device, dtype, forced)
        if why is None:
            accepted.append(row)
        else:
            rejected.append((row, why))
    if not accepted:
        reasons = "; ".join(f"{row.backend}: {why}" for row, why in rejected)
        raise KernelUnavailable(
            f"{op}: no kernel for {device} {dtype} ({reasons or 'unknown op'}). Move the tensors "
            "to a supported device and dtype, build the extension, or set "
            "OPENTRANS_BACKEND=reference."
        )
    best = min(accepted, key=lambda row: row.rank)
    rejected += [(row, f"slower than {best.backend}") for row in accepted if row is not best]
    return Resolution(best, tuple(rejected))


def resolve(op: str, device: str = "cpu", dtype: str = "float32") -> Resolution:
    """Choose the row for an op.

    Raises:
        KernelUnavailable: no row fits; the message gives each row's reason.
    """
    return _resolve(op, device, dtype, settings.get().backend)


def explain(op: str, device: str = "cpu", dtype: str = "float32") -> str:
    """What would run, and why each other row would not."""
    found = resolve(op, device, dtype)
    lines = [f"{op} on {device} {dtype}: {found.row.backend} ({found.row.layouts})"]
    lines += [f"  not {row.backend}: {why}" for row, why in found.rejected]
    return "\n".join(lines)


def backends() -> list[dict[str, str]]:
    """One record per row: op, backend, device, dtypes, layouts, and whether it can run here."""
    records = []
    for row in TABLE:
        device = "cpu" if row.device == "any" else row.device
        why = _reject(row, device, row.dtypes[0], "auto")
        records.append(
            {
                "op": row.op,
                "backend": row.backend,
                "device": row.device,
                "dtypes": ", ".join(row.dtypes),
                "layouts": row.layouts,
                "available": "yes" if why is None else why,
            }
        )
    return records
