"""``opentrans bench schedule``: what more cores would make of the accelerated trunk, from the times
of its units of work on one thread of this machine."""

from __future__ import annotations

import argparse
from typing import Any

from .bench_op import numbers
from .bench_rows import show_repeats
from .bench_session import Session, add_limits, limit
from .options import add_json, add_model, add_size, input_size, positive, subject_of
from .progress import steps
from .render import Output

SUMMARY = "simulate the kernels' schedule on N cores from units timed on one"
CORES, QUICK_CORES = (2, 4, 8, 16, 32, 64), (2, 8)
ROUNDS, QUICK_ROUNDS = 7, 3
MOST_CORES = 4096  # what the extension records for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench schedule``."""
    parser.add_argument(
        "--mask", default="global:0.90", metavar="MASK", help="mask file or recipe (global:0.90)"
    )
    add_model(parser)
    add_size(parser)
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="images (default 1)")
    parser.add_argument(
        "--cores", metavar="N,...", help=f"default {','.join(map(str, CORES))}, at most 4096"
    )
    add_limits(parser, threads=False)
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help=f"default {ROUNDS}, quick {QUICK_ROUNDS}"
    )
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Time the units, simulate, show."""
    cores = numbers(
        options.cores, int, "--cores", lambda n: 1 <= n <= MOST_CORES, "2,4,8 (at most 4096)"
    )
    options.threads = 1
    from opentrans_kernels.bench.environment import missing_limits
    from opentrans_kernels.bench.part import TrunkModule
    from opentrans_kernels.bench.schedule import barrier, measure_schedule

    cost = None
    if not missing_limits(options.isa, options.threads):
        cost = barrier()  # before this process is pinned to the one CPU that is timed
    started = limit(options, out)
    if isinstance(started, int):
        return started
    subject = subject_of(options, out)
    size = input_size(options)
    session = Session("schedule", options, out, started)
    with steps(out, "bench schedule") as step:
        found = measure_schedule(
            subject,
            size,
            cores or list(QUICK_CORES if options.quick else CORES),
            cost=cost,
            batch=options.batch,
            rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            tell=step,
        )
    session.result |= {
        "subject": {**subject.describe(), "part": TrunkModule(subject.model).part},
        "mask": {"label": subject.mask, "synthetic": subject.synthetic_mask},
        "input": [options.batch, 3, *size],
        **found,
    }
    show(session.result, out)
    show_repeats([("schedule", session.result["command"])], out)
    return session.finish(complete=True, failed=[])


def show(result: dict[str, Any], out: Output) -> None:
    """Efficiency by part and cores as built, then the whole by schedule."""
    from opentrans_kernels.bench.part import title

    size = "x".join(map(str, result["input"]))
    out.heading(f"{title(result['subject'])}, {result['mask']['label']}, input {size}")
    cores = [row["cores"] for row in result["parts"][0]["rows"]]
    cells = [
        [
            part["part"],
            f"{part['one_thread_ms']:.2f}",
            *(f"{row['efficiency']['as built']:.0%}" for row in part["rows"]),
        ]
        for part in result["parts"]
    ]
    columns = ("part", "ms, 1 core", *(f"{count} cores" for count in cores))
    right = range(1, len(columns))
    out.table("simulated parallel efficiency, as the kernels split their work", columns, cells,
              right=right)  # fmt: skip
    whole = result["parts"][-1]
    out.text()
    names = {
        "as built": "as built",
        "static": "every region by static ranges",
        "dealt": "every region dealt, unit by unit",
    }
    cells = [
        [label, "", *(f"{row['ms'][name]:.2f}" for row in whole["rows"])]
        for name, label in names.items()
    ]
    cells.append(["of it outside of regions, serial", "",
                  *(f"{row['serial_ms']:.2f}" for row in whole["rows"])])  # fmt: skip
    cells.append(["regions with fewer units than cores", "",
                  *(f"{row['regions_with_too_few_units']} of {row['regions']}"
                    for row in whole["rows"])])  # fmt: skip
    out.table("simulated ms of the whole", ("schedule", *columns[1:]), cells, right=right)
    out.text()
    out.text(
        f"a barrier of {result['barrier_us']:.1f} us per region ({result['barrier']}); caches and "
        "memory bandwidth that cores share are ignored, PyTorch's own operators count as serial"
    )
