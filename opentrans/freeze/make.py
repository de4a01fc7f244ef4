"""Makes a freeze plan from a model, an alpha table and a rule."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.spectrum import AlphaTable, LayerAlpha

from .pairing import NormPairs, pair_norms
from .plan import FreezePlan, parameters_of
from .record import Decision, Disagreement
from .rules import RULES, Choice, FreezeRule, Request, Unit, suggest
from .seen import denser_first, weights_of, weights_seen_by
from .work import Work, owner, trace_work


def freeze_plan(
    model: nn.Module,
    alphas: AlphaTable | None = None,
    rule: str = "median",
    *,
    ratio: float | None = None,
    seed: int | None = None,
    like: FreezePlan | None = None,
    match: str | None = None,
    until: str | None = None,
    layers: Sequence[str] | None = None,
    norms: bool = True,
    also: AlphaTable | None = None,
    weights_seen: str | None = None,
    input_size: tuple[int, int] | None = None,
    inputs: Sequence[torch.Tensor] | None = None,
    allow_trivial: bool = False,
) -> FreezePlan:
    """Decide which layers of ``model`` stop training. Nothing is changed; see ``plan.apply``.

    Layers are matched by their exact names. A parameter shared with a module that trains is not
    frozen; a fused q/k/v projection only if all three parts are. Parameters that are already
    frozen stay so, except under the rule ``opentrans``.

    Args:
        model: the module to be trained, or its backbone, before any distributed wrapper.
        alphas: from ``estimate_alpha(model)``. Rules without alphas take its layers as the layers
            to choose from; without a table these are all convolutions and linear layers.
        rule: a key of :data:`~opentrans.freeze.rules.RULES`, or one with its argument behind a
            colon: "ratio:0.25", "random:7", "prefix:layer2", "list:conv1,layer1.0.conv1".
        ratio: share of layers, for ``ratio`` and ``random`` (there 0.5 by default).
        seed: for ``random``.
        like: for ``random``: freeze as many layers as this plan (or as much work).
        match: for ``random``: "count" or "macs", equal layers or equal forward multiply-adds.
        until: for ``prefix``: the last module to freeze.
        layers: for ``list``: full module names.
        norms: freeze the affine of a batch norm with the layer it follows.
        also: a second table of the same layers and fit: that of the dense weights beside that of
            the masked ones. The one with fewer zeros decides, and ``plan.disagreement`` says where
            the other would freeze something else.
        weights_seen: "dense" or "masked": what the alphas were computed from; by default judged by
            the zeros that the table counted, or else by those in the model's weights now.
        input_size, inputs: what the model takes, for tracing; see ``FreezePlan.report``.
        allow_trivial: allow a plan that freezes nothing, or everything.

    Raises:
        PlanError: unknown rule, option or layer, a table of another model, or a trivial plan.
        UnsupportedModelError: multiply-adds are needed and the model cannot be traced.
    """
    given = {"ratio": ratio, "seed": seed, "like": like, "match": match, "until": until}
    given["layers"] = layers
    options = {key: value for key, value in given.items() if value is not None}
    row = parse_rule(rule, options)
    alphas, also = denser_first(alphas, also, row)
    tracer = _Tracer(model, input_size, inputs)
    pairs = NormPairs({})
    if norms and row.name != "opentrans":
        pairs = pair_norms(model, tracer.quietly())
    units = _units(model, alphas, row)
    if row.name == "prefix":
        units = _in_order(units, tracer.quietly())
    listed = options.get("layers", ())

    def no_norms(found: Sequence[Unit]) -> list[Unit]:
        return [one for one in found if one.name not in pairs.layer_of or one.name in listed]

    units = no_norms(units)
    shown = dict(options)
    if like is not None:
        options["like"] = frozenset(like.frozen)
        shown["like"] = like.digest()[:12]
    request = Request(units, options, lambda: tracer.work().layer_macs())
    choice = row.choose(request)
    disagreement = None
    if alphas is not None and also is not None:
        other = row.choose(Request(no_norms(_units(model, also, row)), options, request.macs))
        names = [unit.name for unit in units]
        labels = weights_of(alphas, also)
        disagreement = Disagreement.of(labels[0], choice.frozen, labels[1], other.frozen, names)
    if row.name == "opentrans":
        decisions, again = _published(model, units, choice)
    else:
        decisions, again = _exact(model, units, choice, pairs), ()
    seen, warning = weights_seen_by(
        model, [unit.name for unit in units], alphas if row.needs_alphas else None, weights_seen
    )
    own = dict(model.named_parameters(remove_duplicate=False))
    changed = [*(name for one in decisions for name in one.parameters), *again]
    plan = FreezePlan(
        rule=row.name,
        options={key: list(v) if key == "layers" else v for key, v in shown.items()},
        decisions=tuple(decisions),
        fit=alphas.label if alphas is not None and row.needs_alphas else None,
        threshold=choice.threshold,
        alpha_digest=alpha_digest(alphas) if alphas is not None and row.needs_alphas else None,
        weights_seen=seen,
        norms_frozen=norms and row.name != "opentrans",
        shapes={name: tuple(own[name].shape) for name in changed},
        already_frozen=tuple(n for n, p in own.items() if not p.requires_grad),
        trainable_again=tuple(again),
        notes=(*warning, *choice.notes, *pairs.notes, *tracer.notes),
        disagreement=disagreement,
    )
    if not allow_trivial:
        _refuse_trivial(plan, own, alphas)
    return plan


def alpha_digest(alphas: AlphaTable) -> str:
    """SHA-256 over fit, names, shapes and the exact alphas of a table."""
    parts = [[row.name, list(row.shape), float(row.alpha).hex()] for row in alphas]
    return hashlib.sha256(json.dumps([alphas.fit, parts]).encode()).hexdigest()


class _Tracer:
    """Traces the model at most once."""

    def __init__(self, model: nn.Module, size: Any, inputs: Any) -> None:
        self._arguments = (model, size, inputs)
        self._work: Work | None = None
        self.notes: tuple[str, ...] = ()

    def work(self) -> Work:
        if self._work is None:
            self._work = trace_work(*self._arguments)
        return self._work

    def quietly(self) -> Work | None:
        """The trace; None, with a note, if the model cannot be traced."""
        try:
            return self.work()
        except UnsupportedModelError as error:
            self.notes = (f"names alone tell order and batch norms: {error}",)
            return None


def parse_rule(text: str, options: dict[str, Any]) -> FreezeRule:
    """The row of ``text``; an argument behind a colon is added to ``options``.

    Raises:
        PlanError: unknown rule, or options it does not take.
    """
    name, colon, argument = text.partition(":")
    row = RULES.get(name)
    if row is None:
        raise PlanError(
            f"there is no freeze rule {name!r}.{suggest(name, RULES)} Rules: {', '.join(RULES)}."
        )
    if colon:
        if not row.options or not argument:
            raise PlanError(
                f"rule {name!r} "
                + (
                    f"misses its {row.options[0]} behind the colon."
                    if row.options
                    else f"takes no argument. Write {name!r} alone."
                )
            )
        options.setdefault(row.options[0], _argument(row.options[0], argument))
    foreign = [key for key in options if key not in row.options]
    if foreign:
        raise PlanError(
            f"rule {name!r} does not use {', '.join(foreign)}"
            + (f"; it takes {', '.join(row.options)}." if row.options else "; it takes no option.")
        )
    return row


def _argument(key: str, text: str) -> Any:
    try:
        if key == "ratio":
            return float(text)
        if key == "seed":
            return int(text)
    except ValueError as error:
        raise PlanError(f"{key} must be a number, got {text!r}.") from error
    return text.split(",") if key == "layers" else text


def _units(model: nn.Module, alphas: AlphaTable | None, row: FreezeRule) -> list[Unit]:
    """What the rule decides about, in network order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if alphas is not None:
        _same_model(modules, model, alphas)
    elif row.needs_alphas:
        raise PlanError(
            f"rule {row.name!r} needs alphas. Pass alphas=estimate_alpha(model), or use a rule "
            f"without: {', '.join(name for name, one in RULES.items() if not one.needs_alphas)}."
        )
    if alphas is not None and row.name not in ("prefix", "list"):
        grouped: dict[str, list[Any]] = {}
        for entry in alphas:
            grouped.setdefault(_module_of(entry, modules), []).append(entry)
        return [
            Unit(
                name,
                entries[0].kind,
                _kernel(modules[name]),
                {entry.part: entry.alpha for entry in entries},
                "; ".join(dict.fromkeys(entry.reason for entry in entries if entry.reason)),
            )
            for name, entries in grouped.items()
        ]
    units = []
    for name in parameters_of(model):
        weight = getattr(modules[name], "weight", None)
        kind = "other"
        if isinstance(modules[name], nn.modules.conv._ConvNd):
            kind = "conv"
        elif isinstance(weight, torch.Tensor) and weight.dim() == 2:
            kind = "linear" if not isinstance(modules[name], nn.Embedding) else "other"
        if kind != "other" or row.name in ("prefix", "list"):
            units.append(Unit(name, kind, _kernel(modules[name])))
    if not units:
        raise PlanError(
            f"{type(model).__name__} has no layer with parameters to freeze. Pass the model that "
            "is trained."
        )
    return units


def _kernel(module: nn.Module) -> tuple[int, ...]:
    size = getattr(module, "kernel_size", ())
    return tuple(size) if isinstance(size, tuple) else (size,)


def _in_order(units: list[Unit], work: Work | None) -> list[Unit]:
    """Units as the forward runs them, and behind them what it does not run."""
    rank: dict[str, int] = {}
    for name in work.parameters if work is not None else ():
        rank.setdefault(owner(name), len(rank))
    return sorted(units, key=lambda unit: rank.get(unit.name, len(rank)))


def _same_model(modules: Mapping[str, nn.Module], model: nn.Module, alphas: AlphaTable) -> None:
    if not len(alphas):
        raise PlanError("the alpha table has no rows. Estimate a model with weight matrices.")
    unknown = [row.module for row in alphas if _module_of(row, modules) not in modules]
    fix = "Estimate this very model: alphas=estimate_alpha(model)."
    if unknown:
        raise PlanError(
            f"the alpha table is of another model: {len(unknown)} of its {len(alphas)} layers are "
            f"not in {type(model).__name__}, for instance {unknown[0]}."
            f"{suggest(unknown[0], modules)} {fix}"
        )
    for row in alphas:
        weight = getattr(modules[_module_of(row, modules)], "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
        whole = sum(math.prod(one.shape) for one in alphas if one.parameter == row.parameter)
        fits = shape == row.shape if not row.part else shape and math.prod(shape) == whole
        if not fits:
            raise PlanError(
                f"the alpha table is of another model: it has {row.name} with shape {row.shape}, "
                f"here {row.module} has {shape}. {fix}"
            )


def _module_of(row: LayerAlpha, modules: Mapping[str, nn.Module]) -> str:
    """The module of a row; "" for the weight of a model that is a layer itself."""
    return "" if row.parameter == "weight" and "weight" not in modules else row.module


def _exact(
    model: nn.Module, units: Sequence[Unit], choice: Choice, pairs: NormPairs
) -> list[Decision]:
    owned = parameters_of(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, set[str]] = {}
    for module, names in owned.items():
        for name in names:
            owners.setdefault(id(named[name]), set()).add(module)

    def users(module: str, fixed: set[str]) -> set[str]:
        """Modules outside ``fixed`` that use a parameter of ``module``, which must then train."""
        found = (owners[id(named[name])] - fixed for name in owned.get(module, ()))
        return {user for one in found for user in one}

    frozen, why = set(choice.frozen), dict(choice.frozen)
    while True:  # a layer that must train may take others with it
        norms = {norm for name in frozen for norm in pairs.of(name)}
        shared = {name: found for name in frozen if (found := users(name, frozen | norms))}
        if not shared:
            break
        frozen -= set(shared)
        for name, found in shared.items():
            why[name] += f"; but a parameter is shared with {', '.join(sorted(found))}: it trains"
    decisions = []
    for unit in units:
        if unit.name not in frozen:
            reason = why.get(unit.name) or choice.kept[unit.name]
            decisions.append(Decision(unit.name, False, reason, unit.alphas))
            continue
        behind = tuple(
            norm
            for norm in pairs.of(unit.name)
            if norm not in frozen and not users(norm, frozen | norms)
        )
        parameters = tuple(n for one in (unit.name, *behind) for n in owned.get(one, ()))
        decisions.append(Decision(unit.name, True, why[unit.name], unit.alphas, parameters, behind))
    return decisions


def _published(
    model: nn.Module, units: Sequence[Unit], choice: Choice
) -> tuple[list[Decision], tuple[str, ...]]:
    """The published loop: freeze what *begins* with a frozen name, make all else trainable."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    # A third of a fused projection has a name of its own, which no parameter begins with.
    starts = [unit.name for unit in units if unit.name in choice.frozen and "" in unit.alphas]
    if not starts:
        return [Decision(u.name, False, choice.kept.get(u.name, "a part only"), u.alphas)
                for u in units], ()  # fmt: skip
    hit = {name: next((s for s in starts if name.startswith(s)), None) for name in names}
    taken: dict[str, list[str]] = {}
    for name, start in hit.items():
        if start is not None:
            home = next((u.name for u in units if name.startswith(f"{u.name}.")), start)
            taken.setdefault(home, []).append(name)
    decisions = []
    for unit in units:
        reason = choice.frozen.get(unit.name) or choice.kept[unit.name]
        caught = taken.get(unit.name, [])
        if caught and unit.name not in starts:
            reason += f"; frozen because its name begins with {hit[caught[0]]}"
        if unit.name in choice.frozen and not caught:
            reason += "; no parameter begins with the names of its parts: it trains"
        decisions.append(Decision(unit.name, bool(caught), reason, unit.alphas, tuple(caught)))
    return decisions, tuple(name for name, start in hit.items() if start is None)


def _refuse_trivial(
    plan: FreezePlan, own: Mapping[str, nn.Parameter], alphas: AlphaTable | None
) -> None:
    fix = "Choose another rule or ratio, or pass allow_trivial=True if this is meant."
    if not plan.parameters:
        why = "no layer was chosen"
        if alphas is not None and plan.fit is not None:
            known = [row.alpha for row in alphas if row.defined]
            why = f"of {len(alphas)} alphas {len(known)} are defined" + (
                f", from {min(known):.4g} to {max(known):.4g}" if known else ""
            )
        raise PlanError(f"rule {plan.rule!r} freezes nothing: {why}. {fix}")
    fixed = {id(own[name]) for name in plan.parameters}
    trains = [name for name, parameter in own.items() if id(parameter) not in fixed]
    if not trains or len(plan.frozen) == len(plan.decisions):
        raise PlanError(
            f"rule {plan.rule!r} freezes all {len(plan.decisions)} layers: nothing of them would "
            f"train. {fix}"
        )
