"""Compiles a ``.cu`` file into a shared library at first use, once per GPU generation.

The library is kept in the user's cache folder under a name made of the sources' hash, the
architecture and the compiler's version. No torch headers are involved.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import KernelUnavailable

__all__ = ["build_library", "find_nvcc"]

_FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC")
_TIMEOUT = 300


def find_nvcc() -> str | None:
    """Path of nvcc: of ``CUDA_HOME``, of ``PATH``, or of the usual place."""
    home = os.environ.get("CUDA_HOME", "").strip()
    tried = [Path(home, "bin", "nvcc")] if home else []
    tried += [Path(found)] if (found := shutil.which("nvcc")) else []
    tried.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in tried if path.exists()), None)


def build_library(nvcc: str, sources: Sequence[Path], architecture: str, op: str) -> Path:
    """The shared library of ``sources``, whose first file is compiled and includes the others.

    ``architecture`` is nvcc's (``"sm_90"``); ``op`` names the kernel in errors. Raises
    KernelUnavailable with the compiler's first error, or if the cache folder cannot be written.
    """
    # Machine code alone: -arch would add PTX for a compiler to come, of a less able architecture.
    target_flags = ("-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{target_flags}{version}{_FLAGS}".encode())
    for path in sources:
        digest.update(path.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or str(Path.home() / ".cache")
    folder = Path(base) / "opentrans_kernels" / "cuda"
    target = folder / f"{sources[0].stem}_{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            part = os.path.join(work, "part.so")
            done = subprocess.run(
                [nvcc, *_FLAGS, *target_flags, "-o", part, str(sources[0])],
                capture_output=True, text=True, timeout=_TIMEOUT,
            )  # fmt: skip
            if done.returncode:
                lines = (done.stderr + done.stdout).splitlines()
                shown = next((line for line in lines if "error" in line), "no message")
                raise KernelUnavailable(
                    f"{op}: {nvcc} failed for {architecture}: {shown}. Plan without "
                    "this kernel, or install a CUDA toolkit that knows this GPU and a host "
                    "compiler that it accepts."
                )
            os.replace(part, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(
            f"{op}: building for {architecture} failed: {error}. Check that "
            f"{folder} can be written, or set XDG_CACHE_HOME."
        ) from error
    return target
