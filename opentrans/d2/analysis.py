"""fvcore's counter, which detectron2's ``analyze_model`` uses, made to see our operators."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from opentrans_kernels.flops import FORMULAS, fvcore_handle

__all__ = ["fvcore_handles", "register_with_fvcore"]


def fvcore_handles() -> dict[str, Callable[..., int]]:
    """Operator name -> handle, for ``FlopCountAnalysis(...).set_op_handle(**fvcore_handles())``.

    A handle counts what is computed: nonzeros x output pixels for a sparse convolution.
    """
    import opentrans_kernels.ops  # noqa: F401  (defines the operators)

    handles: dict[str, Callable[..., int]] = {}
    for name in FORMULAS:
        if hasattr(torch.ops.opentrans_kernels, name):
            handles |= fvcore_handle(getattr(torch.ops.opentrans_kernels, name))
    return handles


def register_with_fvcore() -> bool:
    """Make every later ``FlopCountAnalysis`` count our operators, detectron2's subclass too.

    Does nothing, and returns False, as long as fvcore's counter is not imported: nobody counts.
    """
    counter = sys.modules.get("fvcore.nn.flop_count")
    known = getattr(counter, "_DEFAULT_SUPPORTED_OPS", None)
    if known is None:
        return False
    known.update(fvcore_handles())
    return True
