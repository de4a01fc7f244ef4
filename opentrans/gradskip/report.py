"""What ``skip_frozen`` did, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from opentrans_kernels.ops.folded_conv2d import folded_bytes
from opentrans_kernels.ops.folded_conv2d.sparse import packed_bytes
from opentrans_kernels.topology import Trunk, conv_shapes

from .explain import Explanation, explain
from .graph import Graph
from .planner import Decisions
from .sparse import Sparse


@dataclass(frozen=True)
class GradSkipReport:
    """The plan that is in force; ``print(report)`` sums it up.

    Attributes:
        policy: of batch norm: "frozen", "affine" or "train".
        frozen, trains: names of convolutions.
        prefix: convolutions before which, and in which, nothing trains: they keep nothing.
        replaced: module paths of what was replaced.
        accelerated: module paths of the prefix that run through the inference plan.
        sparse: convolutions that run on the sparse kernels, by name.
        untouched: module path -> why it was left as it is.
        notes: what else to know.
    """

    policy: str
    frozen: tuple[str, ...]
    trains: tuple[str, ...]
    prefix: tuple[str, ...]
    replaced: tuple[str, ...]
    untouched: dict[str, str]
    notes: tuple[str, ...]
    graph: Graph = field(repr=False)
    decisions: Decisions = field(repr=False)
    trunk: Trunk = field(repr=False)
    accelerated: tuple[str, ...] = ()
    sparse: Mapping[str, Sparse] = field(default_factory=dict, repr=False)

    def explain(
        self,
        input_size: tuple[int, int] = (224, 224),
        batch: int = 1,
        *,
        itemsize: int = 4,
        channels_last: bool = False,
    ) -> Explanation:
        """Per activation of the trunk: what is kept for backward, why, and bytes.

        Args:
            input_size: (height, width) of a training image in pixels. batch: images.
            itemsize: bytes of an activation's element (4 float32, 2 under autocast).
            channels_last: layout of the activations; it rounds the bits differently.

        Raises:
            UnsupportedModelError: the size does not pass through the trunk.
        """
        shapes = conv_shapes(self.trunk, input_size)
        return explain(
            self.graph, self.decisions, shapes, batch, itemsize, channels_last, self.sparse
        )

    @property
    def copies_nbytes(self) -> int:
        """Bytes of the folded and packed copies of weights that exist now, on top of the model."""
        convs: dict[str, nn.Conv2d] = {node.name: node.conv for node in self.trunk.convs()}
        packed = sum(
            packed_bytes(convs[name].weight, one.structure) for name, one in self.sparse.items()
        )
        return packed + sum(folded_bytes(conv.weight) for conv in convs.values())

    def __str__(self) -> str:
        lines = [
            f"gradient skipping: {len(self.frozen)} of {len(self.frozen) + len(self.trains)} "
            f"convolutions frozen, batch norm policy {self.policy!r}",
            f"  {len(self.prefix)} of them before anything trains: no autograd, nothing kept",
            f"  {len(self.replaced)} modules replaced",
        ]
        if self.accelerated:
            lines.append(f"  {len(self.accelerated)} modules of the prefix run the inference plan")
        if self.sparse:
            lines.append(f"  {len(self.sparse)} convolutions run on the sparse kernels")
        lines += [f"  left as it is: {name}: {why}" for name, why in self.untouched.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
