"""``opentrans bench model --system``: a whole segmentation model, dense in every way that works,
with our head alone, our trunk alone, and both.

One model stands for all sides: replacements are put in and out between calls, so trunk and head
have the very same weights everywhere. Only what needs weights in another form (channels_last,
compiled) has copies. Scores are ``[K, H, W]``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..accelerate import accelerate
from ..errors import MaskError, OpenTransError
from ..heads import HeadReport, accelerate_heads
from ..heads.parts import head_parts
from ..plan.models import accelerated_parts
from ..synthetic import parse_mask_spec, synthetic_masks
from .model import peak_bytes
from .parts import Toggle, time_parts, trunk_path
from .rows import matched
from .timing import TimingTable, interleave, median_pair
from .variants import fold_batch_norms_, freezing, relative_error

__all__ = ["DENSE", "OURS", "Whole", "measure_whole"]

EAGER, LAST, TRUNK, ALL = "eager", "channels_last", "compiled trunk", "compiled"
DENSE = (EAGER, LAST, TRUNK, ALL)
HEAD, OUR_TRUNK, BOTH = "our head, dense trunk", "our trunk, old head", "our trunk and head"
OURS = (HEAD, OUR_TRUNK, BOTH)
#: Largest error of a whole with queries, and of any against float32, as a share of the largest
#: score: attention masks of a masked decoder are thresholds, so one rounding can move a pixel. Then
#: the class has to be the same on this share of pixels.
LARGEST_ERROR, SAME_CLASS = 1e-4, 0.9999

Call = Callable[[], torch.Tensor]


@dataclass
class Whole:
    """A dense model in eval mode, and how to run it.

    tower: path of its ResNet. head: path of what ``head_mask`` covers, the tower left out. run: the
    model and a dtype to scores ``[K, H, W]``; it may raise for float64, where the model's code
    makes float32 tensors.
    """

    name: str
    model: nn.Module
    tower: str
    run: Callable[[nn.Module, torch.dtype], torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    head: str = ""


class _Sides:
    """The calls of every side, on one model."""

    def __init__(self, whole: Whole, compiling: bool) -> None:
        self.whole, self.compiling = whole, compiling
        self.unavailable: dict[str, str] = {}
        self.calls: dict[str, Call] = {}
        self.copies: dict[str, Any] = {}

    def run(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return self.whole.run(model, torch.float32)

    def build_dense(self, step: Callable[[str], None]) -> None:
        """The dense sides, of the model before it is accelerated."""
        model, path = self.whole.model, self.whole.tower
        self.calls[EAGER] = lambda: self.run(model)
        builders = {LAST: self._last, TRUNK: self._compiled_trunk, ALL: self._compiled}
        for name, build in builders.items():
            if name in (TRUNK, ALL) and not self.compiling:
                self.unavailable[name] = "not asked for (--no-compile)"
                continue
            step(name)
            try:
                made = build(model, path)
                self.run(made)
                self.run(made)
            except Exception as error:  # a competitor that fails is a result
                words = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                self.unavailable[name] = words[:300]
                continue
            self.copies[name] = made
            self.calls[name] = lambda m=made: self.run(m)

    def _last(self, model: nn.Module, tower: str) -> nn.Module:
        own = copy.deepcopy(model)
        fold_batch_norms_(own.get_submodule(tower))
        return own.to(memory_format=torch.channels_last)

    def _compiled_trunk(self, model: nn.Module, tower: str) -> nn.Module:
        own = copy.deepcopy(model)
        fold_batch_norms_(own.get_submodule(tower)).to(memory_format=torch.channels_last)
        compile_in_place(own.get_submodule(trunk_path(tower, (), own)))
        return _Frozen(own)

    def _compiled(self, model: nn.Module, tower: str) -> nn.Module:
        own = self._last(model, tower)
        return _Frozen(torch.compile(own, dynamic=False))

    def build_ours(self, size: tuple[int, int], threads: int) -> tuple[HeadReport, Toggle]:
        """Accelerate the model, and the three sides with ours."""
        model = self.whole.model
        accelerate(model.get_submodule(self.whole.tower), input_size=size, threads=threads)
        trunk = Toggle(model)
        heads = accelerate_heads(model)
        both = Toggle(model)
        paths = list(head_parts(model))
        if not paths:
            self.unavailable |= dict.fromkeys((HEAD, BOTH), "no part of the head was recognised")
        head = Toggle(model, paths)

        def side(*on: Toggle) -> None:
            both.dense()
            for toggle in on:
                toggle.accelerated()

        def call(*on: Toggle) -> Call:
            def run() -> torch.Tensor:
                side(*on)
                return self.run(model)

            return run

        dense = self.calls.pop(EAGER)
        self.calls = {EAGER: lambda: (side(), dense())[1], **self.calls}
        self.calls[OUR_TRUNK] = call(trunk)
        if paths:
            self.calls[HEAD] = self._head_on_dense_trunk(call(head))
            self.calls[BOTH] = call(trunk, head)
        return heads, both

    def _head_on_dense_trunk(self, plain: Call) -> Call:
        """On the compiled trunk where there is one: its copy of the head gets the parts as well."""
        if TRUNK not in self.calls:
            return plain
        frozen = self.copies[TRUNK]
        accelerate_heads(frozen.model)
        head = Toggle(frozen.model, list(head_parts(frozen.model)))
        self.calls[TRUNK] = lambda: (head.dense(), self.run(frozen))[1]
        return lambda: (head.accelerated(), self.run(frozen))[1]


class _Frozen(nn.Module):
    """Runs a model with inductor's freezing in force, for what is compiled at the first call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with freezing():
            return self.model(*args, **kwargs)


class _Path(nn.Module):
    """What a backbone computes, as a module of its own, so that weights can become constants."""

    def __init__(self, backbone: nn.Module, method: str) -> None:
        super().__init__()
        self.backbone, self.plain = backbone, getattr(type(backbone), method)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.plain(self.backbone, x)


def compile_in_place(backbone: nn.Module) -> None:
    """Let ``backbone`` run compiled, on channels_last input.

    FC-CLIP's backbone switches modes in forward; ``extract_features`` is the work.
    """
    method = "extract_features" if hasattr(backbone, "extract_features") else "forward"
    call = torch.compile(_Path(backbone, method), dynamic=False)

    def compiled(_: nn.Module, x: torch.Tensor) -> Any:
        return call(x.contiguous(memory_format=torch.channels_last))

    # In a class of its own: a part of the head around it is refused what is set on an instance.
    backbone.__class__ = type(type(backbone).__name__, (type(backbone),), {method: compiled})


def measure_whole(
    whole: Whole,
    mask: str,
    size: tuple[int, int],
    *,
    rounds: int = 5,
    threads: int = 1,
    compiling: bool = True,
    head_mask: str | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One result: errors first, then all sides interleaved, memory, and times by part.

    Sides are compared by CPU time with one thread, and by wall time with more, whose CPU times
    would be added up, waiting for each other included.

    mask: recipe for the tower's weights. head_mask: "uniform:SHARE" for the head's convolutions and
    linear layers, None leaves them as they are. size: (height, width) in pixels.

    Raises:
        OpenTransError: the model cannot be accelerated.
    """
    torch.set_num_threads(threads)
    model = whole.model.eval()
    masks = synthetic_masks(model.get_submodule(whole.tower), mask)
    masks.apply_(model.get_submodule(whole.tower))
    head = {} if head_mask is None else {"head_mask": _mask_head(whole, head_mask)}
    step("reference")
    sides = _Sides(whole, compiling)
    reference, kind = _reference(whole, sides)
    own = relative_error(_yardstick(sides, kind), reference)
    sides.build_dense(step)
    step("accelerating")
    heads, toggle = sides.build_ours(size, threads)
    moves = kind != "float64" or whole.facts.get("queries") is not None
    limit = max(2 * own, LARGEST_ERROR if moves else 1e-6)
    accuracy = {}
    for name, call in list(sides.calls.items()):
        step(f"error of {name}")
        scores = call()
        same = float((scores.argmax(0) == reference.argmax(0)).double().mean())
        match = matched(relative_error(scores, reference), limit)
        match["equal"] = match["equal"] and same >= SAME_CLASS
        accuracy[name] = {"match": match, "argmax": same}
        if name in DENSE and not accuracy[name]["match"]["equal"] and name != EAGER:
            error = accuracy.pop(name)["match"]["error"]
            sides.unavailable[name] = f"its scores are off by {error:.1e} of the largest"
            del sides.calls[name]
    del reference
    table = interleave(
        sides.calls, rounds=rounds, warmup_s=0.1, settle=0,
        on_round=lambda done, total: step(f"round {done} of {total}"),
    )  # fmt: skip
    clock = "cpu" if threads == 1 else "wall"
    fastest = BOTH if BOTH in sides.calls else OUR_TRUNK
    step("one thread")
    scaling = _scaling(fastest, sides.calls[fastest], threads, rounds) if threads > 1 else None
    step("memory")
    memory = {name: peak_bytes(call) for name, call in sides.calls.items()}
    step("parts")
    toggle.accelerated()
    parts = time_parts(
        model, lambda: sides.run(model), whole.tower, heads, rounds=max(1, min(rounds, 3))
    )
    return {
        "system": whole.name,
        **whole.facts,
        **head,
        "height": size[0],
        "width": size[1],
        "rounds": rounds,
        "reference": kind,
        "dense_error": own,
        "unavailable": sides.unavailable,
        "clock": clock,
        "rows": list(_rows(table, clock, accuracy, memory)),
        "baseline": _best(table, clock),
        "scaling": scaling,
        "parts": parts.to_dict(),
        "accelerated_layers": len(accelerated_parts(model.get_submodule(whole.tower))),
        "head": {
            "replaced": len(heads.replaced),
            "done": heads.done(),
            "left": [f"{part.path}: {part.reason}" for part in heads.left],
        },
    }


def _scaling(name: str, call: Call, threads: int, rounds: int) -> dict[str, Any]:
    """One of our sides on one thread and on all of them in turns, by wall time; its layers are
    those planned for all. The first call on another number of threads is not counted: libraries
    prepare themselves for it."""
    spent: dict[int, list[float]] = {1: [], threads: []}
    try:
        for index in range(rounds):
            for count in list(spent) if index % 2 else list(reversed(spent)):
                torch.set_num_threads(count)
                call()
                start = time.perf_counter()
                call()
                spent[count].append((time.perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(threads)
    pair = median_pair(spent[1], spent[threads])
    return {"name": name, "one_thread_ms": pair.slow_ms, "ms": pair.fast_ms,
            "ratio": pair.ratios.to_dict()}  # fmt: skip


@torch.no_grad()
def _mask_head(whole: Whole, recipe: str) -> dict[str, Any]:
    """Set the smallest weights of each layer of the head to zero, in place.

    Raises MaskError for another recipe than a uniform one.
    """
    spec = parse_mask_spec(recipe)
    if spec.allocation != "uniform":
        raise MaskError(
            f"the head's mask {recipe!r} must be a uniform one, since its layers have scales of "
            "their own. Write for instance uniform:0.90."
        )
    kept = numel = layers = 0
    for name, layer in whole.model.get_submodule(whole.head).named_modules(prefix=whole.head):
        inside = f"{name}.".startswith(f"{whole.tower}.")
        if inside or not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        weight = layer.weight
        kept_here = torch.ones(weight.numel(), dtype=torch.bool)
        smallest = weight.abs().flatten().argsort()[: round(spec.sparsity * weight.numel())]
        kept_here[smallest] = False
        weight.masked_fill_(~kept_here.view(weight.shape), 0)
        kept, numel = kept + int(torch.count_nonzero(weight)), numel + weight.numel()
        layers += 1
    return {"label": recipe, "layers": layers, "density": kept / max(1, numel)}


def _reference(whole: Whole, sides: _Sides) -> tuple[torch.Tensor, str]:
    """Scores in float64, or in float32 where the model's code does not run in float64."""
    try:
        with torch.no_grad():
            double = copy.deepcopy(whole.model).double()
            found = whole.run(double, torch.float64)
            if found.dtype == torch.float64:
                return found, "float64"
            why = f"its scores come out as {found.dtype}"
    except (RuntimeError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0][:100]
    return sides.run(whole.model).clone(), f"eager float32 (not float64: {why})"


def _yardstick(sides: _Sides, kind: str) -> torch.Tensor:
    """What dense float32 gives: against itself, by PyTorch's kernels without oneDNN."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and kind == "float64"
    try:
        return sides.run(sides.whole.model)
    finally:
        torch.backends.mkldnn.enabled = before


def _best(table: TimingTable, clock: str) -> str:
    return table.fastest([name for name in DENSE if name in table.timings], clock)


def _rows(
    table: TimingTable, clock: str, accuracy: dict[str, Any], memory: dict[str, int | None]
) -> Iterator[dict[str, Any]]:
    """One row per side; ``speedup`` over the fastest dense one, None for what is inexact."""
    best = _best(table, clock)
    for name, timing in table.timings.items():
        match = accuracy[name]["match"]
        pair = table.pair(best, name, clock)
        yield {
            "name": name,
            "ours": name in OURS,
            "ms": timing.wall.median,
            "cpu_ms": timing.cpu.median,
            "median_round": {"baseline_ms": pair.slow_ms, "ms": pair.fast_ms},
            "wall": timing.wall.to_dict(),
            "speedup": pair.ratios.to_dict() if match["equal"] else None,
            "match": match,
            "argmax": accuracy[name]["argmax"],
            "peak_bytes": memory[name],
        }
    if not any(name in table.timings for name in OURS):
        raise OpenTransError("no side with our parts could be built, so there is nothing to show.")
