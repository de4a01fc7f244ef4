"""``implicit_gemm_conv2d`` on the live slices of its weight: interpreted, compiled, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_triton_conv import SMALL, TARGET, case, close, compiled
from torch.utils.flop_counter import FlopCounterMode
from triton_tools import Interpreter, why_no_triton

from opentrans_kernels.ops import implicit_gemm_conv2d
from opentrans_kernels.ops.arguments import BadArgument
from opentrans_kernels.ops.implicit_gemm_conv2d import live_pieces, live_slices, reference
from opentrans_kernels.ops.implicit_gemm_conv2d.shapes import CONFIGS, k_major

SLICED: dict[str, dict[str, Any]] = {
    "3x3": dict(kernel=3, c=48, cout=40),
    "3x3, odd widths": dict(kernel=3, c=37, cout=21, h=3, w=11, relu=False),
    "pool": dict(kernel=3, c=32, cout=32, h=6, w=8, pool=2),
    "pointwise, second segment": dict(kernel=1, c=64, cout=48, second=16),
    "residual": dict(kernel=3, c=16, cout=16, residual=True),
}


def sliced(dtype: torch.dtype, density: float = 0.5, **options: Any) -> tuple[Any, ...]:
    """Arguments whose weight is zero in whole slices of a small tile, and the slices."""
    arguments = list(case(dtype, **options))
    weight = arguments[1]
    _, columns, depth, *_ = SMALL
    kept = torch.rand(
        weight.shape[0], -(-weight.shape[1] // depth), -(-weight.shape[2] // columns)
    )  # fmt: skip
    kept = (kept < density).repeat_interleave(depth, 1).repeat_interleave(columns, 2)
    arguments[1] = weight * kept[:, : weight.shape[1], : weight.shape[2]]
    return (*arguments, SMALL, *live_slices(arguments[1], SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SLICED)
def test_slices_without_nonzeros_are_left_out(
    interpreter: Interpreter, name: str, density: float, dtype: torch.dtype
) -> None:
    arguments = sliced(dtype, density, **SLICED[name])
    weight, begin, steps = arguments[1], *arguments[-2:]
    tiles = -(-weight.shape[2] // SMALL[1])
    total = weight.shape[0] * -(-weight.shape[1] // SMALL[2]) * tiles
    assert begin.tolist() == sorted(begin.tolist()) and begin[-1] == steps.numel() - 1 <= total
    assert steps.numel() - 1 == {0.0: 0, 1.0: total}.get(density, steps.numel() - 1)
    close(interpreter(TARGET, *arguments), arguments[:-3])
    close(reference.implicit_gemm_conv2d(*arguments), arguments[:-3])


def test_coarse_pieces_come_from_fine_ones() -> None:
    weight = torch.randn(9, 200, 150) * (torch.rand(9, 200, 150) < 1e-3)
    fine = live_pieces(weight, 32, 32)
    assert fine.shape == (9, 7, 5) and 0 < fine.sum() < fine.numel()
    for columns, depth in ((32, 32), (64, 32), (64, 64), (128, 64)):
        found = live_pieces(fine, columns // 32, depth // 32)
        assert torch.equal(found, live_pieces(weight, columns, depth))
        assert live_slices(weight, (0, columns, depth))[1].numel() - 1 == found.sum()


@pytest.mark.parametrize("name", ["3x3, odd widths", "pointwise, second segment"])
def test_weights_with_k_innermost(interpreter: Interpreter, name: str) -> None:
    arguments = list(sliced(torch.float32, 1.0, **SLICED[name]))
    arguments[1] = k_major(arguments[1])
    assert arguments[1].stride(1) == 1
    close(interpreter(TARGET, *arguments), tuple(arguments[:-3]))
    close(interpreter(TARGET, *arguments[:-3], SMALL), tuple(arguments[:-3]))


def test_only_given_slices_are_read(interpreter: Interpreter) -> None:
    """What lies outside is not multiplied, not even by a weight that is not zero there."""
    arguments = list(sliced(torch.float32, **SLICED["3x3"]))
    silent = arguments[1] == 0
    arguments[1] = arguments[1] + 7.0 * silent
    found = interpreter(TARGET, *arguments)
    torch.testing.assert_close(found, reference.implicit_gemm_conv2d(*arguments))
    arguments[1] = arguments[1] * ~silent
    close(found, tuple(arguments[:-3]))


def test_opcheck_and_flops() -> None:
    given = sliced(torch.float32, **SLICED["3x3"])
    torch.library.opcheck(torch.ops.opentrans_kernels.implicit_gemm_conv2d.default, given)
    given = sliced(torch.float32, kernel=3, n=1, c=32, cout=32, h=4, w=5)
    with FlopCounterMode(display=False) as counter:
        torch.ops.opentrans_kernels.implicit_gemm_conv2d(*given)
    assert counter.get_total_flops() == 2 * (4 * 5) * (given[-1].numel() - 1) * 16 * 16


def test_gradients_are_those_of_the_whole_weight() -> None:
    x, weight, bias, *_, begin, steps = sliced(torch.float32, **SLICED["3x3"])
    x, weight = x.requires_grad_(), weight.requires_grad_()
    found = [
        torch.autograd.grad(
            implicit_gemm_conv2d(x, weight, bias, relu=True, config=config, slices=slices).sum(),
            (x, weight),
        )
        for config, slices in ((SMALL, (begin, steps)), ((), None))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bad_slices() -> None:
    x, weight, bias, *_ = case(torch.float32, 3)
    begin, steps = live_slices(weight, SMALL)
    run = implicit_gemm_conv2d
    with pytest.raises(BadArgument, match="slices belong to one tile"):
        run(x, weight, bias, slices=(begin, steps))
    with pytest.raises(BadArgument, match="no channels"):
        run(x, weight, bias, torch.arange(16).int(), config=SMALL, slices=(begin, steps))
    with pytest.raises(BadArgument, match=r"begin must be torch.int32 \[2\]"):
        run(x, weight, bias, config=SMALL, slices=(begin[:1], steps))
    with pytest.raises(BadArgument, match="steps must be torch.int32"):
        run(x, weight, bias, config=SMALL, slices=(begin, steps.long()))
    with pytest.raises(BadArgument, match="come together"):
        run(x, weight, bias, config=SMALL, slices=(begin, None))


def test_slices_keep_every_stage_of_the_pipeline() -> None:
    """Addresses that come from memory must not cost the asynchronous copies, or their width."""
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    dense, slices = (compiled("bf16", 90, CONFIGS[3], SLICED=flag) for flag in (False, True))
    assert slices.shared == dense.shared and slices.registers <= dense.registers + 16
    assert slices.count(r"cp\.async") == dense.count(r"cp\.async")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SLICED)
def test_slices_on_a_device(name: str, dtype: torch.dtype) -> None:
    from triton_targets import poisoned_conv

    arguments = sliced(dtype, **SLICED[name])
    there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    close(poisoned_conv(*there).cpu(), arguments[:-3])
