"""PyTorch's operators as ONNX operations of opset 11, the newest that every peer reads.

What opset 11 lacks (layer norm, GELU, attention) is written in the terms that PyTorch's exporters
use, which engines recognise and run as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ...errors import OpenTransError

__all__ = ["OPERATIONS", "Writer"]


class Writer:
    """Operations and tensors while they grow.

    values: of each node: the name of a value that depends on the input, a tensor that does not, or
        a list of either where an operator returns several.
    """

    def __init__(self) -> None:
        self.operations: list[dict[str, Any]] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.values: dict[fx.Node, Any] = {}

    def emit(self, op: str, inputs: Sequence[Any], output: str = "", **attributes: Any) -> str:
        """Add one operation on nodes, names, tensors or numbers; returns the name of its output."""
        output = output or f"v{len(self.operations)}"
        names = [self.name(one) for one in inputs]
        entry = {"op": op, "inputs": names, "output": output, "attributes": attributes}
        self.operations.append(entry)
        return output

    def name(self, value: Any) -> str:
        """The name under which operations read a value."""
        if isinstance(value, fx.Node):
            value = self.values[value]
        if isinstance(value, str):
            return value
        if isinstance(value, torch.Tensor):
            array = value.contiguous().numpy()
        else:
            array = np.asarray(value, np.int64 if _whole(value) else np.float32)
        name = f"c{len(self.tensors)}"
        self.tensors[name] = array
        return name


def _whole(value: Any) -> bool:
    """Whether these are positions or sizes; a number that is added or multiplied is a float."""
    return isinstance(value, list | np.integer)


def _shape(node: fx.Node) -> list[int]:
    return [int(side) for side in node.meta["val"].shape]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults included."""
    given = node.target._schema.arguments
    found = {one.name: one.default_value for one in given if one.has_default_value()}
    found |= {one.name: value for one, value in zip(given, node.args, strict=False)}
    return found | node.kwargs


def _refuse(node: fx.Node, what: str) -> OpenTransError:
    return OpenTransError(
        f"the network calls {node.target} {what}, which the graph for other engines cannot say. "
        "Leave them out of --peers."
    )


def _pair(value: Sequence[int]) -> list[int]:
    return list(value) * (2 // len(value))


def _axis(axis: int, node: fx.Node) -> int:
    return axis % len(_shape(node))


def _same(writer: Writer, node: fx.Node) -> Any:
    return writer.values[node.args[0]]


def _unary(op: str) -> Callable[[Writer, fx.Node], str]:
    return lambda writer, node: writer.emit(op, [node.args[0]])


def _binary(op: str) -> Callable[[Writer, fx.Node], str]:
    def write(writer: Writer, node: fx.Node) -> str:
        if node.kwargs.get("alpha", 1) != 1:
            raise _refuse(node, f"with alpha = {node.kwargs['alpha']}")
        return writer.emit(op, [_operand(one) for one in node.args[:2]])

    return write


def _operand(value: Any) -> Any:
    return value if isinstance(value, fx.Node) else float(value)


def _conv(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    if not isinstance(a["padding"], list | tuple):
        raise _refuse(node, f"with padding {a['padding']!r}")
    return writer.emit(
        "Conv",
        [one for one in (a["input"], a["weight"], a["bias"]) if one is not None],
        kernel_shape=_shape(a["weight"])[2:],
        strides=_pair(a["stride"]),
        pads=_pair(a["padding"]) * 2,
        dilations=_pair(a["dilation"]),
        group=a["groups"],
    )


def _pool(op: str) -> Callable[[Writer, fx.Node], str]:
    def write(writer: Writer, node: fx.Node) -> Any:
        a = _arguments(node)
        kernel = _pair(a["kernel_size"])
        strides, pads = _pair(a["stride"] or kernel), _pair(a["padding"])
        more: dict[str, Any] = {}
        if op == "AveragePool":
            if a["divisor_override"] is not None:
                raise _refuse(node, f"with divisor_override = {a['divisor_override']}")
            more["count_include_pad"] = int(a["count_include_pad"])
        elif _pair(a["dilation"]) != [1, 1]:
            raise _refuse(node, f"with dilation {a['dilation']}")
        if a["ceil_mode"]:
            raise _refuse(node, "with ceil_mode")
        if kernel == strides == [1, 1] and not any(pads):
            return _same(writer, node)
        return writer.emit(
            op, [node.args[0]], kernel_shape=kernel, strides=strides, pads=pads * 2, **more
        )

    return write


def _global_pool(writer: Writer, node: fx.Node) -> str:
    if list(node.args[1]) != [1, 1]:
        raise _refuse(node, f"to {list(node.args[1])}")
    return writer.emit("GlobalAveragePool", [node.args[0]])


def _batch_norm(writer: Writer, node: fx.Node) -> list[str]:
    """One that was not folded, as what eval mode makes of it: a factor and a term per channel."""
    a = _arguments(node)
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (None if a[n] is None else writer.values[a[n]] for n in names)
    factor = (var.double() + a["eps"]).rsqrt() * (1 if weight is None else weight)
    term = (0 if bias is None else bias) - mean * factor
    sides = [-1] + [1] * (len(_shape(a["input"])) - 2)
    y = writer.emit("Mul", [a["input"], factor.view(sides).float()])
    return [writer.emit("Add", [y, term.view(sides).float()])]


def _layer_norm(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    axes = list(range(-len(a["normalized_shape"]), 0))
    mean = writer.emit("ReduceMean", [a["input"]], axes=axes, keepdims=1)
    centred = writer.emit("Sub", [a["input"], mean])
    squares = writer.emit("Pow", [centred, 2.0])
    variance = writer.emit("ReduceMean", [squares], axes=axes, keepdims=1)
    deviation = writer.emit("Sqrt", [writer.emit("Add", [variance, a["eps"]])])
    y = writer.emit("Div", [centred, deviation])
    y = y if a["weight"] is None else writer.emit("Mul", [y, a["weight"]])
    return y if a["bias"] is None else writer.emit("Add", [y, a["bias"]])


def _gelu(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    if a["approximate"] != "none":
        raise _refuse(node, f"with approximate = {a['approximate']!r}")
    erf = writer.emit("Erf", [writer.emit("Div", [a["self"], math.sqrt(2)])])
    y = writer.emit("Mul", [a["self"], writer.emit("Add", [erf, 1.0])])
    return writer.emit("Mul", [y, 0.5])


def _silu(writer: Writer, node: fx.Node) -> str:
    return writer.emit("Mul", [node.args[0], writer.emit("Sigmoid", [node.args[0]])])


def _clip(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    return writer.emit("Clip", [a["self"], float(a["min_val"]), float(a["max_val"])])


def _linear(writer: Writer, node: fx.Node) -> str:
    """As a product with the weight's transpose, which engines that use zeros expect."""
    a = _arguments(node)
    weight = writer.values[a["weight"]]
    if isinstance(weight, str):
        raise _refuse(node, "with a weight that depends on the input")
    y = writer.emit("MatMul", [a["input"], weight.t()])
    return y if a["bias"] is None else writer.emit("Add", [y, a["bias"]])


def _attention(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    for name in ("attn_mask", "is_causal", "enable_gqa", "dropout_p"):
        if a[name]:
            raise _refuse(node, f"with {name}")
    head = _shape(a["query"])[-1]
    order = list(range(len(_shape(a["key"]))))
    order[-2:] = order[:-3:-1]
    keys = writer.emit("Transpose", [a["key"]], perm=order)
    scores = writer.emit("MatMul", [a["query"], keys])
    scores = writer.emit("Mul", [scores, a["scale"] or 1 / math.sqrt(head)])
    # Opset 11 flattens behind the axis, which means the last one if there is nothing behind it.
    weights = writer.emit("Softmax", [scores], axis=len(order) - 1)
    return writer.emit("MatMul", [weights, a["value"]])


def _softmax(writer: Writer, node: fx.Node) -> str:
    axis = _axis(_arguments(node)["dim"], node)
    if axis + 1 != len(_shape(node)):
        raise _refuse(node, f"along dimension {axis} of {len(_shape(node))}")
    return writer.emit("Softmax", [node.args[0]], axis=axis)


def _mean(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    axes = sorted(_axis(one, a["self"]) for one in a["dim"])
    return writer.emit("ReduceMean", [a["self"]], axes=axes, keepdims=int(a["keepdim"]))


def _reshape(writer: Writer, node: fx.Node) -> str:
    """All that changes the shape and not the order of the values."""
    return writer.emit("Reshape", [node.args[0], _shape(node)])


def _transpose(writer: Writer, node: fx.Node) -> str:
    order = list(range(len(_shape(node))))
    one, other = (_axis(dim, node) for dim in node.args[1:3])
    order[one], order[other] = order[other], order[one]
    return writer.emit("Transpose", [node.args[0]], perm=order)


def _permute(writer: Writer, node: fx.Node) -> str:
    order = [_axis(dim, node) for dim in node.args[1]]
    return writer.emit("Transpose", [node.args[0]], perm=order)


def _expand(writer: Writer, node: fx.Node) -> str:
    return writer.emit("Expand", [node.args[0], _shape(node)])


def _concat(writer: Writer, node: fx.Node) -> str:
    return writer.emit("Concat", node.args[0], axis=_axis(_arguments(node)["dim"], node))


def _select(writer: Writer, node: fx.Node) -> str:
    a = _arguments(node)
    return _gather(writer, a["self"], _axis(a["dim"], a["self"]), a["index"])


def _gather(writer: Writer, source: fx.Node, axis: int, index: int) -> str:
    return writer.emit("Gather", [source, np.int64(index % _shape(source)[axis])], axis=axis)


def _unbind(writer: Writer, node: fx.Node) -> list[str]:
    source = node.args[0]
    axis = _axis(_arguments(node)["dim"], source)
    return [_gather(writer, source, axis, index) for index in range(_shape(source)[axis])]


def _slice(writer: Writer, node: fx.Node) -> Any:
    a = _arguments(node)
    axis = _axis(a["dim"], node)
    size = _shape(a["self"])[axis]
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(size)
    if (start, stop, step) == (0, size, 1):
        return _same(writer, node)
    return writer.emit("Slice", [a["self"], [start], [stop], [axis], [step]])


def _item(writer: Writer, node: fx.Node) -> Any:
    source, index = node.args
    found = writer.values[source]
    if index >= len(found):
        raise _refuse(source, f"and reads its output {index}")
    return found[index]


_RESHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze.dim", "squeeze.dims")
_SAME = ("clone", "alias", "contiguous", "detach")
OPERATIONS: dict[str, Callable[[Writer, fx.Node], Any]] = {
    **{f"aten.{name}{'' if '.' in name else '.default'}": _reshape for name in _RESHAPES},
    **{f"aten.{name}.default": _same for name in _SAME},
    "aten.flatten.using_ints": _reshape,
    "aten.unflatten.int": _reshape,
    "aten.transpose.int": _transpose,
    "aten.permute.default": _permute,
    "aten.expand.default": _expand,
    "aten.cat.default": _concat,
    "aten.select.int": _select,
    "aten.unbind.int": _unbind,
    "aten.slice.Tensor": _slice,
    "<built-in function getitem>": _item,
    "aten.conv2d.default": _conv,
    "aten.linear.default": _linear,
    "aten.matmul.default": _binary("MatMul"),
    "aten.add.Tensor": _binary("Add"),
    "aten.sub.Tensor": _binary("Sub"),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.div.Tensor": _binary("Div"),
    "aten.relu.default": _unary("Relu"),
    "aten.sigmoid.default": _unary("Sigmoid"),
    "aten.tanh.default": _unary("Tanh"),
    "aten.hardtanh.default": _clip,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.softmax.int": _softmax,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.layer_norm.default": _layer_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.avg_pool2d.default": _pool("AveragePool"),
    "aten.max_pool2d.default": _pool("MaxPool"),
    "aten.adaptive_avg_pool2d.default": _global_pool,
    "aten.mean.dim": _mean,
}
