"""The candidates for one layer: what could compute it here, and why others could not.

A candidate is packed once (:meth:`Candidate.pack`) and then called with activations in
channels_last. ``dense`` candidates are PyTorch's own on the layer as it is given; on the full
widths they are the dense network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import dispatch
from ..errors import OpenTransError
from ..ops.implicit_gemm_conv2d import live_pieces, live_slices, pack_weight
from ..ops.implicit_gemm_conv2d.shapes import fitting, k_major
from ..ops.nhwc import empty_nhwc, nhwc, why_too_old
from ..ops.sparse_conv2d_nhwc import pack
from .network import Layer
from .precision import Precision

__all__ = ["Candidate", "Place", "candidates", "layer_signature", "output_size", "random_inputs"]

#: Above it, at two fifths of the CUDA cores' peak, zeros cost as much as they save (arithmetic).
MOST_DENSE = 0.45
#: Above these shares of the dense work, zeros left out do not pay for finding the others.
MOST_GATHERED, MOST_SLICED = 0.75, 0.85
_PIECE = 32  # divides the columns and the depth of every tile
Run = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a layer runs: device, compute capability (None off CUDA), precision."""

    device: torch.device
    precision: Precision
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device, precision: Precision) -> Place:
        on_gpu = device.type == "cuda"
        return cls(device, precision, torch.cuda.get_device_capability(device) if on_gpu else None)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer. dense: PyTorch's own kernels. pack: layer -> function.

    warm: compiles for a layer and an input size, without packing or running; None if there is
    nothing to compile. share: of the dense work, on which its time depends; 1 if it skips nothing.
    """

    name: str
    dense: bool
    pack: Callable[[Layer], Run]
    warm: Callable[[Layer, tuple[int, int, int]], None] | None = None
    share: float = 1.0


def layer_signature(layer: Layer, size: tuple[int, int, int]) -> tuple[object, ...]:
    """Layers with equal signatures take equal times on kernels that do not look at zeros."""
    second = layer.second
    extra = None if second is None else (second.weight.shape[1], second.pool, second.stride)
    return (
        tuple(layer.weight.shape), layer.stride, layer.padding, layer.relu, layer.residual,
        layer.pool, extra, size,
    )  # fmt: skip


def candidates(
    layer: Layer, place: Place, size: tuple[int, int, int]
) -> tuple[list[Candidate], dict[str, str]]:
    """What can compute ``layer``, and name -> reason for what cannot.

    size: batch, height and width of the input.
    """
    found: list[Candidate] = []
    rejected: dict[str, str] = {}
    makers = (
        ("aten", _aten),
        ("cudnn", _cudnn),
        ("matmul", _matmul),
        ("gemm", _gemm),
        ("sparse", _sparse),
    )
    for name, make in makers:
        given = make(layer, place, size)
        if isinstance(given, str):
            rejected[name] = given
        else:
            found += given
    return found, rejected


def _packed(weight: torch.Tensor, place: Place) -> torch.Tensor:
    return weight.to(place.device, place.precision.dtype, memory_format=torch.channels_last)


def _aten(layer: Layer, place: Place, size: object) -> list[Candidate] | str:
    """Always there: the convolution, then element-wise operators in place."""

    def pack(layer: Layer) -> Run:
        weight = _packed(layer.weight, place)
        bias = layer.bias.to(place.device, place.precision.dtype)
        second = layer.second
        weight2 = None if second is None else _packed(second.weight, place)

        def run(x, residual, x2):
            y = F.conv2d(x, weight, bias, layer.stride, layer.padding)
            if second is not None:
                pooled = F.avg_pool2d(x2, second.pool) if second.pool > 1 else x2
                y += F.conv2d(pooled, weight2, None, second.stride)
            if residual is not None:
                y += residual
            if layer.relu:
                y.relu_()
            return F.avg_pool2d(y, layer.pool) if layer.pool > 1 else y

        return run

    return [Candidate("aten", True, pack)]


def _cudnn(layer: Layer, place: Place, size: object) -> list[Candidate] | str:
    """cuDNN with bias, sum and ReLU in its epilogue."""
    if place.device.type != "cuda":
        return f"cuDNN runs on CUDA, not on {place.device.type}"
    if not layer.relu:
        return "cuDNN's fused operators end in a ReLU, this layer does not"

    def pack(layer: Layer) -> Run:
        weight = _packed(layer.weight, place)
        bias = layer.bias.to(place.device, place.precision.dtype)
        second = layer.second
        weight2 = None if second is None else _packed(second.weight, place)
        conv = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], 1)

        def run(x, residual, x2):
            if second is not None:
                pooled = F.avg_pool2d(x2, second.pool) if second.pool > 1 else x2
                residual = F.conv2d(pooled, weight2, None, second.stride)
            if residual is None:
                y = torch.cudnn_convolution_relu(x, weight, bias, *conv)
            else:
                y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *conv)
            return F.avg_pool2d(y, layer.pool) if layer.pool > 1 else y

        return run

    return [Candidate("cudnn", True, pack)]


def _matmul(layer: Layer, place: Place, size: object) -> list[Candidate] | str:
    """A 1x1 as one GEMM over pixels, bias and ReLU in its epilogue where nothing is added."""
    if layer.kernel != 1 or layer.stride != 1:
        return "only a 1x1 convolution with stride 1 is a plain matrix product"
    if layer.second is not None and layer.second.stride != 1:
        return "its shortcut has a stride"

    def pack(layer: Layer) -> Run:
        dtype = place.precision.dtype
        matrix = layer.weight.flatten(1).T.to(place.device, dtype).contiguous()
        bias = layer.bias.to(place.device, dtype)
        second = layer.second
        matrix2 = None
        if second is not None:
            matrix2 = second.weight.flatten(1).T.to(place.device, dtype).contiguous()

        def run(x, residual, x2):
            n, _, h, w = x.shape
            rows = _rows(x)
            if second is not None:
                pooled = nhwc(F.avg_pool2d(x2, second.pool)) if second.pool > 1 else x2
                y = torch.addmm(bias, _rows(pooled), matrix2).addmm_(rows, matrix)
            elif residual is None and layer.relu:
                y = torch._addmm_activation(bias, rows, matrix, use_gelu=False)
            else:
                y = torch.addmm(bias, rows, matrix)
            if residual is not None:
                y += _rows(residual)
            if layer.relu and (residual is not None or second is not None):
                y.relu_()
            y = y.view(n, h, w, -1).permute(0, 3, 1, 2)
            return F.avg_pool2d(y, layer.pool) if layer.pool > 1 else y

        return run

    return [Candidate("matmul", True, pack)]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[pixels, C] view of a channels_last tensor."""
    return nhwc(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _gemm(layer: Layer, place: Place, size: tuple[int, int, int]) -> list[Candidate] | str:
    """The implicit GEMM, one candidate per tile; dense and, for few live inputs, gathered."""
    if layer.stride != 1 or layer.kernel not in (1, 3) or layer.padding != layer.kernel // 2:
        return (
            f"implicit_gemm_conv2d takes 1x1 and 3x3 with stride 1, this is {layer.kernel}x"
            f"{layer.kernel} with stride {layer.stride}, padding {layer.padding}"
        )
    second = layer.second
    if layer.pool not in (1, 2) or (second is not None and (second.stride, second.pool) not in
                                    ((1, 1), (1, 2))):  # fmt: skip
        return "implicit_gemm_conv2d takes average pools of 2 only"
    if place.capability is not None and (problem := why_too_old(place.capability)) is not None:
        return problem
    dtype = place.precision.dtype
    try:
        row = dispatch.resolve(
            "implicit_gemm_conv2d", place.device.type, str(dtype).removeprefix("torch.")
        )
    except OpenTransError as error:
        return str(error)
    if place.device.type == "cuda" and row.row.backend != "triton":
        return f"triton does not serve: {row.fallback or row.row.backend}"
    function = row.function()
    tiles: list[tuple[int, ...]] = [()]
    if row.row.backend == "triton":
        pooled = second is not None and second.pool > 1
        tiles = fitting(layer.weight.shape[0], dtype, pooled, layer.residual)
    cout, cin = layer.weight.shape[:2]
    gathered = layer.live_inputs().numel() / cin
    pieces = live_pieces(pack_weight(layer.weight != 0), _PIECE, _PIECE)
    kinds = [("gemm", tile, 1.0) for tile in tiles]
    if gathered <= MOST_GATHERED:
        kinds += [("gather", tile, gathered) for tile in tiles[:3]]
    for tile in tiles if row.row.backend == "triton" else [(64, 64, 64, 4, 4)]:
        live = live_pieces(pieces, tile[1] // _PIECE, tile[2] // _PIECE)
        share = int(live.sum()) * tile[1] * tile[2] / layer.weight.numel()
        if share <= MOST_SLICED:
            kinds.append(("slices", tile, share))

    def packer(kind: str, tile: tuple[int, ...]) -> Callable[[Layer], Run]:
        def pack(layer: Layer) -> Run:
            channels, slices = None, (None, None)
            weight = layer.weight
            if kind == "gather":
                kept = layer.live_inputs()
                weight, channels = weight[:, kept], kept.to(place.device, torch.int32)
            laid_out = k_major if place.precision.tf32 else torch.Tensor.contiguous
            packed = pack_weight(weight)
            main = laid_out(place.precision.operand(packed, place.device))
            if kind == "slices":
                slices = tuple(t.to(place.device) for t in live_slices(packed, tile))
            bias = layer.bias.to(place.device, torch.float32)
            second = layer.second
            other = None
            if second is not None:
                other = place.precision.operand(pack_weight(second.weight), place.device)
                other = laid_out(other)
            pool2 = 1 if second is None else second.pool
            fixed = (layer.kernel, layer.pool, pool2, layer.relu, place.precision.tf32, tile)

            def run(x, residual, x2):
                return function(x, main, bias, channels, residual, x2, other, *fixed, *slices)

            return run

        return pack

    found = []
    for kind, tile, share in kinds:
        text = "x".join(map(str, tile[:3])) + f"w{tile[3]}s{tile[4]}" if tile else "any"
        warm = _warmer(place, tile, kind) if row.row.backend == "triton" else None
        found.append(Candidate(f"{kind}:{text}", False, packer(kind, tile), warm, share))
    return found


def _sparse(layer: Layer, place: Place, size: object) -> list[Candidate] | str:
    """Nonzeros on CUDA cores; a shortcut's convolution runs densely before it."""
    if layer.stride != 1 or layer.kernel not in (1, 3) or layer.padding != layer.kernel // 2:
        return "sparse_conv2d_nhwc takes 1x1 and 3x3 with stride 1"
    if (density := layer.main_density) > MOST_DENSE:
        return f"a density of {density:.0%} is above {MOST_DENSE:.0%}"
    dtype = place.precision.dtype
    try:
        found = dispatch.resolve(
            "sparse_conv2d_nhwc", place.device.type, str(dtype).removeprefix("torch.")
        )
    except OpenTransError as error:
        return str(error)
    if place.device.type == "cuda" and found.row.backend != "cuda":
        return str(found.fallback or found.row.backend)
    function = found.function()

    def make(layer: Layer) -> Run:
        packed = pack(layer.weight).to(place.device)
        bias = layer.bias.to(place.device, torch.float32)
        second = layer.second
        weight2 = None if second is None else _packed(second.weight, place)

        def run(x, residual, x2):
            if second is not None:
                pooled = F.avg_pool2d(x2, second.pool) if second.pool > 1 else x2
                residual = F.conv2d(pooled, weight2, None, second.stride)
            y = function(
                x, packed.entries, packed.begin, packed.slots, bias, residual, packed.cin,
                packed.kernel, packed.chunk, layer.relu,
            )  # fmt: skip
            return F.avg_pool2d(y, layer.pool) if layer.pool > 1 else y

        return run

    return [Candidate("sparse", False, make, None, density)]


def _warmer(
    place: Place, tile: tuple[int, ...], kind: str
) -> Callable[[Layer, tuple[int, int, int]], None]:
    def warm(layer: Layer, size: tuple[int, int, int]) -> None:
        from ..ops.implicit_gemm_conv2d import triton

        def meta(*shape: int, dtype: torch.dtype = place.precision.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        cout, cin = layer.weight.shape[:2]
        used = layer.live_inputs().numel() if kind == "gather" else cin
        n, h, w = size
        out = output_size(layer, size)
        second = layer.second
        x2 = weight2 = None
        if second is not None:
            c2, step = second.weight.shape[1], second.pool
            x2 = meta(n, c2, out[1] * step, out[2] * step)
            weight2 = meta(1, c2, cout)
        slices = (None, None)
        if kind == "slices":
            slices = (meta(-(-cout // tile[1]) + 1, dtype=torch.int32), meta(1, dtype=torch.int32))
        weight = meta(layer.kernel**2, used, cout)
        if place.precision.tf32:
            weight = k_major(weight)
        triton.warm(
            meta(n, cin, h, w), weight, meta(cout, dtype=torch.float32),
            meta(used, dtype=torch.int32) if kind == "gather" else None,
            meta(n, cout, *out[1:]) if layer.residual else None, x2, weight2,
            layer.kernel, layer.pool, 1 if second is None else second.pool, layer.relu,
            place.precision.tf32, tile, *slices,
        )  # fmt: skip

    return warm


def output_size(layer: Layer, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Batch, height and width of a layer's output."""
    n, h, w = size
    h, w = ((side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in (h, w))
    return n, h // layer.pool, w // layer.pool


def random_inputs(
    layer: Layer, size: tuple[int, int, int], place: Place
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x, residual and x2 for one layer, as its neighbours would hand them over."""
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(c: int, n: int, h: int, w: int) -> torch.Tensor:
        like = torch.empty(0, dtype=place.precision.dtype, device=place.device)
        return empty_nhwc(like, n, c, h, w).normal_(generator=generator).relu_()

    out = output_size(layer, size)
    x = draw(layer.weight.shape[1], *size)
    residual = draw(layer.weight.shape[0], *out) if layer.residual else None
    x2 = None
    if layer.second is not None:
        n, h, w = out
        step = layer.second.pool * layer.second.stride
        x2 = draw(layer.second.weight.shape[1], n, h * step, w * step)
    return x, residual, x2
