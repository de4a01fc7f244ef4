"""The solvers behind alpha, timed by size: what ``spectrum/blas.py`` chooses from."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentrans.cli.render import Output
from opentrans_kernels.bench.environment import environment_block


def solvers(out: Output) -> int:
    """Milliseconds from a weight to its eigenvalues by size, float64, one thread."""
    import numpy as np
    import torch

    from opentrans_kernels.ops import gram_eigenvalues
    from opentrans_kernels.spectrum.blas import SOLVERS, library_name, one_thread

    def best(call: Callable[[], Any], seconds: float = 0.5) -> float:
        call()
        samples, deadline = [], time.perf_counter() + seconds
        while not samples or time.perf_counter() < deadline:
            start = time.process_time()
            call()
            samples.append(time.process_time() - start)
        return min(samples) * 1e3

    rows, generator = [], np.random.default_rng(0)
    with one_thread():
        for n, *stored in SOLVERS:
            a = generator.standard_normal((n, n)) / n**0.5  # no digits to win back
            t = torch.from_numpy(a)
            now = (
                best(lambda t=t: gram_eigenvalues(t[None])),
                best(lambda a=a: np.linalg.eigvalsh(a @ a.T)),
                best(lambda t=t: torch.linalg.eigvalsh(t @ t.T)),
            )
            rows.append([n, *(f"{ms:.2f} ({old:g})" for ms, old in zip(now, stored, strict=True))])
    out.heading("weight to eigenvalues, ms here (and in the table)")
    out.table(None, ("n", "gram_eigenvalues", library_name(), "torch"), rows)
    out.finish({"rows": rows, **environment_block()})
    return 0
