"""Checkpoint and mask in, packed checkpoint out; written only if the result is exact."""

from __future__ import annotations

import argparse

from .options import ARCH_HELP, add_json, add_size, add_threads, arch_packages, input_size
from .progress import steps
from .render import Output, check_writable

SUMMARY = "checkpoint + mask in, packed checkpoint out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans accelerate``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights (.pt, .safetensors)")
    parser.add_argument(
        "--mask", metavar="MASK", help="mask file or recipe; without it the weights' own zeros"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="packed checkpoint")
    parser.add_argument("--arch", default="RN50", help=ARCH_HELP)
    add_size(parser)
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(packages=arch_packages)


def run(options: argparse.Namespace, out: Output) -> int:
    """Accelerate, compare with the float64 masked network, save; 1 and no file if inexact or if
    every layer stays dense."""
    check_writable(options.output)
    import torch

    from opentrans_kernels.accelerate import accelerate
    from opentrans_kernels.accelerate.compare import Whole
    from opentrans_kernels.bench.subject import load_subject
    from opentrans_kernels.bench.variants import relative_error
    from opentrans_kernels.checkpoint import save_accelerated
    from opentrans_kernels.topology import find_trunk
    from opentrans_kernels.towers import NAMED

    torch.set_num_threads(options.threads)
    subject = load_subject(options.mask, arch=options.arch, checkpoint=options.checkpoint)
    if subject.banner():
        out.warn(str(subject.banner()))
    size = input_size(options)
    with steps(out, "accelerate") as step, torch.no_grad():
        step("planning and packing")
        masked = subject.masked_copy()
        report = accelerate(subject.model, subject.masks, input_size=size, threads=options.threads)
        step("float64 reference")
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        error = own_error = None
        if report.max_rel_err is not None:  # else its forward does not take such an image
            own = Whole(masked, find_trunk(masked))(x)
            exact64 = masked.double()
            reference = Whole(exact64, find_trunk(exact64))(x.double())
            error = relative_error(Whole(subject.model, find_trunk(subject.model))(x), reference)
            own_error = relative_error(own, reference)
    # Every replaced layer was checked alone by accelerate, also where the whole cannot run.
    exact = error is None or error <= 2 * own_error
    written = exact and report.accelerated
    out.text(str(report))
    if error is None:
        out.text("the network as a whole was not compared; every replaced layer was")
    else:
        out.text(f"max error against float64: {error:.2e}; dense float32's own: {own_error:.2e}")
    if not report.accelerated:
        out.warn(f"nothing was accelerated, so {options.output} was not written; see above why")
    elif written:
        # Only known names are recorded: a file never says how else a network is built.
        arch = options.arch if options.arch in NAMED else None
        save_accelerated(options.output, subject.model, subject.masks, arch=arch)
        how = "load_accelerated builds the network" if arch else "load it with its network"
        out.text(f"wrote {options.output}; {how}", whole=True)
    else:
        out.warn(
            f"inexact: the error is more than twice dense float32's own; {options.output} was "
            "not written. Report this with the output of 'opentrans info'."
        )
    out.finish(
        {
            "subject": subject.describe(),
            "output": str(options.output) if written else None,
            "max_rel_err": error,
            "dense_own_rel_err": own_error,
            "exact": exact,
            "report": report.to_dict(),
        }
    )
    return 0 if written else 1
