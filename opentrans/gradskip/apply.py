"""``skip_frozen(model, frozen)``: freeze, plan, and swap modules in place; ``restore_skipped``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.nn import watch_together
from opentrans_kernels.topology import ConvNode, Trunk, find_trunk
from opentrans_kernels.topology.behaviour import first_changed, own_behaviour
from opentrans_kernels.topology.nodes import original

from ..freeze.plan import refuse_wrapped
from .graph import ConvStep, Graph, PoolStep, build_graph
from .modules import (
    UNDO,
    PrefixBlock,
    SkipAvgPool2d,
    SkipBlock,
    SkipConv2d,
    SkipPassed,
    Skipping,
    SkipReLU,
)
from .names import freeze_affines, has_running_statistics, named_parameters_of, policy_of
from .planner import POLICIES, Decisions, decide
from .report import GradSkipReport
from .sparse import Sparse, choose_sparse

if TYPE_CHECKING:
    from opentrans_kernels.masks import MaskSet
    from opentrans_kernels.plan import Plan

    from ..freeze import FreezePlan

__all__ = ["is_skipped", "restore_skipped", "skip_frozen"]

_RECORD = "_opentrans_gradskip"
log = logging.getLogger(__name__)


def skip_frozen(
    model: nn.Module,
    frozen: FreezePlan | Iterable[str],
    *,
    bn: str = "frozen",
    outputs: Iterable[str] = (),
    masks: MaskSet | Mapping[str, torch.Tensor] | None = None,
    plan: Plan | None = None,
    accelerate_prefix: bool = True,
) -> GradSkipReport:
    """Freeze parts of ``model`` and let the trunk keep only what backward then needs.

    Gradients are those of plain autograd. Modules keep their names, the ``state_dict`` its keys and
    shapes; other weights may be loaded at any time. Call it before the optimizer is made and before
    the model is wrapped (DistributedDataParallel, torch.compile). Calling it again replaces the
    plan; what is frozen stays frozen.

    Args:
        model: holds a ResNet trunk at any depth; any floating dtype, device and layout.
        frozen: a FreezePlan, or module names; a container stands for everything in it. The batch
            norm behind a frozen convolution is frozen with it.
        bn: "frozen": running statistics, scale and shift fixed everywhere, whatever ``train()``
            says; "affine": running statistics, scale and shift of trainable convolutions train;
            "train": batch norms follow their own mode. Outside a ResNet trunk the first two hold
            for norms behind replaced convolutions; others follow their own mode. Batch
            statistics couple all elements, so each norm then keeps its input.
        outputs: module paths of stages or blocks (such as "layer1", "layer4") whose results
            something outside the trunk stores for its own backward. Naming too few costs one bit
            per element, naming too many the whole activation.
        masks: of pruned weights, which must be zero already. Convolutions that are sparse enough
            then run on the sparse kernels in forward, input and weight gradient (float32 on the
            CPU); gradients are zero outside the mask.
        plan: from ``opentrans_kernels.make_plan`` for this model and these masks: its sparse
            convolutions run sparsely, the others densely. None: decided by density.
        accelerate_prefix: run blocks before which nothing trains, and whose convolutions are all
            sparse, as one fused kernel each, as ``opentrans_kernels.accelerate`` does.

    Raises:
        PlanError: unknown names, or a model that is already wrapped; nothing was changed.
        UnsupportedModelError: no convolution, a norm without running statistics, an accelerated
            model; nothing was changed.
        MaskError: masks that do not fit the model or its zeros; nothing was changed.
    """
    policy = policy_of(bn, POLICIES)
    outputs = tuple(outputs)
    earlier = vars(model).get(_RECORD)
    _swap(earlier, "before")
    try:
        refuse_wrapped(model, sum(1 for _ in model.parameters()))
        trunk = find_trunk(model)
        chosen = named_parameters_of(model, trunk, frozen)
        untouched = _untouched(trunk, policy)
        sparse, notes = choose_sparse(trunk, masks, plan)
        build_graph(trunk, outputs, untouched)  # refuses unknown outputs before anything changes
    except BaseException:
        _swap(earlier, "after")
        raise
    flags = earlier["flags"] if earlier else [(p, p.requires_grad) for p in model.parameters()]
    _freeze(trunk, policy, chosen)
    graph = build_graph(trunk, outputs, untouched)
    decisions = decide(graph, policy)
    swaps = _replacements(model, trunk, graph, decisions, sparse, untouched, accelerate_prefix)
    places = [(*_place(model, path), new) for path, new in swaps.items()]
    record = {"places": places, "flags": flags}
    _swap(record, "after")
    vars(model)[_RECORD] = record
    report = _report(policy, trunk, graph, decisions, swaps, sparse, untouched, notes)
    for note in report.notes:
        log.info("%s", note)
    return report


def is_skipped(model: nn.Module) -> bool:
    """Whether ``skip_frozen`` is in force on this very module."""
    return _RECORD in vars(model)


def restore_skipped(model: nn.Module) -> None:
    """Put the original modules back, and ``requires_grad`` as it was before ``skip_frozen``.

    Raises PlanError if ``skip_frozen`` was not called on ``model``, or if it is wrapped by now.
    """
    record = vars(model).get(_RECORD)
    if record is None:
        raise PlanError(
            f"restore_skipped: skip_frozen was never called on this {type(model).__name__}. Pass "
            "the very module that was given to it."
        )
    _swap(record, "before")
    try:
        refuse_wrapped(model, len(record["flags"]))
    except BaseException:
        _swap(record, "after")
        raise
    for parameter, flag in record["flags"]:
        parameter.requires_grad_(flag)
    del vars(model)[_RECORD]


def _swap(record: Mapping[str, Any] | None, which: str) -> None:
    """Put the modules of ``record`` in place as they were "before" or "after"."""
    for modules, key, old, new in record["places"] if record else ():
        target, other = (old, new) if which == "before" else (new, old)
        target.training = other.training
        modules[key] = target


def _place(model: nn.Module, path: str) -> tuple[dict[str, Any], str, nn.Module]:
    parent, _, key = path.rpartition(".")
    modules = model.get_submodule(parent)._modules
    return modules, key, modules[key]  # type: ignore[return-value]


def _freeze(trunk: Trunk, policy: str, chosen: Iterable[nn.Parameter]) -> None:
    chosen = list(chosen)
    affines = freeze_affines(trunk, policy, {id(p) for p in chosen})
    for parameter in (*chosen, *affines):
        parameter.requires_grad_(False)
        parameter.grad = None


def _untouched(trunk: Trunk, policy: str) -> dict[str, str]:
    """Blocks and stem convolutions to leave alone, with the reason.

    Raises UnsupportedModelError for a norm that has no fixed scale and shift.
    """
    found: dict[str, str] = {}
    stem = trunk.stem.convs if trunk.stem is not None else ()
    for node in stem:
        if why := _why_not(node):
            found[node.name] = why
        elif node.act_name is None:
            found[node.name] = "its ReLU module is shared, and each use decides for itself"
    for block in trunk.blocks:
        whys = [_why_not(node) for node in block.all_convs]
        inside = ((n or "the block", m) for n, m in block.module.named_modules())
        if more := first_changed(inside):
            whys.append(f"{more}, which would not be called")
        if why := next(filter(None, whys), None):
            found[block.name] = why
    if policy == "train":
        return found
    for node in trunk.convs():
        if not has_running_statistics(node.bn):
            raise UnsupportedModelError(
                f"{node.bn_name} has no running statistics (track_running_stats=False), so it "
                "always normalises with those of the batch and is no fixed scale and shift. Use "
                "bn='train'."
            )
    return found


def _why_not(node: ConvNode) -> str | None:
    parts = ((node.name, node.conv), (node.bn_name, node.bn), (node.act_name, node.act))
    if more := first_changed((str(name), part) for name, part in parts if part is not None):
        return f"{more}, which would not be called"
    if "weight" not in node.conv._parameters:
        return f"the weight of {node.name} is computed from others (pruned or parametrized)"
    return None


def _replacements(
    model: nn.Module, trunk: Trunk, graph: Graph, decisions: Decisions,
    sparse: Mapping[str, Sparse], untouched: dict[str, str], fuse_prefix: bool,
) -> dict[str, Skipping]:  # fmt: skip
    """Module path -> replacement. Nothing is swapped yet."""
    swaps: dict[str, Skipping] = {}
    batch = decisions.policy == "train"
    blocks = {block.name: block for block in trunk.blocks}
    for step in graph.steps:
        if isinstance(step, PoolStep) and step.size is not None and step.name in graph.ends:
            pool = original(model.get_submodule(step.name))
            if step.size > 1 and own_behaviour(pool) is None:
                swaps[step.name] = SkipAvgPool2d(pool, step.size)
        elif isinstance(step, ConvStep) and not step.block:
            bits = step.out in decisions.bits
            swaps.update(_stem_conv(model, step, bits, batch, sparse.get(step.out)))
        elif isinstance(step, ConvStep) and step.block not in swaps:
            block = blocks[step.block]
            kept = {node.name: node.name in decisions.bits for node in block.convs}
            prefix = fuse_prefix and not batch and block.convs[-1].name not in decisions.needs_grad
            if prefix and all(node.name in sparse for node in block.all_convs):
                swaps[step.block] = PrefixBlock(block, sparse)
            else:
                swaps[step.block] = SkipBlock(block, kept, batch, sparse)
    for node in trunk.loose:
        if node.name in sparse:
            swaps.update(_loose_sparse(model, node, batch, sparse[node.name], untouched))
        elif not any(p.requires_grad for p in node.conv.parameters()):
            swaps.update(_loose_conv(model, node, batch, untouched))
    return swaps


def _stem_conv(
    model: nn.Module, step: ConvStep, bits: bool, batch: bool, sparse: Sparse | None
) -> dict[str, Skipping]:
    node = step.node
    act = original(model.get_submodule(str(node.act_name)))
    if batch:  # the norm stays where it is and follows its own mode
        return {
            node.name: SkipConv2d(node.conv, None, relu=False, bits=False, sparse=sparse),
            str(node.act_name): SkipReLU(act, bits),
        }
    found: dict[str, Skipping] = {
        node.name: SkipConv2d(node.conv, node.bn, relu=True, bits=bits, sparse=sparse),
        str(node.act_name): SkipPassed(act),
    }
    if node.bn is not None:
        found[str(node.bn_name)] = SkipPassed(node.bn)
    watch_together(model, found, {}, UNDO)
    return found


def _loose_conv(
    model: nn.Module, node: ConvNode, batch: bool, untouched: dict[str, str]
) -> dict[str, Skipping]:
    """A frozen convolution outside the trunk; who reads its ReLU is unknown, so that stays."""
    conv = node.conv
    if type(conv).forward is not nn.Conv2d.forward or isinstance(conv.padding, str):
        untouched[node.name] = f"{type(conv).__name__} with padding {conv.padding!r}"
        return {}
    if conv.padding_mode != "zeros":
        untouched[node.name] = f"its padding is {conv.padding_mode!r}"
        return {}
    if why := _why_not(node):
        untouched[node.name] = why
        return {}
    bn = None if batch else node.plain_bn
    if bn is not None and any(p.requires_grad for p in bn.parameters()):
        bn = None
    swaps: dict[str, Skipping] = {node.name: SkipConv2d(conv, bn, relu=False, bits=False)}
    if bn is not None:
        swaps[str(node.bn_name)] = SkipPassed(bn)
        watch_together(model, swaps, {}, UNDO, node.through)
    return swaps


def _loose_sparse(
    model: nn.Module, node: ConvNode, batch: bool, sparse: Sparse, untouched: dict[str, str]
) -> dict[str, Skipping]:
    """A pruned convolution outside a trunk, with the norm and ReLU that are proved to follow it.

    Who reads the ReLU is unknown. Where the convolution trains, what follows it mostly does too and
    stores that anyway; behind a frozen one a bit is kept.
    """
    if why := _why_not(node):
        untouched[node.name] = why
        return {}
    bn = None if batch else node.plain_bn
    relu = node.relu and node.act is not None and (bn is not None or node.bn is None)
    bits = relu and not any(p.requires_grad for p in node.conv.parameters())
    swaps: dict[str, Skipping] = {
        node.name: SkipConv2d(node.conv, bn, relu=relu, bits=bits, sparse=sparse)
    }
    if bn is not None:
        swaps[str(node.bn_name)] = SkipPassed(bn)
    if relu:
        swaps[str(node.act_name)] = SkipPassed(node.act)
    if len(swaps) > 1:
        watch_together(model, swaps, {}, UNDO, node.through)
    return swaps


def _report(
    policy: str, trunk: Trunk, graph: Graph, decisions: Decisions, swaps: Mapping[str, Skipping],
    sparse: Mapping[str, Sparse], untouched: dict[str, str], said: Iterable[str],
) -> GradSkipReport:  # fmt: skip
    nodes = list(trunk.convs())
    trains = tuple(n.name for n in nodes if n.conv.weight.requires_grad)
    frozen = tuple(n.name for n in nodes if not n.conv.weight.requires_grad)
    prefix = tuple(s.out for s in graph.conv_steps() if s.out not in decisions.needs_grad)
    notes = [*trunk.notes, *said]
    if not decisions.needs_grad:
        notes.append(
            "nothing in the trunk trains: no gradient enters it and nothing is kept, here as in "
            "plain PyTorch. To make it faster use opentrans_kernels.accelerate(model)"
        )
    elif not frozen:
        notes.append(
            "nothing is frozen: no weight gradient is skipped; what remains is batch norm as scale "
            "and shift, ReLUs of one bit and pools without their input"
        )
    if policy == "train":
        notes.append(
            "batch statistics: every norm behind something that trains keeps its input, so frozen "
            "layers save their own input, ReLU bits and the weight gradient only"
        )
    return GradSkipReport(
        policy, frozen, trains, prefix, tuple(swaps), dict(untouched), tuple(notes), graph,
        decisions, trunk, sparse=dict(sparse),
        accelerated=tuple(n for n, new in swaps.items() if isinstance(new, PrefixBlock)),
    )  # fmt: skip
