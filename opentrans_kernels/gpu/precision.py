"""What a plan computes in: storage dtype, and whether float32 products may be TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import PlanError

__all__ = ["PRECISIONS", "Precision"]


@dataclass(frozen=True)
class Precision:
    """``float16``, ``bfloat16``, ``tf32`` or ``float32`` (strict: IEEE products and sums)."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    @classmethod
    def of(cls, name: str | torch.dtype | Precision) -> Precision:
        """Raises PlanError for an unknown name."""
        if isinstance(name, Precision):
            return name
        text = str(name).removeprefix("torch.")
        if text not in PRECISIONS:
            raise PlanError(
                f"precision {text!r} is not known. Use one of {', '.join(PRECISIONS)}; sums are "
                "float32 in each of them."
            )
        return PRECISIONS[text]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """cuDNN and cuBLAS compute float32 as this precision says; restored afterwards.

        Half-precision sums are not reduced in half precision either.
        """
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (
            matmul.allow_tf32,
            cudnn.allow_tf32,
            cudnn.benchmark,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        )
        try:
            matmul.allow_tf32 = cudnn.allow_tf32 = self.tf32
            cudnn.benchmark = True  # PyTorch's own kernels at their best
            matmul.allow_fp16_reduced_precision_reduction = False
            matmul.allow_bf16_reduced_precision_reduction = False
            with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                yield
        finally:
            (
                matmul.allow_tf32,
                cudnn.allow_tf32,
                cudnn.benchmark,
                matmul.allow_fp16_reduced_precision_reduction,
                matmul.allow_bf16_reduced_precision_reduction,
            ) = before


PRECISIONS = {
    "float16": Precision("float16", torch.float16),
    "bfloat16": Precision("bfloat16", torch.bfloat16),
    "tf32": Precision("tf32", torch.float32, True),
    "float32": Precision("float32", torch.float32),
}
