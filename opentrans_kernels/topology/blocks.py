"""Reads one residual block: structure from attribute names, then proof by tracing its forward."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.activations import NONE
from opentrans_kernels.topology.cover import own_class
from opentrans_kernels.topology.fold import is_plain_bn
from opentrans_kernels.topology.naming import child, naming_of_block
from opentrans_kernels.topology.nodes import BlockNode, ConvNode, original
from opentrans_kernels.topology.tracing import same_expression


class Unrecognised(Exception):
    """Internal: why a module is not taken as a block or stem. Never leaves this package."""


def is_relu(module: nn.Module | None) -> bool:
    return type(module) is nn.ReLU


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether it has one window per channel, of a form that the kernels can express."""
    if conv.groups == 1 or not conv.groups == conv.in_channels == conv.out_channels:
        return False
    return plain_conv(conv, grouped=True) is None


def winograd_window(conv: nn.Conv2d) -> bool:
    """Whether it is a 3x3 of stride 1 that Winograd's F(2x2, 3x3) computes, whatever its class."""
    form = (conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    return form == ((3, 3), (1, 1), (1, 1), 1) and unusual_window(conv) is None


def plain_conv(module: nn.Module | None, grouped: bool = False) -> str | None:
    """None if ``module`` is a convolution the kernels can express; otherwise what is unusual about
    it. ``grouped``: it may be.
    """
    if not isinstance(module, nn.Conv2d):
        return f"is {type(module).__name__}, not Conv2d"
    own = own_class(module)
    if own.forward is not nn.Conv2d.forward or own._conv_forward is not nn.Conv2d._conv_forward:
        return f"is a {own.__name__} with its own forward"
    return unusual_window(module, grouped)


def unusual_window(module: nn.Conv2d, grouped: bool = False) -> str | None:
    """What about a convolution's numbers the kernels cannot express, whatever its class."""
    if module.groups != 1 and not grouped:
        return f"has groups={module.groups}"
    if module.groups != 1 and module.dilation != (1, 1):
        return f"has groups={module.groups} and dilation={module.dilation}"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"has padding={module.padding!r} ({module.padding_mode})"
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    if any(len(set(pair)) != 1 for pair in (kernel, stride, padding, module.dilation)):
        return (
            f"is not square (kernel {kernel}, stride {stride}, padding {padding}, dilation "
            f"{module.dilation})"
        )
    return None


def pool_size(module: nn.Module | None) -> int:
    """Size of a non-overlapping average pool; 1 for none. Raises Unrecognised for anything else."""
    if module is None or type(module) is nn.Identity:
        return 1
    if type(module) is not nn.AvgPool2d:
        raise Unrecognised(f"the pool is {type(module).__name__}, not AvgPool2d")
    size, stride, padding = (
        v if isinstance(v, tuple) else (v, v)
        for v in (module.kernel_size, module.stride, module.padding)
    )
    if size == (1, 1) and stride == (1, 1):
        return 1
    plain = size[0] == size[1] and size == stride and padding == (0, 0)
    if not plain or module.ceil_mode or module.divisor_override is not None:
        raise Unrecognised(
            f"its average pool overlaps, pads or rounds up (kernel {size}, stride {stride}, "
            f"padding {padding}, ceil_mode={module.ceil_mode})"
        )
    return size[0]


def conv_node(
    names: tuple[str, str | None, str | None],
    conv: nn.Module | None,
    bn: nn.Module | None,
    relu: bool,
) -> ConvNode:
    """A checked node from (conv, bn, act) paths. Raises Unrecognised."""
    name, bn_name, act_name = names
    reason = plain_conv(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        raise Unrecognised(f"{name} {reason}")
    if not is_plain_bn(bn) or bn is None:
        raise Unrecognised(f"{bn_name} is {type(bn).__name__}, not a batch norm that can be folded")
    return ConvNode(name, conv, bn, bn_name, relu, act_name)


def _downsample(
    prefix: str, module: nn.Module | None
) -> tuple[ConvNode | None, int, nn.Module | None]:
    if module is None or type(module) is nn.Identity:
        return None, 1, None
    named = [key for key, _ in module.named_children()] == ["convolution", "normalization"]
    if type(module) is not nn.Sequential and not named:
        raise Unrecognised(f"{prefix} is {type(module).__name__}, not Sequential")
    parts = [(f"{prefix}.{key}", original(part)) for key, part in module.named_children()]
    pool: nn.Module | None = None
    if parts and not isinstance(parts[0][1], nn.Conv2d):
        pool = parts.pop(0)[1]
    if len(parts) != 2:
        raise Unrecognised(f"{prefix} is not [pool,] convolution, batch norm")
    (conv_name, conv), (bn_name, bn) = parts
    return conv_node((conv_name, bn_name, None), conv, bn, False), pool_size(pool), pool


def read_block(name: str, module: nn.Module) -> BlockNode:
    """The structure of one block. Raises Unrecognised with the reason."""
    block = original(module)
    naming = naming_of_block(block)
    count = 3 if child(block, naming.at(naming.conv, 3)) is not None else 2
    for extra, what in (("se", "squeeze-and-excitation"), ("attn", "an attention module")):
        if child(block, extra) is not None and type(child(block, extra)) is not nn.Identity:
            raise Unrecognised(f"it has {what} ({extra})")
    for extra in ("aa", "drop_block"):
        if child(block, extra) is not None and type(child(block, extra)) is not nn.Identity:
            raise Unrecognised(f"{extra} is {type(child(block, extra)).__name__}")
    drop = child(block, "drop_path")
    if drop is not None and drop.training and getattr(drop, "drop_prob", 1.0):
        raise Unrecognised(f"drop_path is active (drop_prob {getattr(drop, 'drop_prob', '?')})")

    nodes = []
    for i in range(1, count + 1):
        conv, bn = naming.at(naming.conv, i), naming.at(naming.bn, i)
        acts = naming.acts_of(i, i == count)
        keys = [k for k in acts if child(block, k) is not None]
        if not keys:
            raise Unrecognised(f"no activation module after {conv} ({', '.join(acts)})")
        if not is_relu(child(block, keys[0])):
            raise Unrecognised(f"{keys[0]} is {type(child(block, keys[0])).__name__}, not ReLU")
        own = keys[0] in acts[: naming.own] and i < count
        names = (f"{name}.{conv}", f"{name}.{bn}", f"{name}.{keys[0]}" if own else None)
        nodes.append(conv_node(names, child(block, conv), child(block, bn), True))

    kernels = tuple(node.conv.kernel_size[0] for node in nodes)
    if kernels not in ((1, 3, 1), (3, 3)):
        raise Unrecognised(f"its kernel sizes are {kernels}, not (1, 3, 1) or (3, 3)")
    avgpool = child(block, "avgpool") if count == 3 else None
    shortcut = naming.downsample
    down, down_pool, _ = _downsample(f"{name}.{shortcut}", child(block, shortcut))
    node = BlockNode(
        name=name,
        module=block,
        kind="bottleneck" if count == 3 else "basic",
        convs=tuple(nodes),
        pool=pool_size(avgpool),
        downsample=down,
        down_pool=down_pool,
    )
    _check_widths(node)
    return node


def _check_widths(node: BlockNode) -> None:
    for first, second in zip(node.convs, node.convs[1:], strict=False):
        if first.conv.out_channels != second.conv.in_channels:
            raise Unrecognised(
                f"{first.name} gives {first.conv.out_channels} channels, {second.name} takes "
                f"{second.conv.in_channels}"
            )
    for conv in node.all_convs:
        bn = conv.bn
        mean = getattr(bn, "running_mean", None)
        features = getattr(bn, "num_features", None) if mean is None else mean.numel()
        if features != conv.conv.out_channels:
            raise Unrecognised(
                f"{conv.bn_name} has {features} channels, {conv.name} gives "
                f"{conv.conv.out_channels}"
            )


def prove_block(node: BlockNode, twin: nn.Module) -> None:
    """Trace the block's own forward against the structure. ``twin``: its copy on the meta device.

    Raises Unrecognised when the two differ or the forward cannot be traced.
    """
    naming = naming_of_block(twin)
    conv1 = child(twin, naming.at(naming.conv, 1))
    if not isinstance(conv1, nn.Conv2d):
        raise Unrecognised("its copy lost its first convolution")
    down = child(twin, naming.downsample) if node.downsample is not None else None
    count = len(node.convs)

    def claim(x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, count + 1):
            y = _call(twin, naming.at(naming.conv, i), y)
            y = _call(twin, naming.at(naming.bn, i), y)
            if i < count:
                y = F.relu(y)
            if i == 2 and node.pool > 1:
                y = _call(twin, "avgpool", y)
        shortcut = x
        for part in down.children() if down is not None else ():
            shortcut = part(shortcut)
        return F.relu(y + shortcut)

    x = torch.empty(1, conv1.in_channels, 16, 16, dtype=conv1.weight.dtype, device="meta")
    prove(f"{type(node.module).__name__}.forward", twin, claim, x)


def prove(what: str, run: nn.Module, claim: object, x: torch.Tensor) -> None:
    try:
        same = same_expression(run, claim, x)  # type: ignore[arg-type]
    except Exception as error:  # any failure of foreign code is a reason, kept in the notes
        raise Unrecognised(f"{what} cannot be traced ({type(error).__name__}: {error})") from error
    if not same:
        raise Unrecognised(f"{what} computes something else than its layer names suggest")


def _call(module: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    found = child(module, name)
    if found is None:
        raise Unrecognised(f"no {name}")
    result: torch.Tensor = found(x)
    return result


def alone(node: ConvNode) -> ConvNode:
    """The same convolution with nothing claimed about what follows it."""
    return replace(
        node, bn=None, bn_name=None, relu=False, act_name=None, act=None, activation=NONE,
        through=(),
    )  # fmt: skip
