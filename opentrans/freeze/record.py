"""The data of a freeze plan: one decision per layer, the rule and the numbers behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Decision", "Disagreement", "PlanRecord"]


@dataclass(frozen=True)
class Decision:
    """What happens to one module, and why.

    alphas: the measured values, by part ("" for the whole weight); empty without alphas.
    parameters: full names of the parameters that stop training, those of ``norms`` included.
    norms: batch norms whose affine is frozen with the layer.
    """

    name: str
    frozen: bool
    reason: str
    alphas: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Disagreement:
    """Where two freeze sets over the same layers differ.

    first, second: what they were made from ("dense weights", "farms xmin_mid").
    only_first, only_second: layers that one of them alone freezes, in network order.
    layers: how many were decided about.
    """

    first: str
    second: str
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    layers: int

    @classmethod
    def of(
        cls,
        first: str,
        one: Collection[str],
        second: str,
        two: Collection[str],
        layers: Sequence[str],
    ) -> Disagreement:
        """Compare two sets of frozen layers; ``layers`` are all, in network order."""
        return cls(
            first,
            second,
            tuple(name for name in layers if name in one and name not in two),
            tuple(name for name in layers if name in two and name not in one),
            len(layers),
        )

    @property
    def count(self) -> int:
        """Layers on which the two differ."""
        return len(self.only_first) + len(self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "layers": self.layers,
            "count": self.count,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Disagreement:
        """What :meth:`to_dict` made. Raises KeyError or TypeError on anything else."""
        return cls(
            str(record["first"]),
            str(record["second"]),
            tuple(record["only_first"]),
            tuple(record["only_second"]),
            int(record["layers"]),
        )

    def __str__(self) -> str:
        text = f"freeze sets of {self.first} and of {self.second}: "
        if not self.count:
            return f"{text}the same over {self.layers} layers"
        sides = [
            f"only by {label}: {', '.join(names)}"
            for label, names in ((self.first, self.only_first), (self.second, self.only_second))
            if names
        ]
        return f"{text}{self.count} of {self.layers} layers differ; frozen {'; '.join(sides)}"


@dataclass(frozen=True)
class PlanRecord:
    """Which modules stop training, by which rule, from which numbers.

    Attributes:
        rule: a key of :data:`~opentrans.freeze.rules.RULES`.
        options: the rule's arguments.
        decisions: one per layer, in network order.
        fit: fit of the alpha estimate, behind a method other than "whole" ("farms xmin_mid"); None
            if the rule used no alpha.
        threshold: the cut on alpha (median, or the largest frozen alpha of ``ratio``).
        alpha_digest: SHA-256 over names, shapes, fit and alphas of the table.
        weights_seen: "dense" or "masked": the weights the alphas were computed from.
        norms_frozen: whether batch norms are frozen with their layer.
        shapes: parameter -> shape, for every parameter the plan changes: it fits no other model.
        already_frozen: parameters that were frozen when the plan was made, and stay so.
        trainable_again: parameters the rule ``opentrans`` makes trainable.
        notes: what could not be paired, drawn or decided; a warning if the alphas are of masked
            weights.
        disagreement: with the freeze set of a second table (``also=``); None without one.
    """

    rule: str
    options: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    fit: str | None = None
    threshold: float | None = None
    alpha_digest: str | None = None
    weights_seen: str = "dense"
    norms_frozen: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    already_frozen: tuple[str, ...] = ()
    trainable_again: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    disagreement: Disagreement | None = None

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen layers, without their batch norms."""
        return frozenset(one.name for one in self.decisions if one.frozen)

    @property
    def norms(self) -> frozenset[str]:
        """Names of the batch norms frozen with their layers."""
        return frozenset(norm for one in self.decisions for norm in one.norms)

    @property
    def modules(self) -> frozenset[str]:
        """Layers and batch norms: every module the plan freezes."""
        return self.frozen | self.norms

    @property
    def parameters(self) -> tuple[str, ...]:
        """Full names of all parameters the plan freezes, in network order."""
        return tuple(dict.fromkeys(name for one in self.decisions for name in one.parameters))

    def digest(self) -> str:
        """SHA-256 of what is frozen; it must be equal on every rank before training starts."""
        parts = [self.rule, sorted(self.parameters), sorted(self.trainable_again)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
