"""Fine-tune a CLIP ResNet with part of its layers frozen, by distillation on plain images.

Which layers freeze is decided by a rule (small alpha first, as published), or read from a plan of
`opentrans alpha --save-plan`. Frozen layers keep only what backward needs. With --mask the pruned
weights stay zero and have no optimizer state. DIR receives state.pt (to continue; the same command
does), plan.json, log.json and, at the end, weights.safetensors.

rules: median, above_median, ratio:SHARE, random:SEED, all_3x3, prefix:MODULE, list:A,B, opentrans
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import positive
from .progress import progress_bar
from .render import Output, make_folder, write_atomically
from .training import Training, add_training, example_settings, prepare

if TYPE_CHECKING:
    import torch

    from opentrans.freeze import FreezePlan
    from opentrans.state import SavedTraining, TrainingState
    from opentrans_kernels.masks import MaskSet

SUMMARY = "fine-tune with frozen layers (and masks) on a folder of images, by distillation"
STATE, PLAN, LOG, WEIGHTS = "state.pt", "plan.json", "log.json", "weights.safetensors"

EXAMPLE = {"size": 64, "batch": 4, "steps": 40, "save_every": 20, "rule": "all_3x3"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans freeze``."""
    add_training(parser, output="freeze-run")
    parser.add_argument("--steps", type=positive, default=1000, metavar="N", help="default 1000")
    parser.add_argument(
        "--save-every", type=positive, default=100, metavar="N", help="steps (default 100)"
    )
    parser.add_argument("--rule", default="median", metavar="RULE", help="default median")
    parser.add_argument("--plan", metavar="FILE", help="a freeze plan, instead of a rule")
    parser.add_argument(
        "--fit", default="xmin_peak", metavar="MODE", help="of alpha (default xmin_peak)"
    )
    parser.add_argument("--mask", metavar="MASK", help="mask file or recipe; stays in force")
    parser.add_argument(
        "--plain", action="store_true",
        help="freeze with requires_grad only, without gradient skipping",
    )  # fmt: skip


def run(options: argparse.Namespace, out: Output) -> int:
    """Train; the folder holds the result."""

    if options.example:
        example_settings(options, add_arguments, EXAMPLE)
    folder = Path(options.output)
    saved = _saved(folder, options)
    training = prepare(options, out)
    masks = saved.masks if saved is not None else _masks(training, options)
    plan = saved.freeze_plan if saved is not None else _plan(training, options, masks, out)
    if masks is not None:
        masks.apply_(training.model)
        if masks.source.synthetic and training.banner is None:
            out.warn("the masks say that they are SYNTHETIC")
    skipping = _freeze(training, options, plan, out)
    optimizer = _optimizer(training, options, masks)
    make_folder(folder)
    if plan is not None:
        plan.to_json(folder / PLAN)
    from opentrans.state import TrainingState

    names = ("rule", "fit", "plan", "mask", "plain")
    settings = training.settings | {name: getattr(options, name) for name in names}
    state = TrainingState(
        training.model,
        optimizer,
        masks=masks,
        freeze_plan=plan,
        extras={"distiller": training.distiller},
        config=settings,
    )
    first = state.load(folder / STATE).step if saved is not None else 0
    log = _read_log(folder) if saved is not None else []
    seconds = _train(training, optimizer, state, first, log, options, out)
    _finish(training, optimizer, log, seconds, skipping, options, out)
    return 0


def _saved(folder: Path, options: argparse.Namespace) -> SavedTraining | None:
    """Masks and plan of a run that is there already."""
    from opentrans.state import read_training_state
    from opentrans_kernels.errors import CheckpointError

    if not (folder / STATE).exists():
        return None
    if options.fresh:
        raise CheckpointError(
            f"{folder} holds a run already. Leave out --fresh to continue it, or name another "
            "folder with --output."
        )
    return read_training_state(folder / STATE)


def _masks(training: Training, options: argparse.Namespace) -> MaskSet | None:
    if options.mask is None:
        return None
    from opentrans_kernels.bench.subject import load_masks_file
    from opentrans_kernels.synthetic import is_mask_spec, synthetic_masks

    if is_mask_spec(options.mask):
        return synthetic_masks(training.model, options.mask)
    return load_masks_file(options.mask).transfer_to(training.model)


def _plan(
    training: Training, options: argparse.Namespace, masks: MaskSet | None, out: Output
) -> FreezePlan:
    """The plan of a file, or made by the rule from the weights before they are masked."""
    from opentrans.freeze import FreezePlan, freeze_plan

    if options.plan is not None:
        plan = FreezePlan.from_json(options.plan)
        plan.check(training.model)
        return plan
    from opentrans.freeze import RULES

    alphas = also = None
    rule = RULES.get(options.rule.partition(":")[0])
    if rule is not None and rule.needs_alphas:
        from opentrans_kernels.spectrum import estimate_alpha

        with progress_bar(out, "alpha") as bar:
            alphas = estimate_alpha(training.model, options.fit, progress=bar)
        for note in alphas.notes:
            out.warn(note)
        if masks is not None:
            with progress_bar(out, "masked alpha") as bar:
                also = estimate_alpha(training.model, options.fit, masks=masks, progress=bar)
    plan = freeze_plan(
        training.model, alphas, options.rule, also=also, input_size=(options.size, options.size)
    )
    if plan.disagreement is not None:
        out.text(str(plan.disagreement))
    return plan


def _freeze(
    training: Training, options: argparse.Namespace, plan: FreezePlan | None, out: Output
) -> dict[str, Any]:
    """Apply the plan; what is kept for backward, in bytes, for JSON."""
    model, size = training.model, (options.size, options.size)
    if plan is None:
        return {}
    out.heading(f"Freeze plan, rule {plan.rule}")
    out.text(str(plan.report(model, size)))
    plan.apply(model)
    if options.plain:
        return {}
    from opentrans.gradskip import skip_frozen

    report = skip_frozen(model, plan)
    kept = report.explain(size, options.batch)
    out.text(str(report))
    out.text(str(kept).splitlines()[-1 - len(kept.uncounted)])
    return {"kept_bytes": kept.total, "baseline_bytes": kept.baseline}


def _optimizer(
    training: Training, options: argparse.Namespace, masks: MaskSet | None
) -> torch.optim.Optimizer:
    import torch

    settings: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if masks is None:
        return torch.optim.AdamW(training.parameters(), **settings)
    from opentrans.masked import MaskedOptimizer

    return MaskedOptimizer(
        torch.optim.AdamW, training.model, masks, training.parameters(), **settings
    )


def _train(
    training: Training,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    first: int,
    log: list[dict[str, Any]],
    options: argparse.Namespace,
    out: Output,
) -> float:
    """Steps ``first`` to the last; saves on the way. Returns the CPU seconds of a step."""
    from opentrans_kernels.errors import OpenTransError

    folder, step = Path(options.output), training.stepper(optimizer)
    losses: list[float] = []
    began, done = time.process_time(), 0
    with progress_bar(out, "freeze") as bar:
        for iteration in range(first, options.steps):
            loss = step(training.model, iteration).item()
            if not math.isfinite(loss):
                raise OpenTransError(
                    f"the loss is {loss} at step {iteration + 1}, and nothing of that is kept: "
                    f"{folder / STATE} is of step {log[-1]['step'] if log else 0}. Start again "
                    "from it with a lower --lr in a new folder, or look for broken images."
                )
            losses.append(loss)
            done += 1
            bar(iteration + 1, options.steps, f"loss {loss:.4g}")
            if (iteration + 1) % options.save_every == 0 or iteration + 1 == options.steps:
                mean = sum(losses) / len(losses)
                log.append({"step": iteration + 1, "loss": mean})
                losses = []
                state.save(folder / STATE, step=iteration + 1)
                write_atomically(folder / LOG, json.dumps(log, indent=2) + "\n")
                if not out.stderr.isatty():  # a bar in place would leave nothing behind
                    out.text(f"step {iteration + 1} of {options.steps}: mean loss {mean:.4g}")
    return (time.process_time() - began) / max(1, done)


def _read_log(folder: Path) -> list[dict[str, Any]]:
    """The log up to the saved step; a run that was stopped while saving may be without it."""
    from opentrans_kernels.errors import CheckpointError
    from opentrans_kernels.masks.limits import parse_json

    path = folder / LOG
    if not path.exists():
        return []
    try:
        log = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
            raise ValueError("it holds no list of steps")
        return log
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not the log of a run ({error}). Remove it; the state does not need it."
        ) from error


def _finish(
    training: Training,
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, Any]],
    seconds: float,
    skipping: dict[str, Any],
    options: argparse.Namespace,
    out: Output,
) -> None:
    from safetensors.torch import save

    from opentrans_kernels.masks import atomic_write

    folder = Path(options.output)
    weights = {k: v.detach().contiguous() for k, v in training.model.state_dict().items()}
    atomic_write(folder / WEIGHTS, save(weights))
    memory = getattr(optimizer, "state_bytes", None)
    if memory is not None:
        out.text(f"optimizer: {memory()}")
    out.table(None, ("step", "mean loss"), [[row["step"], row["loss"]] for row in log])
    out.text(f"\n{seconds:.2f} s of CPU time per step; weights {folder / WEIGHTS}")
    if training.banner is not None:
        out.warn(training.banner)
    out.finish(
        {
            "folder": str(folder),
            "synthetic": training.synthetic,
            "cpu_seconds_per_step": seconds,
            "log": log,
            **skipping,
        }
    )
