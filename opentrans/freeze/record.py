"""The data of a freeze plan: one decision per layer, the rule and the numbers behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Decision", "PlanRecord"]


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
class PlanRecord:
    """Which modules stop training, by which rule, from which numbers.

    Attributes:
        rule: a key of :data:`~opentrans.freeze.rules.RULES`.
        options: the rule's arguments.
        decisions: one per layer, in network order.
        fit: mode of the alpha estimate; None if the rule used no alpha.
        threshold: the cut on alpha (median, or the largest frozen alpha of ``ratio``).
        alpha_digest: SHA-256 over names, shapes, fit and alphas of the table.
        weights_seen: "dense" or "masked": the weights the alphas were computed from.
        norms_frozen: whether batch norms are frozen with their layer.
        shapes: parameter -> shape, for every parameter the plan changes: it fits no other model.
        already_frozen: parameters that were frozen when the plan was made, and stay so.
        trainable_again: parameters the rule ``opentrans`` makes trainable.
        notes: what could not be paired, drawn or decided.
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
