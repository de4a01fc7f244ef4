"""``opentrans bench op``: every row of the dispatch table on the shapes of RN50's trunk and of
vision transformers, dense beside it.

A case is built once; all rows that run here and all dense sides take turns on it. Weights, masks
(uniform random) and inputs are random. Each row's result is compared with float64 before it is
timed, and a row that is not exact gets no speed-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from .. import dispatch
from ..errors import OpenTransError
from ..pack import SparseWeight
from .cases import DENSITIES, BlockCase, ConvCase, block_cases, conv_cases, representative
from .layers import ERROR_LIMIT, dense_calls
from .linear_ops import LINEAR_OPS, linear_case, linear_cases
from .op_case import Call, Case, macs_of, masked_weight, random_values
from .rows import matched
from .timing import interleave
from .variants import relative_error

#: Ops that other commands time, and which.
ELSEWHERE = {
    "sparse_stage": "opentrans bench trunk",
    "powerlaw_fit": "opentrans bench alpha",
    "gram_eigenvalues": "opentrans bench alpha",
    "avg_pool2d_backward": "opentrans bench training",
    "ms_deform_attn": "benchmarks/bench_deform.py",
    "ms_deform_attn_backward": "benchmarks/bench_deform.py",
    "depthwise_conv2d": "opentrans bench trunk --arch torchvision:mobilenet_v2",
    "winograd_conv2d": "opentrans plan global:0.90 --arch torchvision:vgg16",
    "mask_scores": "opentrans bench model --system ovs-mask",
    "relu_bits": "opentrans bench training",
    "relu_bits_backward": "opentrans bench training",
}
#: Pools -> window, stride and padding.
POOLS = {"avg_pool2d": (2, 2, 0), "max_pool2d": (3, 2, 1), "window_avg_pool2d": (3, 2, 1)}
#: Ops of the GPU path; their reference rows are oracles, not rivals.
ON_GPUS = ("implicit_gemm_conv2d", "bottleneck_chain", "fused_stem", "sparse_conv2d_nhwc")


def build_cases(
    size: tuple[int, int] = (224, 224),
    *,
    ops: Sequence[str] = (),
    densities: Sequence[float] = DENSITIES,
    batch: int = 1,
    quick: bool = False,
    only: Sequence[str] = (),
) -> Iterator[Case]:
    """Cases of all ops named (default: all that are known here), built one after the other.

    Args:
        size: (height, width) of the image in pixels.
        densities: shares of weights kept. batch: images. quick: one shape per kind of layer.
        only: names of cases (default: all).

    Raises:
        OpenTransError: no case has a name of ``only``.
    """
    convs, blocks = conv_cases(size), block_cases(size)
    pool_names = {_pool_name(case, op) for case in convs for op in POOLS}
    linears = {op: linear_cases(op) for op in LINEAR_OPS}
    named = {case.name for case in [*convs, *blocks, *(c for cs in linears.values() for c in cs)]}
    unknown = set(only) - named - pool_names
    if unknown:
        raise OpenTransError(
            f"no case is called {min(unknown)!r} at {size[0]}x{size[1]} pixels. The table of "
            f"'opentrans bench op' names them, for instance {convs[0].name!r}."
        )
    if quick and not only:
        convs, blocks = representative(convs), blocks[1:2]
        linears = {op: cases[:1] for op, cases in linears.items()}
    for op, build in BUILDERS.items():
        if ops and op not in ops:
            continue
        pools = set()  # convolutions of one input have the same pool behind them
        for case in blocks if op == "sparse_bottleneck" else linears.get(op, convs):
            if op in POOLS:
                shape = (case.cin, case.height, case.width)
                if min(shape[1:]) >= 2 and case.kind == "3x3" and shape not in pools:
                    pools.add(shape)
                    if not only or _pool_name(case, op) in only:
                        yield build(case, 1.0, batch)
                continue
            for density in densities if not only or case.name in only else ():
                yield build(case, density, batch)


def rows_for(op: str) -> tuple[list[dispatch.Row], list[dict[str, str]]]:
    """(rows of ``op`` that run on this CPU, the others with the reason)."""
    running, skipped = [], []
    for row, record in zip(dispatch.TABLE, dispatch.backends(), strict=True):
        if row.op != op:
            continue
        if record["available"] != "yes":
            skipped.append({"backend": f"{op} {row.backend}", "reason": record["available"]})
        elif row.device not in ("any", "cpu"):
            reason = f"takes {row.device} tensors; this is a CPU benchmark"
            skipped.append({"backend": f"{op} {row.backend}", "reason": reason})
        else:
            running.append(row)
    return running, skipped


def skipped_rows(ops: Sequence[str] = ()) -> list[dict[str, str]]:
    """Every dispatch row that is not timed here, with the reason."""
    found = []
    for op in dict.fromkeys(row.op for row in dispatch.TABLE):
        if ops and op not in ops:
            continue
        running, skipped = rows_for(op)
        found += skipped
        if op not in BUILDERS:
            where = ELSEWHERE.get(op)
            reason = f"timed by '{where}'" if where else "no CPU case is defined for it"
            if op in ON_GPUS:
                reason = "an op of the GPU path: 'make gpu' checks and times its kernels"
            found += [{"backend": f"{op} {row.backend}", "reason": reason} for row in running]
    return found


def measure_case(
    case: Case, *, rounds: int = 7, warmup_s: float = 0.03, backends: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows of one case, one per backend: exactness first, then interleaved times.

    ``clock`` is CPU time with one thread, which does not count interruptions, else wall time. A row
    is exact within twice its :func:`yardstick`, or 1e-6.
    """
    running = [row for row in rows_for(case.op)[0] if not backends or row.backend in backends]
    if not running:
        return []
    calls: dict[str, Call] = {}
    for row in running:
        kernel = dispatch.Resolution(row, ()).function()
        calls[row.backend] = lambda kernel=kernel: kernel(*case.arguments)
    with torch.no_grad():
        errors = {name: relative_error(call(), case.reference) for name, call in calls.items()}
        own = {
            name: relative_error(case.select(call()), case.reference)
            for name, call in case.dense.items()
        }
        plain = relative_error(case.select(case.plain()), case.reference)
        everything = {**calls, **case.dense}
        table = interleave(everything, rounds=rounds, warmup_s=warmup_s, min_sample_ms=2.0)
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    best = table.fastest(case.dense, clock)
    rows = []
    for name in calls:
        dense_error = yardstick(name, own[best], plain)
        match = matched(errors[name], max(ERROR_LIMIT, 2 * dense_error))
        exact = match["equal"]
        pair = table.pair(best, name, clock)
        rows.append(
            {
                "op": case.op,
                "backend": name,
                "case": case.name,
                "kind": case.kind,
                **case.shape,
                "density": case.density,
                "density_asked": case.asked,
                "nnz": case.nnz,
                "macs": case.macs,
                "dense_kind": best,
                "dense_ms": pair.slow_ms,
                "ms": pair.fast_ms,
                "speedup": pair.ratios.to_dict() if exact else None,
                "clock": clock,
                "contended_share": table[name].contended_share(),
                "exact": exact,
                "error": errors[name],
                "dense_error": dense_error,
                "match": match,
            }
        )
    return rows


def yardstick(backend: str, dense: float, plain: float) -> float:
    """The error whose double a row may have: that of the dense side it is compared with.

    The reference row *is* PyTorch's operator on contiguous tensors, where oneDNN rounds up to 2.5
    times more than on the layouts of the dense sides, so it may have that operator's (``plain``).
    """
    return max(dense, plain) if backend == "reference" else dense


def _conv_parts(case: ConvCase, density: float, batch: int) -> tuple[Any, ...]:
    weight = masked_weight(case.cout, case.cin, case.kernel, density)
    bias = random_values([case.cout], 1)
    packed = SparseWeight.from_dense(weight, bias, stride=case.stride, padding=case.padding)
    return weight, bias, packed, random_values([batch, case.cin, case.height, case.width], 2)


def _conv_shape(case: ConvCase, batch: int) -> dict[str, int]:
    return {
        "cin": case.cin, "cout": case.cout, "kernel": case.kernel, "stride": case.stride,
        "h_out": case.out[0], "w_out": case.out[1], "batch": batch,
    }  # fmt: skip


def _conv_macs(case: ConvCase, nnz: int, batch: int) -> dict[str, int]:
    h, w = case.out
    return macs_of([(nnz, case.cin * case.cout * case.kernel**2, h, w, case.kernel)], batch)


def _forward(case: ConvCase, density: float, batch: int) -> Case:
    weight, bias, packed, x = _conv_parts(case, density, batch)

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(*tensors, case.stride, case.padding).relu()

    arguments = (
        x, packed.structure, packed.values, packed.bias, None,
        case.cout, case.kernel, case.stride, case.padding, True,
    )  # fmt: skip
    return Case(
        "sparse_conv2d", case.name, case.kind, _conv_shape(case, batch), packed.density, density,
        packed.nnz, _conv_macs(case, packed.nnz, batch), arguments,
        dense_calls(x, weight, bias, case.stride, case.padding), lambda: plain(x, weight, bias),
        plain(x.double(), weight.double(), bias.double()),
    )  # fmt: skip


def _weight_gradient(case: ConvCase, density: float, batch: int) -> Case:
    weight, _, packed, x = _conv_parts(case, density, batch)
    grad = random_values([batch, case.cout, *case.out], 3)

    def gradient(image: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        sides = [case.stride] * 2, [case.padding] * 2, [1, 1]
        return torch.ops.aten.convolution_backward(
            outer, image, inner, None, *sides, False, [0, 0], 1, [False, True, False]
        )[1]

    def chosen(found: torch.Tensor) -> torch.Tensor:
        return found.contiguous().flatten()[packed.indices()]

    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad, weight)]
    return Case(
        "sparse_conv2d_wgrad", case.name, case.kind, _conv_shape(case, batch), packed.density,
        density, packed.nnz, _conv_macs(case, packed.nnz, batch),
        (x, grad, packed.structure, packed.values),
        {"contiguous": lambda: gradient(x, grad, weight), "channels_last": lambda: gradient(*last)},
        lambda: gradient(x, grad, weight),
        chosen(gradient(x.double(), grad.double(), weight.double())), chosen,
    )  # fmt: skip


def _pool_name(case: ConvCase, op: str) -> str:
    k, s, p = POOLS[op]
    size = "x".join(str((side + 2 * p - k) // s + 1) for side in (case.height, case.width))
    return f"{case.cin} channels, {k}x{k} pool, {size}"


def _pool(op: str, case: ConvCase, density: float, batch: int) -> Case:
    k, s, p = geometry = POOLS[op]
    run = functional.max_pool2d if op == "max_pool2d" else functional.avg_pool2d
    x = random_values([batch, case.cin, case.height, case.width], 2)
    last = x.contiguous(memory_format=torch.channels_last)
    reference = run(x.double(), *geometry)
    shape = {
        "cin": case.cin, "cout": case.cin, "kernel": k, "stride": s, "h_out": reference.shape[2],
        "w_out": reference.shape[3], "batch": batch,
    }  # fmt: skip
    rest: dict[str, tuple[Any, ...]] = {
        "avg_pool2d": (k,),
        "max_pool2d": ([k] * 2, [s] * 2, [p] * 2, False),
        "window_avg_pool2d": ([k] * 2, [s] * 2, [p] * 2, False, True, 0),
    }
    return Case(
        op, _pool_name(case, op), "pool", shape, 1.0, 1.0, 0,
        {"nominal": 0, "effective": 0, "executed": 0}, (x, *rest[op]),
        {"contiguous": lambda: run(x, *geometry), "channels_last": lambda: run(last, *geometry)},
        lambda: run(x, *geometry),
        reference,
    )  # fmt: skip


def _block(case: BlockCase, density: float, batch: int) -> Case:
    out = 4 * case.planes
    shapes = [(case.cin, case.planes, 1), (case.planes, case.planes, 3), (case.planes, out, 1)]
    shapes += [(case.cin, out, 1)] * case.down
    weights = [masked_weight(cout, cin, k, density) for cin, cout, k in shapes]
    biases = [random_values([cout], 5 + i) for i, (_, cout, _) in enumerate(shapes)]
    packs = [
        SparseWeight.from_dense(w, b, stride=1, padding=k // 2)
        for w, b, (_, _, k) in zip(weights, biases, shapes, strict=True)
    ]
    x = random_values([batch, case.cin, case.height, case.width], 2)
    parts: list[Any] = [t for p in packs for t in (p.structure, p.values, p.bias)]
    parts += [None] * (12 - len(parts))
    down_pool = case.pool if case.down else 1

    def dense(x: torch.Tensor, ws: list[torch.Tensor], bs: list[torch.Tensor]) -> torch.Tensor:
        y = functional.conv2d(x, ws[0], bs[0]).relu_()
        y = functional.conv2d(y, ws[1], bs[1], padding=1).relu_()
        y = functional.avg_pool2d(y, case.pool) if case.pool > 1 else y
        y = functional.conv2d(y, ws[2], bs[2])
        side = functional.avg_pool2d(x, case.pool) if case.pool > 1 else x
        return y.add_(functional.conv2d(side, ws[3], bs[3]) if case.down else side).relu_()

    last = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    x_last = x.contiguous(memory_format=torch.channels_last)
    h, w = case.height // case.pool, case.width // case.pool
    sizes = [(case.height, case.width)] * 2 + [(h, w)] * 2
    counts = [
        (p.nnz, weight.numel(), *size, k)
        for p, weight, size, (_, _, k) in zip(packs, weights, sizes, shapes, strict=False)
    ]
    nnz = sum(p.nnz for p in packs)
    return Case(
        "sparse_bottleneck", case.name, "block",
        {"cin": case.cin, "cout": out, "kernel": 3, "stride": case.pool, "h_out": h, "w_out": w,
         "batch": batch},
        nnz / sum(weight.numel() for weight in weights), density, nnz, macs_of(counts, batch),
        (x, *parts, out, case.pool, down_pool),
        {
            "contiguous": lambda: dense(x, weights, biases),
            "channels_last": lambda: dense(x_last, last, biases),
        },
        lambda: dense(x, weights, biases),
        dense(x.double(), [w.double() for w in weights], [b.double() for b in biases]),
    )  # fmt: skip


BUILDERS: dict[str, Callable[..., Case]] = {
    "sparse_conv2d": _forward,
    "sparse_conv2d_wgrad": _weight_gradient,
    "sparse_bottleneck": _block,
    **{op: partial(_pool, op) for op in POOLS},
    **{op: partial(linear_case, op) for op in LINEAR_OPS},
}
