"""The model before against the model after: swapping back and forth, difference, times."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import OpenTransError, UnsupportedModelError
from ..linears import stepped_layers
from ..nn import Replacement
from ..plan import Plan
from ..plan.build import Builder
from ..plan.choose import Choice
from ..plan.layers import LinearUnit, require_own_weight
from ..plan.subject import PlanSubject, Unit
from ..timing.rounds import PairTiming, measure_pair
from ..topology import Trunk, forward_trunk
from ..topology.cover import switched
from .parts import PartError, check_parts

_log = logging.getLogger(__name__)

#: Difference from the masked dense network, relative to its largest output, that means a defect.
BROKEN = 1e-3
#: Largest side of the one image of a comparison that times nothing: a plan from a file may name
#: any size and batch, and memory grows with them.
LARGEST_SIDE = 512


class Culprit(Exception):
    """Internal: without this unit's replacement the network agrees. Never leaves this package."""

    def __init__(self, unit: Unit | LinearUnit, error: float) -> None:
        super().__init__(unit.name)
        self.unit = unit
        self.why = (
            f"the model's output changes by {error:.1e} when it is replaced, although it is exact "
            "alone: the forward uses it in another way than by calling it once, such as reading "
            "its weight, or calling its convolution without the norm"
        )


class Swap:
    """Exchanges modules by path, back and forth, and what would compute around them."""

    def __init__(self, model: nn.Module, replacements: Mapping[str, Replacement]) -> None:
        replacements = {**replacements, **stepped_layers(model, replacements)}
        self.model, self.replacements = model, replacements
        self.places = []
        for path, new in replacements.items():
            parent_path, _, key = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            self.places.append((parent._modules, key, parent._modules[key], new))

    def on(self) -> None:
        for modules, key, _, new in self.places:
            modules[key] = new

    def off(self) -> None:
        for modules, key, old, _ in self.places:
            modules[key] = old

    def without(self, unit: Unit | LinearUnit) -> Swap | None:
        """The same but for one unit; None if that is not among them. To be called when off."""
        rest = {path: new for path, new in self.replacements.items() if path not in unit.places}
        return Swap(self.model, rest) if len(rest) < len(self.replacements) else None


class Whole(nn.Module):
    """The trunk of a model, looked up by name at each call, or all of it where there is none.

    Without a recognised stem the part that holds the residual stages runs, or the whole model.
    """

    def __init__(self, model: nn.Module, trunk: Trunk) -> None:
        super().__init__()
        self.model = model
        self.__dict__["trunk"] = trunk
        self.root = trunk.prefix.rstrip(".")
        self.what = "trunk" if trunk.stem is not None else self.root or "model"

    def channels(self) -> int:
        """Channels of the image: those of the first convolution."""
        if self.trunk.stem is not None:
            return self.trunk.stem.convs[0].conv.in_channels
        parts = self.model.get_submodule(self.root).modules()
        return next(part.in_channels for part in parts if isinstance(part, nn.Conv2d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.trunk.stem is not None:
            return forward_trunk(self.trunk, x)[-1]
        return next(iter(self.outputs(x)))

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Floating tensors that the part with the stages, or the model, returns by its own forward.

        Raises whatever that forward raises, and UnsupportedModelError if it returns none.
        """
        y = self.model.get_submodule(self.root)(x)
        leaves = torch.utils._pytree.tree_leaves(y)
        found = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if not found:
            raise UnsupportedModelError(
                f"{self.root or 'the model'} returns no floating tensor for an image, so it cannot "
                "be compared or timed. Pass the tower that returns feature maps."
            )
        return found


class Agreement(nn.Module):
    """What is compared before and after: the trunk, and what the model's own forward returns.

    A head may reject the image (attention pools take one size): then it is the trunk alone.
    """

    def __init__(self, whole: Whole, x: torch.Tensor) -> None:
        super().__init__()
        self.whole = whole
        self.own = False
        if whole.trunk.stem is not None:
            try:
                whole.outputs(x.clone())
                self.own = True
            except Exception as error:  # the model's own code, and only an additional check
                _log.info("only the trunk is compared: %s: %s", type(error).__name__, error)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = [self.whole(x.clone())]
        return found + self.whole.outputs(x.clone()) if self.own else found


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference of any output, relative to the largest value of that output."""
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        if want.numel():
            scale = max(float(want.abs().max()), torch.finfo(torch.float32).tiny)
            error = float((got - want).abs().max()) / scale
            worst = error if error != error else max(worst, error)
    return worst


class Outcome:
    """Compares the model before and after, and decides whether it pays.

    measure: at the plan's size and batch, which are timed; else one image of at most
    ``LARGEST_SIDE``.
    """

    def __init__(self, subject: PlanSubject, plan: Plan, batch: int, measure: bool) -> None:
        self.subject, self.plan, self.measure = subject, plan, measure
        self.whole = Whole(subject.model, subject.trunk)
        generator = torch.Generator().manual_seed(0)
        height, width = plan.input_size
        if not measure:
            batch, height, width = 1, min(height, LARGEST_SIDE), min(width, LARGEST_SIDE)
        self.x = torch.randn(batch, self.whole.channels(), height, width, generator=generator)
        self.timing: PairTiming | None = None
        self.measured = "measure=False"
        self.max_rel_err: float | None = None
        self.notes: list[str] = []
        self.parts: list[PartError] = []

    def compare(self, swap: Swap) -> None:
        """Error and times; the model is left as it was.

        Raises Culprit for a unit that the model uses in another way than by calling it.
        """
        with torch.no_grad():
            try:
                agreement = Agreement(self.whole, self.x)
                expected = self._dense(agreement)
            except OpenTransError:
                raise
            except Exception as error:  # the model's own forward: its failure is only reported
                self.measured = f"{type(error).__name__} in the model's own forward: {error}"
                self.notes.append(f"not measured as a whole: {self.measured}")
                return
            found = self._swapped(agreement, swap)
            self._check(agreement, swap, expected, found)
            if self.subject.collapse.zero and self.subject.collapse.cut is None:
                self._note_constant(swap)
        if not self.measure:
            return

        def with_parts(state: Callable[[], None]) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                state()
                return self.whole(self.x)

            return run

        try:
            with switched(self.subject.model, paused=False):
                self.timing = measure_pair(with_parts(swap.off), with_parts(swap.on))
        finally:
            swap.off()
        self.notes += self.timing.notes()
        height, width = self.plan.input_size
        self.measured = f"{self.whole.what} at {height}x{width}"

    def _swapped(
        self, call: nn.Module, swap: Swap, weights: dict[str, torch.Tensor] | None = None
    ) -> Any:
        swap.on()
        try:
            if not weights:
                return call(self.x)
            return torch.func.functional_call(call, weights, (self.x,), tie_weights=False)
        finally:
            swap.off()

    def _dense(self, agreement: Agreement) -> list[torch.Tensor]:
        """The masked dense network; weights are masked in temporary copies."""
        masked: dict[str, torch.Tensor] = {}
        for unit in self.subject.units:
            masked |= self._masked(unit)
        if not masked:
            return agreement(self.x)
        return torch.func.functional_call(agreement, masked, (self.x,), tie_weights=False)

    def _masked(self, unit: Unit | LinearUnit) -> dict[str, torch.Tensor]:
        """Masked weights of a unit whose masks are not in them, named as in Agreement."""
        found = {}
        for layer in unit.layers if unit.must_mask else ():
            if layer.name not in self.subject.masks:
                continue
            require_own_weight(layer)
            weight = layer.weight.detach() * self.subject.masks[layer.name]
            found[f"whole.model.{layer.path}"] = weight
        return found

    def _check(
        self, agreement: Agreement, swap: Swap,
        expected: list[torch.Tensor], found: list[torch.Tensor],
    ) -> None:  # fmt: skip
        if not all(bool(torch.isfinite(want).all()) for want in expected):
            self.notes.append(
                "the dense network's own output on a random image is NaN or Inf, so the two could "
                "not be compared"
            )
            return
        error = difference(found, expected)
        if error <= BROKEN:
            self.max_rel_err = error
            return
        again = difference(self._dense(agreement), expected)
        if again > BROKEN:
            self.notes.append(
                f"the dense network itself answers the same image differently from call to call "
                f"(by {again:.1e}), so the whole could not be compared; every part was"
            )
            return
        for unit in self.subject.units:
            less = swap.without(unit)
            if less is None:
                continue
            now = self._swapped(agreement, less, self._masked(unit))
            if difference(now, expected) <= BROKEN:
                raise Culprit(unit, error)
        raise UnsupportedModelError(
            f"the accelerated network differs from the masked dense one by {error:.1e} of its "
            f"largest output, although every part alone is exact; rounding explains at most about "
            f"{BROKEN:.0e}. Nothing was changed. Either the network multiplies rounding errors "
            "(activations that cancel), or its forward uses several layers in another way than by "
            "calling them, such as reading their weights."
        )

    def _note_constant(self, swap: Swap) -> None:
        """Layers are all zero and their order is not known: ask the network itself."""
        other = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(1))
        swap.on()
        try:
            same = torch.equal(self.whole(self.x.clone()), self.whole(other))
        finally:
            swap.off()
        if same:
            self.notes.append(
                f"the {self.whole.what}'s output no longer depends on the input: two random images "
                "give the same answer"
            )

    def give_up(
        self, plan: Plan, choices: Mapping[str, Choice]
    ) -> tuple[Plan, dict[str, Replacement]]:
        """The whole is slower: everything dense, but masks that are not in the weights applied."""
        timing = self.timing
        assert timing is not None
        slower = (
            f"the whole {self.whole.what} would be slower ({timing.after_ms:.2f} ms against "
            f"{timing.before_ms:.2f} ms, {timing.rule})"
        )
        builder = Builder(self.subject)
        compact: dict[str, Choice] = {}
        for unit in self.subject.units:
            kind = "compact" if unit.must_mask else "dense"
            built = builder.build(unit, kind) if unit.must_mask else None
            builder.release()
            compact[unit.name] = Choice(kind, f"{kind}: {slower}", built)
        compact, self.parts = check_parts(self.subject, compact, builder)
        swaps: dict[str, Replacement] = {}
        for choice in compact.values():
            swaps.update(choice.built.swaps if choice.built is not None else {})
        kinds = {n: (c.kind, c.reason) for n, c in compact.items() if c.kind != choices[n].kind}
        if swaps:
            self.notes.append(f"{slower}: it runs densely, with the masks applied")
            self.compare(Swap(self.subject.model, swaps))
        else:
            self.notes.append(f"{slower}: it was left as it was")
            self.timing = replace(timing, after_ms=timing.before_ms, q1=1.0, q3=1.0)
        return plan.changed(kinds), swaps
