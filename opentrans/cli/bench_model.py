"""``opentrans bench model``: the whole image encoder, and its backbone over batch, input size and
threads, one axis at a time; with memory and the three counts of work."""

from __future__ import annotations

import argparse
import os
from typing import Any

from . import bench_system
from .bench_op import numbers
from .bench_rows import match_cell, ratio_cell, show_repeats
from .bench_session import Session, add_limits, limit
from .options import add_json, add_model, positive, subject_of
from .progress import steps
from .render import Output

SUMMARY = "whole model over batch, size and threads, with memory"
BATCHES, SIZES = (1, 4, 16), ("224", "384", "512", "800x1216")
QUICK_BATCHES, QUICK_SIZES = (1, 4), ("224",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench model``."""
    parser.add_argument(
        "--mask", default="global:0.90", metavar="MASK", help="mask file or recipe (global:0.90)"
    )
    add_model(parser)
    add_limits(parser, threads=False)
    parser.add_argument("--batches", metavar="N,...", help=f"default {_list(BATCHES)}")
    parser.add_argument("--sizes", metavar="PX,HxW,...", help=f"default {_list(SIZES)}")
    parser.add_argument("--threads", metavar="N,...", dest="counts", help="default 1 to all CPUs")
    parser.add_argument("--rounds", type=positive, metavar="N", help="default 5, quick 3")
    bench_system.add_arguments(parser)
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Measure and show; 1 if a row is inexact."""
    if options.system:
        return bench_system.run(options, out)
    bench_system.refuse_without_system(options)
    counts = numbers(options.counts, int, "--threads", lambda n: n > 0, "1,2")
    batches = numbers(options.batches, int, "--batches", lambda n: n > 0, "1,4,16")
    sizes = _sizes(options.sizes or _list(QUICK_SIZES if options.quick else SIZES))
    if not counts:
        every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        counts = list(range(1, every + 1))
    options.threads = max(counts)  # the process is limited and pinned for the most threads
    started = limit(options, out)
    if isinstance(started, int):
        return started
    from opentrans_kernels.bench.environment import SIMD_BITS, portable_words
    from opentrans_kernels.bench.model import measure_setting, settings
    from opentrans_kernels.bench.part import TrunkModule
    from opentrans_kernels.bench.subject import clip_image_size

    subject = subject_of(options, out)
    tower = sizes[0][0] if ":" in options.arch else clip_image_size(options.arch)
    part = TrunkModule(subject.model).part
    batches = batches or list(QUICK_BATCHES if options.quick else BATCHES)
    session = Session("model", options, out, started)
    densities = subject.densities(sizes[0])
    session.result |= {
        "subject": subject.describe(),
        "mask": {
            "label": subject.mask,
            "synthetic": subject.synthetic_mask,
            "parameter_density": densities["parameters"],
            "flop_density": densities["flops"],
        },
        "rows": [],
    }
    rows = session.result["rows"]
    complete = True
    try:
        with steps(out, "bench model") as step:
            for setting in settings(batches, sizes, counts, tower, part):
                step(str(setting))
                row = measure_setting(
                    subject, setting, rounds=_rounds(options), simd_bits=SIMD_BITS[options.isa]
                )
                rows.append(row | {"command": portable_words(row_command(options, row))})
                session.save()
    except KeyboardInterrupt:
        complete = False
    cells = [
        [
            *_setting(row),
            row["dense_kind"],
            f"{row['dense_ms']:.1f}",
            f"{row['ms']:.1f}",
            ratio_cell(row["speedup"]),
            match_cell(row["match"]),
        ]
        for row in rows
    ]
    out.heading(f"{subject.arch}, {subject.mask}")
    columns = ("what", "batch", "threads", "fastest dense", "dense ms", "our ms", "speed-up")
    out.table(None, (*columns, "match"), cells)
    out.text()
    cells = [
        [
            *_setting(row),
            f"{1e3 * row['batch'] / row['ms']:.1f}",
            *(_mb(row["memory"][key]) for key in ("dense_peak_bytes", "peak_bytes")),
        ]
        for row in rows
    ]
    out.table(None, (*columns[:3], "images/s", "dense peak MB", "our peak MB"), cells)
    out.text()
    show_repeats([(_name(row), row_command(options, row)) for row in rows], out)
    failed = [
        f"{row['part']} {row['height']}x{row['width']} batch {row['batch']} is inexact: "
        f"{row['error']:.1e}, dense float32 {row['dense_error']:.1e}"
        for row in rows
        if not row["exact"]
    ]
    return session.finish(complete=complete, failed=failed)


def row_command(options: argparse.Namespace, row: dict[str, Any]) -> list[str]:
    """What measures ``row`` again: its one setting; the tower's row comes with any."""
    from opentrans_kernels.bench.rows import command_words

    return command_words(
        ("opentrans", "bench", "model"),
        mask=options.mask,
        arch=options.arch,
        checkpoint=options.checkpoint,
        seed=options.seed,
        batches=row["batch"],
        sizes=f"{row['height']}x{row['width']}",
        threads=row["threads"],
        isa=options.isa,
        cpus=options.cpus,
        rounds=_rounds(options),
    )


def _rounds(options: argparse.Namespace) -> int:
    return options.rounds or (3 if options.quick else 5)


def _setting(row: dict[str, Any]) -> list[Any]:
    return [f"{row['part']} {row['height']}x{row['width']}", row["batch"], row["threads"]]


def _name(row: dict[str, Any]) -> str:
    what, batch, threads = _setting(row)
    return f"{what}, batch {batch}, {threads} thread(s)"


def _sizes(text: str) -> list[tuple[int, int]]:
    from opentrans_kernels.errors import OpenTransError

    found = []
    for part in text.split(","):
        height, _, width = part.strip().partition("x")
        try:
            found.append((int(height), int(width or height)))
        except ValueError:
            found.append((0, 0))
        if min(found[-1]) < 32:
            raise OpenTransError(
                f"--sizes {part!r} is no size of at least 32 pixels. Write for example "
                "224,512,800x1216."
            )
    return found


def _list(values: object) -> str:
    return ",".join(map(str, values))  # type: ignore[call-overload]


def _mb(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.0f}"
