"""``opentrans bench tokens``: a segmenter with fewer tokens against itself dense, and against what
the same work buys otherwise: a smaller input, pooled tokens, fewer blocks.

Where its linear layers are pruned, each is also run by the sparse kernels, and what has the same
work is sparse as well. Sides share their parameters: copies of the model hold the same tensors. A
reduced side is no exact copy of the dense one, so there is no bound on its error: what is shown is
how far its logits are off, and how many pixels keep their class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..accelerate import accelerate
from ..tokens import TokenPlan, reduce_tokens, token_state
from ..tokens.blocks import ReducedBlock
from ..tokens.cluster import Clusters, Pool
from ..topology.linears import block_linears
from .model import peak_bytes
from .timing import TimingTable, interleave
from .variants import freezing, relative_error

__all__ = ["COMPILED", "EAGER", "FEWER", "POOLED", "SMALLER", "SPARSE", "TokenSubject",
           "measure_tokens"]  # fmt: skip

EAGER, COMPILED, SPARSE = "eager", "compiled", "sparse"
#: What costs the same; ", sparse" is appended where it runs on the kernels.
SMALLER, POOLED, FEWER = "smaller input", "pooled tokens", "fewer blocks"
#: What a side is to the reader, by the first part of its name; any other is reduced.
KINDS = {EAGER: "dense", COMPILED: "dense", SMALLER: "baseline", POOLED: "baseline",
         FEWER: "baseline"}  # fmt: skip
PARTS = ("reducing", "way back")

Size = tuple[int, int]


@dataclass
class TokenSubject:
    """A model, images [1, 3, H, W] -> logits [1, K, H, W], in eval mode, and what to compare.

    encoder: path of the part whose tokens are reduced; its ``blocks`` are a list. macs: of a size
    in pixels, a plan, a number of blocks (None: all) and the share of their weights that is kept;
    None where they depend on the image. patch: pixels of a token's side. masked: weights of blocks
    are zero, so sides on the sparse kernels are timed as well.
    """

    name: str
    model: nn.Module
    encoder: str
    patch: int
    macs: Callable[[Size, TokenPlan | None, int | None, float], int | None]
    facts: dict[str, Any] = field(default_factory=dict)
    masked: bool = False

    def kept(self) -> float:
        """Share of the weights of blocks' linear layers that are not zero."""
        weights = [layer.weight for layer in block_linears(self.model).values()]
        nonzero = sum(int(torch.count_nonzero(weight)) for weight in weights)
        return nonzero / max(1, sum(weight.numel() for weight in weights))


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def same_work(subject: TokenSubject, size: Size, target: int, kept: float = 1.0) -> Size:
    """The input, of the shape of ``size``, whose work at all tokens is nearest to ``target``."""
    height, width = (side // subject.patch for side in size)
    sizes = [
        (rows * subject.patch, max(1, round(rows * width / height)) * subject.patch)
        for rows in range(1, height + 1)
    ]
    return min(sizes, key=lambda one: abs((subject.macs(one, None, None, kept) or 0) - target))


class _Sides:
    """Calls of all sides on one image."""

    def __init__(
        self, subject: TokenSubject, plan: TokenPlan, image: torch.Tensor, measure: bool
    ) -> None:
        self.subject, self.plan, self.image, self.measure = subject, plan, image, measure
        self.size: Size = (image.shape[2], image.shape[3])
        self.kept = subject.kept() if subject.masked else 1.0
        self.calls: dict[str, Callable[[], torch.Tensor]] = {}
        self.macs: dict[str, int | None] = {}
        self.unavailable: dict[str, str] = {}
        self.replaced: dict[str, int] = {}
        self.smaller: Size | None = None
        self.fewer: int | None = None
        self.parts: dict[str, Callable[[], object]] = {}

    @property
    def best(self) -> str:
        """The reduced side that everything of the same work stands beside."""
        return f"{SPARSE}, {self.plan.method}" if self.subject.masked else self.plan.method

    def run(self, model: nn.Module, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(image)

    def build(self, compiling: bool, step: Callable[[str], None]) -> None:
        subject, image = self.subject, self.image
        self._add(EAGER, lambda: self.run(subject.model, image), self._macs())
        if compiling:
            step(COMPILED)
            self._compiled()
        else:
            self.unavailable[COMPILED] = "not asked for (--no-compile)"
        step(self.plan.method)
        reduced = self._side(self.plan.method, self.plan, sparse=False)
        if subject.masked:
            step(SPARSE)
            self._side(SPARSE, None)
            step(self.best)
            reduced = self._side(self.best, self.plan)
        self._same_work(step)
        if self.plan.method in ("cluster", "pool"):
            self._time_parts(reduced)

    def _add(self, name: str, call: Callable[[], torch.Tensor], macs: int | None) -> None:
        self.calls[name], self.macs[name] = call, macs

    def _macs(
        self, plan: TokenPlan | None = None, blocks: int | None = None, sparse: bool = False,
        size: Size | None = None,
    ) -> int | None:  # fmt: skip
        kept = self.kept if sparse else 1.0
        return self.subject.macs(size or self.size, plan, blocks, kept)

    def _side(
        self, name: str, plan: TokenPlan | None, *, blocks: int | None = None,
        sparse: bool | None = None, size: Size | None = None,
    ) -> nn.Module:  # fmt: skip
        """One more side, of the model with fewer tokens or blocks, on the kernels where it is
        masked, on an image of ``size``."""
        model = twin(self.subject.model)
        encoder: Any = model.get_submodule(self.subject.encoder)
        encoder.blocks = encoder.blocks[:blocks]
        if plan is not None:
            reduce_tokens(encoder, plan)
        on_kernels = self.subject.masked if sparse is None else sparse
        if on_kernels:
            report = accelerate(model, input_size=size or self.size, measure=self.measure)
            self.replaced[name] = sum(unit.kind == "sparse" for unit in report.plan.units)
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}

        def call() -> torch.Tensor:
            if size is None:
                return self.run(model, self.image)
            image = F.interpolate(self.image, size, antialias=True, **options)
            return F.interpolate(self.run(model, image), self.size, **options)

        self._add(name, call, self._macs(plan, blocks, on_kernels, size))
        return model

    def _compiled(self) -> None:
        frozen = torch.compile(twin(self.subject.model), dynamic=False)
        image = self.image

        def call() -> torch.Tensor:
            with freezing():
                return self.run(frozen, image)

        try:
            call()
            call()
        except Exception as error:  # a competitor that fails is a result
            words = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            self.unavailable[COMPILED] = words[:300]
            return
        self._add(COMPILED, call, self.macs[EAGER])

    def _same_work(self, step: Callable[[str], None]) -> None:
        """What the work of the best reduced side buys otherwise."""
        how = f", {SPARSE}" if self.subject.masked else ""
        if self.plan.method == "cluster":
            step(POOLED)
            self._side(POOLED + how, TokenPlan(
                "pool", alpha=self.plan.alpha, grid=self.plan.grid, expand=self.plan.expand
            ))  # fmt: skip
        work = self.macs[self.best]
        if work is None:
            why = f"the work of {self.plan.method!r} depends on the image"
            self.unavailable |= {SMALLER + how: why, FEWER + how: why}
            return
        step(SMALLER)
        self.smaller = same_work(self.subject, self.size, work, self.kept)
        self._side(SMALLER + how, None, size=self.smaller)
        step(FEWER)
        encoder: Any = self.subject.model.get_submodule(self.subject.encoder)
        self.fewer = min(
            range(1, len(encoder.blocks) + 1),
            key=lambda n: abs((self._macs(None, n, self.subject.masked) or 0) - work),
        )
        self._side(FEWER + how, None, blocks=self.fewer)

    def _time_parts(self, reduced: nn.Module) -> None:
        """Calls of what reduction adds, on the tokens of this image."""
        encoder = reduced.get_submodule(self.subject.encoder)
        state = token_state(encoder)
        first = next((m for m in encoder.modules() if isinstance(m, ReducedBlock)), None)
        if state is None or first is None:
            return  # alpha is the depth: nothing is reduced
        seen: list[torch.Tensor] = []
        handle = first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self.run(reduced, self.image)
        finally:
            handle.remove()
        if state.run.reduction is None:
            return  # the grid is the map
        tokens, size, plan = seen[0][:, state.prefix :], state.map_size, self.plan
        width = tokens.shape[-1] if plan.expand else self.subject.facts["classes"]
        y = torch.ones(1, state.tokens, width)

        def reducing() -> Clusters | Pool:
            with torch.no_grad():
                return (Clusters if plan.method == "cluster" else Pool)(tokens, size, plan)

        found = reducing()

        def back() -> torch.Tensor:
            with torch.no_grad():
                return found.make_weights() @ y if isinstance(found, Clusters) else found.expand(y)

        self.parts = dict(zip(PARTS, (reducing, back), strict=True))


def measure_tokens(
    subject: TokenSubject,
    plan: TokenPlan,
    size: Size,
    *,
    rounds: int = 5,
    threads: int = 1,
    compiling: bool = True,
    measure: bool = True,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One result: what sides compute, then all of them interleaved, memory, and the two parts.

    size: (height, width) in pixels, multiples of the patch. measure: time the layers of sparse
    sides, so that those stay dense that gain nothing; False: go by predictions.

    Raises:
        OpenTransError: the plan does not fit the model or the size.
    """
    torch.set_num_threads(threads)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    sides = _Sides(subject, plan, image, measure)
    sides.build(compiling, step)
    dense = sides.calls[EAGER]().clone()
    looks = {}
    for name, call in sides.calls.items():
        step(f"output of {name}")
        logits = call()
        looks[name] = {
            "difference": relative_error(logits, dense),
            "same_class": float((logits.argmax(1) == dense.argmax(1)).double().mean()),
        }
    del dense
    table = interleave(
        {**sides.calls, **sides.parts}, rounds=rounds, warmup_s=0.1, settle=0,
        on_round=lambda done, total: step(f"round {done} of {total}"),
    )  # fmt: skip
    step("memory")
    memory = {name: peak_bytes(call) for name, call in sides.calls.items()}
    whole = table[sides.best].cpu.median
    return {
        "system": subject.name,
        **subject.facts,
        "height": size[0],
        "width": size[1],
        "plan": asdict(plan),
        "rounds": rounds,
        "baseline": _fastest(table, sides),
        "smaller": list(sides.smaller) if sides.smaller else None,
        "fewer": sides.fewer,
        "kept": sides.kept,
        "replaced": sides.replaced,
        "unavailable": sides.unavailable,
        "rows": list(_rows(table, sides, looks, memory)),
        "parts": [
            {"part": name, "cpu_ms": table[name].cpu.median,
             "share": min(1.0, table[name].cpu.median / whole)}
            for name in sides.parts
        ],
    }  # fmt: skip


def _fastest(table: TimingTable, sides: _Sides) -> str:
    return table.fastest([name for name in sides.calls if kind_of(name) == "dense"], "cpu")


def kind_of(name: str) -> str:
    """What a side is: "dense", "exact" (dense numbers on the kernels), "baseline" or "reduced"."""
    return "exact" if name == SPARSE else KINDS.get(name.partition(",")[0], "reduced")


def _rows(
    table: TimingTable,
    sides: _Sides,
    looks: dict[str, dict[str, float]],
    memory: dict[str, int | None],
) -> Iterator[dict[str, Any]]:
    """One per side; ``speedup`` over the fastest dense one, ``work`` as a share of dense work."""
    best, dense = _fastest(table, sides), sides.macs[EAGER]
    for name in sides.calls:
        timing, macs = table[name], sides.macs[name]
        yield {
            "name": name,
            "kind": kind_of(name),
            "ms": timing.wall.median,
            "cpu_ms": timing.cpu.median,
            "wall": timing.wall.to_dict(),
            "contended_share": timing.contended_share(),
            "speedup": table.ratio(best, name, "cpu").to_dict(),
            "over_eager": table.ratio(EAGER, name, "cpu").to_dict(),
            "macs": macs,
            "work": None if macs is None or not dense else macs / dense,
            **looks[name],
            "peak_bytes": memory[name],
        }
