"""The common part of the results of the training benchmarks: machine, versions, commit, canary."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from opentrans_kernels.bench import canary
from opentrans_kernels.bench.environment import environment_block, portable_words
from opentrans_kernels.bench.schema import envelope


class Watch:
    """Looks at the machine when it is made and when the result is finished."""

    def __init__(self, kind: str, threads: int) -> None:
        self.kind, self.threads = kind, threads
        command = [f"benchmarks/{Path(sys.argv[0]).name}", *portable_words(sys.argv[1:])]
        self.start = {**environment_block(), "threads": threads, "command": command}
        self._before = canary.look(threads=threads)

    def result(self, complete: bool = True) -> dict[str, Any]:
        """What every result begins with."""
        found = canary.verdict(self._before, canary.look(threads=self.threads))
        return {**envelope(self.kind, complete=complete), **self.start, "canary": found}
