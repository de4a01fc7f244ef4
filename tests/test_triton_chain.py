"""``bottleneck_chain``: the operator's contract, its Triton kernel interpreted and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from triton_tools import CAPABILITIES, Compiled, Interpreter, compile_for, why_no_triton

from opentrans_kernels.ops import bottleneck_chain
from opentrans_kernels.ops.arguments import BadArgument
from opentrans_kernels.ops.bottleneck_chain import reference
from opentrans_kernels.ops.bottleneck_chain.shapes import configs, power, why_not
from opentrans_kernels.ops.implicit_gemm_conv2d import pack_weight

TARGET = "triton_targets:poisoned_chain"
SMALL = (32, 64, 16, 4, 2)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHARED = {80: 163 << 10, 90: 227 << 10}


def case(
    dtype: torch.dtype, c: int = 16, inner: int = 16, wide: int = 64, after: int = 16,
    n: int = 2, h: int = 5, w: int = 7,
) -> tuple[Any, ...]:  # fmt: skip
    kind = torch.float64 if dtype == torch.float64 else torch.float32

    def weight(cout: int, cin: int, k: int) -> torch.Tensor:
        return pack_weight(torch.randn(cout, cin, k, k) / (cin * k * k) ** 0.5, dtype)

    return (
        torch.randn(n, c, h, w).to(dtype), weight(inner, c, 3), torch.randn(inner).to(kind),
        weight(wide, inner, 1), torch.randn(wide).to(kind), torch.randn(n, wide, h, w).to(dtype),
        weight(after, wide, 1), torch.randn(after).to(kind), False,
    )  # fmt: skip


def exact(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x, w2, b2, w3, b3, residual, w1, b1 = (a.double() for a in arguments[:8])
    patches = F.unfold(x, 3, padding=1)
    u = torch.einsum("nkp,ko->nop", patches, w2.permute(1, 0, 2).reshape(-1, w2.shape[2]))
    u = (u.unflatten(2, x.shape[2:]) + b2.view(1, -1, 1, 1)).clamp_min(0)
    y = torch.einsum("nchw,co->nohw", u, w3[0]) + b3.view(1, -1, 1, 1) + residual
    y = y.clamp_min(0)
    return y, (torch.einsum("nchw,co->nohw", y, w1[0]) + b1.view(1, -1, 1, 1)).clamp_min(0)


def close(found: tuple[torch.Tensor, ...], arguments: tuple[Any, ...]) -> None:
    for got, want in zip(found, exact(arguments), strict=True):
        assert got.shape == want.shape and got.dtype == arguments[0].dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        if want.numel():
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error <= TOLERANCE[got.dtype], f"{float(error):.1e}"


CASES: dict[str, dict[str, int]] = {
    "as it comes": {},
    "several K steps and chunks": dict(c=48, inner=32, wide=192, after=32),
    "compacted widths": dict(c=48, inner=40, wide=64, after=24),
    "wider afterwards": dict(c=16, inner=16, wide=64, after=64),
    "one pixel": dict(n=3, h=1, w=1),
    "one row": dict(h=1, w=13),
    "more than one program": dict(n=1, h=9, w=8),
    "batch 0": dict(n=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    arguments = case(dtype, **CASES[name])
    close(interpreter(TARGET, *arguments, SMALL), arguments)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_reference(name: str, dtype: torch.dtype) -> None:
    arguments = case(dtype, **CASES[name])
    close(reference.bottleneck_chain(*arguments), arguments)


def test_gradients_opcheck_and_compile() -> None:
    arguments = case(torch.float64, c=3, inner=2, wide=4, after=3, n=1, h=3, w=3)
    leaves = [a.requires_grad_() for a in arguments[:8]]
    assert torch.autograd.gradcheck(lambda *xs: bottleneck_chain(*xs), leaves)
    from opentrans_kernels.errors import UnsupportedModelError

    with pytest.raises((UnsupportedModelError, RuntimeError)):
        (g,) = torch.autograd.grad(
            bottleneck_chain(*leaves)[1].sum(), leaves[:1], create_graph=True
        )
        g.sum().backward()
    arguments = case(torch.float32)
    torch.library.opcheck(torch.ops.opentrans_kernels.bottleneck_chain.default, arguments)
    compiled = torch.compile(
        lambda *xs: bottleneck_chain(*xs)[1] + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*arguments[:8]), bottleneck_chain(*arguments[:8])[1] + 1)


def test_autocast_keeps_biases_and_flops_are_counted() -> None:
    arguments = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = bottleneck_chain(*arguments[:8])
    assert y.dtype == after.dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        bottleneck_chain(*arguments[:8])
    assert counter.get_total_flops() == 2 * 2 * 35 * (9 * 16 * 16 + 16 * 64 + 64 * 16)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (1, torch.randn(1, 16, 16), "weight2 must be torch.float32 [9, 16, 16]"),
        (3, torch.randn(1, 17, 64), "weight3 must be torch.float32 [1, 16, 64]"),
        (5, torch.randn(2, 64, 5, 6), "residual must be"),
        (6, torch.randn(64, 16), "Pack them with pack_weight"),
        (7, torch.randn(16).half(), "bias1 must be torch.float32"),
        (0, torch.randn(2, 16), "four dimensions"),
    ],
)  # fmt: skip
def test_bad_arguments(position: int, value: torch.Tensor, words: str) -> None:
    arguments = list(case(torch.float32))
    arguments[position] = value
    with pytest.raises(BadArgument) as caught:
        torch.ops.opentrans_kernels.bottleneck_chain(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
        )
    assert words in str(caught.value)


def test_widths_that_do_not_fit_say_so() -> None:
    assert why_not(64, 64, 256, 64, torch.bfloat16) is None
    assert "multiples of 16" in str(why_not(20, 64, 256, 64, torch.bfloat16))
    assert "fit into registers" in str(why_not(512, 512, 2048, 512, torch.bfloat16))
    assert "float32" in str(why_not(64, 64, 256, 64, torch.float32))
    assert [power(n) for n in (1, 16, 17, 48, 64, 200)] == [16, 16, 32, 64, 64, 256]


SHAPES = [(64, 64, 64), (128, 128, 128), (256, 256, 256)]


COMPILED = [
    pytest.param(*shape, capability, marks=() if shape[0] == 128 else pytest.mark.slow)
    for shape in SHAPES
    for capability in CAPABILITIES
]


def compiled_chain(
    capability: int, cin: int, inner: int, after: int, config: tuple[int, ...]
) -> Compiled:
    from opentrans_kernels.ops.bottleneck_chain.triton import chain_kernel

    bm, bj, bk, warps, stages = config
    pointers = {name: "*bf16" for name in "x weight2 weight3 residual weight1 y after".split()}
    biases = dict.fromkeys(("bias2", "bias3", "bias1"), "*fp32")
    integers = dict.fromkeys(("rows", "height", "width", "cin", "wide", "after_channels"), "i32")
    return compile_for(
        chain_kernel, capability, pointers | biases | integers,
        dict(INNER=inner, AFTER=after, PRECISION="ieee", BM=bm, BJ=bj, BK=bk),
        num_warps=warps, num_stages=stages, aligned=("cin", "wide", "after_channels"),
    )  # fmt: skip


@pytest.mark.parametrize(("cin", "inner", "after", "capability"), COMPILED)
def test_it_compiles_without_spills_and_on_tensor_cores(cin, inner, after, capability) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    config = configs(cin, inner, after, torch.bfloat16)[0]
    one = compiled_chain(capability, cin, inner, after, config)
    assert one.stack == 0, f"{config} spills {one.stack} bytes"
    assert one.shared <= SHARED[capability]
    assert one.count(r"wgmma\.mma_async" if capability == 90 else r"mma\.sync") > 0
    assert one.atomics == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name: str, dtype: torch.dtype) -> None:
    from triton_targets import poisoned_chain

    arguments = case(dtype, **CASES[name])
    there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    close(tuple(y.cpu() for y in poisoned_chain(*there, ())), arguments)
