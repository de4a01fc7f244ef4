"""Argument checks, output size and tile sizes of ``implicit_gemm_conv2d``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import BadArgument, image
from ..nhwc import expect

__all__ = [
    "CONFIGS",
    "CONFIGS_FLOAT32",
    "CONFIGS_POOLED",
    "check",
    "default_config",
    "fitting",
    "k_major",
]

_OP = "implicit_gemm_conv2d"
#: (rows, columns, K, warps, stages) of a tile in half precision, the largest first.
CONFIGS = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (256, 64, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 32, 32, 4, 4),
)
#: Four loads per value of a pooled second segment: larger tiles spill on sm_80.
CONFIGS_POOLED = ((128, 128, 32, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3))
#: In float32, strict or TF32: sums fill the registers sooner.
CONFIGS_FLOAT32 = (
    (128, 128, 32, 8, 3),
    (128, 64, 32, 8, 3),
    (64, 64, 32, 4, 3),
    (64, 32, 32, 4, 3),
)
_MULTIPROCESSORS = 132


def k_major(weight: torch.Tensor) -> torch.Tensor:
    """A packed weight ``[taps, Cin, Cout]`` whose memory is ``[taps, Cout, Cin]``: for TF32."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def fitting(
    cout: int, dtype: torch.dtype, pooled: bool = False, residual: bool = False
) -> list[tuple[int, ...]]:
    """Tiles without wasted columns, the largest first. pooled: a second segment is averaged.

    residual: a tensor is added, for which the largest tile has no registers left on sm_90.
    """
    configs = CONFIGS_POOLED if pooled else CONFIGS
    if dtype == torch.float32:
        configs = CONFIGS_FLOAT32
    elif residual:
        configs = tuple(c for c in configs if c[0] * c[1] < 128 * 256)
    widest = max(cout, min(c[1] for c in configs))
    return [c for c in configs if c[1] <= widest and (c[1] > 32 or cout < 64)]


def default_config(
    rows: int, cout: int, dtype: torch.dtype, pooled: bool = False, residual: bool = False
) -> tuple[int, ...]:
    """The largest tile that wastes no columns and still gives every multiprocessor a program."""
    configs = fitting(cout, dtype, pooled, residual)
    for config in configs:
        if -(-rows // config[0]) * -(-cout // config[1]) >= _MULTIPROCESSORS:
            return config
    return min(configs, key=lambda c: c[0] * c[1])


def check(
    x: torch.Tensor, weight, bias, channels, residual, x2, weight2, kernel: int, pool: int,
    pool2: int, config: Sequence[int] = (), begin=None, steps=None,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The output's shape ``[N, Cout, H', W']``. Raises BadArgument."""
    n, c, h, w = image(_OP, x)
    if kernel not in (1, 3) or pool not in (1, 2) or pool2 not in (1, 2):
        raise BadArgument(
            f"{_OP}: kernel {kernel}, pool {pool}, pool2 {pool2}; the kernel is 1 or 3, pools are "
            "1 or 2. Other convolutions stay with PyTorch."
        )
    if weight.dim() != 3 or weight.shape[0] != kernel * kernel:
        raise BadArgument(
            f"{_OP}: weight must be [{kernel * kernel}, Cin, Cout] for a {kernel}x{kernel} "
            f"convolution, got {list(weight.shape)}. Pack it with pack_weight."
        )
    cin, cout = weight.shape[1:]
    expect(_OP, "weight", weight, weight.shape, x.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    expect(_OP, "bias", bias, (cout,), wide)
    if channels is None:
        if c != cin:
            raise BadArgument(f"{_OP}: x has {c} channels, the weight expects {cin}.")
    else:
        expect(_OP, "channels", channels, (cin,), torch.int32)
    if pool > 1 and (h < pool or w < pool):
        raise BadArgument(
            f"{_OP}: an image of {h}x{w} pixels is too small for a {pool}x{pool} pooling window. "
            "Pass a larger image."
        )
    size = (n, cout, h // pool, w // pool)
    if residual is not None:
        if pool > 1:
            raise BadArgument(f"{_OP}: a residual and an output pool exclude each other.")
        expect(_OP, "residual", residual, size, x.dtype)
    if (x2 is None) != (weight2 is None) or (x2 is not None and pool > 1):
        raise BadArgument(
            f"{_OP}: x2 and weight2 come together, and without an output pool (pool={pool})."
        )
    if x2 is not None:
        n2, c2, h2, w2 = image(_OP, x2, "x2")
        if (n2, h2 // pool2, w2 // pool2) != (n, h, w) or x2.dtype != x.dtype:
            raise BadArgument(
                f"{_OP}: x2 {x2.dtype} {list(x2.shape)}, averaged over {pool2}x{pool2}, does not "
                f"fit x {x.dtype} {list(x.shape)}."
            )
        expect(_OP, "weight2", weight2, (1, c2, cout), x.dtype)
    if config and (len(config) != 5 or any(v < 1 for v in config)):
        raise BadArgument(
            f"{_OP}: config {list(config)} must be (rows, columns, K, warps, stages), or empty."
        )
    if (begin is None) != (steps is None):
        raise BadArgument(f"{_OP}: begin and steps come together, from live_slices.")
    if steps is not None:
        if not config or channels is not None:
            raise BadArgument(
                f"{_OP}: slices belong to one tile and to all channels: pass the config that "
                "live_slices was given, and no channels."
            )
        expect(_OP, "begin", begin, (-(-cout // config[1]) + 1,), torch.int32)
        expect(_OP, "steps", steps, (steps.numel(),), torch.int32)
    return size
