"""The whole suite once for every instruction set of this CPU: ``tests/run_isa.py [LEVEL ...]``.

torch, oneDNN, MKL and the kernels of this package are limited together, as on a CPU that has no
more. Results differ in rounding between the levels, and no test may depend on which one it meets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from test_isa import ALL, supported  # noqa: E402

from opentrans_kernels.bench.environment import isa_environment  # noqa: E402

GENERIC = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OPENTRANS_CPU_CAPABILITY": "generic",
}


def limits(level: str) -> dict[str, str]:
    """Variables that limit every library to ``level``. NEON is the only choice where it exists."""
    if level == "generic":
        return GENERIC
    if level == "neon":
        return {"OPENTRANS_CPU_CAPABILITY": "neon"}
    names = isa_environment(level, 1).items()
    return {name: value for name, value in names if not name.endswith("_NUM_THREADS")}


def main(levels: list[str], arguments: list[str]) -> int:
    here = [name for name, there in supported().items() if there]
    for level in levels:
        if level not in here:
            print(f"this CPU has no {level}; it has {', '.join(here)}", file=sys.stderr)
            return 2
    for level in ALL:
        if level not in here:
            print(f"== {level}: not run, this CPU has none")
    failed = []
    for level in levels or here:
        added = limits(level)
        print(f"== {level}: {' '.join(f'{k}={v}' for k, v in added.items())}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests", *arguments]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, **added}).returncode:
            failed.append(level)
    print(f"== failed: {', '.join(failed)}" if failed else "== every level passed")
    return 1 if failed else 0


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    sys.exit(main(words[:cut], words[cut + 1 :]))
