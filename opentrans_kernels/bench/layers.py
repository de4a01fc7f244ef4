"""Layer by layer: the sparse kernel against oneDNN's best dense convolution, losing rows included.

The dense side is what inductor's frozen graphs call: oneDNN with prepacked weights, channels_last,
fused ReLU; plain ``F.conv2d`` on channels_last stands in where that operator is missing, and where
it is faster. Batch norm is folded on both sides, inputs are random, every layer is measured alone
(a hot loop), so the sum over layers is a lower bound for a trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import OpenTransError
from ..topology import ConvNode, conv_shapes, find_trunk, fold_bn
from .rows import matched
from .subject import Subject
from .timing import interleave
from .variants import relative_error

#: Error of a layer relative to its largest output that is always accepted.
ERROR_LIMIT = 1e-6


@dataclass(frozen=True)
class LayerRow:
    """One convolution. Times are milliseconds per batch by ``clock``: CPU time with one thread,
    which does not count interruptions, else wall time. ``error`` and ``dense_error`` are
    largest differences from the float64 convolution, relative to its largest output."""

    name: str
    cin: int
    cout: int
    kernel: int
    stride: int
    h_out: int
    w_out: int
    density: float
    nnz: int
    dense_ms: float
    sparse_ms: float
    speedup: float
    speedup_q1: float
    speedup_q3: float
    dense_kind: str
    clock: str
    error: float
    dense_error: float

    @property
    def match(self) -> dict[str, Any]:
        """Equal if the error is at most 1e-6, or at most twice that of dense float32."""
        return matched(self.error, max(ERROR_LIMIT, 2 * self.dense_error))

    @property
    def exact(self) -> bool:
        """Whether :attr:`match` is equal."""
        return bool(self.match["equal"])

    @property
    def loses(self) -> bool:
        """True if the sparse kernel is slower than dense on this layer."""
        return self.speedup < 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "loses": self.loses, "exact": self.exact, "match": self.match}


def measure_layers(
    subject: Subject,
    input_size: tuple[int, int],
    *,
    batch: int = 1,
    rounds: int = 7,
    warmup_s: float = 0.05,
    only: Sequence[str] = (),
    on_layer: Callable[[int, int, str], None] | None = None,
) -> list[LayerRow]:
    """Time every masked convolution of the trunk, dense and sparse interleaved.

    Args:
        subject: tower and masks.
        input_size: (height, width) of the image in pixels.
        batch: images per call.
        rounds, warmup_s: see :func:`~opentrans_kernels.bench.timing.interleave`.
        only: names of layers (default: all).
        on_layer: called with (layers done, all layers, name) before each layer.

    Raises:
        OpenTransError: the model or a mask cannot be used, or a layer of ``only`` is not there.
    """
    masks = subject.masks.masks
    shapes = conv_shapes(subject.model, input_size)
    nodes = [
        node
        for node in find_trunk(subject.model).convs()
        if node.name in masks and node.name in shapes and _is_plain(node.conv)
    ]
    unknown = set(only) - {node.name for node in nodes}
    if unknown:
        raise OpenTransError(
            f"no masked convolution of the trunk is called {min(unknown)!r}. There are "
            f"{len(nodes)}, for instance {nodes[0].name!r}."
        )
    rows = []
    for index, node in enumerate(nodes):
        if only and node.name not in only:
            continue
        if on_layer is not None:
            on_layer(index, len(nodes), node.name)
        shape = shapes[node.name]
        generator = torch.Generator().manual_seed(index)
        x = torch.rand(batch, node.conv.in_channels, shape.h_in, shape.w_in, generator=generator)
        rows.append(_measure(node, masks[node.name], x, rounds, warmup_s))
    return rows


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and conv.dilation == (1, 1) and conv.kernel_size in ((1, 1), (3, 3))


def _measure(
    node: ConvNode, mask: torch.Tensor, x: torch.Tensor, rounds: int, warmup_s: float
) -> LayerRow:
    from ..ops import sparse_conv2d
    from ..pack import SparseWeight

    conv = node.conv
    stride, padding = int(conv.stride[0]), int(conv.padding[0])
    weight64, bias64 = fold_bn(node, conv.weight.detach().double() * mask)
    weight, bias = weight64.float(), bias64.float()
    packed = SparseWeight.from_dense(weight, bias, stride=stride, padding=padding)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "sparse": lambda: sparse_conv2d(x, packed, relu=True),
        **dense_calls(x, weight, bias, stride, padding),
    }
    with torch.no_grad():
        reference = functional.conv2d(x.double(), weight64, bias64, stride, padding).relu()
        errors = {name: relative_error(call(), reference) for name, call in calls.items()}
        table = interleave(calls, rounds=rounds, warmup_s=warmup_s, min_sample_ms=2.0)
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    dense = table.fastest([name for name in calls if name != "sparse"], clock)
    pair = table.pair(dense, "sparse", clock)
    return LayerRow(
        name=node.name,
        cin=conv.in_channels,
        cout=conv.out_channels,
        kernel=int(conv.kernel_size[0]),
        stride=stride,
        h_out=reference.shape[-2],
        w_out=reference.shape[-1],
        density=float(mask.double().mean()),
        nnz=int(mask.sum()),
        dense_ms=pair.slow_ms,
        sparse_ms=pair.fast_ms,
        speedup=pair.ratios.median,
        speedup_q1=pair.ratios.q1,
        speedup_q3=pair.ratios.q3,
        dense_kind=dense,
        clock=clock,
        error=errors["sparse"],
        dense_error=errors[dense],
    )


def dense_calls(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, padding: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Dense convolution + bias + ReLU on channels_last, as PyTorch runs it.

    x: [N, Cin, H, W]; weight: [Cout, Cin, k, k]; bias: [Cout]. Conversions happen here, once.
    """
    last = x.contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "conv2d": lambda: functional.conv2d(last, weight_last, bias, stride, padding).relu_()
    }
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    prepack = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
    if fused is not None and prepack is not None and torch.backends.mkldnn.is_available():
        pads, strides, ones = [padding] * 2, [stride] * 2, [1, 1]
        ready = prepack(weight_last, pads, strides, ones, 1, list(last.shape))
        calls["onednn_prepacked"] = lambda: fused(
            last, ready, bias, pads, strides, ones, 1, "relu", [], ""
        )
    return calls
