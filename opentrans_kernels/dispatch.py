"""The dispatch table: every (op, backend) row with what it requires, and how one is chosen.

Rows are data. Kernels are named as ``module:function`` strings and imported when first used, so
importing this module loads no kernel. Tests, benchmarks, ``opentrans info`` and the docs iterate
over :data:`TABLE`.

Where the compiled extension, or triton, is missing the reference serves, and says so: one logged
warning per op, or :class:`~opentrans_kernels.errors.KernelUnavailable` under
``OPENTRANS_STRICT=1``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import native, settings
from .errors import KernelUnavailable

__all__ = ["TABLE", "Resolution", "Row", "backends", "explain", "resolve"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One implementation of one op.

    Attributes:
        op, backend: names; ``OPENTRANS_BACKEND`` forces a backend.
        device: device type whose tensors it takes.
        dtypes: dtypes of the activations.
        layouts: input layouts read without a copy; others are repacked inside the kernel.
        needs: ``"extension"``, ``"triton"``, ``"nvcc"`` (built at first use) or ``""``.
        rank: lower is preferred.
        target: ``module:function``, taking the op's arguments in schema order. For a compiled row,
            and for a kernel behind an op that has one, it is the registered op.
    """

    op: str
    backend: str
    device: str
    dtypes: tuple[str, ...]
    layouts: str
    needs: str
    rank: int
    target: str


_FLOATS = ("float32", "float64")
_HALF = ("bfloat16", "float16")
_OPS = "opentrans_kernels.ops"

TABLE: tuple[Row, ...] = tuple(
    row
    for op, folder, name in (
        ("sparse_conv2d", "sparse_conv2d", "OP"),
        ("sparse_conv2d_wgrad", "sparse_conv2d", "WGRAD"),
        ("sparse_bottleneck", "sparse_bottleneck", "OP"),
        ("sparse_stage", "sparse_stage", "OP"),
        ("depthwise_conv2d", "depthwise_conv2d", "OP"),
        ("winograd_conv2d", "winograd_conv2d", "OP"),
        ("sparse_linear", "sparse_linear", "OP"),
        ("sparse_mlp", "sparse_mlp", "OP"),
        ("avg_pool2d", "avg_pool2d", "OP"),
        ("avg_pool2d_backward", "avg_pool2d", "BACKWARD"),
        ("window_avg_pool2d", "window_avg_pool2d", "OP"),
        ("max_pool2d", "max_pool2d", "OP"),
        ("ms_deform_attn", "ms_deform_attn", "OP"),
        ("ms_deform_attn_backward", "ms_deform_attn", "BACKWARD"),
        ("relu_bits", "relu_bits", "OP"),
        ("relu_bits_backward", "relu_bits", "BACKWARD"),
    )
    for row in (
        Row(
            op, "cpu", "cpu", ("float32",), "planar, rows dense", "extension", 0,
            f"{_OPS}.{folder}:{name}",
        ),
        Row(op, "reference", "any", _FLOATS, "any", "", 9, f"{_OPS}.{folder}.reference:{op}"),
    )
) + tuple(
    Row(
        op, "triton", "cuda", (*_HALF, "float32"), "any strides, points dense", "triton", 1,
        f"{_OPS}.ms_deform_attn:{name}",
    )
    for op, name in (("ms_deform_attn", "OP"), ("ms_deform_attn_backward", "BACKWARD"))
) + (
    # Eigenvalues are float64 from the Gram matrix to the fit.
    Row(
        "powerlaw_fit", "cpu", "cpu", ("float64",), "1-d dense", "extension", 0,
        f"{_OPS}.powerlaw_fit:OP",
    ),
    Row(
        "powerlaw_fit", "triton", "cuda", ("float64",), "1-d dense", "triton", 1,
        f"{_OPS}.powerlaw_fit.triton:powerlaw_fit",
    ),
    Row(
        "powerlaw_fit", "reference", "any", ("float64",), "any", "", 9,
        f"{_OPS}.powerlaw_fit.reference:powerlaw_fit",
    ),
    Row(
        "gram_eigenvalues", "cpu", "cpu", ("float64",), "any strides", "extension", 0,
        f"{_OPS}.gram_eigenvalues:OP",
    ),
    Row(
        "gram_eigenvalues", "reference", "any", ("float64",), "any", "", 9,
        f"{_OPS}.gram_eigenvalues.reference:gram_eigenvalues",
    ),
    Row(
        "mask_scores", "cpu", "cpu", ("float32",), "any strides", "extension", 0,
        f"{_OPS}.mask_scores:OP",
    ),
    Row(
        "mask_scores", "reference", "any", _FLOATS, "any", "", 9,
        f"{_OPS}.mask_scores.reference:mask_scores",
    ),
) + tuple(
    # The GPU path; on the CPU the references serve, so that its plans can be checked there.
    row
    for op, dtypes in (
        ("implicit_gemm_conv2d", (*_HALF, "float32")),
        ("bottleneck_chain", _HALF),
        ("fused_stem", (*_HALF, "float32")),
    )
    for row in (
        Row(
            op, "triton", "cuda", dtypes, "channels_last", "triton", 1,
            f"{_OPS}.{op}.triton:{op}",
        ),
        Row(
            op, "reference", "any", (*_FLOATS, *_HALF), "any", "", 9,
            f"{_OPS}.{op}.reference:{op}",
        ),
    )
) + (
    Row(
        "sparse_conv2d_nhwc", "cuda", "cuda", ("float32", *_HALF), "channels_last", "nvcc", 1,
        f"{_OPS}.sparse_conv2d_nhwc.cuda:sparse_conv2d_nhwc",
    ),
    Row(
        "sparse_conv2d_nhwc", "reference", "any", (*_FLOATS, *_HALF), "any", "", 9,
        f"{_OPS}.sparse_conv2d_nhwc.reference:sparse_conv2d_nhwc",
    ),
)  # fmt: skip

_functions: dict[str, Callable[..., Any]] = {}  # target -> kernel


@dataclass(frozen=True)
class Resolution:
    """The chosen row and, for every other row of the op, why it was not chosen.

    ``fallback``: the reason, if only the missing extension kept a faster row from being chosen.
    """

    row: Row
    rejected: tuple[tuple[Row, str], ...]
    fallback: str | None = None

    def function(self) -> Callable[..., Any]:
        """The kernel: a function of the op's arguments in schema order."""
        found = _functions.get(self.row.target)
        if found is None:
            module, name = self.row.target.split(":")
            found = _functions[self.row.target] = getattr(importlib.import_module(module), name)
        return found


def _reject(row: Row, device: str, dtype: str, forced: str) -> str | None:
    if forced != "auto" and row.backend != forced:
        return f"OPENTRANS_BACKEND={forced}"
    if row.device not in ("any", device):
        return f"takes {row.device} tensors, not {device}"
    if dtype not in row.dtypes:
        return f"takes {', '.join(row.dtypes)}, not {dtype}"
    if row.needs == "extension" and not native.load():
        return f"{_NOT_LOADED}: {native.reason()}"
    if row.needs == "triton" and not _has_triton():
        return f"{_NO_TRITON}. Install it with: pip install triton."
    if row.needs == "nvcc" and (why := _why_no_nvcc()) is not None:
        return f"{_NO_NVCC}: {why}."
    return None


_NOT_LOADED = "the compiled extension is not loaded"
_NO_TRITON = "triton is not installed"
_NO_NVCC = "its CUDA kernel cannot be built"


def _why_no_nvcc() -> str | None:
    return importlib.import_module(f"{_OPS}.sparse_conv2d_nhwc.build").why_not()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


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
        fix = (
            f"Convert the tensors with .float(), or call it under torch.autocast({device!r}), "
            "where the kernels compute in float32."
            if dtype in _HALF
            else "Move the tensors to a supported device and dtype, build the extension, or set "
            "OPENTRANS_BACKEND=reference."
        )
        raise KernelUnavailable(
            f"{op}: no kernel for {device} {dtype} ({reasons or 'unknown op'}). {fix}"
        )
    best = accepted[0]
    for row in accepted[1:]:  # torch.compile of torch 2.11 cannot trace min() with a key
        if row.rank < best.rank:
            best = row
    faster = [why for row, why in rejected if row.rank < best.rank]
    missing = [why for why in faster if why.startswith((_NOT_LOADED, _NO_TRITON, _NO_NVCC))]
    rejected += [(row, f"slower than {best.backend}") for row in accepted if row is not best]
    return Resolution(best, tuple(rejected), missing[0] if missing else None)


_warned: set[str] = set()  # ops whose fallback was logged


def resolve(op: str, device: str = "cpu", dtype: str = "float32") -> Resolution:
    """Choose the row for an op.

    Raises:
        KernelUnavailable: no row fits, with each row's reason; or, under ``OPENTRANS_STRICT=1``,
            the extension is missing and the reference would have to serve.
    """
    current = settings.get()
    found = _resolve(op, device, dtype, current.backend)
    if found.fallback is not None:
        if current.strict:
            raise KernelUnavailable(
                f"{op}: OPENTRANS_STRICT=1 refuses the slower reference kernel, but "
                f"{found.fallback} Or choose the reference with OPENTRANS_BACKEND=reference, or "
                "unset OPENTRANS_STRICT."
            )
        if op not in _warned:
            _warned.add(op)
            _log.warning("%s runs on the slower reference kernel: %s", op, found.fallback)
    return found


def explain(op: str, device: str = "cpu", dtype: str = "float32") -> str:
    """What would run, and why each other row would not."""
    found = _resolve(op, device, dtype, settings.get().backend)
    lines = [f"{op} on {device} {dtype}: {found.row.backend} ({found.row.layouts})"]
    lines += [f"  not {row.backend}: {why}" for row, why in found.rejected]
    return "\n".join(lines)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def backends() -> list[dict[str, str]]:
    """One record per row: op, backend, device, dtypes, layouts, and whether it can run here."""
    records = []
    for row in TABLE:
        device = "cpu" if row.device == "any" else row.device
        why = _reject(row, device, row.dtypes[0], "auto")
        if why is None and device == "cuda" and not _has_cuda():
            why = "torch sees no CUDA device"
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
