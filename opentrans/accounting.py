"""Multiply-adds of a training step, per layer and pass, by an honest rule or by the paper's.

1 MAC is one multiply-add. *honest*: forward of every layer; wgrad where the layer's weight trains;
dgrad where some trainable parameter, batch-norm affine included, feeds the layer's input; each pass
times the density of its mask only if a kernel skips the zeros in that pass. *paper* (Han et al.,
arXiv 2404.07448, supplement 6.2), with C the forward of a layer: forward C, dgrad C everywhere,
wgrad C where the layer trains; a mask scales forward and wgrad, whether or not a kernel skips
zeros, and never dgrad; the head counts its forward only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.synthetic import maskable_convs
from opentrans_kernels.topology.tracing import meta_copy

from .freeze import FreezePlan, Work, pair_norms, trace_work
from .freeze.work import owner

__all__ = ["NORM_MACS", "LayerFlops", "TrainingFlops", "training_flops"]

Rule = Literal["honest", "paper"]
Norms = Literal["exact", "full", "none"]
PASSES = ("forward", "dgrad", "wgrad")
NORM_MACS = 2  # per output element of a batch norm, as fvcore counts


@dataclass(frozen=True)
class LayerFlops:
    """MACs per image of one layer; ``nominal`` is its dense forward.

    kind: "layer" (convolution, linear), "norm" or "product" (of two activations). trains: its
    weight (affine) trains. density: share of its weights alive.
    """

    name: str
    kind: str
    nominal: int
    density: float
    trains: bool
    forward: float
    dgrad: float
    wgrad: float

    @property
    def total(self) -> float:
        return self.forward + self.dgrad + self.wgrad


@dataclass(frozen=True)
class TrainingFlops:
    """The account of :func:`training_flops`, in MACs per image unless ``total`` is asked for.

    rows: layers in execution order, freeze plan and masks in force. before: the same with neither.
    head, other: MACs of the head (all passes) and of forward-only towers. active: share of the
    images for which plan and masks are in force. notes: what is not counted.
    """

    rule: Rule
    rows: tuple[LayerFlops, ...]
    before: tuple[LayerFlops, ...]
    head: float
    other: float
    active: float
    notes: tuple[str, ...] = ()

    @property
    def backbone(self) -> float:
        """Mean over the schedule of the layers' MACs."""
        start, then = (sum(row.total for row in rows) for rows in (self.before, self.rows))
        return (1 - self.active) * start + self.active * then

    @property
    def per_image(self) -> float:
        """Mean over the schedule, head and other towers included."""
        return self.backbone + self.head + self.other

    @property
    def unchanged(self) -> float:
        """MACs per image without plan and masks."""
        return sum(row.total for row in self.before) + self.head + self.other

    @property
    def saved(self) -> float:
        """Share of the MACs that plan and masks save, 0 to 1."""
        return 1 - self.per_image / self.unchanged

    def total(self, images: int) -> float:
        """MACs of a schedule of ``images`` training images (batch size times steps)."""
        return self.per_image * images

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("backbone", "per_image", "unchanged", "saved")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'MMAC per image':<{width}} density   forward     dgrad     wgrad"]
        lines += [
            f"{row.name:<{width}} {row.density:7.3f} {row.forward / 1e6:9.2f} "
            f"{row.dgrad / 1e6:9.2f} {row.wgrad / 1e6:9.2f}"
            for row in self.rows
        ]
        lines.append(
            f"{self.rule} rule: {self.per_image / 1e9:.2f} GMAC per image (backbone "
            f"{self.backbone / 1e9:.2f}, head {self.head / 1e9:.2f}, other {self.other / 1e9:.2f})"
            f", {-self.saved:+.1%} from {self.unchanged / 1e9:.2f}; in force for {self.active:.0%} "
            "of the images"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def training_flops(
    model: nn.Module,
    freeze_plan: FreezePlan | Iterable[str] | None = None,
    masks: MaskSet | Mapping[str, torch.Tensor] | float | None = None,
    *,
    input_size: tuple[int, int] = (224, 224),
    rule: Rule = "honest",
    sparse: Collection[str] = (),
    freeze_norms: bool = True,
    norms: Norms = "exact",
    active: float = 1.0,
    head_macs: float = 0.0,
    head_trains: bool = True,
    other_macs: float = 0.0,
    leave_out: Sequence[str] = (),
) -> TrainingFlops:
    """Count the work of training ``model``; the model is traced without arithmetic, not changed.

    Args:
        model: the backbone. Everything in it trains, unless the plan says otherwise.
        freeze_plan: a FreezePlan, or names of modules to freeze; None: nothing is frozen.
        masks: pruning masks by module name, or one density for all layers: all but the first
            convolution by the honest rule, everything by the paper's. None: dense.
        input_size: (height, width) in pixels of a training image.
        rule: "honest" or "paper"; see the module.
        sparse: passes whose kernels skip zeros ("forward", "dgrad", "wgrad"); honest rule only.
            PyTorch alone skips none, so the default gives masks no credit.
        freeze_norms: for names: freeze the batch norm behind each frozen layer too.
        norms: batch norms at 2 MACs per element: "exact" follows the rule; "full" charges three
            passes whatever is frozen, the convention of published tables; "none" leaves them out.
        active: share of the images for which plan and masks are in force, 0.8 where they come
            after a fifth of the schedule. Before, all trains dense.
        head_macs: forward MACs per image of what follows the backbone. Honest: three passes if
            ``head_trains``, two if only the backbone does. Paper: one.
        other_macs: MACs per image of forward-only towers, such as a text encoder or a teacher.
        leave_out: names of modules not to count, such as "attnpool"; the input passes through.

    Raises:
        OpenTransError: unknown rule, pass or module, or a density or share outside 0 to 1.
        MaskError: masks and model disagree.
        PlanError: plan and model disagree.
        UnsupportedModelError: the model cannot be traced.
    """
    _check(rule, sparse, norms, active, masks)
    work = trace_work(_without(model, leave_out), input_size)
    everything = frozenset(work.parameters)
    frozen = _frozen_parameters(model, work, freeze_plan, freeze_norms)
    density = _densities(model, masks, work, rule)
    credit = frozenset(sparse) if rule == "honest" else frozenset(("forward", "wgrad"))
    count = _Counter(model, work, rule, norms)
    rows = count.rows(everything - frozen, density, credit)
    before = count.rows(everything, {}, frozenset())
    if rule == "paper":
        passes = 1
    else:
        passes = 3 if head_trains else 1 + bool(everything - frozen)
    notes = []
    if work.failure:
        notes.append(
            f"the forward stopped after these layers, nothing behind is counted: "
            f"{work.failure[:120]}"
        )
    if masks is not None and rule == "honest" and not sparse:
        notes.append("masks get no credit: no pass skips zeros (pass sparse=(...))")
    return TrainingFlops(rule, rows, before, head_macs * passes, other_macs, active, tuple(notes))


def _without(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """``model``, or a weightless copy with the modules ``names`` replaced by identities."""
    modules = dict(model.named_modules())
    unknown = [name for name in names if not name or name not in modules]
    if unknown:
        raise OpenTransError(
            f"leave_out names {unknown[0]!r}, which the model does not have. Use a module name "
            f"such as {next(n for n in modules if n)!r}."
        )
    if not names:
        return model
    twin = meta_copy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, nn.Identity())
    return twin


class _Counter:
    """Turns a trace into rows for a given set of trainable parameters and densities."""

    def __init__(self, model: nn.Module, work: Work, rule: Rule, norms: Norms) -> None:
        self.work, self.rule, self.norms = work, rule, norms
        # Multiply-adds per element of each convolution's output.
        self._cost = {n: conv.weight[0].numel() for n, conv in conv_modules(model).items()}

    def rows(
        self, trainable: frozenset[str], density: Mapping[str, float], credit: frozenset[str]
    ) -> tuple[LayerFlops, ...]:
        bits = self.work.bits(trainable)
        norm_of = {layer: norm for norm, layer in self.work.pairs.items()}
        owners = {owner(name) for name in trainable}
        found: list[LayerFlops] = []
        for product in self.work.products:
            name = owner(product.weights[0]) if product.weights else "(activations)"
            needed = sum(1 for feed in product.feeds if feed & bits)
            trains = bool(self.work.bits(product.weights) & bits)
            share = density.get(name, 1.0)
            found.append(
                self._row(
                    name, "layer" if product.weights else "product", product.macs, share, trains,
                    needed - trains, credit,
                )
            )  # fmt: skip
            norm = norm_of.get(name)
            if norm is not None and self.norms != "none" and name in self._cost:
                macs = NORM_MACS * (product.macs // self._cost[name])
                affine = norm in owners
                full = self.norms == "full" and self.rule == "honest"
                share = share if self.rule == "paper" else 1.0
                found.append(
                    self._row(
                        norm, "norm", macs, share, affine or full, int(needed > 0 or full), credit
                    )
                )
        return tuple(found)

    def _row(
        self,
        name: str,
        kind: str,
        macs: int,
        density: float,
        trains: bool,
        inputs: int,
        credit: frozenset[str],
    ) -> LayerFlops:
        if self.rule == "paper" and kind != "product":
            inputs = 1
        times = {p: density if p in credit else 1.0 for p in PASSES}
        return LayerFlops(
            name,
            kind,
            macs,
            density,
            trains,
            forward=macs * times["forward"],
            dgrad=inputs * macs * times["dgrad"],
            wgrad=trains * macs * times["wgrad"],
        )


def _check(rule: str, sparse: Collection[str], norms: str, active: float, masks: Any) -> None:
    if rule not in ("honest", "paper"):
        raise OpenTransError(f"there is no rule {rule!r}. Use rule='honest' or rule='paper'.")
    if norms not in ("exact", "full", "none"):
        raise OpenTransError(f"norms={norms!r} is not one of 'exact', 'full', 'none'.")
    unknown = sorted(set(sparse) - set(PASSES))
    if unknown or isinstance(sparse, str):
        raise OpenTransError(
            f"sparse={sparse!r} names no pass. Pass a tuple of {', '.join(PASSES)}."
        )
    if sparse and rule == "paper":
        raise OpenTransError(
            "the paper's rule has its own credit for masks (forward and wgrad, never dgrad), so "
            "sparse= has no meaning for it. Leave it out, or use rule='honest'."
        )
    shares = [("active", active)] + ([("masks", masks)] if isinstance(masks, float) else [])
    for name, share in shares:
        if not 0 <= share <= 1:
            raise OpenTransError(f"{name}={share:g} is not a share. Use a number from 0 to 1.")


def _frozen_parameters(
    model: nn.Module, work: Work, plan: FreezePlan | Iterable[str] | None, freeze_norms: bool
) -> frozenset[str]:
    if plan is None:
        return frozenset()
    if isinstance(plan, FreezePlan):
        plan.check(model)
        kept = set(plan.already_frozen) - set(plan.trainable_again)
        return frozenset({*plan.parameters, *kept})
    names = [plan] if isinstance(plan, str) else list(plan)
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise OpenTransError(
            f"{len(unknown)} of {len(names)} layers to freeze are not in the model, such as "
            f"{unknown[0]!r}. Use names of model.named_modules(), such as "
            f"{next(n for n in modules if n)!r}."
        )
    if freeze_norms:
        pairs = pair_norms(model, work)
        names += [norm for name in names for norm in pairs.of(name)]
    return frozenset(
        f"{name}.{key}" if name else key
        for name in names
        for key, _ in modules[name].named_parameters()
    )


def _densities(
    model: nn.Module,
    masks: MaskSet | Mapping[str, torch.Tensor] | float | None,
    work: Work,
    rule: Rule,
) -> dict[str, float]:
    """Module -> share of its weights alive; absent: dense."""
    if masks is None:
        return {}
    if isinstance(masks, float | int):
        layers: Iterable[str] = (
            work.layer_macs() if rule == "paper" else maskable_convs(meta_copy(model))
        )
        return dict.fromkeys(layers, float(masks))
    if not isinstance(masks, MaskSet):
        masks = MaskSet.from_tensors(masks)
    found = masks.match(model, strict=True).masks
    return {name: int(torch.count_nonzero(m)) / m.numel() for name, m in found.items()}
