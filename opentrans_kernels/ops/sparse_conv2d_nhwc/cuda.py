"""The CUDA-core kernel of ``sparse_conv2d_nhwc``: checks, pointers and the launch."""

from __future__ import annotations

import ctypes

import torch

from ...errors import KernelUnavailable, PlanError
from ..nhwc import LIMIT, empty_nhwc, nhwc
from . import build
from .pack import LANES, LINES
from .shapes import check

__all__ = ["sparse_conv2d_nhwc"]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def problem_of(x, entries, begin, slots, bias, residual, y, kernel, chunk, relu) -> build.Problem:
    """Pointers and sizes of one launch; tensors must outlive it."""
    n, cin, h, w = x.shape
    at = (
        t.data_ptr() if t is not None else None
        for t in (x, entries, begin, slots, bias, residual, y)
    )
    return build.Problem(*at, n, h, w, cin, y.shape[1], kernel**2, chunk, int(relu))


def sparse_conv2d_nhwc(x, entries, begin, slots, bias, residual, cin, kernel, chunk, relu):
    size = check(x, entries, begin, slots, bias, residual, cin, kernel, chunk)
    y = empty_nhwc(x, *size)
    if y.numel() == 0:
        return y
    blocks = size[0] * -(-size[2] // LINES) * -(-size[3] // LANES) * slots.shape[0]
    if blocks > LIMIT:
        raise PlanError(
            f"sparse_conv2d_nhwc: {blocks} blocks are more than {LIMIT}. Pass a smaller batch."
        )
    x, residual = nhwc(x), None if residual is None else nhwc(residual)
    problem = problem_of(x, entries, begin, slots, bias, residual, y, kernel, chunk, relu)
    loaded = build.library(*torch.cuda.get_device_capability(x.device))
    text = ctypes.c_char_p()
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        code = loaded.otk_sparse_conv(
            ctypes.byref(problem), _DTYPES[x.dtype], stream, ctypes.byref(text)
        )
    if code:
        raise KernelUnavailable(
            f"sparse_conv2d_nhwc: the launch failed with CUDA error {code} "
            f"({(text.value or b'').decode()}). Plan without this kernel on this GPU."
        )
    return y
