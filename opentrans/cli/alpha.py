"""Alpha, the power-law exponent of every layer's weight spectrum, and what to freeze by it.

Weights come from CHECKPOINT (loaded into --arch), else they are synthetic and say nothing about a
trained network. --freeze makes a plan, small alpha first; its saving is counted, not assumed.

rules: median, above_median, ratio:SHARE, random:SEED, all_3x3, prefix:MODULE, list:A,B, opentrans
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_json, add_model, add_size, add_threads, input_size
from .progress import progress_bar
from .render import Cell, Output, check_writable, write_atomically

if TYPE_CHECKING:
    from torch import nn

    from opentrans.freeze import FreezePlan
    from opentrans_kernels.spectrum import AlphaTable, LayerAlpha

SUMMARY = "power-law exponent per layer, and a freeze plan from it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans alpha``."""
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="weights; without it synthetic ones"
    )
    add_model(parser, checkpoint=False)
    parser.add_argument(
        "--fit", default="xmin_peak", metavar="MODE",
        help="xmin_peak (as in the published training, default), xmin_mid, ks, xmin_peak_fixed, "
        "weightwatcher",
    )  # fmt: skip
    parser.add_argument(
        "--mask", metavar="MASK", help="measure the masked weights: mask file or recipe"
    )
    parser.add_argument(
        "--freeze", metavar="RULE", help="also make a freeze plan, for instance median"
    )
    parser.add_argument(
        "--no-norms", action="store_true", help="leave batch norms of frozen layers training"
    )
    parser.add_argument("--save-plan", metavar="FILE", help="write the freeze plan as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write all numbers as CSV")
    parser.add_argument(
        "--plot", metavar="DIR", help="write index.html, alpha.svg and spectra.svg there"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu or cuda (default: where the weights are, the CPU)"
    )
    add_size(parser)
    add_threads(parser)
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Estimate, decide, show, write."""
    from opentrans_kernels.errors import PlanError

    folder = check_writable(options.plot, directory=True) if options.plot else None
    for path in (options.csv, options.save_plan):
        if path:
            check_writable(path)
    if options.save_plan and not options.freeze:
        raise PlanError("--save-plan without a rule has no plan to save. Add --freeze median.")
    import torch

    from opentrans.freeze import parse_rule
    from opentrans_kernels.spectrum import FitOptions, estimate_alpha

    FitOptions(options.fit)  # both refuse what they do not know, before the work starts
    if options.freeze:
        parse_rule(options.freeze, {})
    torch.set_num_threads(options.threads)
    model, subject, banner = _subject(options)
    if banner:
        out.warn(banner)
    start = time.perf_counter()
    with progress_bar(out, "alpha") as progress:
        table = estimate_alpha(
            model,
            options.fit,
            device=options.device,
            threads=options.threads,
            keep_spectra=folder is not None,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    if banner:
        table = _with_note(table, banner)
    plan = _plan(options, model, table)
    _show(table, plan, out)
    out.text(f"estimated in {seconds:.2f} s wall on {options.threads} thread(s)")
    payload: dict[str, Any] = json.loads(table.to_json())
    payload.update(subject=subject, seconds=seconds, threads=options.threads)
    savings_text = ""
    if plan is not None:
        saving = plan.report(model, input_size(options))
        savings_text = str(saving)
        out.heading(f"Freeze plan, rule {plan.rule}, {options.size} px")
        out.text(savings_text)
        for note in plan.notes:
            out.note(note)
        payload.update(freeze=plan.to_dict(), savings=saving.to_dict())
    if options.csv:
        table.to_csv(options.csv)
        out.text(f"wrote {options.csv}", whole=True)
    if plan is not None and options.save_plan:
        plan.to_json(options.save_plan)
        out.text(f"wrote {options.save_plan}", whole=True)
    if folder is not None:
        _write_plots(folder, table, plan, payload, savings_text, banner, out)
    out.finish(payload)
    return 0


def _subject(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], str | None]:
    """The network, all of it trainable; labels for JSON; what must be said about it."""
    from opentrans_kernels.bench.subject import build_tower, load_subject, load_weights

    if options.mask is not None:
        subject = load_subject(
            options.mask, arch=options.arch, checkpoint=options.checkpoint, seed=options.seed
        )
        model, labels = subject.masked_copy(), subject.describe()
    else:
        model = build_tower(options.arch, seed=options.seed, empty=options.checkpoint is not None)
        weights = f"synthetic weights (seed {options.seed})"
        if options.checkpoint is not None:
            load_weights(model, options.checkpoint)
            weights = f"weights of {Path(options.checkpoint).name}"
        labels = {
            "arch": options.arch,
            "weights": weights,
            "mask": None,
            "synthetic": options.checkpoint is None,
        }
    banner = None
    if labels["synthetic"]:
        what = "mask" if options.checkpoint is not None else "weights"
        banner = (
            f"SYNTHETIC {what}: alphas and freeze decisions say nothing about a trained network."
        )
    return model.requires_grad_(True), labels, banner


def _with_note(table: AlphaTable, note: str) -> AlphaTable:
    import dataclasses

    return dataclasses.replace(table, notes=(*table.notes, note))


def _plan(options: argparse.Namespace, model: nn.Module, table: AlphaTable) -> FreezePlan | None:
    if not options.freeze:
        return None
    from opentrans.freeze import freeze_plan

    return freeze_plan(
        model,
        table,
        options.freeze,
        norms=not options.no_norms,
        input_size=input_size(options),
        weights_seen="dense" if options.mask is None else "masked",
    )


def _show(table: AlphaTable, plan: FreezePlan | None, out: Output) -> None:
    columns = ["layer", "shape", "alpha", "D", "xmin", "kept/all", "norm", "stable rank"]
    columns += ["freeze"] if plan is not None else []
    frozen = plan.frozen if plan is not None else frozenset()
    rows: list[list[Cell]] = []
    for row in table:
        cells = _cells(row)
        if plan is not None:
            cells.append("frozen" if row.module in frozen else "trains")
        rows.append([*cells, _remark(row)])
    right = range(2, 8)
    out.table(None, [*columns, "remark"], rows, right=list(right))
    flagged = sum(row.ambiguous for row in table)
    summary = f"{len(table)} layers, fit {table.fit}, median alpha {table.median():.4f}"
    if flagged:
        summary += f", {flagged} ambiguous (another correct implementation may differ there)"
    out.text()
    out.text(summary)
    for name, reason in table.skipped.items():
        out.text(f"left out: {name}: {reason}")


def _cells(row: LayerAlpha) -> list[Cell]:
    return [
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.alpha:.4f}",
        f"{row.ks_distance:.4f}",
        f"{row.xmin:.3e}",
        f"{row.num_evals}/{row.num_total}",
        f"{row.spectral_norm:.3g}",
        f"{row.stable_rank:.2f}",
    ]


def _remark(row: LayerAlpha) -> str:
    reason = f"ambiguous: {row.reason}" if row.ambiguous else row.reason
    precision = "" if row.precision == "float64" else row.precision
    return "; ".join(filter(None, (reason, row.approx, precision)))


def _write_plots(
    folder: Path,
    table: AlphaTable,
    plan: FreezePlan | None,
    payload: dict[str, Any],
    savings_text: str,
    banner: str | None,
    out: Output,
) -> None:
    from opentrans_kernels.errors import CheckpointError
    from opentrans_kernels.report import alpha_files

    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the directory {folder} cannot be created ({error.strerror}). Name another one with "
            "--plot."
        ) from error
    subject = payload["subject"]
    files = alpha_files(
        table,
        title=f"Alpha of {subject['arch']}",
        subtitle=f"{subject['weights']}; {subject['mask'] or 'no mask'}; fit {table.fit}, float64",
        banner=banner,
        plan=payload.get("freeze"),
        savings=payload.get("savings"),
        plan_text=str(plan) if plan is not None else "",
        savings_text=savings_text,
    )
    for name, text in files.items():
        write_atomically(folder / name, text)
    for name in files:
        out.text(f"wrote {folder / name}", whole=True)
