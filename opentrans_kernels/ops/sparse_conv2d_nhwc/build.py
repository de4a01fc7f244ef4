"""Compiles ``csrc/cuda/sparse_conv.cu`` once per GPU generation, and loads it through ctypes.

nvcc is called at first use; the library is kept in the user's cache folder under a name made of
the sources' hash, the architecture and the compiler's version. No torch headers are involved.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ...errors import KernelUnavailable

__all__ = ["Problem", "find_nvcc", "library", "sources", "why_not"]

_FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC")
_TIMEOUT = 300


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


def find_nvcc() -> str | None:
    """Path of nvcc: of ``CUDA_HOME``, of ``PATH``, or of the usual place."""
    home = os.environ.get("CUDA_HOME", "").strip()
    tried = [Path(home, "bin", "nvcc")] if home else []
    tried += [Path(found)] if (found := shutil.which("nvcc")) else []
    tried.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in tried if path.exists()), None)


def why_not() -> str | None:
    """Why the CUDA kernel cannot be built here; None if it can be tried."""
    if len(sources()) < 2:
        return "csrc/cuda is missing: the package was installed without its CUDA sources"
    if find_nvcc() is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda). Install the CUDA toolkit"
    return None


def compile_command(nvcc: str, architecture: str, output: str) -> list[str]:
    return [nvcc, *_FLAGS, f"-arch={architecture}", "-o", output, str(sources()[0])]


@cache
def library(major: int, minor: int) -> ctypes.CDLL:
    """The library for a compute capability, built if need be.

    Raises KernelUnavailable with the compiler's first error.
    """
    if (problem := why_not()) is not None:
        raise KernelUnavailable(f"sparse_conv2d_nhwc: {problem}, or plan without this kernel.")
    nvcc = str(find_nvcc())
    architecture = f"sm_{major}{minor}"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{architecture}{version}{_FLAGS}".encode())
    for path in sources():
        digest.update(path.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or str(Path.home() / ".cache")
    folder = Path(base) / "opentrans_kernels" / "cuda"
    target = folder / f"sparse_conv_{digest.hexdigest()[:24]}.so"
    if not target.exists():
        _build(nvcc, architecture, folder, target)
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


def _build(nvcc: str, architecture: str, folder: Path, target: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            part = os.path.join(work, "part.so")
            done = subprocess.run(
                compile_command(nvcc, architecture, part),
                capture_output=True, text=True, timeout=_TIMEOUT,
            )  # fmt: skip
            if done.returncode:
                lines = (done.stderr + done.stdout).splitlines()
                shown = next((line for line in lines if "error" in line), "no message")
                raise KernelUnavailable(
                    f"sparse_conv2d_nhwc: {nvcc} failed for {architecture}: {shown}. Plan without "
                    "this kernel, or install a CUDA toolkit that knows this GPU and a host "
                    "compiler that it accepts."
                )
            os.replace(part, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(
            f"sparse_conv2d_nhwc: building for {architecture} failed: {error}. Check that "
            f"{folder} can be written, or set XDG_CACHE_HOME."
        ) from error
