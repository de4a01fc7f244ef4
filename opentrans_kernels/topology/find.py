"""Walks a model, finds the ResNet trunk and sorts every convolution into stem, block or loose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from opentrans_kernels.activations import NONE, RELU
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology.blocks import (
    Unrecognised,
    conv_node,
    is_relu,
    plain_conv,
    prove_block,
    read_block,
)
from opentrans_kernels.topology.cover import own_class
from opentrans_kernels.topology.dataflow import dataflow
from opentrans_kernels.topology.naming import (
    TRANSFORMERS,
    Naming,
    child,
    naming_of_root,
)
from opentrans_kernels.topology.nodes import (
    BlockNode,
    ConvNode,
    PoolNode,
    StemNode,
    Trunk,
    original,
)
from opentrans_kernels.topology.tracing import meta_copy, same_expression


def find_trunk(model: nn.Module) -> Trunk:
    """The first ResNet trunk in ``model``; every convolution outside it is in ``Trunk.loose``.

    Recognised at any depth: open_clip and OpenAI CLIP towers (average pools for strides),
    torchvision, timm and transformers ResNets. A model without one gives a trunk of family
    "generic" with loose convolutions only.

    Raises UnsupportedModelError if there is not a single Conv2d.
    """
    trunks = find_trunks(model)
    first = trunks[0]
    if len(trunks) == 1:
        return first
    others = ", ".join(repr(t.prefix.rstrip(".")) for t in trunks[1:])
    note = (
        f"{len(trunks) - 1} more trunk(s) at {others}: their convolutions are listed as loose. "
        "Pass that submodule to find_trunk to have its blocks recognised."
    )
    return replace(first, notes=(*first.notes, note))


def find_trunks(model: nn.Module) -> tuple[Trunk, ...]:
    """All ResNet trunks in ``model`` in registration order; see ``find_trunk``."""
    roots = _roots(model)
    trunks = tuple(_read_trunk(model, prefix, root) for prefix, root in roots)
    if trunks:
        return trunks
    loose, pools, notes = _loose(model, set())
    if not loose:
        linears = sum(isinstance(module, nn.Linear) for _, module in walk_modules(model))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Conv2d that can be accelerated"
            + (f" ({'; '.join(notes)})" if notes else "")
            + (
                f"; its {linears} linear layers can only be, inside of a model that takes images"
                if linears
                else ""
            )
            + ". Pass a convolutional network, for example the visual tower of a CLIP ResNet."
        )
    notes = ["no ResNet trunk (layer1, layer2, ... of residual blocks) found", *notes]
    return (Trunk(model, "", "generic", None, (), tuple(loose), notes=tuple(notes), pools=pools),)


def _roots(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, module in walk_modules(model):
        if any(name.startswith(prefix) for prefix, _ in found):
            continue
        if naming_of_root(module) is not None:
            found.append((f"{name}." if name else "", module))
    return found


def walk_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, original module) for every module, accelerated replacements seen through."""
    for name, module in model.named_modules():
        if "opentrans_original" not in name.split("."):
            yield name, original(module)


def _read_trunk(model: nn.Module, prefix: str, root: nn.Module) -> Trunk:
    naming = naming_of_root(root)
    assert naming is not None  # it is one of _roots
    notes: list[str] = []
    refused: dict[str, list[str]] = {}
    twin = meta_copy(root)
    uses = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False))
    blocks: list[BlockNode] = []
    stages: list[str] = []
    first_block: nn.Module | None = None
    stage = 1
    while (container := child(root, naming.at(naming.stage, stage))) is not None:
        path = f"{prefix}{naming.at(naming.stage, stage)}"
        stages.append(path)
        if type(container) is not nn.Sequential:
            notes.append(
                f"{path} is {type(container).__name__}, not Sequential: order of blocks unknown"
            )
        twins = dict((child(twin, naming.at(naming.stage, stage)) or nn.Module()).named_children())
        for index, (key, module) in enumerate(container.named_children()):
            first_block = twins[key] if first_block is None else first_block
            name = f"{path}.{key}"
            try:
                if type(container) is not nn.Sequential:
                    raise Unrecognised("its stage is not Sequential")
                if uses[id(module)] > 1:
                    raise Unrecognised("the same module is used at several places")
                node = read_block(name, module)
                prove_block(node, twins[key])
                blocks.append(replace(node, stage=stage - 1, index=index))
            except Unrecognised as reason:
                refused.setdefault(str(reason), []).append(name)
        stage += 1
    for reason_text, names in refused.items():
        shown = names[0] if len(names) == 1 else f"{len(names)} blocks ({names[0]} .. {names[-1]})"
        notes.append(
            f"{shown} not taken as a block: {reason_text}. Every convolution there is loose."
        )
    stem: StemNode | None = None
    try:
        stem = _read_stem(naming, prefix, root, twin, first_block)
    except Unrecognised as reason:
        notes.append(f"the stem is not recognised: {reason}. Its convolutions are loose.")
    taken = {id(c.conv) for c in (stem.convs if stem else ())}
    taken |= {id(c.conv) for b in blocks for c in b.all_convs}
    opaque = frozenset(id(block.module) for block in blocks)
    loose, pools, loose_notes = _loose(model, taken, opaque)
    return Trunk(
        model=model,
        prefix=prefix,
        family=_family(root, naming),
        stem=stem,
        blocks=tuple(blocks),
        loose=tuple(loose),
        stages=tuple(stages),
        iterated=naming.iterated,
        notes=(*notes, *loose_notes),
        pools=pools,
    )


def _family(root: nn.Module, naming: Naming) -> str:
    """By the attributes that the families do not share."""
    if naming is TRANSFORMERS:
        return "transformers"
    layer1 = child(root, "layer1")
    block = original(next(layer1.children())) if layer1 is not None else root
    if child(block, "avgpool") is not None:
        return "open_clip" if child(block, "act1") is not None else "openai"
    return "timm" if hasattr(block, "drop_path") or hasattr(block, "aa") else "torchvision"


class _Reached(Exception):
    """Carries the tensor that arrives at the first block."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x


def _read_stem(
    naming: Naming, prefix: str, root: nn.Module, twin: nn.Module, first_block: nn.Module | None
) -> StemNode:
    """The convolutions before the first stage. Raises Unrecognised."""
    nodes: list[ConvNode] = []
    steps: list[str] = []
    several = naming.at(naming.stem_conv, 1) != naming.at(naming.stem_conv, 2)
    count = 3 if several and isinstance(child(root, "conv2"), nn.Conv2d) else 1
    if count == 3 and not isinstance(child(root, "conv3"), nn.Conv2d):
        raise Unrecognised("it has conv2 but no conv3")
    for i in range(1, count + 1):
        conv, bn = naming.at(naming.stem_conv, i), naming.at(naming.stem_bn, i)
        acts = tuple(naming.at(path, i) for path in naming.stem_acts)
        keys = [k for k in acts if child(root, k) is not None]
        if not keys or not is_relu(child(root, keys[0])):
            raise Unrecognised(f"no ReLU module after {conv} ({', '.join(acts)})")
        shared = count > 1 and keys[0] not in acts[: naming.own]
        paths = (f"{prefix}{conv}", f"{prefix}{bn}", None if shared else f"{prefix}{keys[0]}")
        node = conv_node(paths, child(root, conv), child(root, bn), True)
        nodes.append(node if shared else replace(node, act=child(root, keys[0]), activation=RELU))
        steps += [conv, bn, keys[0]]
    pools = [k for k in naming.stem_pools if child(root, k) is not None]
    pool = pools[0] if pools else None
    if pool is not None:
        steps.append(pool)
    if first_block is None:
        raise Unrecognised("the first stage is empty")
    conv1 = child(twin, naming.at(naming.stem_conv, 1))
    if not isinstance(conv1, nn.Conv2d):
        raise Unrecognised("its copy lost its first convolution")

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise _Reached(args[0])

    def run(x: torch.Tensor) -> torch.Tensor:
        try:
            twin(x)
        except _Reached as reached:
            return reached.x
        raise Unrecognised("the model's forward never reaches its first block")

    def claim(x: torch.Tensor) -> torch.Tensor:
        for step in steps:
            module = child(twin, step)
            x = module(x) if module is not None else x
        return x

    x = torch.empty(1, conv1.in_channels, 64, 64, dtype=conv1.weight.dtype, device="meta")
    handle = first_block.register_forward_pre_hook(stop)
    try:
        same = same_expression(run, claim, x)
    except Unrecognised:
        raise
    except Exception as error:  # any failure of foreign code is a reason, kept in the notes
        raise Unrecognised(f"it cannot be traced ({type(error).__name__}: {error})") from error
    finally:
        handle.remove()
    if not same:
        raise Unrecognised("what reaches the first block is not conv, batch norm, ReLU, ..., pool")
    pool_name = f"{prefix}{pool}" if pool is not None else None
    return StemNode(tuple(nodes), tuple(f"{prefix}{s}" for s in steps), pool_name)


def _loose(
    model: nn.Module, taken: set[int], opaque: frozenset[int] = frozenset()
) -> tuple[list[ConvNode], tuple[PoolNode, ...], list[str]]:
    """Every remaining Conv2d, with the batch norm and activation that are certain to follow it.

    opaque: ids of modules that the taken ones are in.
    """
    uses = Counter(id(original(m)) for _, m in model.named_modules(remove_duplicate=False))
    loose: dict[str, ConvNode] = {}
    notes: list[str] = []
    for name, module in walk_modules(model):
        if not isinstance(module, nn.Conv2d) or id(module) in taken:
            continue
        own = own_class(module)
        if own.forward is not nn.Conv2d.forward or (
            own._conv_forward is not nn.Conv2d._conv_forward
        ):
            notes.append(f"{name} {plain_conv(module)}: left alone")
        elif uses[id(module)] > 1:
            notes.append(f"{name} is used at {uses[id(module)]} places: left alone")
        else:
            loose[name] = ConvNode(name, module)
    if not loose or isinstance(model, nn.Conv2d):
        return list(loose.values()), (), notes
    flow = dataflow(model, opaque)
    modules = dict(walk_modules(model))

    def alone(name: str | None) -> nn.Module | None:
        found = modules[name] if name is not None else None
        return found if uses[id(found)] == 1 else None

    for name, chain in flow.chains.items():
        bn, act = alone(chain.bn), alone(chain.act)
        if name not in loose or (chain.bn is not None and bn is None):
            continue
        folds = act is not None or chain.act is None
        loose[name] = replace(
            loose[name],
            bn=bn,
            bn_name=chain.bn,
            relu=chain.activation == RELU,
            act_name=None if act is None else chain.act,
            act=act,
            activation=chain.activation if folds else NONE,
            through=tuple((path, modules[path]) for path in chain.through),
        )
    for name, sources in flow.sources.items():
        if name in loose:
            loose[name] = replace(loose[name], sources=sources)
    return list(loose.values()), tuple(flow.pools), [*notes, *flow.notes()]
