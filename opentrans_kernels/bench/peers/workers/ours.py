"""What both of our workers do once they know what to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

import numpy as np
import torch
from protocol import serve

from opentrans_kernels import native


def serve_ours(answers: IO[str], run: Callable[[], torch.Tensor]) -> None:
    """Serve timings of ``run``, without gradients."""

    def call() -> torch.Tensor:
        with torch.no_grad():
            return run()

    described = {
        "engine": "opentrans",
        "cpu_capability": native.cpu_capability() if native.available() else None,
        "torch": torch.__version__,
    }
    serve(answers, call, described, lambda target: np.save(target, call().contiguous().numpy()))
