"""A libcusolver made of NumPy: C functions with the real signatures that record every call."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from opentrans_kernels.spectrum.cuda import solve as solve_module
from opentrans_kernels.spectrum.cuda.cusolver import _SIGNATURES, CuSolver

__all__ = ["Library", "use"]


def array(address: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    size = math.prod(shape) * np.dtype(kind).itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(buffer, dtype=kind).reshape(shape)


class Library:
    """libcusolver's functions, as C functions of the same types; ``leave_out`` are missing.

    Attributes:
        calls: (name, n, batch, device bytes, host bytes) of every solve.
        info: matrices of this order report no convergence.
    """

    DEVICE, HOST = 4096, 96  # workspace bytes it asks for, and checks that it got

    def __init__(self, leave_out: str = "", info: int = -1, status: int = 0) -> None:
        self.calls: list[tuple[str, int, int, int, int]] = []
        self.streams: list[int] = []
        self.info, self.status = info, status
        bodies = {
            "cusolverGetVersion": self._version,
            "cusolverDnCreate": self._create,
            "cusolverDnCreateParams": self._create,
            "cusolverDnSetStream": lambda handle, stream: self.streams.append(stream) or 0,
            "cusolverDnXsyevd_bufferSize": self._sizes,
            "cusolverDnXsyevBatched_bufferSize": self._sizes,
            "cusolverDnXsyevd": lambda *a: self._solve("Xsyevd", *a, 1),
            "cusolverDnXsyevBatched": lambda *a: self._solve("XsyevBatched", *a),
        }
        assert set(bodies) == set(_SIGNATURES), "a function has no stand-in"
        for name, body in bodies.items():
            if name != leave_out:
                prototype = ctypes.CFUNCTYPE(ctypes.c_int, *_SIGNATURES[name])
                setattr(self, name, prototype(body))

    @staticmethod
    def _version(out) -> int:
        out[0] = 11703
        return 0

    @staticmethod
    def _create(out) -> int:
        out[0] = 0x51
        return 0

    @staticmethod
    def _problem(*fixed) -> int:
        handle, params, jobz, uplo, n, type_a, a, lda, type_w, w, compute = fixed
        assert handle == params == 0x51 and a and w
        assert (jobz, uplo, type_a, type_w, compute) == (0, 0, 1, 1, 1), "values only, float64"
        assert lda == n
        return n

    def _sizes(self, *arguments) -> int:
        self._problem(*arguments[:11])
        arguments[11][0], arguments[12][0] = self.DEVICE, self.HOST
        return 0

    def _solve(self, name: str, *arguments) -> int:
        n = self._problem(*arguments[:11])
        a, w = arguments[6], arguments[9]
        device, device_bytes, host, host_bytes, info, batch = arguments[11:]
        assert (device_bytes, host_bytes) == (self.DEVICE, self.HOST) and device and host
        array(device, (self.DEVICE,), np.uint8)[:] = 7  # a workspace too small would show
        array(host, (self.HOST,), np.uint8)[:] = 7
        matrices = array(a, (batch, n, n), np.float64)
        # Column-major storage and fill mode "lower": the upper triangle of a row-major matrix.
        array(w, (batch, n), np.float64)[:] = np.linalg.eigvalsh(matrices, UPLO="U")
        array(info, (batch,), np.int32)[:] = 3 if n == self.info else 0
        matrices[:] = math.nan  # the real one overwrites them too
        self.calls.append((name, n, batch, device_bytes, host_bytes))
        return self.status


def use(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    """Make the stand-in the library of this process, with no handle left from another one."""
    loaded = CuSolver(library, "stand-in")
    monkeypatch.setattr(solve_module.cusolver, "load", lambda: loaded)
    monkeypatch.setattr(solve_module, "_idle", {})
    return library
