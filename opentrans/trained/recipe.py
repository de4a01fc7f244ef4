"""Prune a trained network on photographs alone, round by round, and let it recover.

Iterative magnitude pruning with distillation from the dense network, then training of what is left
at a falling rate. Both run on the sparse kernels where layers are sparse enough, both continue
where they were stopped.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet, atomic_write, open_checkpoint
from opentrans_kernels.plan import Plan

from ..gradskip import restore_skipped, skip_frozen
from ..imp import Progress, iterative_magnitude_pruning
from ..imp.scope import prunable_convs
from ..least_squares import reconstruct
from ..saved import check_entries, count, mapping, tensors
from ..state import check_parts, differences, load_optimizer, write_state
from .bank import Bank
from .objective import Objective
from .statistics import bank_inputs, recalibrate

__all__ = [
    "FIT_BELOW",
    "Recipe",
    "fine_tune",
    "norms_of",
    "prepared",
    "prune_on_photographs",
    "save_weights",
]

SAVE_EVERY = 100  # steps of recovery
# Norms whose scale and shift may train alone.
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
FIT_BELOW = 0.35  # of the weights; a fit of more takes minutes and training does as well
WARM_UP = 20  # steps, in which Adam's second moments are still those of a few batches
RECOVERY = "recovery.pt"
SELECTED = "selected.safetensors"  # masks, where they are not those of the last round
Settings = dict[str, Any]
ENTRIES = {"model": tensors, "optimizer": mapping, "steps": count, "settings": mapping}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. Raises PlanError for a density or rounds out of range.

    rounds, density: rounds of pruning, each taking the same share of what is left, down to
        ``density``; one round is one-shot pruning. period: steps of training between rounds. The
        first round comes after a single step: a student that equals the dense network has no
        gradient, and Adam would make full steps of its noise.
    recovery: steps after the last round, in which the rate falls from ``recovery_lr`` (None:
        ``lr``) to 0 along a cosine.
    lr, batch: of Adam, in crops. allocation, strength, pattern: see ``docs/pruning.md``.
    sparse: train on the sparse kernels.
    statistics: crops on which batch norms measure their running mean and variance again after every
        round; 0: they keep those of the dense network.
    fit: crops on which the kept weights are refitted, layer by layer, to the dense network's
        outputs after every round that leaves at most ``FIT_BELOW`` (:func:`reconstruct`); 0: never.
    select: turns in which the fit after the last round chooses anew, inside every layer, which
        weights to keep; 0: those the rounds left. Needs ``fit`` and single weights.
    """

    rounds: int = 22
    density: float = 0.1
    period: int = 60
    recovery: int = 1000
    lr: float = 1e-4
    recovery_lr: float | None = None
    batch: int = 1
    allocation: str = "global"
    strength: float = 0.5
    pattern: str = "unstructured"
    seed: int = 0
    sparse: bool = True
    statistics: int = 0
    fit: int = 0
    select: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or self.rounds < 1:
            raise PlanError(
                f"density={self.density} and rounds={self.rounds} do not go together with pruning: "
                "density is the share of weights left, above 0 and below 1 (0.1 keeps a tenth), "
                "rounds a whole number from 1."
            )
        if self.select and (not self.fit or self.pattern != "unstructured"):
            raise PlanError(
                f"select={self.select} chooses single weights while they are refitted, but fit is "
                f"{self.fit} and the pattern {self.pattern}. Set fit (64 crops) and the pattern "
                "'unstructured', or select=0."
            )

    def steps(self) -> int:
        """Of training, in all."""
        return 1 + (self.rounds - 1) * self.period + self.recovery

    def after_rounds(self) -> range:
        """Numbers of the steps that follow a round; the last one is the first of the recovery."""
        return range(1, 2 + (self.rounds - 1) * self.period, self.period)

    def rate(self) -> float:
        """Share of the remaining weights that a round removes."""
        return 1 - self.density ** (1 / self.rounds)


def prune_on_photographs(
    model: nn.Module,
    objective: Objective,
    bank: Bank,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    recipe: Recipe,
    *,
    scope: Iterable[str] | None = None,
    input_size: tuple[int, int] = (224, 224),
    plan: Plan | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str, int, int, float], None] | None = None,
) -> MaskSet:
    """Prune ``model`` in place by ``recipe``; returns its masks.

    Args:
        model: starts as the dense network whose answers ``bank`` holds.
        prepare: uint8 images -> network input.
        scope: names of the convolutions to prune; None: all but the first.
        input_size: (height, width) in pixels that ``macs`` and ``latency`` weigh by.
        plan: measured, whose milliseconds ``latency`` weighs by; None: predicted ones.
        out_dir: where the run is kept, to be continued by the same call.
        on_progress: called with "prune" or "recover", steps done, steps in all, loss.

    Raises the errors of ``iterative_magnitude_pruning``.
    """
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    bank.seed = recipe.seed
    names = list(prunable_convs(model, scope))
    repair = _Repair(model, names, bank, prepare, recipe)

    def step(network: nn.Module, iteration: int) -> torch.Tensor:
        repair(network, iteration)
        return _step(network, objective, bank, prepare, recipe.batch, optimizer, iteration)

    def show(progress: Progress) -> None:
        if on_progress is not None:
            on_progress("prune", progress.step, progress.steps, progress.loss or 0.0)

    result = iterative_magnitude_pruning(
        model, step, rounds=recipe.rounds, rate=recipe.rate(), target_density=recipe.density,
        period=recipe.period, first_after=1, scope=names, allocation=recipe.allocation,
        strength=recipe.strength, pattern=recipe.pattern, optimizer=optimizer, out_dir=out_dir,
        input_size=input_size, plan=plan, run_config=asdict(recipe), sparse=recipe.sparse,
        on_progress=show,
    )  # fmt: skip
    masks = _after_rounds(repair, model, result.masks, None if out_dir is None else Path(out_dir))
    fine_tune(
        model, objective, bank, prepare, masks, steps=recipe.recovery,
        lr=recipe.lr if recipe.recovery_lr is None else recipe.recovery_lr, batch=recipe.batch,
        sparse=recipe.sparse, first=recipe.steps() - recipe.recovery,
        path=None if out_dir is None else Path(out_dir) / RECOVERY,
        on_progress=None if on_progress is None else lambda *at: on_progress("recover", *at),
    )  # fmt: skip
    return masks


def _after_rounds(
    repair: _Repair, model: nn.Module, masks: MaskSet, folder: Path | None
) -> MaskSet:
    """Repair what the last round left; the masks as they are then. A recovery that has begun goes
    on with the weights that were selected before it."""
    kept = None if folder is None else folder / SELECTED
    if kept is not None and kept.exists() and (kept.parent / RECOVERY).exists():
        return MaskSet.load(kept)
    repair(model, repair.recipe.steps() - repair.recipe.recovery)
    if repair.selected is None:
        return masks
    if kept is not None:
        repair.selected.save(kept)
    return repair.selected


class _Repair:
    """What follows a round of pruning before training goes on. It is done at the step after the
    round, so that a run that was stopped between the two does it as well."""

    def __init__(
        self, model: nn.Module, names: list[str], bank: Bank, prepare: Callable[..., torch.Tensor],
        recipe: Recipe,
    ) -> None:  # fmt: skip
        self.names, self.bank, self.prepare, self.recipe = names, bank, prepare, recipe
        self.needed = bool(recipe.statistics or recipe.fit)
        self.selected: MaskSet | None = None  # masks, where those of the rounds were changed
        # Ordinary modules: a model that trains on the sparse kernels normalises inside them.
        self.dense = copy.deepcopy(model) if recipe.fit else model
        self.plain = copy.deepcopy(model) if self.needed else model

    def __call__(self, network: nn.Module, iteration: int) -> None:
        if not self.needed or iteration not in self.recipe.after_rounds():
            return
        if self.recipe.fit:
            self.plain.load_state_dict(network.state_dict())
            masks = _live(self.plain, self.names)
            last = iteration == self.recipe.after_rounds()[-1]
            select = self.recipe.select if last else 0
            if select or masks.density() <= FIT_BELOW:
                inputs = torch.cat(list(bank_inputs(self.bank, self.prepare, self.recipe.fit)))
                found = reconstruct(self.plain, self.dense, masks, inputs, select=select)
                network.load_state_dict(self.plain.state_dict())
                self.selected = found.masks if select else None
        if self.recipe.statistics:
            inputs = bank_inputs(self.bank, self.prepare, self.recipe.statistics)
            recalibrate(network, self.plain, inputs)


def _live(model: nn.Module, names: list[str]) -> MaskSet:
    weights = {name: model.get_submodule(name).weight for name in names}
    return MaskSet.from_tensors({name: weight.detach() != 0 for name, weight in weights.items()})


def save_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """The ``state_dict`` as a safetensors file, as a whole or not at all."""
    from safetensors.torch import save

    atomic_write(path, save({k: v.contiguous() for k, v in model.state_dict().items()}))


def fine_tune(
    model: nn.Module,
    objective: Objective,
    bank: Bank,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    masks: MaskSet,
    *,
    steps: int,
    lr: float,
    batch: int = 1,
    frozen: Iterable[str] = (),
    affine_only: bool = False,
    sparse: bool = True,
    first: int = 0,
    seconds: float | None = None,
    path: Path | None = None,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> int:
    """Train the live weights of a pruned model for ``steps`` steps; returns the steps done.

    The learning rate falls from ``lr`` to 0 along half a cosine, over steps or, with ``seconds``,
    over time: training then ends when they are over. Pruned weights stay zero. ``frozen`` layers
    do not train, nor the norms behind them. affine_only: nothing trains but scales and shifts of
    norms; gradients of weights are computed all the same. first: number of the first batch. path:
    continues from there, saved every 100 steps.

    Raises:
        PlanError: nothing is left to train, or the run in ``path`` had other settings.
        OpenTransError: the loss is not finite.
    """
    names = list(frozen)
    parts = norms_of(model) if affine_only else [model]  # the kernels stand in for norms
    with prepared(model, names, masks, sparse):
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        if not trained:
            why = "it has no norm with a scale and a shift" if affine_only else "all is frozen"
            raise PlanError(f"nothing of the network would train: {why}. Freeze less.")
        optimizer = torch.optim.Adam(trained, lr=lr, fused=True)
        own = masks.match(model, strict=True).masks
        hooks = [
            weight.register_hook(lambda grad, dead=~mask: grad.masked_fill(dead, 0))
            for name, mask in own.items()
            if (weight := model.get_parameter(f"{name}.weight")).requires_grad
        ]
        settings = {
            "steps": steps, "lr": lr, "batch": batch, "first": first, "frozen": names,
            "masks": masks.content_hash(), **({"affine_only": True} if affine_only else {}),
        }  # fmt: skip
        start = _load(path, model, optimizer, settings)
        began = time.perf_counter()
        done = start
        try:
            while done < steps:
                part = done / steps
                if seconds is not None:
                    part = (time.perf_counter() - began) / seconds
                    if part >= 1:
                        break
                warm = min(1.0, (done + 1) / WARM_UP)
                for group in optimizer.param_groups:
                    group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * part))
                loss = _step(model, objective, bank, prepare, batch, optimizer, first + done)
                if not math.isfinite(loss.item()):
                    raise OpenTransError(
                        f"the loss is {loss.item()} after {done} steps of recovery. Use a lower "
                        "learning rate."
                    )
                done += 1
                if on_progress is not None:
                    on_progress(done, steps, loss.item())
                if path is not None and done % SAVE_EVERY == 0:
                    _save(path, model, optimizer, done, settings)
        finally:
            for hook in hooks:
                hook.remove()
    if path is not None and done > start:
        _save(path, model, optimizer, done, settings)
    return done


def _step(
    model: nn.Module,
    objective: Objective,
    bank: Bank,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    optimizer: torch.optim.Optimizer,
    iteration: int,
) -> torch.Tensor:
    images, targets = bank.batch(iteration, batch)
    optimizer.zero_grad()
    loss = objective.loss(objective.outputs(model, prepare(images)), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The norms that have a scale and a shift."""
    return [m for m in model.modules() if isinstance(m, NORMS) and m.weight is not None]


@contextlib.contextmanager
def prepared(
    model: nn.Module, frozen: list[str], masks: MaskSet, sparse: bool = True
) -> Iterator[None]:
    """Zeros, flags and kernels for training; undone at the end, but for the zeros."""
    masks.apply_(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    try:
        if sparse:
            skip_frozen(model, frozen, bn="affine", masks=masks)
        else:
            for name in frozen:
                model.get_submodule(name).requires_grad_(False)
        yield
    finally:
        if sparse:
            restore_skipped(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, settings: Settings
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "steps": steps,
        "settings": settings,
    }
    write_state(path, state)


def _load(
    path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings
) -> int:
    """Steps done by the run that ``path`` holds, whose state is put back; 0 without a file."""
    if path is None or not path.exists():
        return 0
    name, state = str(path), open_checkpoint(path).content
    check_entries(name, state, ENTRIES)
    if found := differences(state["settings"], settings):
        raise PlanError(
            f"{name} was written by a run with other settings: {'; '.join(found)}. Continue with "
            "those, or name another folder."
        )
    check_parts(name, {**state, "extras": {}}, model, optimizer, {})
    load_optimizer(name, optimizer, state["optimizer"])
    model.load_state_dict(state["model"])
    return int(state["steps"])
