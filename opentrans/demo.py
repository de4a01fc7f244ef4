"""``python -m opentrans.demo``: the same as ``opentrans demo``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with its own options; returns the exit code of the command line."""
    from opentrans_kernels.cli import main as command

    return command(["demo", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
