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
from torch.nn import functional

from ..activations import RELU
from ..compact import fold_conv
from ..compact.layers import masked_weight
from ..engines import DepthwiseEngine, SparseEngine
from ..errors import OpenTransError
from ..plan.subject import unsupported_conv
from ..topology import ConvNode, conv_shapes, find_trunk, fold_bn
from ..topology.blocks import is_depthwise
from .rows import matched
from .subject import Subject
from .timing import interleave
from .variants import relative_error

#: Error of a layer relative to its largest output that is always accepted.
ERROR_LIMIT = 1e-6


@dataclass(frozen=True)
class LayerRow:
    """One convolution; where ``groups`` is ``cin``, every weight is multiplied. Times are
    milliseconds per batch by ``clock``: CPU time with one thread, which does not count
    interruptions, else wall time. ``error`` and ``dense_error`` are largest differences from the
    float64 convolution, relative to its largest output."""

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
    groups: int = 1

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
    """Time every masked convolution that the kernels can run, dense and sparse interleaved.

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
        if node.name in masks and node.name in shapes and unsupported_conv(node.conv) is None
    ]
    unknown = set(only) - {node.name for node in nodes}
    if unknown:
        example = f", for instance {nodes[0].name!r}" if nodes else ""
        raise OpenTransError(
            f"no masked convolution that the kernels can run is called {min(unknown)!r}. There are "
            f"{len(nodes)}{example}."
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


def left_out(subject: Subject, input_size: tuple[int, int]) -> dict[str, str]:
    """Masked convolutions that :func:`measure_layers` has no row for, and why."""
    shapes = conv_shapes(subject.model, input_size)
    found = {}
    for node in find_trunk(subject.model).convs():
        if node.name in subject.masks.masks:
            why = unsupported_conv(node.conv)
            if why is None and node.name not in shapes:
                why = "is not reached by the image"
            if why is not None:
                found[node.name] = why
    return found


def _measure(
    node: ConvNode, mask: torch.Tensor, x: torch.Tensor, rounds: int, warmup_s: float
) -> LayerRow:
    conv = node.conv
    stride, padding, dilation = (int(v[0]) for v in (conv.stride, conv.padding, conv.dilation))  # type: ignore[arg-type]
    weight64, bias64 = fold_bn(node, masked_weight(node, mask))
    weight, bias = weight64.float(), bias64.float()
    engine: SparseEngine | DepthwiseEngine = (
        DepthwiseEngine(weight64, bias64, conv)
        if is_depthwise(conv)
        else SparseEngine.from_folded(fold_conv(node, mask))
    )
    form = stride, padding, dilation, conv.groups
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "sparse": lambda: engine(x, activation=RELU),
        **dense_calls(x, weight, bias, *form),
    }
    with torch.no_grad():
        reference = functional.conv2d(x.double(), weight64, bias64, *form).relu()
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
        groups=conv.groups,
    )


def dense_calls(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: int,
    padding: int,
    dilation: int = 1,
    groups: int = 1,
) -> dict[str, Callable[[], torch.Tensor]]:
    """Dense convolution + bias + ReLU on channels_last, as PyTorch runs it.

    x: [N, Cin, H, W]; weight: [Cout, Cin / groups, k, k]; bias: [Cout]. Conversions happen here,
    once.
    """
    last = x.contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    form = [stride] * 2, [padding] * 2, [dilation] * 2, groups
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "conv2d": lambda: functional.conv2d(last, weight_last, bias, *form).relu_()
    }
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    prepack = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
    if fused is not None and prepack is not None and torch.backends.mkldnn.is_available():
        strides, pads, rates, _ = form
        ready = prepack(weight_last, pads, strides, rates, groups, list(last.shape))
        calls["onednn_prepacked"] = lambda: fused(
            last, ready, bias, pads, strides, rates, groups, "relu", [], ""
        )
    return calls
