"""``fused_stem``: the operator's contract, its Triton kernel interpreted and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton_tools import CAPABILITIES, Compiled, Interpreter, compile_for, why_no_triton

from opentrans_kernels.ops import fused_stem
from opentrans_kernels.ops.arguments import BadArgument
from opentrans_kernels.ops.fused_stem import reference
from opentrans_kernels.ops.fused_stem.shapes import CONFIGS, PATCH
from opentrans_kernels.ops.implicit_gemm_conv2d import pack_weight

TARGET = "triton_targets:poisoned_stem"
SMALL = (32, 4, 2)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def case(
    dtype: torch.dtype, middle: int = 16, cout: int = 16, n: int = 2, h: int = 10, w: int = 14
) -> tuple[Any, ...]:
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(n, 3, h, w).to(dtype),
        pack_weight(torch.randn(middle, 3, 3, 3) / 5, dtype), torch.randn(middle).to(kind),
        pack_weight(torch.randn(cout, middle, 3, 3) / (9 * middle) ** 0.5, dtype),
        torch.randn(cout).to(kind), False,
    )  # fmt: skip


def convolve(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, stride: int):
    """Tap by tap, in float64."""
    n, _, h, w = x.shape
    padded = torch.zeros(n, x.shape[1], h + 2, w + 2, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = x
    out = bias.double().view(1, -1, 1, 1)
    for tap in range(9):
        part = padded[:, :, tap // 3 : tap // 3 + h : stride, tap % 3 : tap % 3 + w : stride]
        out = out + torch.einsum("nchw,co->nohw", part, packed[tap].double())
    return out.clamp_min(0)


def close(found: torch.Tensor, arguments: tuple[Any, ...]) -> None:
    x, w1, b1, w2, b2, _ = arguments
    want = convolve(convolve(x.double(), w1, b1, 2), w2, b2, 1)
    assert found.shape == want.shape and found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    if want.numel():
        error = (found.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[x.dtype], f"{float(error):.1e}"


CASES: dict[str, dict[str, int]] = {
    "even": {},
    "odd size": dict(h=9, w=13),
    "one pixel": dict(n=3, h=1, w=1),
    "one row": dict(h=2, w=31),
    "the widths of CLIP": dict(middle=32, cout=32, n=1),
    "odd widths": dict(middle=20, cout=40),
    "batch 0": dict(n=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    arguments = case(dtype, **CASES[name])
    close(interpreter(TARGET, *arguments, SMALL), arguments)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_reference(name: str, dtype: torch.dtype) -> None:
    arguments = case(dtype, **CASES[name])
    close(reference.fused_stem(*arguments), arguments)


def test_gradients_opcheck_flops_and_autocast() -> None:
    arguments = case(torch.float64, middle=2, cout=3, n=1, h=4, w=5)
    leaves = [a.requires_grad_() for a in arguments[:5]]
    assert torch.autograd.gradcheck(lambda *xs: fused_stem(*xs), leaves)
    arguments = case(torch.float32)
    torch.library.opcheck(torch.ops.opentrans_kernels.fused_stem.default, arguments)
    with FlopCounterMode(display=False) as counter:
        fused_stem(*arguments[:5])
    assert counter.get_total_flops() == 2 * 2 * 35 * (27 * 16 + 9 * 16 * 16)
    with torch.autocast("cpu", torch.float16):
        assert fused_stem(*arguments[:5]).dtype == torch.float16


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.randn(2, 4, 10, 14), "the image has 4 channels, not 3"),
        (1, torch.randn(9, 3, 80), "Run the convolutions one by one"),
        (3, torch.randn(9, 17, 16), "weight2 must be torch.float32 [9, 16, 16]"),
        (4, torch.randn(16).half(), "bias2 must be torch.float32"),
        (1, torch.randn(27, 16), "Pack them with pack_weight"),
    ],
)
def test_bad_arguments(position: int, value: torch.Tensor, words: str) -> None:
    arguments = list(case(torch.float32))
    arguments[position] = value
    with pytest.raises(BadArgument) as caught:
        fused_stem(*arguments[:5])
    assert words in str(caught.value)


def compiled_stem(capability: int, dtype: str, config: tuple[int, ...]) -> Compiled:
    from opentrans_kernels.ops.fused_stem.triton import stem_kernel

    bm, warps, stages = config
    sizes = ("rows", "height", "width", "out_height", "out_width", "cout")
    return compile_for(
        stem_kernel, capability,
        {name: f"*{dtype}" for name in ("x", "weight1", "weight2", "y")}
        | dict.fromkeys(("bias1", "bias2"), "*fp32") | dict.fromkeys(sizes, "i32"),
        dict(MIDDLE=32, OUT=32, PRECISION="ieee", BM=bm, PATCH=PATCH),
        num_warps=warps, num_stages=stages, aligned=("cout",),
    )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_without_spills(capability: int, dtype: str) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    for config in CONFIGS:
        one = compiled_stem(capability, dtype, config)
        assert one.stack == 0, f"{config} spills {one.stack} bytes"
        assert one.shared <= 100 << 10 and one.atomics == 0
        if dtype == "bf16":
            assert one.count(r"wgmma\.mma_async|mma\.sync") > 0, "no tensor cores"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name: str, dtype: torch.dtype) -> None:
    from triton_targets import poisoned_stem

    arguments = case(dtype, **CASES[name])
    there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    close(poisoned_stem(*there, ()).cpu(), arguments)
