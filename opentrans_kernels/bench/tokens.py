"""``opentrans bench tokens``: a segmenter with fewer tokens against itself dense, against a smaller
input of equal work, and against pooled tokens.

Sides share their parameters: copies of the model hold the same tensors. A reduced side is no exact
copy of the dense one, so there is no bound on its error: what is shown is how far its logits are
off, and how many pixels keep their class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..tokens import TokenPlan, reduce_tokens, token_state
from ..tokens.blocks import ReducedBlock
from ..tokens.cluster import Clusters, Pool
from .model import peak_bytes
from .timing import TimingTable, interleave
from .variants import freezing, relative_error

__all__ = ["COMPILED", "EAGER", "POOLED", "SMALLER", "TokenSubject", "measure_tokens"]

EAGER, COMPILED = "eager", "compiled"
SMALLER, POOLED = "smaller input, dense", "pooled tokens"
#: What a side is to the reader.
KINDS = {EAGER: "dense", COMPILED: "dense", SMALLER: "baseline", POOLED: "baseline"}
PARTS = ("reducing", "way back")

Size = tuple[int, int]


@dataclass
class TokenSubject:
    """A model, images [1, 3, H, W] -> logits [1, K, H, W], in eval mode, and what to compare.

    encoder: path of the part whose tokens are reduced. macs: of a size in pixels and a plan; None
    where they depend on the image. patch: pixels of a token's side.
    """

    name: str
    model: nn.Module
    encoder: str
    patch: int
    macs: Callable[[Size, TokenPlan | None], int | None]
    facts: dict[str, Any] = field(default_factory=dict)


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def same_work(subject: TokenSubject, size: Size, target: int) -> Size:
    """The input, of the shape of ``size``, whose dense work is nearest to ``target``."""
    height, width = (side // subject.patch for side in size)
    sizes = [
        (rows * subject.patch, max(1, round(rows * width / height)) * subject.patch)
        for rows in range(1, height + 1)
    ]
    return min(sizes, key=lambda one: abs((subject.macs(one, None) or 0) - target))


class _Sides:
    """Calls of all sides on one image."""

    def __init__(self, subject: TokenSubject, plan: TokenPlan, image: torch.Tensor) -> None:
        self.subject, self.plan, self.image = subject, plan, image
        self.size: Size = (image.shape[2], image.shape[3])
        self.calls: dict[str, Callable[[], torch.Tensor]] = {}
        self.macs: dict[str, int | None] = {}
        self.unavailable: dict[str, str] = {}
        self.smaller: Size | None = None
        self.parts: dict[str, Callable[[], object]] = {}

    def run(self, model: nn.Module, image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(image)

    def build(self, compiling: bool, step: Callable[[str], None]) -> None:
        subject, image = self.subject, self.image
        self._add(EAGER, lambda: self.run(subject.model, image), subject.macs(self.size, None))
        if compiling:
            step(COMPILED)
            self._compiled()
        else:
            self.unavailable[COMPILED] = "not asked for (--no-compile)"
        step(self.plan.method)
        reduced = self._reduced(self.plan)
        work = subject.macs(self.size, self.plan)
        self._add(self.plan.method, lambda: self.run(reduced, image), work)
        if self.plan.method == "cluster":
            pool = TokenPlan(
                "pool", alpha=self.plan.alpha, grid=self.plan.grid, expand=self.plan.expand
            )
            pooled = self._reduced(pool)
            self._add(POOLED, lambda: self.run(pooled, image), subject.macs(self.size, pool))
        self._smaller(work)
        if self.plan.method in ("cluster", "pool"):
            self._time_parts(reduced)

    def _add(self, name: str, call: Callable[[], torch.Tensor], macs: int | None) -> None:
        self.calls[name], self.macs[name] = call, macs

    def _reduced(self, plan: TokenPlan) -> nn.Module:
        own = twin(self.subject.model)
        reduce_tokens(own.get_submodule(self.subject.encoder), plan)
        return own

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

    def _smaller(self, work: int | None) -> None:
        if work is None:
            self.unavailable[SMALLER] = f"the work of {self.plan.method!r} depends on the image"
            return
        self.smaller = same_work(self.subject, self.size, work)
        small, model = self.smaller, self.subject.model
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}

        def call() -> torch.Tensor:
            image = F.interpolate(self.image, small, antialias=True, **options)
            return F.interpolate(self.run(model, image), self.size, **options)

        self._add(SMALLER, call, self.subject.macs(small, None))

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
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One result: what sides compute, then all of them interleaved, memory, and the two parts.

    size: (height, width) in pixels, multiples of the patch.

    Raises:
        OpenTransError: the plan does not fit the model or the size.
    """
    torch.set_num_threads(threads)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    sides = _Sides(subject, plan, image)
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
    whole = table[plan.method].cpu.median
    return {
        "system": subject.name,
        **subject.facts,
        "height": size[0],
        "width": size[1],
        "plan": asdict(plan),
        "rounds": rounds,
        "baseline": _fastest(table, sides),
        "smaller": list(sides.smaller) if sides.smaller else None,
        "unavailable": sides.unavailable,
        "rows": list(_rows(table, sides, looks, memory)),
        "parts": [
            {"part": name, "cpu_ms": table[name].cpu.median,
             "share": min(1.0, table[name].cpu.median / whole)}
            for name in sides.parts
        ],
    }  # fmt: skip


def _fastest(table: TimingTable, sides: _Sides) -> str:
    return table.fastest([name for name in sides.calls if KINDS.get(name) == "dense"], "cpu")


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
            "kind": KINDS.get(name, "reduced"),
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
