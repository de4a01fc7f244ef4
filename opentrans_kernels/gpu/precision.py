"""What a plan computes in: storage dtype, and whether float32 products may be TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import PlanError

__all__ = ["PRECISIONS", "Precision", "float32_products", "nearest_tf32"]


def nearest_tf32(x: torch.Tensor) -> torch.Tensor:
    """Float32 ``x`` rounded to TF32; NaN and Inf stay.

    Tensor cores cut the last 13 bits off. Cutting shrinks every product by 7e-4 on average, which
    adds up over 50 layers; of a value rounded beforehand nothing is cut.
    """
    nearest = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether cuBLAS and cuDNN may multiply float32 in TF32; restored afterwards.

    PyTorch keeps this twice, as ``allow_tf32`` and as ``fp32_precision``, and raises where it reads
    the one after the other was set. So what is read is ``fp32_precision``, which never raises, and
    both are written.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts = (matmul, cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    try:
        named: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by fp32_precision alone: there is no name for it
        named = None
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        for part in parts:  # said outright: "none" would ask torch.backends.fp32_precision
            part.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        cudnn.allow_tf32 = before[1] == "tf32"
        if named is None:
            matmul.allow_tf32 = before[0] == "tf32"
        else:  # "medium" is more than allow_tf32 can say
            torch.set_float32_matmul_precision(named)
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


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

    def operand(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``tensor`` as an operand of our kernels, rounded once and to nearest.

        In TF32 on CUDA to what tensor cores read; a CPU multiplies all of a float32.
        """
        found = tensor.to(device, self.dtype).contiguous()
        return nearest_tf32(found) if self.tf32 and device.type == "cuda" else found

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """cuDNN and cuBLAS compute float32 as this precision says; restored afterwards.

        Half-precision sums are not reduced in half precision either.
        """
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (
            cudnn.benchmark,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        )
        try:
            cudnn.benchmark = True  # PyTorch's own kernels at their best
            matmul.allow_fp16_reduced_precision_reduction = False
            matmul.allow_bf16_reduced_precision_reduction = False
            with (
                float32_products(self.tf32),
                torch.autocast("cuda", enabled=False),
                torch.autocast("cpu", enabled=False),
            ):
                yield
        finally:
            (
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
