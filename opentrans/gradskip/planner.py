"""What every activation of the trunk is kept as, and by whom: the decisions, without a model run.

An activation is stored whole if an operation with parameters that train reads it, or something
outside does. Then its ReLU needs nothing of its own. Otherwise the ReLU keeps one bit per element,
and only if a gradient comes by at all, that is if something trains before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .graph import IMAGE, ConvStep, Graph, OpaqueStep, PoolStep, Step

POLICIES = ("frozen", "affine", "train")


def requires_grad(*modules: nn.Module | None) -> bool:
    return any(p.requires_grad for m in modules if m is not None for p in m.parameters())


def reads_input(step: ConvStep) -> bool:
    """Whether the convolution's backward needs its input: the weight or gamma trains."""
    gamma = getattr(step.node.bn, "weight", None)
    return step.node.conv.weight.requires_grad or bool(getattr(gamma, "requires_grad", False))


@dataclass(frozen=True)
class Decisions:
    """Per tensor of the graph.

    needs_grad: tensors whose gradient backward computes.
    stored_by: tensor -> readers that store it whole, in words; empty: nobody.
    bits: outputs of convolutions whose ReLU is to keep bits if gradients come by.
    """

    policy: str
    needs_grad: frozenset[str]
    stored_by: Mapping[str, tuple[str, ...]]
    bits: frozenset[str]

    def first_trainable(self, graph: Graph) -> str | None:
        """The first step in execution order whose output needs a gradient."""
        return next((step.out for step in graph.steps if step.out in self.needs_grad), None)


def decide(graph: Graph, policy: str) -> Decisions:
    """Decisions for the ``requires_grad`` flags as they stand now."""
    needs: set[str] = set()
    for step in graph.steps:
        sources = [step.source, getattr(step, "residual", None)]
        if any(source in needs for source in sources) or _trains(step):
            needs.add(step.out)
    tensors = [IMAGE, *(step.out for step in graph.steps)]
    stored = {tensor: _storing_readers(graph, tensor, needs) for tensor in tensors}
    bits = {s.out for s in graph.conv_steps() if s.relu and not stored[s.out]}
    return Decisions(policy, frozenset(needs), stored, frozenset(bits))


def _trains(step: Step) -> bool:
    if isinstance(step, ConvStep):
        return requires_grad(step.node.conv, step.node.bn)
    return isinstance(step, OpaqueStep) and requires_grad(*step.modules)


def _storing_readers(graph: Graph, tensor: str, needs: set[str]) -> tuple[str, ...]:
    found = []
    for step in graph.readers(tensor):
        if isinstance(step, ConvStep) and reads_input(step):
            found.append(f"{step.node.name} trains and reads it")
        elif isinstance(step, PoolStep) and step.size is None and tensor in needs:
            found.append(f"{step.name} stores its input")
        elif isinstance(step, OpaqueStep) and step.out in needs:
            found.append(f"{step.name} may store it ({step.reason})")
    if tensor in graph.outside:
        found.append(f"read outside ({graph.outside[tensor]})")
    return tuple(found)
