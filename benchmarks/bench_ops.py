"""pytest-benchmark cases: every dispatch row on RN50's shapes by density, dense beside it.

    pytest benchmarks/bench_ops.py --benchmark-group-by=group -k "sparse_conv2d and 64-256"

Cases, exactness rule and shapes are those of ``opentrans bench op``, which interleaves the sides
and is what results are made with; this is for looking at one case closely, with pytest-benchmark's
own statistics, histories and comparisons. A row that is not exact fails instead of being timed.
Shapes are at 224 pixels; one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from opentrans_kernels import dispatch
from opentrans_kernels.bench import cases, ops
from opentrans_kernels.bench.layers import ERROR_LIMIT
from opentrans_kernels.bench.variants import relative_error

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
DENSE = "dense"


def _shapes(op: str) -> list[Any]:
    if op == "sparse_bottleneck":
        return cases.block_cases()
    convs = cases.conv_cases()
    return [case for case in convs if case.kind == "3x3"] if op in ops.POOLS else convs


def _parameters() -> Iterator[Any]:
    for op in ops.BUILDERS:
        sides = [row.backend for row in ops.rows_for(op)[0]] + [DENSE]
        for shape in _shapes(op):
            for density in (1.0,) if op in ops.POOLS else cases.DENSITIES:
                for side in sides:
                    name = f"{op}-{shape.name}-{density:g}-{side}".replace(" ", "-")
                    yield pytest.param(op, shape, density, side, id=name.replace("->", "-"))


@lru_cache(maxsize=1)  # the sides of one case follow each other
def _case(op: str, shape: Any, density: float) -> ops.Case:
    return ops.BUILDERS[op](shape, density, 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "shape", "density", "side"), list(_parameters()))
def test_op(benchmark: Any, op: str, shape: Any, density: float, side: str) -> None:
    case = _case(op, shape, density)
    own = {
        name: relative_error(case.select(call()), case.reference)
        for name, call in case.dense.items()
    }
    if side == DENSE:
        name = min(case.dense, key=lambda name: _seconds(case.dense[name]))
        call, error = case.dense[name], own[name]
    else:
        row = next(row for row in ops.rows_for(op)[0] if row.backend == side)
        kernel = dispatch.Resolution(row, ()).function()
        call, name = (lambda: kernel(*case.arguments)), side
        error = relative_error(call(), case.reference)
        plain = relative_error(case.select(case.plain()), case.reference)
        if error > max(ERROR_LIMIT, 2 * ops.yardstick(side, max(own.values()), plain)):
            pytest.fail(f"{side} is inexact: {error:.1e}")
    benchmark.group = f"{op} {case.name}, density {density:g}"
    benchmark.extra_info |= {"side": name, "error": error, "nnz": case.nnz, "macs": case.macs}
    benchmark(call)


def _seconds(call: Any) -> float:
    import time

    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
