"""Show what would be done with each layer (dense, compact, sparse), why, and how long it takes."""

from __future__ import annotations

import argparse

from .options import add_json, add_model, add_size, add_threads, input_size, subject_of
from .progress import steps
from .render import Output

SUMMARY = "per layer: dense, compact or sparse, with the reason"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans plan``."""
    parser.add_argument("mask", metavar="MASK", help="mask file or recipe")
    add_model(parser)
    add_size(parser)
    add_threads(parser)
    parser.add_argument(
        "--no-measure", action="store_true", help="predict times from a model, run nothing"
    )
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Make the plan and show it; the plan's own text is the documentation."""
    import torch

    from opentrans_kernels.plan import make_plan

    torch.set_num_threads(options.threads)
    subject = subject_of(options, out)
    with steps(out, "planning"):
        plan = make_plan(
            subject.model,
            subject.masks,
            input_size=input_size(options),
            threads=options.threads,
            measure=not options.no_measure,
        )
    out.text(str(plan))
    out.finish({"subject": subject.describe(), "plan": plan.to_dict()})
    return 0
