"""Section that bounds what a 2:4 convolution could gain, before anybody writes one.

Tensor cores of the 2:4 format multiply twice as fast if two of every four neighbours along K are
zero. A masked weight does not have that form, so it is split: the two largest of four go into the
2:4 part, the rest into a second pass. No library has a 2:4 convolution, but cuSPARSELt has the GEMM
that its inner loop would be. Its rate on operands that lie in L2, applied to the layer, is a time
that loads through an image are not expected to beat; against cuDNN's convolution it bounds the
gain. A prototype is worth writing where the bound with the second pass is at least
:data:`WORTHWHILE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sections import Context, check, section
from tower import build_tower

from opentrans_kernels.gpu.clock import CudaTimer
from opentrans_kernels.ops.sparse_conv2d_nhwc import build, pack, sparse_conv2d_nhwc
from opentrans_kernels.synthetic import synthetic_masks

__all__ = ["LAYERS", "WORTHWHILE", "as_matrix", "split"]

#: The three 3x3 in front of an average pool, with their divisor of an image's height and width.
LAYERS = {"layer2.0.conv2": 4, "layer3.0.conv2": 8, "layer4.0.conv2": 16}
MASK = "global:0.90"
WORTHWHILE = 1.15
_BATCHES = (1, 8)
_L2_BYTES = 40 << 20  # of the GEMM's wide operand, so that it stays in L2
_DTYPE = torch.bfloat16
_ERROR = 1.6e-2  # of bfloat16 operands and output, relative to the largest


def split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(2:4 part, rest) of ``[Cout, Cin, k, k]``; groups of four lie along Cin. They add up."""
    cout, cin, *taps = weight.shape
    groups = weight.reshape(cout, cin // 4, 4, *taps)
    smallest = groups.abs().argsort(dim=2, stable=True)[:, :, :2]
    kept = groups.scatter(2, smallest, 0.0).reshape(weight.shape)
    return kept, weight - kept


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """``[Cout, k * k * Cin]``, Cin innermost: neighbours along K are neighbours in a group."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()


def why_not(context: Context) -> str | None:
    """Why cuSPARSELt's GEMM cannot be timed here; None if it can."""
    if context.rehearsal:
        return "a rehearsal has no GPU"
    if torch.cuda.get_device_capability(context.device) < (8, 0):
        return "2:4 tensor cores need compute capability 8.0"
    backend = getattr(torch.backends, "cusparselt", None)
    if backend is None or not backend.is_available():
        return "this torch was built without cuSPARSELt"
    return None


@section("two_four", 45)
def two_four(context: Context) -> dict[str, Any]:
    """Dense and 2:4 GEMM, cuDNN's convolution and the second pass, for each of the layers."""
    small = context.rehearsal
    net = build_tower(layers=(1, 1, 1, 1), width=16) if small else build_tower()
    synthetic_masks(net, MASK).apply_(net)
    reason = why_not(context)
    found: dict[str, Any] = {"mask": f"{MASK} (synthetic)", "not timed": reason, "layers": {}}
    if reason is not None:
        context.notes.append(f"2:4 is not timed: {reason}")
    height, width = (64, 96) if small else (800, 1216)
    for name, divisor in LAYERS.items():
        weight = net.get_submodule(name).weight.detach().double()
        kept, rest = split(weight)
        nonzero = int(torch.count_nonzero(weight))
        entry: dict[str, Any] = {
            "shape": list(weight.shape),
            "density": nonzero / weight.numel(),
            "outside_2_4": int(torch.count_nonzero(rest)) / max(1, nonzero),
        }
        found["layers"][name] = entry
        for batch in _BATCHES[: 1 if small else None]:
            size = (batch, weight.shape[1], height // divisor, width // divisor)
            entry[f"b{batch}"] = _one(context, kept, rest, size, reason is None)
            context.save(found)
            _note(context, name, batch, entry[f"b{batch}"])
    problems = [
        f"{name} {key}: {value['error']}"
        for name, entry in found["layers"].items()
        for key, value in entry.items()
        if isinstance(value, dict) and "error" in value
    ]
    check(not problems, "; ".join(problems))
    return found


def _one(
    context: Context, kept: torch.Tensor, rest: torch.Tensor, size: tuple[int, ...], timed: bool
) -> dict[str, Any]:
    """One layer and batch: checks, then milliseconds and bounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size[0], *size[1:], generator=generator).to(context.device, _DTYPE)
    x = x.contiguous(memory_format=torch.channels_last)
    main = kept.to(context.device, _DTYPE)
    pixels = size[0] * size[2] * size[3]
    matrix = as_matrix(main)
    rows = min(pixels, _L2_BYTES // (2 * matrix.shape[1])) // 16 * 16
    left = torch.randn(rows, matrix.shape[1], generator=generator).to(context.device, _DTYPE)
    _both_parts(x[:1], kept, rest)
    if not timed:
        return {"rows": rows, "pixels": pixels}
    try:
        return _times(context, x, main, rest, left, matrix)
    except Exception as problem:  # the other layers are still worth their time
        return {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}


def _both_parts(x: torch.Tensor, kept: torch.Tensor, rest: torch.Tensor) -> None:
    """The two passes compute the masked layer: float64, first image."""
    image = x.double()
    kept, rest = kept.to(x.device), rest.to(x.device)
    both = F.conv2d(image, kept, padding=1) + F.conv2d(image, rest, padding=1)
    whole = F.conv2d(image, kept + rest, padding=1)
    error = float((both - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
    check(error < 1e-12, f"the two passes are off by {error:.1e}")


def _times(
    context: Context, x: torch.Tensor, main: torch.Tensor, rest: torch.Tensor, left: torch.Tensor,
    matrix: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    clock = CudaTimer(context.device)
    pixels, rows = x.shape[0] * x.shape[2] * x.shape[3], left.shape[0]
    packed = torch._cslt_compress(matrix)
    right = left.t()  # [K, rows], column-major, as an implicit GEMM would hold it
    algorithm = torch._cslt_sparse_mm_search(packed, right, transpose_result=True)

    def sparse() -> torch.Tensor:
        return torch._cslt_sparse_mm(packed, right, transpose_result=True, alg_id=algorithm)

    got = sparse().double()
    got = got if got.shape[0] == rows else got.t()
    want = left.double() @ matrix.double().t()
    error = float((got - want).abs().max() / want.abs().max())
    check(error < _ERROR, f"cuSPARSELt errs by {error:.1e}")
    bias = torch.zeros(main.shape[0], device=context.device, dtype=_DTYPE)
    weight = main.contiguous(memory_format=torch.channels_last)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        convolutions: dict[str, Callable[[], Any]] = {
            "conv": lambda: F.conv2d(x, weight, None, padding=1),
            "conv, bias, ReLU": lambda: torch.cudnn_convolution_relu(
                x, weight, bias, [1, 1], [1, 1], [1, 1], 1
            ),
        }
        record = {f"{name} ms": clock(name, run) for name, run in convolutions.items()}
    finally:
        torch.backends.cudnn.benchmark = before
    record["rows"], record["pixels"] = rows, pixels
    record["gemm_error"] = error
    record["dense gemm ms"] = clock("dense", lambda: left @ matrix.t())
    record["2:4 gemm ms"] = clock("2:4", sparse)
    dense = min(record[f"{name} ms"] for name in convolutions)
    record["2:4 layer ms"] = record["2:4 gemm ms"] * pixels / rows
    record["bound"] = dense / record["2:4 layer ms"]
    record["second pass ms"], record["second pass"] = _second_pass(context, clock, x, main, rest)
    both = record["2:4 layer ms"] + record["second pass ms"]
    record["bound with second pass"] = dense / both
    return record


def _second_pass(
    context: Context, clock: CudaTimer, x: torch.Tensor, main: torch.Tensor, rest: torch.Tensor
) -> tuple[float, str]:
    """Milliseconds of what is left, and what was timed for it."""
    y = F.conv2d(x, main, padding=1).contiguous(memory_format=torch.channels_last)
    if build.why_not() is None:
        packed = pack(rest.float()).to(context.device)
        bias = torch.zeros(main.shape[0], device=context.device)
        run = lambda: sparse_conv2d_nhwc(x, packed, bias, y, relu=True)  # noqa: E731
        return clock("second pass", run), "sparse_conv2d_nhwc"
    return clock("second pass", lambda: y.relu_()), "reading and writing the output only"


def _note(context: Context, name: str, batch: int, record: dict[str, Any]) -> None:
    if "bound" not in record:
        return
    words = "worth" if record["bound with second pass"] >= WORTHWHILE else "not worth"
    context.notes.append(
        f"{name} b{batch}: 2:4 at most {record['bound']:.2f}x of cuDNN, with a second pass "
        f"({record['second pass']}) {record['bound with second pass']:.2f}x: {words} a prototype"
    )
