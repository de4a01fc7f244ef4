"""How many instructions a step of a kernel's loop issues, against what tensor cores need for it.

A multiprocessor issues four instructions a cycle, one per quarter. If a step's instructions take
longer than its products, tensor cores wait; that is visible in the compiled code, without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_triton_chain import compiled_chain
from test_triton_conv import CONFIGS, compiled
from test_triton_stem import compiled_stem
from triton_tools import why_no_triton

from opentrans_kernels.ops.bottleneck_chain.shapes import configs
from opentrans_kernels.ops.fused_stem.shapes import CONFIGS as STEM_CONFIGS

#: Half-precision multiply-adds of an sm_90 multiprocessor a cycle.
PRODUCTS = 2048

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3x3, 128 x 256": (CONFIGS[0], {}),
    "3x3, 128 x 128": (CONFIGS[1], {}),
    "3x3, 128 x 64": (CONFIGS[3], {}),
    "3x3, 128 x 128, live slices": (CONFIGS[1], {"SLICED": True}),
    "3x3, 128 x 64, live slices": (CONFIGS[3], {"SLICED": True}),
    "1x1, 128 x 128, residual": (CONFIGS[1], {"TAPS": 1, "RESIDUAL": True}),
}


def conv_step(name: str) -> tuple[int, float, float]:
    """(instructions of a warp, cycles to issue those of all warps, cycles of tensor cores)."""
    (rows, columns, depth, warps, stages), flags = CASES[name]
    one = compiled("bf16", 90, (rows, columns, depth, warps, stages), **flags)
    (count,) = one.steps()
    return count, count * warps / 4, rows * columns * depth / PRODUCTS


def chain_steps(inner: int) -> list[tuple[int, float, float]]:
    """Of the 3x3, and of a chunk of both 1x1 with the residual between them."""
    (rows, chunk, depth, warps, stages), *_ = configs(inner, inner, inner, torch.bfloat16)
    one = compiled_chain(90, inner, inner, inner, (rows, chunk, depth, warps, stages))
    first, second = one.steps()
    return [
        (first, first * warps / 4, rows * inner * depth / PRODUCTS),
        (second, second * warps / 4, 2 * rows * inner * chunk / PRODUCTS),
    ]


def stem_step() -> tuple[int, float, float]:
    """Of one tap of the stem's second convolution, with the first one computed for it."""
    rows, warps, stages = STEM_CONFIGS[0]
    one = compiled_stem(90, "bf16", (rows, warps, stages))
    (count,) = one.steps()
    return count, count * warps / 4, 2 * rows * 32 * 32 / PRODUCTS


def test_the_stem_loads_with_few_instructions() -> None:
    """Its 27 values a pixel and tap are loaded one by one: that is what its time is."""
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    count, *_ = stem_step()
    assert count <= 300


@pytest.mark.parametrize("name", CASES)
def test_tensor_cores_do_not_wait_for_addresses(name: str) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    count, issue, products = conv_step(name)
    assert issue <= 0.8 * products, f"{count} instructions: {issue:.0f} of {products:.0f} cycles"


@pytest.mark.parametrize("inner", [64, 128])
def test_a_chain_waits_at_most_for_its_epilogue(inner: int) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    (count, issue, products), (_, after, _) = chain_steps(inner)
    assert issue <= products, f"{count} instructions: {issue:.0f} of {products:.0f} cycles"
    assert after <= 780  # triton 3.9 needs 758 cycles at 128 inner channels, 3.8 fewer
