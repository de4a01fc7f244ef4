"""TF32 switches: PyTorch keeps two of them, and whichever a program uses must survive a plan."""

from __future__ import annotations

import fresh_process
import torch

from opentrans_kernels.gpu.precision import PRECISIONS, Precision, nearest_tf32

#: What programs do at their start. The flags are global, so each is tried in a forked process.
STARTS = {
    "nothing": "",
    "allow_tf32": "matmul.allow_tf32 = True; cudnn.allow_tf32 = False",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "fp32_precision": "matmul.fp32_precision = 'tf32'; cudnn.conv.fp32_precision = 'ieee'",
    "fp32_precision of all": "torch.backends.fp32_precision = 'tf32'",
}

SCRIPT = """
import os, traceback
import torch
from opentrans_kernels.gpu.precision import Precision
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

def state():
    found = [part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn)]
    for read in (lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32,
                 torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")
    return found + [cudnn.benchmark, matmul.allow_fp16_reduced_precision_reduction,
                    matmul.allow_bf16_reduced_precision_reduction]

def check():
    before = state()
    for name in ("tf32", "float32", "bfloat16"):
        with Precision.of(name).applied():
            tf32 = name == "tf32"
            # Both readings, since operators use either, and neither raises.
            assert matmul.allow_tf32 == tf32 and cudnn.allow_tf32 == tf32, state()
            assert (matmul.fp32_precision == "tf32") == tf32, state()
            assert (cudnn.conv.fp32_precision == "tf32") == tf32, state()
        after = state()
        for was, now in zip(before, after, strict=True):
            assert was == now or was == "raises", (name, before, after)

for name, start in STARTS.items():
    if (child := os.fork()) == 0:
        try:
            exec(start)
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, name
print("restored", len(STARTS))
"""


def test_switches_hold_inside_and_are_restored() -> None:
    done = fresh_process.run(f"STARTS = {STARTS!r}\n{SCRIPT}")
    assert done.stdout == f"restored {len(STARTS)}\n", done.stderr[-2000:]


def test_operands_of_tf32_are_rounded_to_nearest_and_others_as_torch_does() -> None:
    draw = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    given = torch.cat([draw, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])])
    cpu = torch.device("cpu")
    found = nearest_tf32(given)
    assert not (found[:1000].view(torch.int32) & 0x1FFF).any()
    assert ((found[:1000] - draw).abs() <= 2.0**-11 * draw.abs()).all()
    assert torch.equal(found[1000:-1], given[1000:-1]) and found[-1].isnan()
    for name in PRECISIONS:  # on the CPU, where float32 is multiplied whole
        dtype = Precision.of(name).dtype
        same = Precision.of(name).operand(given.double(), cpu)
        torch.testing.assert_close(same, given.double().to(dtype), rtol=0, atol=0, equal_nan=True)
