"""WeightWatcher's side of ``bench_alpha.py``: its environment, made by one command.

    python benchmarks/peers/weightwatcher_peer.py --venv /somewhere/weightwatcher

It pins old habits of its dependencies, so it lives in an environment and a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from opentrans_kernels.bench.peers.registry import PEERS

REQUIREMENTS = PEERS["weightwatcher"].requirements


def main(argv: Sequence[str] | None = None) -> int:
    """Make or complete the environment; the exit code of the step that failed, or 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", required=True, type=Path, metavar="DIR")
    parser.add_argument("--python", default=sys.executable, help="Python 3.9 or later")
    options = parser.parse_args(argv)
    python = options.venv / "bin" / "python"
    steps = [] if python.exists() else [[options.python, "-m", "venv", str(options.venv)]]
    steps.append([str(python), "-m", "pip", "install", *REQUIREMENTS])
    for command in steps:
        code = subprocess.run(command).returncode
        if code:
            sys.stderr.write(f"weightwatcher_peer: failed: {' '.join(command)}\n")
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
