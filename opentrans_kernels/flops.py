"""The three work counts of a convolution, and their registration with FLOP counters.

* nominal: the dense convolution, zeros included.
* effective: nonzero weights only. This is what the network needs.
* executed: what a kernel really computes, with vector padding. Always at least effective.

All functions return MACs (multiply-accumulates) as integers. ``torch.utils.flop_counter`` counts
2 FLOPs per MAC, fvcore counts 1; the registrations below follow each of them.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from typing import Any

import torch

from opentrans_kernels.errors import OpenTransError

Formula = Callable[[Mapping[str, Any], tuple[int, ...]], int]


def nominal_macs(
    weight_shape: tuple[int, ...], h_out: int, w_out: int, batch: int = 1, groups: int = 1
) -> int:
    """MACs of the dense convolution. weight_shape: [Cout, Cin/groups, kh, kw]; output in pixels.

    ``groups`` is already contained in the weight's shape and only checked against Cout.
    """
    if weight_shape[0] % groups:
        raise OpenTransError(
            f"{weight_shape[0]} output channels cannot be split into {groups} groups; pass the "
            "shape and groups of the same convolution."
        )
    count = batch * h_out * w_out
    for size in weight_shape:
        count *= size
    return count


def effective_macs(nnz: int, h_out: int, w_out: int, batch: int = 1) -> int:
    """MACs on nonzero weights: each one is used once per output pixel."""
    return nnz * batch * h_out * w_out


def executed_macs(
    nnz: int, h_out: int, w_out: int, batch: int = 1, kernel: int = 1, lanes: int = 8
) -> int:
    """MACs a planar vector kernel computes for ``nnz`` nonzeros.

    A 1x1 runs over the flat plane of H*W pixels. A larger kernel runs on a grid whose rows carry
    the padding between them, H*(W + kernel - 2) for a 3x3 with one shared pad column. Either is
    rounded up to whole vectors of ``lanes`` pixels (8 floats on AVX2, 16 on AVX-512, 4 on NEON).
    """
    row = w_out + max(0, kernel - 2)
    pixels = -(-(h_out * row) // lanes) * lanes
    return nnz * batch * pixels


def conv_macs(arguments: Mapping[str, Any], out_shape: tuple[int, ...]) -> int:
    """Effective MACs of one sparse convolution call.

    arguments: the operator's arguments by name, tensors as shapes; ``values`` holds the nonzeros.
    out_shape: [N, Cout, H, W].
    """
    return effective_macs(arguments["values"][0], out_shape[2], out_shape[3], out_shape[0])


def dgrad_macs(arguments: Mapping[str, Any], out_shape: tuple[int, ...]) -> int:
    """Effective MACs of the input gradient: every nonzero meets every pixel of ``grad`` once."""
    batch, _, height, width = arguments["grad"]
    return effective_macs(arguments["values"][0], height, width, batch)


def wgrad_macs(arguments: Mapping[str, Any], out_shape: tuple[int, ...]) -> int:
    """Effective MACs of the gradient of the nonzeros."""
    batch, _, height, width = arguments["grad_out"]
    return effective_macs(arguments["values"][0], height, width, batch)


def bottleneck_macs(arguments: Mapping[str, Any], out_shape: tuple[int, ...]) -> int:
    """Effective MACs of one fused bottleneck call; ``v1``, ``v2``, ``v3``, ``vd`` hold nonzeros."""
    roles = (("conv1", "v1"), ("conv2", "v2"), ("conv3", "v3"), ("downsample", "vd"))
    nnz = {role: arguments[key][0] for role, key in roles if arguments.get(key) is not None}
    batch, _, height, width = arguments["x"]
    pool, stride = arguments["pool"], arguments["stride"]
    return block_macs(nnz, (height, width), pool=pool, stride=stride, batch=batch)


def stage_macs(arguments: Mapping[str, Any], out_shape: tuple[int, ...]) -> int:
    """Effective MACs of the blocks of one ``sparse_stage`` call."""
    batch, _, height, width = arguments["x"]
    sizes = iter(shape[0] for shape in arguments["weights"][1::3])  # structure, values, bias
    total = 0
    pools = arguments["pool"]
    strides = arguments["stride"] or [1] * len(pools)
    for pool, down, stride in zip(pools, arguments["down"], strides, strict=True):
        roles = ("conv1", "conv2", "conv3", *(["downsample"] if down else []))
        nnz = {role: next(sizes) for role in roles}
        total += block_macs(nnz, (height, width), pool=pool, stride=stride, batch=batch)
        height, width = -(-(height // pool) // stride), -(-(width // pool) // stride)
    return total


def folded_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of a dense convolution with its norm folded in; out_shape: of (output, bits)."""
    batch, _, height, width = out_shape[0]
    return nominal_macs(arguments["weight"], height, width, batch)


def folded_backward_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of its backward: input gradient and weight gradient, each if it is needed."""
    batch, _, height, width = arguments["grad"]
    needs = arguments["needs"]
    count = int(needs[0]) + int(needs[1] or needs[3])  # gamma's gradient comes from the weight's
    return count * nominal_macs(arguments["weight"], height, width, batch)


def sparse_folded_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """Effective MACs of a sparse convolution with its norm folded in."""
    batch, _, height, width = out_shape[0]
    return effective_macs(arguments["nnz"], height, width, batch)


def sparse_folded_backward_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """Effective MACs of its backward; a weight gradient that is computed densely counts in full."""
    batch, _, height, width = arguments["grad"]
    needs = arguments["needs"]
    count = effective_macs(arguments["nnz"], height, width, batch)
    dense = nominal_macs(arguments["weight"], height, width, batch)
    wgrad = count if arguments["sparse_wgrad"] else dense
    return int(needs[0]) * count + int(needs[1] or needs[3]) * wgrad


def implicit_gemm_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of a dense convolution with both K segments, pixels that a pool drops left out; of the
    first segment only slices that are given."""
    batch, cout, height, width = out_shape
    taps, cin, _ = arguments["weight"]
    count = taps * cin * cout
    if arguments.get("steps") is not None:
        count = (arguments["steps"][0] - 1) * arguments["config"][1] * arguments["config"][2]
    count *= arguments["pool"] ** 2
    if arguments.get("weight2") is not None:
        count += arguments["weight2"][1] * cout
    return count * batch * height * width


def chain_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of the three dense convolutions of a chain; out_shape: of (output, next conv1)."""
    batch, _, height, width = arguments["x"]
    count = sum(
        taps * cin * cout for taps, cin, cout in (arguments[f"weight{i}"] for i in (2, 3, 1))
    )
    return count * batch * height * width


def sparse_nhwc_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """Effective MACs of a sparse convolution with packed (key, value) pairs, one of them spare."""
    return effective_macs(arguments["entries"][0] - 1, out_shape[2], out_shape[3], out_shape[0])


def stem_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of two dense convolutions, each counted once though a kernel may repeat the first."""
    batch, _, height, width = out_shape
    count = sum(
        taps * cin * cout for taps, cin, cout in (arguments["weight1"], arguments["weight2"])
    )
    return count * batch * height * width


def deform_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of sampling: four corners of D channels for every point of every head."""
    n, q, m, levels, points, _ = arguments["locations"]
    return 4 * n * q * m * levels * points * arguments["value"][3]


def deform_backward_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of its backward: every corner is read for a dot product and added to."""
    return 2 * deform_macs(arguments, out_shape)


def mask_scores_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of the product of classes and masks, which is what is counted of the dense network."""
    batch, classes, height, width = out_shape
    return batch * classes * arguments["masks"][1] * height * width


def depthwise_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of one window per channel."""
    batch, channels, height, width = out_shape
    return batch * channels * height * width * arguments["weight"][2] ** 2


def winograd_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """MACs of the convolution, nine per window; the kernel multiplies four ninths as often."""
    return int(9 * arguments["x"][1] * math.prod(out_shape))


def linear_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """Effective MACs of a linear layer: its nonzeros once per token."""
    return int(arguments["values"][0] * math.prod(out_shape[:-1]))


def mlp_macs(arguments: Mapping[str, Any], out_shape: tuple[Any, ...]) -> int:
    """Effective MACs of two of them."""
    nonzeros = arguments["values1"][0] + arguments["values2"][0]
    return int(nonzeros * math.prod(out_shape[:-1]))


# Operator name without its namespace -> formula.
FORMULAS: dict[str, Formula] = {
    "sparse_conv2d": conv_macs,
    "sparse_conv2d_dgrad": dgrad_macs,
    "sparse_conv2d_wgrad": wgrad_macs,
    "depthwise_conv2d": depthwise_macs,
    "winograd_conv2d": winograd_macs,
    "sparse_linear": linear_macs,
    "sparse_mlp": mlp_macs,
    "sparse_bottleneck": bottleneck_macs,
    "sparse_stage": stage_macs,
    "folded_conv2d": folded_macs,
    "folded_conv2d_backward": folded_backward_macs,
    "sparse_folded_conv2d": sparse_folded_macs,
    "implicit_gemm_conv2d": implicit_gemm_macs,
    "bottleneck_chain": chain_macs,
    "fused_stem": stem_macs,
    "mask_scores": mask_scores_macs,
    "ms_deform_attn": deform_macs,
    "ms_deform_attn_backward": deform_backward_macs,
    "sparse_conv2d_nhwc": sparse_nhwc_macs,
    "sparse_folded_conv2d_backward": sparse_folded_backward_macs,
}


def block_macs(
    nnz: Mapping[str, int],
    in_size: tuple[int, int],
    *,
    pool: int = 1,
    stride: int = 1,
    basic: bool = False,
    batch: int = 1,
) -> int:
    """Effective MACs of a fused residual block.

    nnz: nonzeros of "conv1", "conv2", ("conv3"), ("downsample").
    in_size: height and width of the block's input.
    pool: average pool after conv2 (and before the shortcut convolution); stride: of conv2 in a
        bottleneck, of conv1 in a basic block, of the shortcut convolution in both.
    """
    height, width = in_size
    full = height * width
    strided = (-(-height // stride)) * (-(-width // stride))
    out = (height // pool) * (width // pool) if pool > 1 else strided
    first = strided if basic else full
    pixels = {"conv1": first, "conv2": strided, "conv3": out, "downsample": out}
    unknown = sorted(set(nnz) - set(pixels))
    if unknown:
        raise OpenTransError(
            f"block_macs does not know {', '.join(unknown)}; name the convolutions "
            f"{', '.join(pixels)}."
        )
    return batch * sum(count * pixels[name] for name, count in nnz.items())


def _overload(op: Any) -> Any:
    return op.default if isinstance(op, torch._ops.OpOverloadPacket) else op


def _formula(op: Any, macs: Formula | None) -> Formula:
    if macs is not None:
        return macs
    name = _overload(op)._schema.name.rpartition("::")[2]
    if name not in FORMULAS:
        raise OpenTransError(
            f"no formula for the operator {name}; formulas exist for {', '.join(FORMULAS)}. Pass "
            "one as macs=(arguments, out_shape) -> MACs."
        )
    return FORMULAS[name]


def _by_name(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in; tensors arrive as shapes."""
    arguments = _overload(op)._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}


def register(op: Any, macs: Formula | None = None) -> None:
    """Make ``torch.utils.flop_counter.FlopCounterMode`` count calls of ``op``.

    op: an operator such as ``torch.ops.opentrans_kernels.sparse_conv2d`` (or its ``.default``).
    macs: (arguments by schema name with tensors as shapes, output shape) -> MACs; by default the
        entry of ``FORMULAS``. A call counts 2 * MACs FLOPs.

    Registering an operator again is allowed and changes nothing. Raises OpenTransError if there is
    no formula.
    """
    from torch.utils import flop_counter

    packet = op.overloadpacket if isinstance(op, torch._ops.OpOverload) else op
    formula = _formula(op, macs)
    if packet in flop_counter.flop_registry:
        return

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * formula(_by_name(op, args, kwargs), tuple(out_shape))

    flop_counter.register_flop_formula(packet)(flops)


def register_when_counting(op: Any) -> None:
    """:func:`register` ``op``, as soon as ``torch.utils.flop_counter`` is imported.

    Not at once, because that module imports triton, which a program that counts nothing should not
    have to load.
    """
    if _COUNTER in sys.modules:
        register(op)
        return
    _waiting.append(op)
    if _AFTER_IMPORT not in sys.meta_path:
        sys.meta_path.insert(0, _AFTER_IMPORT)


_COUNTER = "torch.utils.flop_counter"
_waiting: list[Any] = []


class _AfterImport(MetaPathFinder):
    """Steps aside for the import of the counter, and registers the waiting operators after it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            while _waiting:
                register(_waiting.pop())

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_AFTER_IMPORT = _AfterImport()


def fvcore_handle(op: Any, macs: Formula | None = None) -> dict[str, Callable[..., int]]:
    """{operator name: handle} for fvcore, which counts one FLOP per MAC.

    ``FlopCountAnalysis(model, x).set_op_handle(**fvcore_handle(op))``. fvcore itself is not needed
    here; tensors arrive as values of a traced graph with complete shapes.
    """
    formula = _formula(op, macs)

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        arguments = _by_name(op, tuple(_shape(value) for value in inputs), {})
        return formula(arguments, _shape(outputs[0]))

    return {_overload(op)._schema.name: handle}


def _shape(value: Any) -> Any:
    """Shape of a tensor value of a traced graph; the constant itself for anything else."""
    kind = value.type()
    if isinstance(kind, torch._C.TensorType):
        sizes = kind.sizes()
        return None if sizes is None else tuple(sizes)
    if value.node().kind() == "prim::ListConstruct":
        return [_shape(element) for element in value.node().inputs()]
    return value.toIValue()
