"""Per-layer table: the sparse convolution against oneDNN's dense one, losing rows included.

Example::

    python benchmarks/bench_layers.py --mask global:0.90 --size 224 --threads 1 --json layers.json

Each layer is measured alone, interleaved with its dense counterpart, batch norm folded and ReLU
fused on both sides. Rows are in network order; the last line is the sum. Exit code 1 if a layer is
inexact (error above 1e-6 of its largest output and above twice that of dense float32), 2 for bad
input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from opentrans.cli.bench import ISAS, chosen_cpus
from opentrans.cli.bench_rows import match_cell, show_repeats
from opentrans.cli.options import (
    add_json,
    add_model,
    add_size,
    add_threads,
    input_size,
    positive,
    subject_of,
)
from opentrans.cli.render import Output
from opentrans_kernels.bench.environment import isa_environment, missing_limits, portable_words
from opentrans_kernels.bench.rows import command_words, subject_words
from opentrans_kernels.errors import OpenTransError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mask", default="global:0.90", metavar="MASK", help="file or recipe")
    add_model(parser)
    add_size(parser)
    add_threads(parser)
    parser.add_argument("--batch", type=positive, default=1, metavar="N")
    parser.add_argument("--isa", choices=ISAS, default="native", help="limit of both sides")
    parser.add_argument("--rounds", type=positive, default=9, metavar="N")
    parser.add_argument("--layer", action="append", metavar="NAME", help="default: every layer")
    add_json(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    try:
        if missing_limits(options.isa, options.threads):
            # The limits are read when a process starts, so this one is replaced.
            limits = isa_environment(options.isa, options.threads)
            command = [sys.executable, os.path.abspath(__file__), *given]
            os.execve(sys.executable, command, {**os.environ, **limits})
        return run(options, Output(options.json))
    except OpenTransError as error:
        sys.stderr.write(f"bench_layers: {error}\n")
        return 2


def run(options: argparse.Namespace, out: Output) -> int:
    """The table; 1 if a layer is inexact."""
    from opentrans_kernels.bench.timing import pin

    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)
    import torch

    from opentrans_kernels.bench.environment import environment_block
    from opentrans_kernels.bench.layers import measure_layers

    torch.set_num_threads(options.threads)
    subject = subject_of(options, out)
    with out.progress("bench layers") as step:
        rows = measure_layers(
            subject,
            input_size(options),
            batch=options.batch,
            rounds=options.rounds,
            only=options.layer or (),
            on_layer=lambda done, total, name: step(f"{done + 1} of {total}: {name}"),
        )
    dense, sparse = sum(row.dense_ms for row in rows), sum(row.sparse_ms for row in rows)
    cells = [
        [
            row.name,
            f"{row.cin}->{row.cout} k{row.kernel}",
            f"{row.h_out}x{row.w_out}",
            f"{row.density:.3f}",
            f"{row.dense_ms:.3f}",
            f"{row.sparse_ms:.3f}",
            f"{row.speedup:.2f}x ({row.speedup_q1:.2f}-{row.speedup_q3:.2f})",
            match_cell(row.match),
            "LOSES" if row.loses else "",
        ]
        for row in rows
    ]
    ratio = dense / sparse
    cells.append(["sum", "", "", "", f"{dense:.2f}", f"{sparse:.2f}", f"{ratio:.2f}x", "", ""])
    columns = ("layer", "conv", "output", "density", "dense ms", "sparse ms", "speed-up")
    out.heading(f"{subject.arch}, {subject.mask}, {options.size} px, batch {options.batch}")
    out.table(None, (*columns, "match", ""), cells)
    out.text()
    show_repeats([(row.name, row_command(options, row.name)) for row in rows], out)
    inexact = [row for row in rows if not row.exact]
    for row in inexact:
        out.warn(
            f"{row.name} is inexact: {row.error:.1e} of its largest output, "
            f"dense float32 {row.dense_error:.1e}"
        )
    out.finish(
        {
            "subject": subject.describe(),
            "isa": options.isa,
            "pinned_cpus": cpus,
            "dense_ms": dense,
            "sparse_ms": sparse,
            "speedup_of_sums": ratio,
            "layers": [
                row.to_dict() | {"command": portable_words(row_command(options, row.name))}
                for row in rows
            ],
            **environment_block(),
        }
    )
    return 1 if inexact else 0


def row_command(options: argparse.Namespace, name: str) -> list[str]:
    """What measures the layer ``name`` again, alone."""
    return command_words(
        ("python", "benchmarks/bench_layers.py"),
        **subject_words(options),
        rounds=options.rounds,
        layer=name,
    )


if __name__ == "__main__":
    sys.exit(main())
