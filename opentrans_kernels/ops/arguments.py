"""What the ops take: checks shared by the front functions, the fake kernels and the reference.

The compiled kernels make the same checks in C++ (csrc/torch), so a call that reaches
them pays for nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..activations import RELU, Activation, Kind
from ..errors import PlanError
from ..pack import Header, checked_header
from ..pack.layout import LARGEST_STEP
from ..pack.winograd import ROWS

__all__ = [
    "BadArgument",
    "activation",
    "bottleneck",
    "bottleneck_size",
    "conv_size",
    "convolution",
    "depthwise",
    "gradient",
    "image",
    "linear",
    "packed_header",
    "pair",
    "pooled_size",
    "result",
    "tokens",
    "window_pooled_size",
    "winograd",
]


class BadArgument(PlanError, RuntimeError):
    """An argument does not fit; a RuntimeError too, as the compiled kernels and torch raise it."""


def image(op: str, x: torch.Tensor, name: str = "x") -> torch.Size:
    """The shape ``[N, C, H, W]`` of a batch of images."""
    if x.dim() != 4:
        raise BadArgument(
            f"{op}: {name} must have four dimensions [N, C, H, W], got {list(x.shape)}."
        )
    return x.shape


def conv_size(
    size: Sequence[int],
    kernel: int,
    stride: int,
    padding: int,
    op: str = "sparse_conv2d",
    dilation: int = 1,
) -> tuple[int, int]:
    """Height and width of a convolution's output; ``size`` is ``[..., H, W]`` of its input."""
    kernel = (kernel - 1) * dilation + 1
    h, w = size[-2] + 2 * padding - kernel, size[-1] + 2 * padding - kernel
    if h < 0 or w < 0:
        raise BadArgument(
            f"{op}: input {size[-2]}x{size[-1]} with padding {padding} is smaller than "
            f"the {kernel}x{kernel} kernel. Pass a larger image."
        )
    return h // stride + 1, w // stride + 1


def pooled_size(op: str, size: Sequence[int], k: int) -> tuple[int, int]:
    """Height and width after averaging ``k x k`` windows with stride ``k``."""
    if k < 1:
        raise BadArgument(f"{op}: the pooling window must be at least 1, got {k}.")
    if size[-2] < k or size[-1] < k:
        raise BadArgument(
            f"{op}: an image of {size[-2]}x{size[-1]} pixels is too small for a {k}x{k} pooling "
            "window. Pass a larger image."
        )
    return size[-2] // k, size[-1] // k


def pair(op: str, name: str, given: int | Sequence[int]) -> list[int]:
    """Numbers for rows and columns, of which a single one serves both."""
    numbers = [given, given] if isinstance(given, int) else given
    if not (
        isinstance(numbers, Sequence) and len(numbers) == 2
        and all(isinstance(n, int) for n in numbers)
    ):  # fmt: skip
        raise BadArgument(
            f"{op}: {name} must be a whole number, or one for rows and one for columns, got "
            f"{given!r}."
        )
    return list(numbers)


def window_pooled_size(
    op: str, size: Sequence[int], window: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool,
) -> tuple[int, int]:  # fmt: skip
    """Height and width after pooling; ``size`` is ``[..., H, W]`` of the input."""
    if not len(window) == len(stride) == len(padding) == 2:
        raise BadArgument(
            f"{op}: window, stride and padding must have two numbers each, for rows and columns; "
            f"got {list(window)}, {list(stride)}, {list(padding)}."
        )
    found = []
    for n, k, s, p in zip(size[-2:], window, stride, padding, strict=True):
        if not (1 <= k <= LARGEST_STEP and 1 <= s <= LARGEST_STEP and 0 <= p <= k // 2):
            raise BadArgument(
                f"{op}: window and stride must be 1 to {LARGEST_STEP} and padding at most half the "
                f"window, got window {k}, stride {s}, padding {p}."
            )
        room = n + 2 * p - k + (s - 1 if ceil_mode else 0)
        if n < 1 or room < 0:
            raise BadArgument(
                f"{op}: an image of {size[-2]}x{size[-1]} pixels is too small for a "
                f"{window[0]}x{window[1]} pooling window with padding {list(padding)}. Pass a "
                "larger image."
            )
        count = room // s + 1
        if ceil_mode and (count - 1) * s >= n + p:
            count -= 1  # the last window would begin behind the image
        found.append(count)
    return found[0], found[1]


def packed_header(op: str, structure: torch.Tensor) -> Header:
    """The header of a valid structure tensor."""
    if structure.dim() != 1 or structure.dtype != torch.int32:
        raise BadArgument(
            f"{op}: structure must be a 1-d int32 tensor made by SparseWeight, got "
            f"{structure.dtype} {list(structure.shape)}."
        )
    try:
        return checked_header(structure)
    except PlanError as error:
        raise BadArgument(f"{op}: {error}") from error


def activation(op: str, relu: bool, kind: int, slope: float) -> Activation:
    """What an op is to apply: ``relu`` is the short way of one of the kinds."""
    if not min(Kind) <= kind <= max(Kind):
        raise BadArgument(
            f"{op}: {kind} is no activation; they are numbered from {min(Kind)} to {max(Kind)}. "
            "See opentrans_kernels.activations.Kind."
        )
    if relu and kind > Kind.RELU:
        raise BadArgument(f"{op}: relu and activation {kind} exclude each other. Pass one of them.")
    return RELU if relu else Activation(kind, slope)


def _weight(op: str, x: torch.Tensor, structure, values, bias) -> Header:
    header = packed_header(op, structure)
    for name, tensor, size in (("values", values, header.nnz), ("bias", bias, header.cout)):
        if tensor is None:
            continue
        if tensor.shape != (size,):
            raise BadArgument(f"{op}: {name} must have {size} elements, got {list(tensor.shape)}.")
        if tensor.dtype not in (torch.float32, x.dtype):
            raise BadArgument(
                f"{op}: {name} is {tensor.dtype}, but x is {x.dtype}. Convert it with .float()."
            )
    return header


def tokens(op: str, x: torch.Tensor) -> torch.Size:
    """The shape ``[..., channels]`` of tokens."""
    if x.dim() < 1:
        raise BadArgument(f"{op}: x must have a dimension of channels at its end, got a number.")
    return x.shape


def linear(op: str, x: torch.Tensor, structure, values, bias) -> Header:
    """Check a packed linear layer and its tokens; returns the structure's header."""
    header = _weight(op, x, structure, values, bias)
    if header[2:5] != (1, 1, 0):
        raise BadArgument(
            f"{op}: the packed weight is a convolution (window, stride, padding {header[2:5]}). "
            "Pack a linear layer's weight [out, in] as [out, in, 1, 1]."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise BadArgument(f"{op}: x is {x.dtype}; convert it to float32 with .float().")
    if tokens(op, x)[-1] != header.cin:
        raise BadArgument(f"{op}: x has {x.shape[-1]} channels, the weight expects {header.cin}.")
    return header


def result(op: str, size: torch.Size, cout: int, residual: torch.Tensor | None) -> None:
    """Check what a linear layer's output is said to be, and what is added to it."""
    if size[-1] != cout:
        raise BadArgument(f"{op}: cout is {cout}, the packed weight has {size[-1]} outputs.")
    if residual is not None and residual.shape != size:
        raise BadArgument(
            f"{op}: residual must have the output's shape {list(size)}, got {list(residual.shape)}."
        )


def _input(op: str, x: torch.Tensor, cin: int) -> torch.Size:
    size = image(op, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise BadArgument(f"{op}: x is {x.dtype}; convert it to float32 with .float().")
    if size[1] != cin:
        raise BadArgument(f"{op}: x has {size[1]} channels, the weight expects {cin}.")
    return size


def convolution(
    x: torch.Tensor, structure, values, bias, residual, cout, kernel, stride, padding, dilation
) -> Header:
    """Check the arguments of ``sparse_conv2d``; returns the structure's header."""
    op = "sparse_conv2d"
    header = _weight(op, x, structure, values, bias)
    given = (cout, kernel, stride, padding, dilation)
    packed = (*header[1:5], header.dilation)
    if given != packed:
        raise BadArgument(
            f"{op}: (cout, kernel, stride, padding, dilation) {given} do not match the packed "
            f"structure's {packed}. Pack the weight again, with the stride, padding and dilation "
            "it is used with."
        )
    size = _input(op, x, header.cin)
    expected = (size[0], cout, *conv_size(size, kernel, stride, padding, op, dilation))
    if residual is not None and (residual.shape != expected or residual.dtype != x.dtype):
        raise BadArgument(
            f"{op}: residual must have the output's shape {list(expected)} and dtype {x.dtype}, "
            f"got {list(residual.shape)} {residual.dtype}."
        )
    return header


def depthwise(x: torch.Tensor, weight, bias, stride: int, padding: int) -> None:
    """Check the arguments of ``depthwise_conv2d``."""
    op = "depthwise_conv2d"
    channels = image(op, x)[1]
    if (
        weight.dim() != 4
        or tuple(weight.shape[:2]) != (channels, 1)
        or not (1 <= weight.shape[2] == weight.shape[3])
    ):
        raise BadArgument(
            f"{op}: weight must be [{channels}, 1, k, k], one window per channel of x, got "
            f"{list(weight.shape)}."
        )
    if bias is not None and bias.shape != (channels,):
        raise BadArgument(
            f"{op}: bias must have {channels} elements, one per channel, got {list(bias.shape)}."
        )
    if not 1 <= stride <= LARGEST_STEP or not 0 <= padding <= LARGEST_STEP:
        raise BadArgument(
            f"{op}: stride must be from 1, padding from 0, each to {LARGEST_STEP}; got {stride} "
            f"and {padding}."
        )
    conv_size(x.shape, weight.shape[2], stride, padding, op)


def winograd(x: torch.Tensor, weight, bias, residual, cout: int, padding: int) -> None:
    """Check the arguments of ``winograd_conv2d``."""
    op = "winograd_conv2d"
    size = image(op, x)
    if cout < 0 or not 0 <= padding <= LARGEST_STEP:
        raise BadArgument(
            f"{op}: cout and padding must be from 0, padding to {LARGEST_STEP}; got {cout} and "
            f"{padding}."
        )
    packed = (16, -(-cout // ROWS), size[1], ROWS)
    if tuple(weight.shape) != packed:
        raise BadArgument(
            f"{op}: weight must be {list(packed)} as transform_weight() makes it, got "
            f"{list(weight.shape)}."
        )
    if bias is not None and bias.shape != (cout,):
        raise BadArgument(
            f"{op}: bias must have {cout} elements, one per channel, got {list(bias.shape)}."
        )
    expected = (size[0], cout, *conv_size(size, 3, 1, padding, op))
    if residual is not None and residual.shape != expected:
        raise BadArgument(
            f"{op}: residual must have the output's shape {list(expected)}, got "
            f"{list(residual.shape)}."
        )


def gradient(op: str, header: Header, grad: torch.Tensor, size: Sequence[int]) -> None:
    """Check that ``grad`` is one of a convolution's output; ``size``: its input's shape."""
    found = image(op, grad, "the output's gradient")
    cin, cout, kernel, stride, padding = header[:5]
    expected = (found[0], cout, *conv_size(size, kernel, stride, padding, op, header.dilation))
    if size[-3] != cin or found != expected or (len(size) == 4 and size[0] != found[0]):
        raise BadArgument(
            f"{op}: an input {list(size)} and the gradient {list(found)} do not fit the packed "
            f"convolution of {cin} to {cout} channels, {kernel}x{kernel}, stride {stride}, "
            f"padding {padding}, dilation {header.dilation}."
        )


def bottleneck(
    x: torch.Tensor, c1, c2, c3, down, cout: int, pool: int, down_pool: int, stride: int
) -> None:
    """Check the arguments of ``sparse_bottleneck``; c1 ... down: (structure, values, bias)."""
    op = "sparse_bottleneck"
    h1, h2, h3 = (_weight(op, x, *part) for part in (c1, c2, c3))
    hd = None
    if down[0] is not None:
        if down[1] is None:
            raise BadArgument(f"{op}: the downsample has a structure but no values.")
        hd = _weight(op, x, *down)
    _check_stride(op, stride, pool, hd is not None)
    pointwise = h1[2:5] == h3[2:5] == (1, 1, 0) and (hd is None or hd[2:5] == (1, stride, 0))
    if not pointwise or (*h2[2:5], h2.dilation) != (3, stride, 1, 1):
        raise BadArgument(
            f"{op}: needs 1x1, 3x3 (stride {stride}, padding 1), 1x1 and a 1x1 shortcut of the "
            f"same stride; got (kernel, stride, padding) {h1[2:5]}, {h2[2:5]}, {h3[2:5]}, "
            f"{None if hd is None else hd[2:5]}."
        )
    size = _input(op, x, h1.cin)
    # Without a downsample the shortcut is x itself, whatever the block's output has.
    shortcut = (size[1], size[1]) if hd is None else hd[:2]
    chains = (h1.cout, h2.cout, h3.cout) == (h2.cin, h3.cin, cout)
    if not chains or shortcut != (size[1], cout):
        raise BadArgument(
            f"{op}: channels do not chain: x has {size[1]}, the convolutions map {h1[:2]}, "
            f"{h2[:2]}, {h3[:2]}, the shortcut {shortcut}, and the output is to have {cout}."
        )
    bottleneck_size(size, pool, down_pool, hd is not None, stride)


def bottleneck_size(
    size: Sequence[int], pool: int, down_pool: int, down: bool, stride: int
) -> tuple[int, int]:
    """Height and width of a block's output; ``size`` is ``[..., H, W]`` of its input."""
    op = "sparse_bottleneck"
    if down_pool != (pool if down else 1) or (pool != 1 and not down):
        raise BadArgument(
            f"{op}: pool {pool} and down_pool {down_pool} give different output sizes; they must "
            "be equal with a downsample, and 1 without."
        )
    _check_stride(op, stride, pool, down)
    return _block_size(op, size, pool, stride)


def _check_stride(op: str, stride: int, pool: int, down: bool) -> None:
    if stride != 1 and (stride != 2 or not down or pool != 1):
        raise BadArgument(
            f"{op}: stride {stride} must be 1, or 2 with a shortcut convolution and no pool."
        )


def _block_size(op: str, size: Sequence[int], pool: int, stride: int) -> tuple[int, int]:
    height, width = pooled_size(op, size, pool)
    return (height - 1) // stride + 1, (width - 1) // stride + 1


def stage_sizes(
    size: Sequence[int], pools: Sequence[int], strides: Sequence[int] = ()
) -> list[tuple[int, int]]:
    """Height and width of the output of each block of a stage; no strides: 1."""
    sizes: list[tuple[int, int]] = []
    now = size
    for pool, stride in zip(pools, strides or [1] * len(pools), strict=True):
        now = _block_size("sparse_stage", now, pool, stride)
        sizes.append(now)
    return sizes
