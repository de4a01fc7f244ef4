"""Compiles ``csrc`` for tests that call the kernels without torch, or with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What tests call the kernels through.
CALLS = sorted(path for path in (ROOT / "tests").glob("csrc_*") if path.suffix in (".h", ".cpp"))


def compiler() -> list[str] | None:
    """The command of the C++ compiler, or None if there is none."""
    named = os.environ.get("CXX", "").strip() or shutil.which("g++") or shutil.which("c++")
    return named.split() if named and shutil.which(named.split()[0]) else None


def compile_all(
    command: Sequence[str], sources: Sequence[Path], folder: Path, jobs: int = 1
) -> tuple[list[Path], str]:
    """Objects in ``folder`` and what the compiler said. Raises RuntimeError with its errors.

    Objects that are there already, made by the same command and younger than every source, are
    kept.
    """
    kernels = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    made_by = folder / "command.txt"
    known = made_by.exists() and made_by.read_text(encoding="utf-8") == repr(list(command))
    made_by.write_text("", encoding="utf-8")  # until all are there

    def one(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        read = kernels if source.is_relative_to(ROOT / "csrc") else [*kernels, *CALLS, source]
        newest = max(path.stat().st_mtime for path in read)
        if known and target.exists() and target.stat().st_mtime > newest:
            return target, ""
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{source.name}: {done.stderr[-3000:]}")
        return target, done.stderr

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(one, sources))
    made_by.write_text(repr(list(command)), encoding="utf-8")
    return [target for target, _ in found], "".join(said for _, said in found)


def kernel_sources() -> list[Path]:
    """All of ``csrc/cpu``."""
    # The slowest first, so that a second job does not wait for them in the end.
    kernels = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
    return sorted(kernels, key=lambda path: not path.stem.startswith("isa_"))


def call_sources() -> list[Path]:
    """The process that tests call the kernels in, see ``csrc_process``."""
    return [path for path in CALLS if path.suffix == ".cpp"]
