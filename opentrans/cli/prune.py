"""Prune a CLIP ResNet by iterative magnitude pruning, trained by distillation on plain images.

After every --period steps on the images, 10 % of the remaining weights are removed: the smallest,
ranked over all convolutions but the first. The loss compares image regions of the network with
those of the network as it started; no labels are needed. DIR receives state.pt (to continue; the
same command does), the masks of every round, log.json and index.html with the density of every
layer in every round.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import positive
from .progress import progress_bar, steps
from .render import Output, make_folder, write_atomically
from .training import add_training, example_settings, prepare

if TYPE_CHECKING:
    from opentrans.imp import ImpResult

SUMMARY = "iterative magnitude pruning on a folder of images, by distillation"

#: Settings of ``--example``: the whole way from dense to a tenth, in about two minutes.
EXAMPLE = {"size": 64, "batch": 4, "period": 5, "rate": 0.23, "target_density": 0.1, "rounds": 9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans prune``."""
    add_training(parser, output="prune-run")
    parser.add_argument("--rounds", type=positive, default=22, metavar="N", help="default 22")
    parser.add_argument(
        "--rate", type=float, default=0.1, metavar="R",
        help="share of the remaining weights that a round removes (default 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--target-density", type=float, metavar="D", help="stop at this density, exactly"
    )
    parser.add_argument(
        "--period", type=positive, default=1000, metavar="N", help="steps per round (default 1000)"
    )
    parser.add_argument(
        "--allocation", default="global", metavar="A",
        help="global (default), uniform, macs or latency: what a zero is worth in each layer",
    )  # fmt: skip
    parser.add_argument(
        "--pattern", default="unstructured", metavar="P",
        help="unstructured (default), 2:4, channel or block",
    )  # fmt: skip
    parser.add_argument("--strength", type=float, default=0.5, help="of macs, latency: 0.5")
    parser.add_argument("--floor", type=float, help="least density of a layer, see docs/pruning.md")
    parser.add_argument(
        "--rewind", type=int, metavar="STEP", help="return to the weights of this step every round"
    )
    parser.add_argument("--mask", metavar="MASK", help="mask file to start from")
    parser.add_argument(
        "--measure", action="store_true",
        help="for --allocation latency: time the layers here instead of predicting",
    )  # fmt: skip


def run(options: argparse.Namespace, out: Output) -> int:
    """Prune; the folder holds the result."""
    from opentrans_kernels.bench.subject import load_masks_file

    if options.example:
        example_settings(options, add_arguments, EXAMPLE)
    start = load_masks_file(options.mask) if options.mask else None
    training = prepare(options, out, start)
    import torch

    from opentrans.imp import iterative_magnitude_pruning

    optimizer = torch.optim.AdamW(
        training.parameters(), lr=options.lr, weight_decay=options.weight_decay
    )
    with progress_bar(out, "prune") as bar:

        def show(progress: Any) -> None:
            state = f"round {progress.round}/{progress.rounds}, {progress.density:.1%} left"
            bar(progress.step, progress.steps, f"{state}, loss {progress.loss:.4g}")
            if progress.record is not None and not out.stderr.isatty():
                out.text(
                    f"round {progress.round} of {progress.rounds}: {progress.record.kept:,} "
                    f"weights left ({progress.density:.2%}), loss {progress.record.loss:.4g}, "
                    f"{progress.record.seconds:.1f} s"
                )

        result = iterative_magnitude_pruning(
            training.model,
            training.stepper(optimizer),
            rounds=options.rounds,
            rate=options.rate,
            target_density=options.target_density,
            period=options.period,
            allocation=options.allocation,
            strength=options.strength,
            floor=options.floor,
            pattern=options.pattern,
            rewind=options.rewind,
            masks=start,
            optimizer=optimizer,
            extras={"distiller": training.distiller},
            out_dir=options.output,
            resume=False if options.fresh else None,
            run_config=training.settings,
            input_size=(options.size, options.size),
            plan=_measured(training.model, options, out),
            synthetic=training.synthetic,
            on_progress=show,
        )
    _finish(options, result, training.banner, out)
    return 0


def _measured(model: Any, options: argparse.Namespace, out: Output) -> Any:
    """A plan measured on a fifth of the weights, for ``--measure``; None without it."""
    if not options.measure or options.allocation != "latency":
        return None
    from opentrans.imp.milliseconds import measured_plan

    path = Path(options.output) / "plan.json"
    make_folder(path.parent)
    with steps(out, "measuring the layers"):
        return measured_plan(model, (options.size, options.size), path)


def _finish(
    options: argparse.Namespace, result: ImpResult, banner: str | None, out: Output
) -> None:
    from opentrans_kernels.report.prune import prune_page

    folder = Path(options.output)
    records = [record.to_dict() for record in result.records]
    title = f"{options.arch}: {options.allocation} {options.pattern} pruning"
    write_atomically(folder / "index.html", prune_page(title, records, banner))
    last = folder / f"round-{len(records):03d}.safetensors"
    out.heading(f"{options.arch} after {len(records)} rounds")
    columns = ("round", "steps", "weights left", "density", "mean loss", "seconds")
    rows = [
        [
            record.round,
            record.steps,
            record.kept,
            f"{record.density:.4f}",
            record.loss,
            f"{record.seconds:.1f}",
        ]
        for record in result.records
    ]
    out.table(None, columns, rows)
    out.text(f"\nmasks {last}\nplots {folder / 'index.html'}", whole=True)
    if banner is None:
        checkpoint = f" --checkpoint {folder / 'state.pt'}"
        command = f"opentrans bench trunk --arch {options.arch} --mask {last}{checkpoint}"
    else:
        command = f"opentrans bench trunk --arch {options.arch} --mask {last}"
        out.warn(banner)
    out.text(f"next: {command}", whole=True)
    out.finish(
        {
            "folder": str(folder),
            "mask": str(last),
            "content_hash": result.masks.content_hash(),
            "synthetic": banner is not None,
            "density": result.masks.density(),
            "rounds": records,
        }
    )
