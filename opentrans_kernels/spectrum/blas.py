"""The LAPACK beside the compiled solver: NumPy's, one thread per matrix.

It serves where the extension is not loaded, in float32, and for singular values. NumPy is a
dependency anyway, its wheels carry OpenBLAS, its ``a @ a.T`` is a ``syrk`` (half the work of a
product), its ``eigvalsh`` the divide-and-conquer driver ``syevd`` without vectors, and both release
the interpreter lock. torch's own copy is MKL, and exports no ``syrk``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

__all__ = ["SOLVERS", "library_name", "one_thread"]


#: n; milliseconds from a square weight to its eigenvalues: ``gram_eigenvalues``, NumPy's syrk and
#: eigvalsh, torch's mm and eigvalsh. Float64, one thread, best of several, a Zen 4 with AVX-512
#: (OpenBLAS 0.3.31, MKL 2024.2). Repeat with ``python benchmarks/bench_alpha.py --solvers``. The
#: first leads or ties in every row, so all sizes go there; NumPy leads torch, so it comes second.
SOLVERS: tuple[tuple[int, float, float, float], ...] = (
    (32, 0.03, 0.03, 0.04),
    (64, 0.09, 0.12, 0.11),
    (128, 0.40, 0.50, 0.51),
    (256, 1.92, 2.43, 3.02),
    (512, 11.3, 16.9, 21.0),
    (1024, 66.9, 93.8, 142.0),
    (2048, 455.0, 708.0, 886.0),
)


@functools.lru_cache(maxsize=1)
def library_name() -> str:
    """ "numpy scipy-openblas": the LAPACK that NumPy was built with."""
    config = np.show_config(mode="dicts") or {}
    lapack = config.get("Build Dependencies", {}).get("lapack", {})
    return f"numpy {lapack.get('name', 'lapack')}"


@functools.lru_cache(maxsize=1)
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """(read, set) the thread count of NumPy's own OpenBLAS; None for another library."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for file in sorted(folder.glob("libscipy_openblas*")):
            library = ctypes.CDLL(str(file))  # already loaded; this only opens a handle
            for tail in ("64_", ""):
                read = getattr(library, f"scipy_openblas_get_num_threads{tail}", None)
                change = getattr(library, f"scipy_openblas_set_num_threads{tail}", None)
                if read is not None and change is not None:
                    read.restype, change.argtypes = ctypes.c_int, [ctypes.c_int]
                    return read, change
    return None


_lock = threading.Lock()
_users = 0
_before: tuple[int, int] = (0, 1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, one call is one thread, of OpenBLAS and of torch; results then do not depend on it.

    The counts are those of the process, so they are set by the first of concurrent users and put
    back by the last. A NumPy with another library than its own OpenBLAS keeps its count.
    """
    global _users, _before
    blas = _openblas()
    with _lock:
        if _users == 0:
            _before = (blas[0]() if blas else 0, torch.get_num_threads())
            _set(1, 1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(*_before)


def _set(blas_threads: int, torch_threads: int) -> None:
    blas = _openblas()
    if blas is not None:
        blas[1](blas_threads)
    torch.set_num_threads(torch_threads)
