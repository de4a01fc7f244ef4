"""Our side of one operator: ``our_operator_worker.py FOLDER THREADS BACKEND``.

Calls the kernel of the dispatch table's row BACKEND with the arguments of ``operator.pt`` in
FOLDER, and serves timings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ours import serve_ours
from protocol import take_stdout

from opentrans_kernels import dispatch


def main(arguments: list[str]) -> None:
    """Load and serve."""
    answers = take_stdout()
    folder, threads, backend = Path(arguments[0]), arguments[1], arguments[2]
    torch.set_num_threads(int(threads))
    work = torch.load(folder / "operator.pt", weights_only=True)
    found = (row for row in dispatch.TABLE if (row.op, row.backend) == (work["op"], backend))
    kernel = dispatch.Resolution(next(found), ()).function()
    serve_ours(answers, lambda: kernel(*work["arguments"]))


if __name__ == "__main__":
    main(sys.argv[1:])
