"""Calls the kernels of ``csrc/cpu`` in a process of its own, without torch: natively, or built for
another processor family and emulated.

Functions, parameters and results are those of ``csrc_shim.cpp`` and ``csrc_shim_ops.cpp``; arrays
that a function writes to are written back. A process that touches memory behind an array ends.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from native_build import ROOT, call_sources, compile_all, compiler, kernel_sources

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
FLAGS = "-std=c++20 -Wall -Werror -ffp-contract=fast".split()


class Pack(NamedTuple):
    structure: np.ndarray | None
    values: np.ndarray | None
    bias: np.ndarray | None


NO_PACK = Pack(None, None, None)


def _encoded(argument: Any) -> bytes:
    if argument is None:
        return b"0"
    if isinstance(argument, int | np.integer):
        return b"i" + struct.pack("<q", argument)
    if isinstance(argument, float):
        return b"d" + struct.pack("<d", argument)
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return b"a" + struct.pack("<q", argument.nbytes) + argument.tobytes()
    packs = [argument] if isinstance(argument, Pack) else argument
    parts = [_encoded(part) for pack in packs for part in pack]
    return b"p" + struct.pack("<q", len(packs)) + b"".join(parts)


def _arrays(arguments: Sequence[Any]) -> list[np.ndarray]:
    """In the order of their encoding."""
    found: list[np.ndarray] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += _arrays(argument)
    return found


class Kernels:
    """``kernels.conv(...)`` calls the function ``conv`` of the process."""

    def __init__(self, command: Sequence[str | Path], capability: str | None = None) -> None:
        self._command = list(command)
        self._environment = dict(os.environ)
        if capability is not None:
            self._environment["OPENTRANS_CPU_CAPABILITY"] = capability
        self._process: subprocess.Popen[bytes] | None = None

    def __getattr__(self, name: str) -> functools.partial[int]:
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
            )
        pipe = self._process
        assert pipe.stdin is not None and pipe.stdout is not None
        message = name.encode() + b"\0" + b"".join(_encoded(a) for a in arguments)
        pipe.stdin.write(struct.pack("<q", len(message)) + message)
        pipe.stdin.flush()
        head = pipe.stdout.read(8)
        body = pipe.stdout.read(struct.unpack("<q", head)[0]) if len(head) == 8 else b""
        if not body:
            self._process = None
            code = pipe.wait(60)
            raise AssertionError(f"{name} ended its process with {code}; see its stderr")
        at = 8
        for array in _arrays(arguments):
            size = struct.unpack_from("<q", body, at)[0]
            at += 8
            if size:
                changed = np.frombuffer(body, array.dtype, array.size, at)
                np.copyto(array, changed.reshape(array.shape))
            at += size
        return struct.unpack_from("<q", body)[0]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(60)
            self._process = None


def build(name: str, command: Sequence[str], flags: Sequence[str]) -> Path:
    """The program in ``build/csrc-NAME``; objects are kept there, one process at a time builds."""
    folder = ROOT / "build" / f"csrc-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile_ = [*command, *FLAGS, *flags, f"-I{ROOT / 'csrc'}"]
        objects, _ = compile_all(compile_, [*kernel_sources(), *call_sources()], folder)
        program = folder / "kernels"
        newest = max(path.stat().st_mtime for path in objects)
        if not program.exists() or program.stat().st_mtime <= newest:
            link = [*command, *flags, *objects, "-o", program, "-pthread"]
            subprocess.run(link, check=True)
    return program


def native() -> Kernels:
    """The kernels for this CPU, or those of the program that ``OTK_TEST_PROGRAM`` names."""
    given = Path(os.environ.get("OTK_TEST_PROGRAM", "")).resolve()
    if given.is_file():
        return Kernels([given])
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler (g++) was found; on Debian: apt install g++")
    return Kernels([build("native", command, ["-O1"])])


def why_not_emulated() -> str | None:
    """Why the kernels for 64-bit Arm cannot be built and run here, or None."""
    if os.environ.get("OTK_TEST_PROGRAM"):
        return "NEON is not run: OTK_TEST_PROGRAM names what is tested"
    missing = [tool for tool in PACKAGES if not shutil.which(tool)]
    if not missing:
        return None
    packages = " ".join(PACKAGES[tool] for tool in missing)
    return f"NEON is not run: no {' and no '.join(missing)}; on Debian: apt install {packages}"


def emulated(capability: str) -> Kernels:
    """The kernels for 64-bit Arm under emulation; ``capability`` is neon or generic."""
    if (reason := why_not_emulated()) is not None:
        pytest.skip(reason)
    return Kernels([EMULATOR, build("neon", [CROSS], ["-O2", "-Wextra", "-static"])], capability)
