"""The whole way in one go: a trained pruned network on a photograph, beside the dense one; then
network, mask, audit, plan, exactness, timing, and a report to read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import chosen_cpus, failures, show
from .inspect import show_audit
from .options import (
    AGAIN,
    add_json,
    add_size,
    add_threads,
    arch_packages,
    input_size,
    positive,
)
from .progress import begin, steps
from .render import Output, check_writable, make_folder, to_json, write_atomically

if TYPE_CHECKING:
    from opentrans_kernels.bench.subject import Subject
    from opentrans_kernels.report import Picture

SUMMARY = "the whole way on one page: mask, audit, plan, exactness, timing, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans demo``."""
    parser.add_argument(
        "--weights", metavar="FILE", help="RN50 weights; else open_clip's 'openai', else synthetic"
    )
    parser.add_argument(
        "--no-download", action="store_true", help="do not look for weights on the network"
    )
    parser.add_argument(
        "--no-trained", action="store_true", help="leave the trained network's part out"
    )
    parser.add_argument(
        "--mask", default="global:0.90", metavar="MASK", help="file or recipe (global:0.90)"
    )
    parser.add_argument("--arch", default="RN50", help="RN50, RN101 or RN50x4 (default RN50)")
    parser.add_argument(
        "--output", default="demo-report", metavar="DIR", help="default demo-report"
    )
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--variants", metavar="A,B,...", help="dense variants to time (default: as bench trunk)"
    )
    add_size(parser)
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(packages=arch_packages)


def run(options: argparse.Namespace, out: Output) -> int:
    """Run the demo; 1 if the accelerated network is not exact."""
    from opentrans_kernels.bench.environment import missing_limits, rerun
    from opentrans_kernels.bench.timing import pin

    folder = check_writable(options.output, directory=True)
    if missing_limits("native", options.threads):
        return rerun([*AGAIN, *options.arguments], "native", options.threads)
    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)
    begin(out, "opentrans demo")
    from opentrans_kernels.audit import audit
    from opentrans_kernels.bench.trunk import TrunkOptions
    from opentrans_kernels.bench.trunk import run as run_trunk
    from opentrans_kernels.bench.variants import BASELINE

    size = input_size(options)
    settings = TrunkOptions(
        height=size[0],
        width=size[1],
        threads=options.threads,
        rounds=options.rounds,
        variants=tuple(options.variants.split(",")) if options.variants else BASELINE,
        cpus=tuple(cpus) if cpus is not None else None,
    )
    settings.check()
    trained, pictures = _trained(options, out)
    subject = _subject(options, out)
    out.heading("2. The mask, layer by layer")
    audited = audit(subject.masks, subject.model, input_size=size)
    show_audit(audited, out)
    out.heading("3. Timing, dense and accelerated interleaved")
    with steps(out, "demo") as step:
        result = run_trunk(subject, settings, step)
    out.heading("4. What was done with each layer")
    out.text(result["report"]["text"])
    show(result, out)
    result.update(audit=str(audited), plan=result["report"]["text"], banner=subject.banner())
    result["trained"] = trained
    result["failed_checks"] = failures(result, None)
    _write(folder, result, pictures, out)
    for line in result["failed_checks"]:
        out.warn(line)
    out.finish(result)
    return 1 if result["failed_checks"] else 0


def _trained(options: argparse.Namespace, out: Output) -> tuple[dict[str, Any], list[Picture]]:
    from .demo_trained import trained_part

    if options.no_trained:
        return {"skipped": "--no-trained was given."}, []
    out.heading("1. A trained network: the edges of a photograph")
    named = tuple(options.variants.split(",")) if options.variants else None
    return trained_part(out, options.threads, named)


def _subject(options: argparse.Namespace, out: Output) -> Subject:
    """The demo's network; says loudly where the weights come from."""
    from opentrans_kernels.bench.subject import load_subject

    from .weights import openai_weights

    weights = options.weights
    if weights is None and not options.no_download:
        found = openai_weights(options.arch)
        weights = found.path
        if weights is None:
            out.warn(f"no trained weights: {found.reason}. Pass them with --weights FILE.")
        else:
            out.text(f"OpenAI's {options.arch} weights {found.reason}")
    subject = load_subject(options.mask, arch=options.arch, checkpoint=weights)
    if subject.banner():
        out.warn(str(subject.banner()))
    return subject


def _write(folder: Path, result: dict[str, Any], pictures: list[Picture], out: Output) -> None:
    """The page and the numbers, each replaced atomically."""
    from opentrans_kernels.report import demo_page

    make_folder(folder)
    write_atomically(folder / "report.json", to_json(result))
    write_atomically(folder / "index.html", demo_page(result, pictures))
    out.text(f"\nwrote {folder / 'index.html'} and {folder / 'report.json'}", whole=True)
