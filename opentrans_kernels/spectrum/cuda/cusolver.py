"""Eigenvalues from cuSOLVER, called through ctypes: the library torch has loaded, no compiler.

``torch.linalg.eigvalsh`` loops over the batch on CUDA for n > 32. Two routines do not, or can run
side by side:

- ``cusolverDnXsyevBatched`` (cuSOLVER >= 11.7.1, CUDA >= 12.6.2): one call for a batch; float64
  values, lower triangle, n * lda * batch <= 2^31 - 1, so larger batches go in chunks.
- ``cusolverDnXsyevd``: one matrix; a handle and a stream each, because calls through one handle
  serialise.

Both overwrite the matrices. Signatures are those of ``cusolverDn.h`` (CUDA 12.6 to 13.0).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelUnavailable, OpenTransError

__all__ = ["INT32_MAX", "CuSolver", "Handle", "find", "load"]

INT32_MAX = 2**31 - 1
_NO_VECTORS = 0  # CUSOLVER_EIG_MODE_NOVECTOR
_LOWER = 0  # CUBLAS_FILL_MODE_LOWER
_FLOAT64 = 1  # CUDA_R_64F
_SONAME = {12: 11, 13: 12}  # CUDA major -> number behind libcusolver.so.
_NEED = "It is part of CUDA >= 12.6.2 (cuSOLVER >= 11.7.1)"

_STATUS = {
    1: "NOT_INITIALIZED: no usable CUDA driver or device",
    2: "ALLOC_FAILED: out of device memory",
    3: "INVALID_VALUE",
    4: "ARCH_MISMATCH: the device is older than the library supports",
    5: "MAPPING_ERROR",
    6: "EXECUTION_FAILED: the kernel failed on the device",
    7: "INTERNAL_ERROR",
    8: "MATRIX_TYPE_NOT_SUPPORTED",
    9: "NOT_SUPPORTED",
}

_size, _void, _int, _long = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_sizes = ctypes.POINTER(_size)
# handle, params, jobz, uplo, n, type of A, A, lda, type of W, W, compute type
_PROBLEM = (_void, _void, _int, _int, _long, _int, _void, _long, _int, _void, _int)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusolverGetVersion": (ctypes.POINTER(_int),),
    "cusolverDnCreate": (ctypes.POINTER(_void),),
    "cusolverDnCreateParams": (ctypes.POINTER(_void),),
    "cusolverDnSetStream": (_void, _void),
    "cusolverDnXsyevd_bufferSize": (*_PROBLEM, _sizes, _sizes),
    "cusolverDnXsyevd": (*_PROBLEM, _void, _size, _void, _size, _void),
    "cusolverDnXsyevBatched_bufferSize": (*_PROBLEM, _sizes, _sizes, _long),
    "cusolverDnXsyevBatched": (*_PROBLEM, _void, _size, _void, _size, _void, _long),
}


class CuSolver:
    """A loaded libcusolver with typed functions.

    Args:
        library: the ``ctypes.CDLL``, or an object with the same functions.
        path: where it came from, for messages.

    Raises:
        KernelUnavailable: a function is missing; the message names version and path.
    """

    def __init__(self, library: Any, path: str) -> None:
        self.path = path
        self._functions: dict[str, Any] = {}
        missing = []
        for name, types in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                missing.append(name)
                continue
            function.argtypes, function.restype = types, _int
            self._functions[name] = function
        self.version = self._version()
        if missing:
            raise KernelUnavailable(
                f"cuSOLVER {self.version} ({path}) has no {missing[-1]}. {_NEED}. Install a torch "
                "built for a newer CUDA, or choose solver='sturm', which does not use cuSOLVER."
            )

    def _version(self) -> str:
        number = _int()
        function = self._functions.get("cusolverGetVersion")
        if function is None or function(ctypes.byref(number)):
            return "of unknown version"
        major, rest = divmod(number.value, 1000)
        return f"{major}.{rest // 100}.{rest % 100}"

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; a status other than 0 is an error that names both."""
        status = self._functions[name](*arguments)
        if status:
            meaning = _STATUS.get(status, "see cusolverStatus_t in cusolver_common.h")
            raise OpenTransError(
                f"{name} of cuSOLVER {self.version} returned status {status} ({meaning}). Free "
                "device memory or estimate fewer layers at once if it is ALLOC_FAILED; otherwise "
                "choose solver='sturm', or device='cpu'."
            )


class Handle:
    """One cuSOLVER handle with its parameters: for one stream and one thread at a time.

    Create it with the device it is for current.
    """

    def __init__(self, solver: CuSolver) -> None:
        self.solver = solver
        self._handle, self._params = _void(), _void()
        solver.call("cusolverDnCreate", ctypes.byref(self._handle))
        solver.call("cusolverDnCreateParams", ctypes.byref(self._params))

    def set_stream(self, stream: int) -> None:
        """``stream``: a ``cudaStream_t`` as ``torch.cuda.Stream.cuda_stream`` gives it."""
        self.solver.call("cusolverDnSetStream", self._handle, _void(stream))

    def batched(
        self, matrices: torch.Tensor, values: torch.Tensor, info: torch.Tensor
    ) -> list[torch.Tensor]:
        """Eigenvalues of a batch by ``XsyevBatched``; chunks keep its 32-bit limit.

        Args:
            matrices: float64 [B, n, n], contiguous, symmetric; **overwritten**.
            values: float64 [B, n], contiguous; receives the eigenvalues, ascending.
            info: int32 [B]; receives 0 where the iteration converged.

        Returns:
            The workspaces. Keep them until the stream has finished.
        """
        batch, n = _check(matrices, values, info)
        if n * n > INT32_MAX:
            raise OpenTransError(
                f"XsyevBatched cannot take a matrix of {n} x {n}: n * lda * batch must stay below "
                "2^31. Use solver='xsyevd'."
            )
        step = max(1, INT32_MAX // max(1, n * n))
        keep = []
        for first in range(0, batch, step):
            part = slice(first, min(first + step, batch))
            keep += self._run(
                "cusolverDnXsyevBatched", n, matrices[part], values[part], info[part],
                _long(part.stop - first),
            )  # fmt: skip
        return keep

    def one_by_one(
        self, matrices: torch.Tensor, values: torch.Tensor, info: torch.Tensor
    ) -> list[torch.Tensor]:
        """Eigenvalues of each matrix by ``Xsyevd``; arguments and result as :meth:`batched`."""
        batch, n = _check(matrices, values, info)
        keep = []
        for index in range(batch):
            keep += self._run("cusolverDnXsyevd", n, matrices[index], values[index], info[index:])
        return keep

    def _run(
        self,
        name: str,
        n: int,
        matrices: torch.Tensor,
        values: torch.Tensor,
        info: torch.Tensor,
        *batch: ctypes.c_int64,
    ) -> list[torch.Tensor]:
        if not values.numel():
            return []
        on_device, on_host = _size(), _size()
        problem = (
            self._handle, self._params, _int(_NO_VECTORS), _int(_LOWER), _long(n), _int(_FLOAT64),
            _void(matrices.data_ptr()), _long(n), _int(_FLOAT64), _void(values.data_ptr()),
            _int(_FLOAT64),
        )  # fmt: skip
        self.solver.call(
            f"{name}_bufferSize", *problem, ctypes.byref(on_device), ctypes.byref(on_host), *batch
        )
        device = matrices.new_empty(max(1, on_device.value), dtype=torch.uint8)
        host = torch.empty(max(1, on_host.value), dtype=torch.uint8)
        self.solver.call(
            name, *problem, _void(device.data_ptr()), on_device, _void(host.data_ptr()), on_host,
            _void(info.data_ptr()), *batch,
        )  # fmt: skip
        return [device, host]


def _check(matrices: torch.Tensor, values: torch.Tensor, info: torch.Tensor) -> tuple[int, int]:
    square = matrices.dim() == 3 and matrices.shape[1] == matrices.shape[2]
    if not square or matrices.dtype != torch.float64 or not matrices.is_contiguous():
        raise OpenTransError(
            "cuSOLVER needs contiguous float64 matrices [B, n, n], got "
            f"{matrices.dtype} {list(matrices.shape)} with strides {list(matrices.stride())}. "
            "Make them with .double().contiguous()."
        )
    batch, n = matrices.shape[0], matrices.shape[1]
    wanted = ((values, torch.float64, (batch, n)), (info, torch.int32, (batch,)))
    for tensor, dtype, shape in wanted:
        fits = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
        if not fits or tensor.device != matrices.device:
            raise OpenTransError(
                f"cuSOLVER writes a contiguous {dtype} {list(shape)} on {matrices.device}, got "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}. Allocate it so."
            )
    return batch, n


def find() -> list[str]:
    """Candidate paths of libcusolver, best first: already loaded, shipped with torch, system."""
    candidates = []
    maps = Path("/proc/self/maps")
    if maps.exists():
        candidates = [
            line.split()[-1]
            for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()
            if "libcusolver.so" in line
        ]
    number = _SONAME.get(int((torch.version.cuda or "0").partition(".")[0]))
    if number is not None:
        site = Path(torch.__file__).parents[1]
        candidates += map(str, sorted(site.glob(f"nvidia/*/lib/libcusolver.so.{number}")))
        candidates += map(str, sorted(site.glob(f"torch/lib/libcusolver*.so*{number}")))
        candidates.append(f"libcusolver.so.{number}")
    return list(dict.fromkeys(candidates))


@functools.lru_cache(maxsize=1)
def load() -> CuSolver:
    """The libcusolver of this process.

    Raises:
        KernelUnavailable: no library, or one older than CUDA 12.6.2; with path and version.
    """
    failures = []
    for path in find():
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            failures.append(f"{path}: {error}")
        else:
            return CuSolver(library, path)
    tried = "; ".join(failures) or f"torch {torch.__version__} is built without a known CUDA"
    raise KernelUnavailable(
        f"libcusolver was not found ({tried}). Install a CUDA build of torch, or choose "
        "solver='sturm', which does not use cuSOLVER."
    )
