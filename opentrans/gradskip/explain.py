"""What is kept for backward, tensor by tensor, with bytes: of this plan, of the usual baseline."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.ops.relu_bits import bits_shape
from opentrans_kernels.topology import ConvShape

from .graph import IMAGE, ConvStep, Graph, OpaqueStep, PoolStep
from .planner import Decisions, reads_input

MIB = 2**20


@dataclass(frozen=True)
class Kept:
    """One activation. form: "whole", "bits", "index" (of a max pool), "norm input", "nothing"."""

    tensor: str
    shape: tuple[int, int, int, int]
    form: str
    nbytes: int
    why: str


@dataclass(frozen=True)
class Explanation:
    """Rows in execution order; parameters and buffers are not counted.

    total: bytes kept for backward of the trunk, each storage once.
    baseline: the same freeze set with frozen batch norms (scale and shift) and
        ``requires_grad = False`` in plain PyTorch.
    uncounted: steps whose memory is not known.
    """

    rows: tuple[Kept, ...]
    total: int
    baseline: int
    uncounted: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{'tensor':<28} {'shape':<20} {'kept':<10} {'KiB':>10}  why"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.tensor:<28} {shape:<20} {row.form:<10} {row.nbytes / 1024:>10.1f}  {row.why}"
            )
        share = self.total / self.baseline if self.baseline else 1.0
        lines.append(
            f"kept for backward: {self.total / MIB:.1f} MiB; frozen batch norms in plain PyTorch: "
            f"{self.baseline / MIB:.1f} MiB ({share:.2f} of it)"
        )
        lines += [f"not counted: {name}" for name in self.uncounted]
        return "\n".join(lines)


Shape = tuple[int, int, int, int]


def tensor_shapes(graph: Graph, shapes: Mapping[str, ConvShape], batch: int) -> dict[str, Shape]:
    """``[N, C, H, W]`` of every tensor of recognised steps."""
    found: dict[str, Shape] = {}
    for step in graph.steps:
        if isinstance(step, ConvStep):
            conv, size = step.node.conv, shapes[step.node.name]
            found.setdefault(step.source, (batch, conv.in_channels, size.h_in, size.w_in))
            found[step.out] = (batch, conv.out_channels, size.h_out, size.w_out)
        elif isinstance(step, PoolStep) and step.source in found and step.size is not None:
            n, c, h, w = found[step.source]
            found[step.out] = (n, c, h // step.size, w // step.size)
    return found


def explain(
    graph: Graph,
    decisions: Decisions,
    shapes: Mapping[str, ConvShape],
    batch: int,
    itemsize: int,
    channels_last: bool,
    sparse: Container[str] = (),
) -> Explanation:
    """Rows and sums; ``sparse``: convolutions whose results have padded planes."""
    sizes = tensor_shapes(graph, shapes, batch)
    padded = _padded(graph, sparse, sizes)
    rows: list[Kept] = []
    for tensor in (IMAGE, *(step.out for step in graph.steps)):
        if tensor in sizes:
            rows += _rows_of(
                tensor, graph, decisions, sizes, itemsize, channels_last, tensor in padded
            )
    baseline = _baseline(graph, decisions, sizes, itemsize)
    uncounted = [f"{s.name}: {s.reason}" for s in graph.steps if isinstance(s, OpaqueStep)]
    return Explanation(tuple(rows), sum(r.nbytes for r in rows), baseline, tuple(uncounted))


def _elements(shape: Shape) -> int:
    n, c, h, w = shape
    return n * c * h * w


def _padded(graph: Graph, sparse: Container[str], sizes: Mapping[str, Shape]) -> set[str]:
    """Tensors that the sparse kernels allocate; average pools pass the layout on where it shows."""
    found: set[str] = set()
    for step in graph.steps:
        passed = isinstance(step, PoolStep) and step.size is not None and step.source in found
        if passed:
            _, _, h, w = sizes[step.source]
            passed = plane_stride(h * w) != h * w
        if passed or (isinstance(step, ConvStep) and step.out in sparse):
            found.add(step.out)
    return found


def _padded_bytes(shape: Shape) -> int:
    """Planes a whole, odd number of cache lines apart, and one more line at the end; float32."""
    n, c, h, w = shape
    return (n * c * plane_stride(h * w) + 16) * 4


def _rows_of(
    tensor: str, graph: Graph, decisions: Decisions, sizes: Mapping[str, Shape], itemsize: int,
    channels_last: bool, padded: bool,
) -> list[Kept]:  # fmt: skip
    shape = sizes[tensor]
    nbytes = _padded_bytes(shape) if padded else _elements(shape) * itemsize
    step = next((s for s in graph.steps if s.out == tensor), None)
    needed = tensor in decisions.needs_grad
    readers = decisions.stored_by[tensor]
    relu = isinstance(step, ConvStep) and step.relu
    rows = []
    # What is read outside is stored whoever computed it, and then the ReLU uses it as well.
    inside = [why for why in readers if not why.startswith("read outside")]
    if inside or (relu and needed and readers):
        why = "; ".join(readers)
        rows.append(Kept(tensor, shape, "whole", nbytes, why))
    elif relu and needed:
        count, length = bits_shape(shape, channels_last and not padded)  # type: ignore[arg-type]
        rows.append(Kept(tensor, shape, "bits", count * length, "ReLU; nobody stores it anyway"))
    else:
        rows.append(Kept(tensor, shape, "nothing", 0, _why_nothing(step, needed)))
    if isinstance(step, PoolStep) and step.size is None and needed:
        rows.append(Kept(tensor, shape, "index", _elements(shape) * 8, "max pool"))
    if isinstance(step, ConvStep) and decisions.policy == "train" and needed:
        # Batch statistics couple all elements; mean and 1 / deviation of the batch come with it.
        training = bool(step.node.bn is not None and step.node.bn.training)
        extra = 2 * shape[1] * 4 if training else 0
        nbytes = _elements(shape) * itemsize + extra
        rows.append(Kept(f"{tensor} (norm)", shape, "norm input", nbytes, "batch norm"))
    return rows


def _why_nothing(step: object, needed: bool) -> str:
    if step is None:
        return "the image; nothing that trains reads it"
    if not needed:
        return "nothing trains before it"
    if isinstance(step, PoolStep):
        return "a pool needs shapes only"
    return "no ReLU, and only frozen layers read it"


def _baseline(graph: Graph, decisions: Decisions, sizes: Mapping[str, Shape], itemsize: int) -> int:
    """Bytes kept by plain PyTorch with batch norms as scale and shift."""
    kept: dict[str, int] = {}
    extra = 0
    needs = decisions.needs_grad

    def keep(tensor: str) -> None:
        if tensor in sizes:
            kept[tensor] = _elements(sizes[tensor]) * itemsize

    for step in graph.steps:
        if isinstance(step, ConvStep):
            # Whatever trains makes the convolution store its input; so does a gradient to pass on.
            if step.source in needs or reads_input(step):
                keep(step.source)
            if step.out in needs:
                extra += sizes[step.out][1] * 4  # the scale, computed in every forward
                if step.relu:
                    keep(step.out)
        elif step.source in needs:
            keep(step.source)
            if isinstance(step, PoolStep) and step.size is None and step.out in sizes:
                extra += _elements(sizes[step.out]) * 8
    return sum(kept.values()) + extra
