"""The model before against the model after: swapping back and forth, difference, times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..errors import OpenTransError, UnsupportedModelError
from ..masks import make_permanent
from ..nn import Replacement
from ..plan import Plan
from ..plan.build import Builder
from ..plan.choose import Choice
from ..plan.clock import interleaved_ms
from ..plan.records import totals_of
from ..plan.subject import PlanSubject
from ..topology import forward_trunk

#: Difference from the masked dense network, relative to its largest output, that means a defect.
BROKEN = 1e-3
#: Largest side of the one image of a comparison that times nothing: a plan from a file may name
#: any size and batch, and memory grows with them.
LARGEST_SIDE = 512


class Swap:
    """Exchanges modules by path, back and forth."""

    def __init__(self, model: nn.Module, replacements: Mapping[str, Replacement]) -> None:
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


class Whole(nn.Module):
    """The trunk of a model, looked up by name at each call, or all of it where there is none.

    Without a recognised stem the part that holds the residual stages runs, or the whole model.
    """

    def __init__(self, subject: PlanSubject) -> None:
        super().__init__()
        self.model = subject.model
        self.__dict__["trunk"] = subject.trunk
        self.root = subject.trunk.prefix.rstrip(".")
        self.what = "trunk" if subject.trunk.stem is not None else self.root or "model"

    def channels(self) -> int:
        """Channels of the image: those of the first convolution."""
        if self.trunk.stem is not None:
            return self.trunk.stem.convs[0].conv.in_channels
        parts = self.model.get_submodule(self.root).modules()
        return next(part.in_channels for part in parts if isinstance(part, nn.Conv2d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.trunk.stem is not None:
            return forward_trunk(self.trunk, x)[-1]
        y = self.model.get_submodule(self.root)(x)
        if isinstance(y, torch.Tensor):
            return y
        return next(t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, torch.Tensor))


class Outcome:
    """Compares the model before and after, and decides whether it pays.

    measure: at the plan's size and batch, which are timed; else one image of at most
    ``LARGEST_SIDE``.
    """

    def __init__(self, subject: PlanSubject, plan: Plan, batch: int, measure: bool) -> None:
        self.subject, self.plan, self.measure = subject, plan, measure
        self.whole = Whole(subject)
        generator = torch.Generator().manual_seed(0)
        height, width = plan.input_size
        if not measure:
            batch, height, width = 1, min(height, LARGEST_SIDE), min(width, LARGEST_SIDE)
        self.x = torch.randn(batch, self.whole.channels(), height, width, generator=generator)
        self.before_ms: float | None = None
        self.after_ms: float | None = None
        self.speedup: float | None = None
        self.measured = "measure=False"
        self.max_rel_err: float | None = None
        self.notes: list[str] = []

    def compare(self, swap: Swap) -> None:
        """Error and times; the model is left as it was."""
        with torch.no_grad():
            try:
                expected = self._masked_dense()
            except OpenTransError:
                raise
            except Exception as error:  # the model's own forward: its failure is only reported
                self.measured = f"{type(error).__name__} in the model's own forward: {error}"
                self.notes.append(f"not measured as a whole: {self.measured}")
                return
            swap.on()
            try:
                found = self.whole(self.x)
            finally:
                swap.off()
        self._check(expected, found)
        if not self.measure:
            return

        def switched(state: Callable[[], None]) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                state()
                return self.whole(self.x)

            return run

        try:
            samples = interleaved_ms(
                {"before": switched(swap.off), "after": switched(swap.on)}, 1.5, (3, 15)
            )
        finally:
            swap.off()
        before, after = samples["before"], samples["after"]
        self.before_ms, self.after_ms = statistics.median(before), statistics.median(after)
        rounds = min(len(before), len(after))  # a hopeless form has one sample only
        ratios = [b / a for b, a in zip(before[:rounds], after[:rounds], strict=True)]
        self.speedup = statistics.median(ratios) if rounds > 1 else self.before_ms / self.after_ms
        height, width = self.plan.input_size
        self.measured = f"{self.whole.what} at {height}x{width}"

    def _masked_dense(self) -> torch.Tensor:
        """The masked dense network; weights are masked in temporary copies."""
        masked = {}
        units = {c.name: u for u in self.subject.units for c in u.convs}
        for name, mask in self.subject.masks.items():
            conv = next(c.conv for c in units[name].convs if c.name == name)
            if not units[name].must_mask:
                continue
            if "weight" not in conv._parameters:
                raise UnsupportedModelError(
                    f"{name}: its weight is computed from others (pruned or parametrized) and a "
                    f"further mask is given. Make it permanent first: {make_permanent(conv)}."
                )
            masked[f"model.{name}.weight"] = conv.weight.detach() * mask
        if not masked:
            return self.whole(self.x)
        return torch.func.functional_call(self.whole, masked, (self.x,))

    def _check(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        if not torch.isfinite(torch.tensor(scale)):
            self.notes.append(
                "the dense network's own output on a random image is NaN or Inf, so the two could "
                "not be compared"
            )
            return
        error = float((found - expected).abs().max()) if expected.numel() else 0.0
        self.max_rel_err = error / max(scale, torch.finfo(torch.float32).tiny)
        if not self.max_rel_err <= BROKEN:
            raise UnsupportedModelError(
                f"the accelerated network differs from the masked dense one by "
                f"{self.max_rel_err:.1e} of its largest output; rounding explains at most about "
                f"{BROKEN:.0e}. Nothing was changed. Activations may cancel or overflow in this "
                "network; otherwise report this with the output of 'opentrans info'."
            )

    def give_up(
        self, plan: Plan, choices: Mapping[str, Choice]
    ) -> tuple[Plan, dict[str, Replacement]]:
        """The whole is slower: everything dense, but masks that are not in the weights applied."""
        slower = (
            f"the whole {self.whole.what} would be slower ({self.after_ms:.2f} ms against "
            f"{self.before_ms:.2f} ms)"
        )
        builder = Builder(self.subject)
        kinds: dict[str, str] = {}
        swaps: dict[str, Replacement] = {}
        for unit in self.subject.units:
            kinds[unit.name] = "compact" if unit.must_mask else "dense"
            if unit.must_mask:
                swaps.update(builder.build(unit, "compact").swaps)
            builder.release()
        units = tuple(
            replace(entry, kind=kinds[entry.name], reason=f"{kinds[entry.name]}: {slower}")
            if choices[entry.name].kind != kinds[entry.name]
            else entry
            for entry in plan.units
        )
        rows = tuple(
            row
            if row.kind == kinds[row.unit]
            else replace(
                row, kind=kinds[row.unit], executed_macs=row.nominal_macs, predicted_ms=None
            )
            for row in plan.rows
        )
        if swaps:
            self.notes.append(f"{slower}: it runs densely, with the masks applied")
            self.compare(Swap(self.subject.model, swaps))
        else:
            self.notes.append(f"{slower}: it was left as it was")
            self.after_ms, self.speedup = self.before_ms, 1.0
        totals = totals_of(units, rows, plan.totals["predicted_dense_ms"])
        return replace(plan, units=units, rows=rows, totals=totals), swaps
