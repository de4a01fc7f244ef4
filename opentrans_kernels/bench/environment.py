"""The machine and software beside every number, and the instruction-set limit of both sides.

torch, oneDNN, MKL and the kernels of this package choose their instruction set when the process
starts. A fair comparison on one instruction set therefore starts a fresh process whose environment
limits *all* of them; :func:`isa_environment` is that environment, :func:`missing_limits` tells
whether the present process already runs under it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OpenTransError

ISAS = ("native", "avx2", "avx512")

#: Variables that limit the dense side and ours to one instruction set, read at process start.
_LIMITS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENTRANS_CPU_CAPABILITY": "avx2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "DNNL_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "OPENTRANS_CPU_CAPABILITY": "avx512",
    },
}
#: CPU flag that an instruction set needs.
_FLAGS = {"avx2": "avx2", "avx512": "avx512f"}
#: Bits of a vector that torch.compile may use under each limit (None: its own choice).
SIMD_BITS = {"native": None, "avx2": 256, "avx512": 512}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "safetensors")
_SHOWN_FLAGS = re.compile(r"^(sse4_[12]|avx\w*|fma|f16c|bmi[12]|amx\w*|asimd\w*|sve\w*)$")


def isa_environment(isa: str, threads: int) -> dict[str, str]:
    """Environment variables for ``isa`` and ``threads``.

    Raises:
        OpenTransError: ``isa`` is unknown.
    """
    if isa not in _LIMITS:
        raise OpenTransError(
            f"instruction set {isa!r} is not known to the benchmark. Use one of {', '.join(ISAS)}."
        )
    return {**_LIMITS[isa], **{name: str(threads) for name in _THREAD_VARIABLES}}


def missing_limits(isa: str, threads: int, environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables of :func:`isa_environment` that ``environ`` lacks or has with another value."""
    environ = os.environ if environ is None else environ
    wanted = isa_environment(isa, threads)
    return [name for name, value in wanted.items() if environ.get(name) != value]


def check_isa(isa: str) -> None:
    """Raise OpenTransError if this CPU lacks ``isa``; nothing where its flags are not known."""
    flags = set(machine()["flags"])
    needed = _FLAGS.get(isa)
    if needed is not None and flags and needed not in flags:
        others = ", ".join(name for name in ISAS if _FLAGS.get(name) in (None, *flags))
        raise OpenTransError(
            f"--isa {isa}: this CPU ({machine()['cpu']}) has no {needed}, so neither side can be "
            f"run on it. Use one of --isa {others}."
        )


def rerun(command: Sequence[str], isa: str, threads: int) -> int:
    """Run this Python with the words of ``command`` in a process limited to ``isa``.

    Returns its exit code.

    The child shares stdin, stdout and stderr; this process only waits. Raises OpenTransError if
    this CPU lacks ``isa``.
    """
    check_isa(isa)
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, **isa_environment(isa, threads), "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, *command], env=environ) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()  # the terminal sent the interrupt to the child as well
            raise


def environment_block() -> dict[str, Any]:
    """Machine, CPU flags, versions, build record, threads and commit, as plain values for JSON."""
    import torch

    from .. import native

    capability = native.cpu_capability() if native.available() else None
    return {
        "machine": machine(),
        "versions": versions(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "opentrans_cpu_capability": capability,
        "extension": native.reason() or "loaded",
        "build": native.build_info(),
        "threads": torch.get_num_threads(),
        "limits": {
            name: os.environ[name]
            for name in sorted({*_LIMITS["avx2"], *_THREAD_VARIABLES})
            if name in os.environ
        },
        "source": source_state(),
    }


def portable_words(words: Sequence[str]) -> list[str]:
    """The words of a command for a result: of absolute paths, also in ``--option=PATH``, the last
    part only, since where a file lies on one machine tells nothing on another."""
    found = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        value = Path(value).name if Path(value).is_absolute() else value
        found.append(f"{option}{equals}{value}")
    return found


def machine() -> dict[str, Any]:
    """CPU model, vector flags, counts, caches, memory, governor and load; no host name."""
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "flags": sorted(flag for flag in set(flags) if _SHOWN_FLAGS.match(flag)),
        "hypervisor": "hypervisor" in flags,
        "cpus": os.cpu_count(),
        "caches": _caches(),
        "memory_gb": _memory_gb(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str | None]:
    """Installed versions; None for a package that is not installed."""
    from .. import __version__

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "opentrans_kernels": __version__,
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None when not run from a source checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"git could not tell: {type(error).__name__}"
        return {"commit": None, "dirty": None, "reason": reason}
    return {"commit": commit.strip(), "dirty": bool(changed.strip())}


def onednn_isa() -> str | None:
    """Instruction set oneDNN says it runs on, asked in a fresh process under this environment.

    None if its report cannot be read (for instance on a build of torch without oneDNN), or does
    not come within two minutes: a finished measurement is not given up for it.
    """
    # The operator that is oneDNN for certain; an ordinary convolution this small may not use it.
    code = (
        "import torch; x, w = torch.rand(1, 16, 8, 8), torch.rand(16, 16, 3, 3);"
        "torch.mkldnn_convolution(x, w, None, [0, 0], [1, 1], [1, 1], 1)"
    )
    environ = {**os.environ, "ONEDNN_VERBOSE": "1", "DNNL_VERBOSE": "1"}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None
    found = re.search(r"cpu,isa:(.*)", done.stdout)
    return found.group(1).strip() if found else None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """Key-value pairs of the first processor in /proc/cpuinfo; empty on other systems."""
    first = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _read(f"{index}/level"), _read(f"{index}/type")
        size = _read(f"{index}/size")
        if level and kind and size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            found[f"L{level}{suffix}"] = size
    return found


def _memory_gb() -> float | None:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return round(int(found.group(1)) / 2**20, 1) if found else None
