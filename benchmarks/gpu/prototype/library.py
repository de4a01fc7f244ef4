"""The CUDA library of ``two_four_conv.cu``: problem, build, and the launch on tensors."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from opentrans_kernels.errors import KernelUnavailable
from opentrans_kernels.ops.nvcc import build_library, find_nvcc
from prototype.pack import TwoFour

__all__ = ["ROWS", "Problem", "conv", "problem_of", "sources", "why_not"]

ROWS = (16, 25, 32)  # of 8 pixels a tile


class Problem(ctypes.Structure):
    """``otk::two_four::Problem``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "groups", "begin", "bytes", "bias", "y")),
        *((name, ctypes.c_int) for name in ("n", "height", "width", "cin", "cout", "relu")),
    ]  # fmt: skip


def sources() -> list[Path]:
    folder = Path(__file__).resolve().parent
    return [folder / name for name in ("two_four_conv.cu", "two_four_conv.h", "sm90.h")]


def why_not(device: torch.device) -> str | None:
    """Why the kernel cannot run on ``device``; None if it can be tried."""
    if device.type != "cuda":
        return "a rehearsal has no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return (
            f"wgmma.sp needs compute capability 9.0, this GPU has {'.'.join(map(str, capability))}"
        )
    if find_nvcc() is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
    return None


@cache
def library() -> ctypes.CDLL:
    """Built at first use. Raises KernelUnavailable with the compiler's first error."""
    target = build_library(str(find_nvcc()), sources(), "sm_90a", "two_four_conv")
    loaded = ctypes.CDLL(str(target))
    loaded.otk_two_four_conv.argtypes = [
        ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int, ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_char_p),
    ]  # fmt: skip
    if loaded.otk_two_four_problem_size() != ctypes.sizeof(Problem):
        raise KernelUnavailable(f"{target} takes another problem. Delete the file.")
    return loaded


def problem_of(
    x: torch.Tensor, packed: TwoFour, bias: torch.Tensor, y: torch.Tensor, relu: bool
) -> Problem:
    """Pointers and sizes of one launch; tensors must outlive it."""
    n, cin, height, width = x.shape
    if (cin, y.shape[1]) != (len(packed.channels), len(packed.rows)):
        raise ValueError(f"x has {cin} channels, the pack expects {len(packed.channels)}")
    tensors = (x, packed.groups, packed.begin, packed.used, bias, y)
    return Problem(*(t.data_ptr() for t in tensors), n, height, width, cin, y.shape[1], int(relu))


def conv(
    x: torch.Tensor, packed: TwoFour, bias: torch.Tensor, y: torch.Tensor, rows: int, relu: bool
) -> torch.Tensor:
    """``y = relu(conv(x) + bias)``; x and y are bfloat16, channels_last, in the pack's orders."""
    problem = problem_of(x, packed, bias, y, relu)
    tiles = x.shape[0] * -(-x.shape[2] // rows) * -(-x.shape[3] // 8) * (y.shape[1] // 128)
    blocks = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    text = ctypes.c_char_p()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    code = library().otk_two_four_conv(
        ctypes.byref(problem), rows, blocks, stream, ctypes.byref(text)
    )
    if code:
        raise KernelUnavailable(
            f"two_four_conv: the launch failed with CUDA error {code} "
            f"({(text.value or b'').decode()})"
        )
    return y
