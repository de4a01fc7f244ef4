"""The CUDA library of ``csrc/cuda/sparse_conv.cu``, loaded through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from ...errors import KernelUnavailable
from ..nvcc import build_library, find_nvcc

__all__ = ["Problem", "library", "sources", "why_not"]


class Problem(ctypes.Structure):
    """``otk::sparse::Problem``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("x", "entries", "begin", "slots", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in
          ("n", "height", "width", "cin", "cout", "taps", "chunk", "relu")),
    ]  # fmt: skip


def sources() -> list[Path]:
    """The .cu file and its headers; empty where the package was installed without csrc."""
    folder = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
    return [p for p in (folder / "sparse_conv.cu", folder / "sparse_conv.h") if p.exists()]


def why_not() -> str | None:
    """Why the CUDA kernel cannot be built here; None if it can be tried."""
    if len(sources()) < 2:
        return "csrc/cuda is missing: the package was installed without its CUDA sources"
    if find_nvcc() is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda). Install the CUDA toolkit"
    return None


@cache
def library(major: int, minor: int) -> ctypes.CDLL:
    """The library for a compute capability, built if need be.

    Raises KernelUnavailable with the compiler's first error.
    """
    if (problem := why_not()) is not None:
        raise KernelUnavailable(f"sparse_conv2d_nhwc: {problem}, or plan without this kernel.")
    target = build_library(str(find_nvcc()), sources(), f"sm_{major}{minor}", "sparse_conv2d_nhwc")
    loaded = ctypes.CDLL(str(target))
    loaded.otk_sparse_conv.argtypes = [
        ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p),
    ]  # fmt: skip
    size = loaded.otk_sparse_conv_problem_size()
    if size != ctypes.sizeof(Problem):
        raise KernelUnavailable(
            f"{target} takes a problem of {size} bytes, this version passes "
            f"{ctypes.sizeof(Problem)}. Delete the file; it is built again."
        )
    return loaded
