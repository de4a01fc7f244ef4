"""The plain loop around a :class:`~opentrans.imp.Pruner`: train, prune, save, repeat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.plan import Plan

from ..gradskip import is_skipped, restore_skipped, skip_frozen
from .allocation import Allocation
from .config import ImpConfig
from .folder import STATE, RunFolder
from .patterns import Pattern
from .pruner import Pruner
from .ranks import check_same_masks, is_first, of_first
from .records import NotFiniteLoss, RoundRecord
from .schedule import ImpSchedule

Step = Callable[[nn.Module, int], "torch.Tensor | float | None"]


@dataclass(frozen=True)
class Progress:
    """Where the run is: steps and rounds done and planned, last loss, density of the masks.

    record: of the round this step ended, else None.
    """

    step: int
    steps: int
    round: int
    rounds: int
    loss: float | None
    density: float
    record: RoundRecord | None = None


@dataclass(frozen=True)
class ImpResult:
    """The masks after the last round, one record per round, and where they were saved."""

    masks: MaskSet
    records: tuple[RoundRecord, ...]
    folder: str | None

    def __str__(self) -> str:
        rows = [f"{'round':>5} {'steps':>7} {'left':>12} {'density':>8} {'loss':>10}"]
        for record in self.records:
            loss = "-" if record.loss is None else f"{record.loss:.4g}"
            rows.append(
                f"{record.round:5d} {record.steps:7d} {record.kept:12,d} {record.density:8.4f} "
                f"{loss:>10}"
            )
        return "\n".join([*rows, str(self.masks)])


def iterative_magnitude_pruning(
    model: nn.Module,
    step: Step,
    *,
    rounds: int = 22,
    rate: float = 0.1,
    target_density: float | None = None,
    period: int = 1000,
    first_after: int | None = None,
    scope: Iterable[str] | None = None,
    allocation: str = "global",
    strength: float = 0.5,
    floor: float | None = None,
    pattern: str = "unstructured",
    block: int = 16,
    rewind: int | None = None,
    masks: MaskSet | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extras: Mapping[str, Any] | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool | None = None,
    run_config: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (224, 224),
    plan: Plan | None = None,
    synthetic: bool = False,
    sparse: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> ImpResult:
    """Train, remove the smallest weights, repeat (Han et al., arXiv 2404.07448, algorithm 1).

    The model is trained and pruned in place: afterwards its removed weights are zero. With the
    defaults 10 % of the remaining weights go in each of 22 rounds, ranked by magnitude over all
    convolutions but the first, and 9.85 % are left.

    With several processes (torch.distributed) the first one writes, masks are compared after every
    round, and the random states of the first one alone are continued.

    Args:
        model: the network; see ``scope``.
        step: ``step(model, iteration)`` does one training step, optimizer included, and returns
            its loss (None: unknown). Iterations count from 0 over the whole run; take the data of
            a step from its number, or from an entry of ``extras``, so that a continued run sees
            what it would have seen.
        rounds, rate, target_density, period, first_after: see :class:`ImpSchedule`.
        scope: names of the Conv2d modules to prune; None: all but the first.
        allocation, strength, floor: "global", "uniform", "macs" or "latency"; see
            :class:`Allocation`. input_size (height, width in pixels) and plan (measured) are what
            "macs" and "latency" weigh by.
        pattern, block: "unstructured", "2:4", "channel" or "block"; see :class:`Pattern`.
        rewind: after how many steps the weights are kept, to return to them after every round;
            None: no rewinding.
        masks: masks to start from.
        optimizer: the one ``step`` uses; its state is cleared where weights go, and saved.
        extras: name -> object with ``state_dict`` and ``load_state_dict``, saved with the run.
        out_dir: folder for state, masks and log of every round (see ``folder``); None: nothing is
            saved.
        resume: None: continue a run found in ``out_dir``, else start; True: there must be one;
            False: there must be none.
        run_config: further settings that must agree when the run is continued (plain values).
        synthetic: the weights are not trained ones; the masks then say so.
        sparse: between rounds, run convolutions that are sparse enough on the sparse kernels in
            forward and backward (``skip_frozen`` with nothing frozen; float32 on a CPU). Batch
            norms then keep their statistics and train scale and shift; outside a ResNet trunk
            those behind sparse convolutions do, so train such networks in eval mode.
        on_progress: called after every step.

    Returns:
        Masks, records and folder. A run that was finished before returns at once.

    Raises:
        NotFiniteLoss: a loss is NaN or infinite. What was saved is the round before.
        PlanError, MaskError: settings, masks and model do not go together, or a run is continued
            with other settings (the message names them).
        CheckpointError: the folder cannot be used, or a file in it is damaged.
    """
    config = ImpConfig(
        ImpSchedule(rounds, rate, target_density, period, first_after),
        Allocation(allocation, strength, floor),
        Pattern(pattern, block),
        rewind,
        (input_size[0], input_size[1]),
        dict(run_config or {}),
    )
    pruner = Pruner(
        model, config, optimizer=optimizer, scope=scope, masks=masks, plan=plan, synthetic=synthetic
    )
    try:
        folder = None if out_dir is None else _folder(out_dir, pruner, extras, resume)
        if sparse and pruner.round:
            skip_frozen(model, (), bn="affine", masks=pruner.masks)
        for iteration in range(pruner.steps, pruner.total_steps):
            if pruner.finished:
                break
            loss = step(model, iteration)
            value = loss.item() if isinstance(loss, torch.Tensor) else loss
            try:
                record = pruner.after_step(iteration + 1, value)
            except NotFiniteLoss as error:
                where = f"Saved up to round {pruner.round} in {folder.path}." if folder else ""
                raise NotFiniteLoss(f"{error} {where}".strip()) from error
            if record is not None:
                check_same_masks(pruner)
                if folder is not None and is_first():
                    folder.save()
                if sparse:
                    skip_frozen(model, (), bn="affine", masks=pruner.masks)
            if on_progress is not None:
                on_progress(
                    Progress(
                        iteration + 1, pruner.total_steps, pruner.round, len(pruner.targets),
                        value, pruner.kept / pruner.total, record,
                    )
                )  # fmt: skip
    finally:
        pruner.close()
        if sparse and is_skipped(model):
            restore_skipped(model)
    return ImpResult(
        pruner.masks, tuple(pruner.records), None if folder is None else str(folder.path)
    )


def _folder(
    out_dir: str | os.PathLike[str],
    pruner: Pruner,
    extras: Mapping[str, Any] | None,
    resume: bool | None,
) -> RunFolder:
    folder = RunFolder(out_dir, pruner, extras)
    found = of_first(folder.has_state)
    if resume and not found:
        raise CheckpointError(
            f"there is no run to continue in {folder.path}: {STATE} is missing. Name the folder of "
            "the run, or start one with resume=None."
        )
    if resume is False and found:
        raise CheckpointError(
            f"{folder.path} holds a run already. Continue it (resume=None), or name a new folder."
        )
    if found:
        folder.load()
    elif stale := sorted(folder.path.glob("round-*.safetensors")):
        raise CheckpointError(
            f"{folder.path} holds masks such as {stale[0].name}, but no {STATE} to continue from. "
            "Name a new folder; pass masks= to start from one of them."
        )
    elif is_first():
        folder.save()
    return folder
