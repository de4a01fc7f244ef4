"""Choosing dense, compact or sparse for one unit: by measuring the forms, or by prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..activations import Kind
from ..audit import predicted_speedup
from ..ops.library import plane_padded
from ..topology.blocks import is_depthwise, plain_conv, winograd_window
from .build import Builder, Built, check_replaceable, dense_call
from .clock import interleaved_ms, undisturbed
from .layers import Layer, LinearUnit
from .reading import PLANAR
from .subject import PlanSubject, Unit

MARGIN = 0.97  # a form replaces the dense one if it takes at most this share of its time
CROSSOVER = 0.85  # above this density the sparse form of a large layer is not even tried
DEPTHWISE = 1.5  # speed of its kernel, which skips no zero, over dense; see docs/design.md
WINOGRAD = 1.5  # speed of a large 3x3 by Winograd's method over dense
WIDE = 28 * 28  # pixels from which it is taken without a clock
SMALL = 1 << 16  # weights of a layer so small that trying costs nothing


@dataclass
class Choice:
    """The decision for one unit; ``built`` is None for dense. ``ms``: kind -> milliseconds."""

    kind: str
    reason: str
    built: Built | None = None
    ms: dict[str, float] = field(default_factory=dict)


class Chooser:
    """Decides unit after unit, in execution order: a unit pays for the layout it receives."""

    def __init__(self, subject: PlanSubject, builder: Builder, batch: int, measure: bool) -> None:
        self.subject, self.builder = subject, builder
        self.batch, self.measure = batch, measure
        self._planar = False  # the unit before leaves the kernels' layout
        self._sparse: set[str] = set()  # convolutions that leave it, wherever they are read

    def choose(self, unit: Unit | LinearUnit) -> Choice:
        """The decision for ``unit``, with the modules that carry it out."""
        check_replaceable(unit)
        choice = self._fixed(unit)
        if choice is None:
            known = unit.layers[0].name in self.subject.shapes
            choice = self._measured(unit) if self.measure and known else self._predicted(unit)
        self._planar = choice.kind in PLANAR and not isinstance(unit, LinearUnit)
        if self._planar:
            self._sparse.add(unit.name)
        self.builder.release()
        return choice

    def _fixed(self, unit: Unit | LinearUnit) -> Choice | None:
        """Decisions that need no clock."""
        if not self.subject.has_zeros:
            return Choice("dense", "dense: no zeros")
        if unit.must_mask:
            return None
        if what := unit.changed:
            return Choice("dense", f"dense: {what}, which would not run")
        if unit.unsupported:
            return Choice("dense", f"dense: the convolution {unit.unsupported}")
        return None

    def _forms(self, unit: Unit | LinearUnit) -> tuple[list[str], str]:
        """Kinds to build, and why sparse is not among them."""
        # A dense linear layer has nothing to fold but its mask.
        dense = ["compact"] if unit.must_mask or not isinstance(unit, LinearUnit) else []
        if by_winograd(unit):
            dense = ["winograd", *dense]
        if unit.unsupported:
            return dense, f"the convolution {unit.unsupported}"
        if unit.density > CROSSOVER and unit.numel > SMALL:
            why = "no zeros" if unit.density == 1 else (
                f"density {unit.density:.2f} > crossover {CROSSOVER}"
            )  # fmt: skip
            return dense, why
        return ["sparse", *dense], ""

    def _measured(self, unit: Unit | LinearUnit) -> Choice:
        kinds, why_not_sparse = self._forms(unit)
        if not kinds:
            return Choice("dense", f"dense: {why_not_sparse}")
        forms = {kind: self.builder.build(unit, kind) for kind in kinds}
        native, arriving = self._inputs(unit)
        dense = dense_call(unit)
        calls = {kind: _bind(built.call, arriving) for kind, built in forms.items()}
        calls["dense"] = _bind(dense, native)
        if arriving is not native:
            calls["dense here"] = _bind(dense, arriving)
        ms = undisturbed(interleaved_ms(calls))
        dense_here = max(ms["dense"], ms.pop("dense here", 0.0))
        best = min(forms, key=lambda kind: ms[kind])
        others = ", ".join(f"{kind} {ms[kind]:.2f} ms" for kind in forms)
        if ms[best] <= MARGIN * dense_here or unit.must_mask:
            against = f"{ms[best]:.2f} ms against dense {ms['dense']:.2f} ms"
            if dense_here > 1.02 * ms["dense"] and ms[best] > MARGIN * ms["dense"]:
                against += f" ({dense_here:.2f} ms behind a sparse layer)"
            reason = f"{self._how(unit, best, why_not_sparse)}{against}"
            if ms[best] > dense_here:
                reason += "; the mask is not in the weights, so the layer cannot stay as it is"
            return Choice(best, reason, forms[best], ms)
        why = why_not_sparse or "not 3 % faster otherwise"
        return Choice("dense", f"dense: {why}: {ms['dense']:.2f} ms, {others}", None, ms)

    def _how(self, unit: Unit | LinearUnit, kind: str, why_not_sparse: str) -> str:
        if kind == "winograd":
            return f"winograd (dense{'; ' * bool(why_not_sparse)}{why_not_sparse}): "
        if kind == "sparse":
            alone = isinstance(unit, Unit) and unit.block is None
            one = alone and is_depthwise(unit.convs[0].conv)
            return "sparse (depthwise, every weight): " if one else "sparse: "
        if self.builder.shrinks(unit):
            sets = list(self.builder.compact.summaries[unit.name].channels.values())[:-1]
            after, before = sum(s.after for s in sets), sum(s.before for s in sets)
            how = f"{after} of {before} inner channels"
        else:
            folded = not isinstance(unit, LinearUnit) and unit.convs[0].bn is not None
            how = "batch norm folded" if folded else "mask applied"
        return f"compact ({how}{'; ' * bool(why_not_sparse)}{why_not_sparse}): "

    def _inputs(self, unit: Unit | LinearUnit) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [batch, cin, H, W] in the model's memory format, and as it arrives here; tokens
        [batch, tokens, cin] of a linear layer."""
        generator = torch.Generator().manual_seed(0)
        if isinstance(unit, LinearUnit):
            layer = unit.layers[0]
            tokens = self.subject.shapes[layer.name].pixels
            x = torch.randn(self.batch, tokens, layer.cin, generator=generator)
            return x, x
        conv, shape = unit.convs[0].conv, self.subject.shapes[unit.convs[0].name]
        size = (self.batch, conv.in_channels, shape.h_in, shape.w_in)
        native = torch.randn(size, generator=generator).relu_()
        last = torch.channels_last
        if conv.weight.is_contiguous(memory_format=last) and not conv.weight.is_contiguous():
            native = native.contiguous(memory_format=last)
        if unit.role == "loose":  # in order of registration, which proves nothing
            sources = unit.convs[0].sources
            planar = bool(sources) and self._sparse.issuperset(sources)
        else:
            planar = self._planar
        if not planar:
            return native, native
        return native, plane_padded(native, *native.shape).copy_(native)

    def _predicted(self, unit: Unit | LinearUnit) -> Choice:
        kinds, why_not_sparse = self._forms(unit)
        speed = predicted_unit_speedup(unit, self.subject)
        if "winograd" in kinds and WINOGRAD > speed and self._is_wide(unit):
            reason = f"{self._how(unit, 'winograd', why_not_sparse)}predicted {WINOGRAD:.1f}x"
            return Choice("winograd", reason, self.builder.build(unit, "winograd"))
        if "sparse" in kinds and speed > 1 / MARGIN:
            how = self._how(unit, "sparse", "")
            reason = f"{how}density {unit.density:.2f}, predicted {speed:.1f}x"
            return Choice("sparse", reason, self.builder.build(unit, "sparse"))
        why = why_not_sparse or f"density {unit.density:.2f}, sparse predicted {speed:.2f}x"
        if unit.must_mask or self.builder.shrinks(unit):
            reason = self._how(unit, "compact", "") + why
            return Choice("compact", reason, self.builder.build(unit, "compact"))
        return Choice("dense", f"dense: {why}")

    def _is_wide(self, unit: Unit | LinearUnit) -> bool:
        shape = self.subject.shapes.get(unit.layers[0].name)
        return shape is not None and shape.pixels >= WIDE


def by_winograd(unit: Unit | LinearUnit) -> bool:
    """Whether it is a convolution alone that Winograd's method computes."""
    if isinstance(unit, LinearUnit) or unit.block is not None:
        return False
    node = unit.convs[0]
    # Its error is relative to the largest sums of a tile, which ReLU6 cuts off and dense arithmetic
    # then rounds no more.
    cut = node.activation.kind == Kind.RELU6
    return winograd_window(node.conv) and plain_conv(node.conv) is None and not cut


def predicted_unit_speedup(unit: Unit | LinearUnit, subject: PlanSubject) -> float:
    """Predicted time of the dense unit over that of the sparse one."""
    dense = sparse = 0.0
    for layer in unit.layers:
        shape = subject.shapes.get(layer.name)
        work = layer.numel * (shape.pixels if shape else 1)
        dense += work
        sparse += work / predicted_layer_speedup(layer, unit.nnz[layer.name])
    return dense / max(sparse, 1e-9)


def predicted_layer_speedup(layer: Layer, nnz: int) -> float:
    """Predicted time of a dense layer over that of its kernel here."""
    if isinstance(layer.module, nn.Conv2d) and is_depthwise(layer.module):
        return DEPTHWISE
    return predicted_speedup(layer.shape[2], nnz / max(1, layer.numel))


def _bind(call, x):  # type: ignore[no-untyped-def]
    return lambda: call(x)
