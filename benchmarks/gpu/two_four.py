"""Section that decides about the 2:4 convolution: is it right, and does it beat cuDNN?

Tensor cores multiply twice as fast if two of every four neighbours along K are zero. A masked
weight does not have that form, but it is the sum of two that have it, and many of their 64 x 32
pieces are empty (``prototype/pack.py``). The kernel stays a prototype, outside the package, until
it is measured: it earns its place where it is :data:`WORTHWHILE` times as fast as cuDNN.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from prototype import library
from prototype.pack import TwoFour, decode, pack
from sections import Context, check, section
from tower import build_tower

from opentrans_kernels.gpu.clock import CudaTimer
from opentrans_kernels.synthetic import synthetic_masks

__all__ = ["LAYERS", "WORTHWHILE"]

#: The three 3x3 in front of an average pool, with their divisor of an image's height and width.
LAYERS = {"layer2.0.conv2": 4, "layer3.0.conv2": 8, "layer4.0.conv2": 16}
MASK = "global:0.90"
WORTHWHILE = 1.15
_BATCHES = (1, 8)
_DTYPE = torch.bfloat16
_HANG_SECONDS = 5.0


@section("two_four", 75)
def two_four(context: Context) -> dict[str, Any]:
    """Each layer: parts to multiply, errors, cuDNN's time, ours masked and ours dense."""
    small = context.rehearsal
    net = build_tower(width=16 if small else 64, **({"layers": (1, 1, 1, 1)} if small else {}))
    synthetic_masks(net, MASK).apply_(net)
    reason = library.why_not(context.device)
    found: dict[str, Any] = {"mask": f"{MASK} (synthetic)", "not timed": reason, "layers": {}}
    if reason is not None:
        context.notes.append(f"2:4 is not timed: {reason}")
    else:
        found["small"] = small_cases(context)
        context.save(found)
    height, width = (64, 96) if small else (800, 1216)
    for name, divisor in LAYERS.items():
        weight = net.get_submodule(name).weight.detach().to(_DTYPE).float()
        if small:  # the prototype's least widths
            weight = F.pad(
                weight, (0, 0, 0, 0, 0, -weight.shape[1] % 64, 0, -weight.shape[0] % 128)
            )
        packed = pack(weight, 200 if small else 20000)
        check(not small or torch.equal(decode(packed), weight), "the pack lost something")
        entry: dict[str, Any] = {
            "shape": list(weight.shape),
            "density": int(torch.count_nonzero(weight)) / weight.numel(),
            "parts": packed.slices,
            "second_parts": packed.second,
            "parts_of_dense": packed.dense,
        }
        found["layers"][name] = entry
        if reason is not None:
            continue
        full = pack(torch.randn(weight.shape) / weight[0].numel() ** 0.5, 0)
        for batch in _BATCHES:
            shape = (batch, weight.shape[1], height // divisor, width // divisor)
            entry[f"b{batch}"] = record = one(context, weight, packed, full, shape)
            context.save(found)
            words = "earns its place" if record["gain"] >= WORTHWHILE else "does not"
            context.notes.append(
                f"{name} b{batch}: {record['gain']:.2f}x of cuDNN with {packed.slices} of "
                f"{packed.dense} parts, {record['mask_gain']:.2f}x of itself without zeros: {words}"
            )
    return found


def small_cases(context: Context) -> dict[str, float]:
    """Every tile on a small image, watched: a kernel that hangs must not cost the section."""
    errors = {}
    for rows in library.ROWS:
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(128, 128, 3, 3, generator=generator) / 34
        weight *= torch.rand(weight.shape, generator=generator) < 0.2
        weight = weight.to(_DTYPE).float()
        packed, inputs = pack(weight, 200), (2, 128, 37, 21)
        x, bias, y = operands(context, packed, inputs)
        library.conv(x, packed.to(context.device), bias, y, rows, True)
        wait(f"a tile of {rows} rows")
        errors[f"{rows} rows"] = error = error_of(y, x, weight, packed, bias)
        check(error < 1e-2, f"a tile of {rows} rows errs by {error:.1e}")
    return errors


def wait(what: str) -> None:
    """Until the device has finished; an error if it hangs."""
    done = torch.cuda.Event()
    done.record()
    end = time.monotonic() + _HANG_SECONDS
    while not done.query():
        check(time.monotonic() < end, f"{what}: the kernel hangs")
        time.sleep(1e-3)


def operands(
    context: Context, packed: TwoFour, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, bias and an output full of NaN; x and bias lie in the orders of the pack already."""
    generator = torch.Generator().manual_seed(0)
    like = {"memory_format": torch.channels_last}
    x = torch.randn(shape, generator=generator).to(context.device, _DTYPE).contiguous(**like)
    rows = len(packed.rows)
    bias = torch.randn(rows, generator=generator).to(context.device)
    y = torch.full((shape[0], rows, *shape[2:]), float("nan"), device=context.device, dtype=_DTYPE)
    return x, bias, y.contiguous(**like)


def ordered(weight: torch.Tensor, packed: TwoFour) -> torch.Tensor:
    """``weight`` in the orders of the pack."""
    return weight[packed.rows][:, packed.channels].contiguous()


def error_of(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, packed: TwoFour, bias: torch.Tensor
) -> float:
    """Largest difference from float64 over the first image, relative to the largest value."""
    exact = F.conv2d(
        x[:1].double(), ordered(weight, packed).to(x.device).double(), bias.double(), padding=1
    ).clamp_min(0)
    difference = (y[:1].double() - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(1e-30))


def one(
    context: Context, weight: torch.Tensor, packed: TwoFour, full: TwoFour, shape: tuple[int, ...]
) -> dict[str, Any]:
    """One layer and batch: errors first, then milliseconds."""
    x, bias, y = operands(context, packed, shape)
    device = context.device
    dense = ordered(weight, packed).to(device, _DTYPE).contiguous(memory_format=torch.channels_last)
    short = bias.to(_DTYPE)
    masked, whole = packed.to(device), full.to(device)
    clock = CudaTimer(device)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "conv": lambda: F.conv2d(x, dense, None, padding=1),
            "conv, bias, ReLU": lambda: torch.cudnn_convolution_relu(
                x, dense, short, [1, 1], [1, 1], [1, 1], 1
            ),
        }
        own = error_of(runs["conv, bias, ReLU"](), x, weight, packed, short)
        dense_ms = {name: clock(name, run) for name, run in runs.items()}
    finally:
        torch.backends.cudnn.benchmark = before
    errors, masked_ms, whole_ms = {}, {}, {}
    for rows in library.ROWS:
        library.conv(x, masked, bias, y.fill_(float("nan")), rows, True)
        wait(f"{shape} in tiles of {rows} rows")
        errors[rows] = error = error_of(y, x, weight, packed, bias)
        check(error <= 2 * own, f"{shape}, {rows} rows: {error:.1e}, cuDNN's own {own:.1e}")
        masked_ms[rows] = clock("2:4", lambda r=rows: library.conv(x, masked, bias, y, r, True))
        whole_ms[rows] = clock("dense", lambda r=rows: library.conv(x, whole, bias, y, r, True))
    return {
        "cudnn_ms": dense_ms,
        "ms": masked_ms,
        "without_zeros_ms": whole_ms,
        "errors": errors,
        "cudnn_error": own,
        "gain": min(dense_ms.values()) / min(masked_ms.values()),
        "mask_gain": min(whole_ms.values()) / min(masked_ms.values()),
    }
