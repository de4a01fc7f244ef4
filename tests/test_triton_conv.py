"""``implicit_gemm_conv2d``: the operator's contract, its Triton kernel interpreted and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from triton_tools import CAPABILITIES, Interpreter, compile_for, why_no_triton

from opentrans_kernels import dispatch, ops
from opentrans_kernels.errors import KernelUnavailable
from opentrans_kernels.ops import implicit_gemm_conv2d
from opentrans_kernels.ops.arguments import BadArgument
from opentrans_kernels.ops.implicit_gemm_conv2d import pack_weight, reference
from opentrans_kernels.ops.implicit_gemm_conv2d.shapes import (
    CONFIGS,
    CONFIGS_FLOAT32,
    CONFIGS_POOLED,
    default_config,
)
from opentrans_kernels.ops.nhwc import why_too_old

TARGET = "triton_targets:poisoned_conv"
SMALL = (32, 16, 16, 4, 2)  # a tile smaller than every case, so that borders and loops are met
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def case(
    dtype: torch.dtype, kernel: int, *, n: int = 2, c: int = 16, cout: int = 16, h: int = 5,
    w: int = 7, gather: int = 0, residual: bool = False, second: int = 0, pool: int = 1,
    pool2: int = 1, relu: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments in schema order, up to ``tf32``."""
    cin = gather or c
    x = torch.randn(n, c, h, w).to(dtype)
    weight = pack_weight(torch.randn(cout, cin, kernel, kernel) / (cin * kernel**2) ** 0.5, dtype)
    bias = torch.randn(cout)
    channels = torch.randperm(c)[:gather].int() if gather else None
    size = (n, cout, h // pool, w // pool)
    extra = torch.randn(size).to(dtype) if residual else None
    x2 = weight2 = None
    if second:
        x2 = torch.randn(n, second, h * pool2 + pool2 // 2, w * pool2).to(dtype)
        weight2 = pack_weight(torch.randn(cout, second, 1, 1) / second**0.5, dtype)
    return x, weight, bias, channels, extra, x2, weight2, kernel, pool, pool2, relu, False


def exact(arguments: tuple[Any, ...]) -> torch.Tensor:
    """The float64 result, written independently of the reference; inputs as they are rounded."""
    x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, relu, _ = (
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )
    x = x if channels is None else x[:, channels.long()]
    patches = F.unfold(x, kernel, padding=kernel // 2)  # [N, Cin * taps, pixels]
    matrix = weight.permute(1, 0, 2).reshape(-1, weight.shape[2])
    y = torch.einsum("nkp,ko->nop", patches, matrix).unflatten(2, x.shape[2:])
    y = y + bias.view(1, -1, 1, 1)
    if x2 is not None:
        h, w = x.shape[2:]
        cells = x2[:, :, : h * pool2, : w * pool2].unflatten(3, (w, pool2)).unflatten(2, (h, pool2))
        mean = cells.mean((3, 5)).to(arguments[5].dtype).double()
        y = y + torch.einsum("nchw,co->nohw", mean, weight2[0])
    y = y if residual is None else y + residual
    y = y.clamp_min(0) if relu else y
    return F.avg_pool2d(y, pool)


def close(found: torch.Tensor, arguments: tuple[Any, ...]) -> None:
    want = exact(arguments)
    assert found.shape == want.shape and found.dtype == arguments[0].dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    if want.numel():
        error = (found.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[found.dtype], f"{float(error):.1e}"


CASES: dict[str, dict[str, Any]] = {
    "pointwise": dict(kernel=1, c=48, cout=40),
    "pointwise, odd widths": dict(kernel=1, c=19, cout=21, h=3, w=11, relu=False),
    "3x3": dict(kernel=3),
    "3x3, odd widths": dict(kernel=3, c=7, cout=37, h=13, w=5),
    "3x3 of one pixel": dict(kernel=3, n=3, h=1, w=1),
    "3x3 of one row": dict(kernel=3, h=1, w=9),
    "gathered channels": dict(kernel=1, c=50, gather=21),
    "gathered channels, 3x3": dict(kernel=3, c=40, gather=16, cout=32),
    "residual": dict(kernel=1, c=32, cout=48, residual=True),
    "pool": dict(kernel=3, h=6, w=8, pool=2),
    "pool, odd size": dict(kernel=3, h=7, w=5, pool=2, cout=20),
    "pool, pointwise": dict(kernel=1, h=2, w=3, pool=2),
    "second segment": dict(kernel=1, c=32, cout=48, second=16),
    "second segment, pooled": dict(kernel=1, c=16, cout=48, second=27, pool2=2),
    "second segment, residual": dict(kernel=3, second=16, residual=True),
    "batch 0": dict(kernel=3, n=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    arguments = case(dtype, **CASES[name])
    close(interpreter(TARGET, *arguments, SMALL), arguments)


def test_tf32_outputs_are_rounded_to_nearest(interpreter: Interpreter) -> None:
    """Tensor cores cut 13 bits off what they read; of these outputs nothing is left to cut."""
    arguments = list(case(torch.float32, 1, c=8, cout=8, relu=False))
    exactly = interpreter(TARGET, *arguments, SMALL)
    assert exactly[0].ne(exactly[1]).any() and arguments[-1] is False
    found = interpreter(TARGET, *arguments[:-1], True, SMALL)
    bits = found.contiguous().view(torch.int32)
    assert not (bits & 0x1FFF).any()
    assert ((found - exactly).abs() <= 2.0**-11 * exactly.abs() * (1 + 1e-4)).all()
    arguments[0][0, 0, 0, 0], arguments[0][1, 0, 0, 0] = float("nan"), float("inf")
    found = interpreter(TARGET, *arguments[:-1], True, SMALL)
    assert found[0, :, 0, 0].isnan().all() and found[1, :, 0, 0].isinf().all()


@pytest.mark.parametrize("config", [*CONFIGS_FLOAT32, CONFIGS[0], CONFIGS[2]], ids=str)
def test_every_tile(interpreter: Interpreter, config: tuple[int, ...]) -> None:
    arguments = case(torch.float32, 3, c=40, cout=72, h=9, w=12, n=3)
    close(interpreter(TARGET, *arguments, config), arguments)


def test_the_default_tile_and_other_layouts(interpreter: Interpreter) -> None:
    arguments = case(torch.float32, 1, c=24, cout=24, residual=True)
    moved = list(arguments)
    moved[0] = arguments[0].transpose(2, 3).contiguous().transpose(2, 3)
    moved[4] = arguments[4].contiguous()
    found = interpreter(TARGET, *moved, ())
    close(found, arguments)


def test_nan_stays_nan_and_zero_weights_do_not_matter_elsewhere(interpreter: Interpreter) -> None:
    arguments = case(torch.float32, 3, h=6, w=6, n=1)
    arguments[0][0, 3, 0, 0] = float("nan")
    found = interpreter(TARGET, *arguments, SMALL)
    reach = torch.zeros(6, 6, dtype=torch.bool)
    reach[:2, :2] = True
    assert torch.equal(found[0].isnan().all(0), reach)
    assert torch.equal(found[0].isnan().any(0), reach)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_reference(name: str, dtype: torch.dtype, poison: None) -> None:
    arguments = case(dtype, **CASES[name])
    if dtype == torch.float64:
        arguments = (*arguments[:2], arguments[2].double(), *arguments[3:])
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    found = reference.implicit_gemm_conv2d(*arguments)
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact(arguments), rtol=1e-12, atol=1e-12)
    else:
        close(found, arguments)
    for now, then in zip(arguments, before, strict=True):
        assert not isinstance(now, torch.Tensor) or torch.equal(now, then)


def test_gradients() -> None:
    """The input gradient is the operator itself with reversed taps; checked by differences."""
    for options in (
        dict(kernel=3, c=4, cout=5, h=4, w=5, n=1, pool=2),
        dict(kernel=1, c=6, cout=4, h=3, w=4, n=2, second=3, pool2=2),
        dict(kernel=3, c=7, gather=4, cout=3, h=3, w=4, n=1, residual=True, relu=False),
    ):
        arguments = list(case(torch.float64, **options))
        arguments[2] = arguments[2].double()
        floats = [
            i for i, a in enumerate(arguments)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
        ]  # fmt: skip

        def run(*values: torch.Tensor, given=arguments, at=floats) -> torch.Tensor:
            filled = list(given)
            for i, value in zip(at, values, strict=True):
                filled[i] = value
            return torch.ops.opentrans_kernels.implicit_gemm_conv2d(*filled)

        leaves = [arguments[i].clone().requires_grad_() for i in floats]
        assert torch.autograd.gradcheck(run, leaves)
        from opentrans_kernels.errors import UnsupportedModelError

        with pytest.raises(UnsupportedModelError, match="gradient of the gradient"):
            (g,) = torch.autograd.grad(run(*leaves).sum(), leaves[0], create_graph=True)


def test_opcheck_and_compile() -> None:
    arguments = case(torch.float32, 3, c=8, cout=8, h=4, w=4, n=1)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.opentrans_kernels.implicit_gemm_conv2d.default, arguments)
    x, weight, bias = arguments[0].detach(), *arguments[1:3]
    compiled = torch.compile(
        lambda x: implicit_gemm_conv2d(x, weight, bias, relu=True) + 1,
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for n in (1, 3):
        batch = x.expand(n, -1, -1, -1)
        want = implicit_gemm_conv2d(batch, weight, bias, relu=True) + 1
        torch.testing.assert_close(compiled(batch), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_but_the_bias(dtype: torch.dtype) -> None:
    x, weight, bias = case(torch.float32, 1)[:3]
    with torch.autocast("cpu", dtype):
        found = implicit_gemm_conv2d(x, weight, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found, implicit_gemm_conv2d(x.to(dtype), weight.to(dtype), bias))


def test_flops_count_both_segments_and_only_whole_windows() -> None:
    arguments = case(torch.float32, 3, n=2, c=4, cout=6, h=5, w=6, pool=2)
    with FlopCounterMode(display=False) as counter:
        ops.implicit_gemm_conv2d(*arguments[:3], pool=2)
    assert counter.get_total_flops() == 2 * 2 * (4 * 6) * 6 * 9 * 4
    arguments = case(torch.float32, 1, n=1, c=4, cout=6, h=3, w=2, second=5, pool2=2)
    with FlopCounterMode(display=False) as counter:
        torch.ops.opentrans_kernels.implicit_gemm_conv2d(*arguments)
    assert counter.get_total_flops() == 2 * (3 * 2) * 6 * (4 + 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.randn(2, 15, 5, 7)}, "x has 15 channels, the weight expects 16"),
        ({0: torch.randn(16, 5, 7)}, "four dimensions"),
        ({1: torch.randn(4, 16, 16)}, "Pack it with pack_weight"),
        ({1: torch.randn(1, 16, 16).half()}, "Pack the weights for this input, in its dtype"),
        ({2: torch.randn(16).half()}, "bias must be torch.float32"),
        ({2: torch.randn(15)}, "bias must be torch.float32 [16]"),
        ({3: torch.arange(16)}, "channels must be torch.int32"),
        ({4: torch.randn(2, 16, 5, 6)}, "residual must be"),
        ({4: torch.randn(2, 16, 5, 7), 8: 2}, "exclude each other"),
        ({5: torch.randn(2, 4, 5, 7)}, "come together"),
        ({5: torch.randn(2, 4, 9, 7), 6: torch.randn(1, 4, 16)}, "does not fit x"),
        ({7: 5}, "Other convolutions stay with PyTorch"),
        ({0: torch.randn(2, 16, 1, 7), 8: 2}, "Pass a larger image"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[int, Any], words: str) -> None:
    arguments = list(case(torch.float32, 1))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(BadArgument) as caught:
        torch.ops.opentrans_kernels.implicit_gemm_conv2d(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
        )
    assert words in str(caught.value)


def test_default_tiles_fit_the_shape() -> None:
    assert default_config(243200, 64, torch.bfloat16)[:2] == (256, 64)
    assert default_config(60800, 256, torch.bfloat16)[:2] == (128, 256)
    assert default_config(950, 512, torch.bfloat16)[:2] == (64, 64), "few rows: small tiles"
    assert default_config(950, 32, torch.bfloat16)[:2] == (128, 32), "few columns: narrow tiles"
    assert default_config(100, 32, torch.float32) in CONFIGS_FLOAT32
    assert default_config(60800, 512, torch.float16, True) == CONFIGS_POOLED[0]


def test_old_gpus_are_refused_with_the_way_out() -> None:
    assert why_too_old((8, 0)) is None and why_too_old((9, 0)) is None
    text = str(why_too_old((7, 5)))
    assert "needs" not in text and "8.0" in text and "7.5" in text and "cuDNN" in text


def test_rows_say_why_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch, set_env) -> None:
    dispatch._resolve.cache_clear()
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    text = dispatch.explain("implicit_gemm_conv2d", "cuda", "bfloat16")
    assert text.startswith("implicit_gemm_conv2d on cuda bfloat16: reference")
    assert "pip install triton" in text
    set_env(OPENTRANS_STRICT="1")
    with pytest.raises(KernelUnavailable, match="OPENTRANS_STRICT=1 refuses"):
        dispatch.resolve("implicit_gemm_conv2d", "cuda", "bfloat16")
    dispatch._resolve.cache_clear()


POINTERS = ("x", "weight", "residual", "x2", "weight2", "y")
INTEGERS = (
    "rows", "height", "width", "out_height", "out_width", "cin", "cout", "x_channels", "height2",
    "width2", "cin2",
)  # fmt: skip


def compiled(dtype: str, capability: int, config: tuple[int, ...], **flags: Any):
    from opentrans_kernels.ops.implicit_gemm_conv2d.triton import conv_kernel

    bm, bn, bk, warps, stages = config
    constants = dict(
        TAPS=9, POOL=1, POOL2=1, GATHER=False, SLICED=False, TURNED=False, RESIDUAL=False,
        SECOND=False, RELU=True, EVEN_K=True, EVEN_K2=True, EVEN_N=True, PRECISION="ieee",
        BM=bm, BN=bn, BK=bk,
    ) | flags  # fmt: skip
    return compile_for(
        conv_kernel, capability,
        {name: f"*{dtype}" for name in POINTERS} | {"bias": "*fp32"}
        | dict.fromkeys(("channels", "begin", "steps"), "*i32")
        | dict.fromkeys(INTEGERS, "i32"),
        constants, num_warps=warps, num_stages=stages,
        aligned=("cin", "cout", "x_channels", "cin2"),
    )  # fmt: skip


VARIANTS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("bf16", CONFIGS[0], {}),
    ("bf16", CONFIGS[1], dict(TAPS=1, RESIDUAL=True)),
    ("fp16", CONFIGS_POOLED[0], dict(TAPS=1, SECOND=True, POOL2=2)),
    ("bf16", CONFIGS_POOLED[2], dict(TAPS=1, SECOND=True, POOL2=2)),
    ("bf16", CONFIGS[2], dict(POOL=2)),
    ("fp16", CONFIGS[4], dict(TAPS=1, GATHER=True)),
    ("fp16", CONFIGS[5], dict(EVEN_K=False, EVEN_N=False)),
    ("fp32", CONFIGS_FLOAT32[0], dict(PRECISION="tf32", TURNED=True)),
    ("fp32", CONFIGS_FLOAT32[1], dict(PRECISION="ieee")),
    ("bf16", CONFIGS[1], dict(SLICED=True, POOL=2)),
    ("fp16", CONFIGS[3], dict(SLICED=True)),
    ("bf16", CONFIGS[0], dict(SLICED=True)),
    ("fp32", CONFIGS_FLOAT32[0], dict(SLICED=True, PRECISION="tf32")),
    ("fp32", CONFIGS_FLOAT32[1], dict(SLICED=True, PRECISION="ieee")),
]
#: Shared bytes a block may have; 227 KB on sm_90.
SHARED = {80: 163 << 10, 90: 227 << 10}


QUICK = {(0, 90), (1, 80), (2, 80), (4, 90), (7, 90), (8, 80), (9, 90), (10, 80)}
COMPILED = [
    pytest.param(
        variant, capability,
        marks=() if (i, capability) in QUICK else pytest.mark.slow,
        id=f"{variant[0]}-{variant[1]}-{'-'.join(variant[2])}-sm_{capability}",
    )
    for i, variant in enumerate(VARIANTS)
    for capability in CAPABILITIES
]  # fmt: skip


@pytest.mark.parametrize(("variant", "capability"), COMPILED)
def test_it_compiles_without_spills_and_on_tensor_cores(variant, capability: int) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    dtype, config, flags = variant
    one = compiled(dtype, capability, config, **flags)
    tensor = r"wgmma\.mma_async" if capability == 90 else r"mma\.sync"
    assert one.stack == 0, f"spills {one.stack} bytes"
    assert one.registers <= 255 and one.shared <= SHARED[capability]
    assert one.atomics == 0
    if flags.get("PRECISION") == "ieee":
        assert one.count(r"\b(wg)?mma\b") == 0 and one.count(r"fma\.rn\.f32") > 100
        assert one.count("tf32") == 0, "strict float32 must not round to TF32"
    else:
        assert one.count(tensor) > 0, "no tensor cores"
        assert one.count(r"cp\.async") > 0 or flags.get("GATHER"), "loads are not pipelined"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name: str, dtype: torch.dtype) -> None:
    from triton_targets import poisoned_conv

    arguments = case(dtype, **CASES[name])
    there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    close(poisoned_conv(*there, ()).cpu(), arguments)
