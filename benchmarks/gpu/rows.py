"""Section that checks every Triton and CUDA row on the device: random data, poisoned outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from sections import Context, check, section

from opentrans_kernels.ops.sparse_conv2d_nhwc import build

TESTS = Path(__file__).resolve().parents[2] / "tests"


@section("rows", 90)
def rows(context: Context) -> dict[str, Any]:
    """Every case of the rows' tests, in every dtype of the row, against float64."""
    sys.path.insert(0, str(TESTS))  # the same cases and oracles that the tests use
    import test_cuda_sparse as scattered
    import test_triton_chain as chain
    import test_triton_conv as conv
    import test_triton_slices as slices
    import test_triton_stem as stem
    import triton_targets as targets

    half = (torch.float16, torch.bfloat16)
    found: dict[str, Any] = {}
    failed = []
    groups = (
        ("implicit_gemm_conv2d", conv, targets.poisoned_conv, (torch.float32, *half)),
        (
            "implicit_gemm_conv2d sliced",
            Sliced(slices),
            targets.poisoned_conv,
            (torch.float32, *half),
        ),
        ("fused_stem", stem, targets.poisoned_stem, (torch.float32, *half)),
        ("bottleneck_chain", chain, targets.poisoned_chain, half),
    )
    for op, module, run, dtypes in groups:
        if context.rehearsal:  # the interpreter multiplies bit patterns of bfloat16
            dtypes = (torch.float16,)
        for dtype in dtypes:
            for name, options in module.CASES.items():
                label = f"{op} {str(dtype).removeprefix('torch.')} {name}"
                arguments = module.case(dtype, **options)
                there = [a.to(context.device) if isinstance(a, torch.Tensor) else a
                         for a in arguments]  # fmt: skip
                tile = [] if module.SMALL is None else [module.SMALL if context.rehearsal else ()]
                try:
                    outputs = run(*there, *tile)
                    parts = outputs if isinstance(outputs, tuple) else (outputs,)
                    parts = tuple(part.cpu() for part in parts)
                    module.close(parts if isinstance(outputs, tuple) else parts[0], arguments)
                    found[label] = "ok"
                except Exception as error:
                    lines = str(error).splitlines() or [""]
                    found[label] = f"{type(error).__name__}: {lines[0][:300]}"
                    failed.append(label)
                context.save(found)
    sparse(context, scattered, found, failed)
    context.notes.append(f"{len(found) - len(failed)} of {len(found)} cases are right")
    check(not failed, f"wrong or failing: {'; '.join(f'{f}: {found[f]}' for f in failed[:20])}")
    return found


class Sliced:
    """The cases of slices in the form of a test module: their tile is an argument already."""

    def __init__(self, cases: Any) -> None:
        self.CASES, self.case, self.SMALL = cases.SLICED, cases.sliced, None
        self._close = cases.close

    def close(self, found: torch.Tensor, arguments: tuple[Any, ...]) -> None:
        self._close(found, arguments[:-3])


def sparse(context: Context, cases: Any, found: dict[str, Any], failed: list[str]) -> None:
    """The CUDA-core convolution, built by nvcc here; where it cannot be built, the reason."""
    if context.rehearsal:
        return
    if (why := build.why_not()) is not None:
        found["sparse_conv2d_nhwc"] = f"not built: {why}"
        context.notes.append(found["sparse_conv2d_nhwc"])
        return
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, options in cases.CASES.items():
            label = f"sparse_conv2d_nhwc {str(dtype).removeprefix('torch.')} {name}"
            given = cases.case(dtype, **options)
            try:
                cases.close(cases.on_device(given, str(context.device)).cpu(), given)
                found[label] = "ok"
            except Exception as error:
                lines = str(error).splitlines() or [""]
                found[label] = f"{type(error).__name__}: {lines[0][:300]}"
                failed.append(label)
            context.save(found)
