"""The trunk as a list of steps over named tensors: who makes an activation and who reads it.

A tensor is named after the module that makes it ("layer1.0.conv2" is what stands behind that
convolution's norm, residual and ReLU); the network's input is "image". Layers that are not
recognised are opaque steps: they count as readers that store their input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from opentrans_kernels.errors import PlanError
from opentrans_kernels.topology import BlockNode, ConvNode, Trunk
from opentrans_kernels.topology.blocks import Unrecognised, pool_size
from opentrans_kernels.topology.nodes import original

IMAGE = "image"


@dataclass(frozen=True)
class ConvStep:
    """``out = act(norm(conv(source)) + residual)``; ``block`` is "" in the stem."""

    node: ConvNode
    source: str
    residual: str | None
    relu: bool
    block: str

    @property
    def out(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class PoolStep:
    """A pool; ``size`` is that of a non-overlapping average, None for any other pool."""

    name: str
    source: str
    size: int | None

    @property
    def out(self) -> str:
        return self.name


@dataclass(frozen=True)
class OpaqueStep:
    """Something not recognised: it is left as it is and may store whatever it reads."""

    name: str
    source: str
    modules: tuple[nn.Module, ...]
    reason: str

    @property
    def out(self) -> str:
        return self.name


Step = ConvStep | PoolStep | OpaqueStep


@dataclass(frozen=True)
class Graph:
    """Steps in execution order, and the tensors that something outside the trunk stores.

    outside: tensor -> what was named for it in ``outputs``.
    ends: module path of a stage or block -> the tensor it returns.
    """

    steps: tuple[Step, ...]
    outside: dict[str, str]
    ends: dict[str, str]

    def conv_steps(self) -> Iterator[ConvStep]:
        return (step for step in self.steps if isinstance(step, ConvStep))

    def readers(self, tensor: str) -> list[Step]:
        """Steps that take ``tensor`` as the input of their computation (the addition is none)."""
        return [step for step in self.steps if step.source == tensor]


def build_graph(trunk: Trunk, outputs: Iterable[str], untouched: dict[str, str]) -> Graph:
    """The steps of ``trunk``.

    Args:
        outputs: module paths (stages, blocks, the stem's pool) whose results are stored outside.
        untouched: module path -> reason, for blocks and stem convolutions to leave alone.

    Raises:
        PlanError: an output that is not a stage, block or stem module.
    """
    steps: list[Step] = []
    ends: dict[str, str] = {}
    tensor = _stem(trunk, steps, ends, untouched)
    known = {block.name: block for block in trunk.blocks}
    for stage in trunk.stages:
        container = original(trunk.model.get_submodule(stage))
        for key, module in container.named_children():
            name = f"{stage}.{key}"
            if name in known and name not in untouched:
                tensor = _block(known[name], tensor, steps)
            else:
                reason = untouched.get(name, "it is not recognised as a residual block")
                steps.append(OpaqueStep(name, tensor, (original(module),), reason))
                tensor = name
            ends[name] = tensor
        ends[stage] = tensor
    return Graph(tuple(steps), _outside(outputs, ends), ends)


def _stem(trunk: Trunk, steps: list[Step], ends: dict[str, str], untouched: dict[str, str]) -> str:
    stem = trunk.stem
    blocked = next((c.name for c in stem.convs if c.name in untouched), None) if stem else None
    if stem is None or blocked is not None:
        root = trunk.model.get_submodule(trunk.prefix.rstrip("."))
        rest = tuple(m for n, m in root.named_children() if trunk.prefix + n not in trunk.stages)
        name = f"{trunk.prefix}stem"
        reason = untouched[blocked] if blocked else "the stem is not recognised"
        steps.append(OpaqueStep(name, IMAGE, rest, reason))
        return name
    tensor = IMAGE
    for node in stem.convs:
        steps.append(ConvStep(node, tensor, None, True, ""))
        tensor = ends[node.name] = node.name
    if stem.pool_name is not None:
        pool = original(trunk.model.get_submodule(stem.pool_name))
        steps.append(PoolStep(stem.pool_name, tensor, _average(pool)))
        tensor = ends[stem.pool_name] = stem.pool_name
    return tensor


def _average(pool: nn.Module) -> int | None:
    """Size of a plain non-overlapping average pool, None for anything else."""
    if type(pool) is not nn.AvgPool2d:
        return None
    try:
        return pool_size(pool)
    except Unrecognised:  # it overlaps, pads or rounds up
        return None


def _block(block: BlockNode, tensor: str, steps: list[Step]) -> str:
    start = shortcut = tensor
    if block.downsample is not None:
        if block.down_pool > 1:
            name = f"{block.downsample.name.rpartition('.')[0]}.pool"
            steps.append(PoolStep(name, start, block.down_pool))
            shortcut = name
        steps.append(ConvStep(block.downsample, shortcut, None, False, block.name))
        shortcut = block.downsample.name
    for index, node in enumerate(block.convs):
        if index == 2 and block.pool > 1:
            name = f"{block.name}.avgpool"
            steps.append(PoolStep(name, tensor, block.pool))
            tensor = name
        last = index == len(block.convs) - 1
        steps.append(ConvStep(node, tensor, shortcut if last else None, True, block.name))
        tensor = node.name
    return tensor


def _outside(outputs: Iterable[str], ends: dict[str, str]) -> dict[str, str]:
    found = {}
    for name in outputs:
        if name not in ends:
            raise PlanError(
                f"outputs names {name!r}, whose result the trunk does not have. Name stages, "
                f"blocks or modules of the stem: {', '.join(list(ends)[:8])}, ..."
            )
        found[ends[name]] = name
    return found
