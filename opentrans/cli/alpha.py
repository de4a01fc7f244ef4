"""Alpha, the power-law exponent of every layer's weight spectrum, and what to freeze by it.

Weights come from CHECKPOINT (loaded into --arch), else they are synthetic and say nothing about a
trained network. --freeze makes a plan, small alpha first; its saving is counted, not assumed.
Where weights are there both dense and masked (--mask, or a pruned checkpoint that kept what lies
under its masks) both are measured, the dense ones decide, and what the others would freeze is told.

rules: median, above_median, ratio:SHARE, random:SEED, all_3x3, prefix:MODULE, list:A,B, opentrans
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .alpha_subject import compare_methods, load_alpha_subject
from .options import add_json, add_model, add_size, add_threads, input_size
from .progress import progress_bar
from .render import Cell, Output, check_writable, make_folder, write_atomically

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
        "--fit", metavar="MODE",
        help="xmin_peak (as in the published training, default), xmin_mid (default with --method "
        "farms), ks, xmin_peak_fixed, weightwatcher",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("whole", "farms"), default="whole",
        help="whole matrices (default), or sub-matrices of one aspect; farms also compares its "
        "freeze set with those of whole matrices",
    )  # fmt: skip
    parser.add_argument(
        "--mask", metavar="MASK", help="also measure the masked weights: mask file or recipe"
    )
    parser.add_argument(
        "--weights", choices=("dense", "masked"), default="dense",
        help="which decide where both are there (default dense); masked measures those alone",
    )  # fmt: skip
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

    FitOptions(options.fit or "xmin_peak")  # both refuse what they do not know, before the work
    if options.freeze:
        parse_rule(options.freeze, {})
    torch.set_num_threads(options.threads)
    subject = load_alpha_subject(options)
    if subject.banner:
        out.warn(subject.banner)
    start = time.perf_counter()

    def estimate(model: nn.Module, what: str) -> AlphaTable:
        with progress_bar(out, what) as progress:
            return estimate_alpha(
                model,
                options.fit,
                method=options.method,
                device=options.device,
                threads=options.threads,
                keep_spectra=folder is not None,
                progress=progress,
            )

    table = estimate(subject.model, "alpha")
    masked = None
    if subject.masked is not None:
        masked = estimate(subject.masked, "masked alpha")
    seconds = time.perf_counter() - start
    for note in table.notes:
        out.warn(note)
    if subject.banner:
        table = _with_note(table, subject.banner)
    plan = _plan(options, subject.model, table, masked)
    _show(table, masked, plan, out)
    out.text(f"estimated in {seconds:.2f} s wall on {options.threads} thread(s)")
    payload: dict[str, Any] = json.loads(table.to_json())
    payload.update(subject=subject.labels, seconds=seconds, threads=options.threads)
    payload.update(weights_seen=table.weights_seen, zeros=table.zeros)
    if masked is not None:
        payload["masked"] = json.loads(masked.to_json())
    if options.method == "farms":
        payload["freeze_sets"] = compare_methods(options, subject.model, table, out)
    savings_text = ""
    if plan is not None:
        saving = plan.report(subject.model, input_size(options))
        savings_text = str(saving)
        out.heading(f"Freeze plan, rule {plan.rule}, {options.size} px")
        out.text(savings_text)
        for note in plan.notes:
            if note not in table.notes:
                out.note(note)
        if plan.disagreement is not None:
            out.text(str(plan.disagreement))
        payload.update(freeze=plan.to_dict(), savings=saving.to_dict())
    if options.csv:
        table.to_csv(options.csv)
        out.text(f"wrote {options.csv}", whole=True)
    if plan is not None and options.save_plan:
        plan.to_json(options.save_plan)
        out.text(f"wrote {options.save_plan}", whole=True)
    if folder is not None:
        _write_plots(folder, table, plan, payload, savings_text, subject.banner, out)
    out.finish(payload)
    return 0


def _with_note(table: AlphaTable, note: str) -> AlphaTable:
    import dataclasses

    return dataclasses.replace(table, notes=(*table.notes, note))


def _plan(
    options: argparse.Namespace, model: nn.Module, table: AlphaTable, masked: AlphaTable | None
) -> FreezePlan | None:
    if not options.freeze:
        return None
    from opentrans.freeze import freeze_plan, parse_rule

    return freeze_plan(
        model,
        table,
        options.freeze,
        norms=not options.no_norms,
        also=masked if parse_rule(options.freeze, {}).needs_alphas else None,
        input_size=input_size(options),
    )


def _show(
    table: AlphaTable, masked: AlphaTable | None, plan: FreezePlan | None, out: Output
) -> None:
    columns = ["layer", "shape", "alpha", "D", "xmin", "kept/all", "norm", "stable rank"]
    zeros = masked or table
    columns += ["zeros"] if zeros.zeros > 0 else []
    columns += ["alpha masked"] if masked is not None else []
    numbers = len(columns)
    columns += ["freeze"] if plan is not None else []
    frozen = plan.frozen if plan is not None else frozenset()
    rows: list[list[Cell]] = []
    for index, row in enumerate(table):
        cells = _cells(row)
        if zeros.zeros > 0:
            cells.append(f"{zeros[index].zeros:.1%}")
        if masked is not None:
            cells.append(f"{masked[index].alpha:.4f}")
        if plan is not None:
            cells.append("frozen" if row.module in frozen else "trains")
        rows.append([*cells, _remark(row)])
    out.table(None, [*columns, "remark"], rows, right=list(range(2, numbers)))
    flagged = sum(row.ambiguous for row in table)
    summary = f"{len(table)} layers, fit {table.label}, median alpha {table.median():.4f}"
    if flagged:
        summary += f", {flagged} ambiguous (another correct implementation may differ there)"
    out.text()
    out.text(summary)
    seen = f"weights seen: {table.weights_seen}, {table.zeros:.1%} exact zeros"
    if masked is not None:
        seen += f"; beside them the masked ones, {masked.zeros:.1%}, median {masked.median():.4f}"
    out.text(seen)
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
    from opentrans_kernels.report import alpha_files

    make_folder(folder, "--plot")
    subject = payload["subject"]
    files = alpha_files(
        table,
        title=f"Alpha of {subject['arch']}",
        subtitle="; ".join(
            (subject["weights"], subject["mask"] or "no mask", f"fit {table.label}, float64")
        ),
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
