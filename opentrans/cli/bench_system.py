"""``opentrans bench model --system``: a whole segmentation model, dense in every way that works,
with our head, our trunk and both; with its time by part."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .bench_rows import match_cell, ratio_cell, show_repeats
from .bench_session import Session, limit
from .options import positive
from .progress import steps
from .render import Output

SYSTEM_NAMES = ("fc-clip", "han", "deeplab", "mask2former-hf", "ovs-mask", "ovs-pixel")
SIZE, CLASSES, ROUNDS, QUICK_ROUNDS = 512, 150, 5, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that belong to ``--system``."""
    group = parser.add_argument_group("with --system")
    group.add_argument(
        "--system", choices=SYSTEM_NAMES, help="a whole segmentation model instead of the encoder"
    )
    group.add_argument("--size", type=positive, metavar="PX", help=f"default {SIZE}")
    group.add_argument("--size-w", type=positive, metavar="PX", help="width, if not square")
    group.add_argument("--queries", type=positive, metavar="N", help="default: the system's own")
    group.add_argument("--classes", type=positive, metavar="K", help=f"default {CLASSES}")
    group.add_argument(
        "--tree", type=Path, metavar="DIR", help="checkout of the system's code (fc-clip, han, "
        "deeplab); a detectron2 beside it is used where none is installed",
    )  # fmt: skip
    group.add_argument(
        "--head-mask", metavar="MASK", help="recipe for the head's convolutions and linear layers "
        "(uniform:0.90); default: none",
    )  # fmt: skip
    group.add_argument(
        "--no-compile", action="store_true", help="leave the dense sides of torch.compile out"
    )


def refuse_without_system(options: argparse.Namespace) -> None:
    """Raise for options that mean something only with ``--system``."""
    from opentrans_kernels.errors import OpenTransError

    for key in ("size", "size_w", "queries", "classes", "tree", "head_mask", "no_compile"):
        if getattr(options, key):
            word = "--" + key.replace("_", "-")
            raise OpenTransError(
                f"{word} belongs to --system. Add for instance --system ovs-mask, or use --sizes."
            )


def run(options: argparse.Namespace, out: Output) -> int:
    """Measure and show; 1 if a row of ours is inexact."""
    from opentrans_kernels.errors import OpenTransError

    if options.counts and not options.counts.isdigit() or options.counts == "0":
        raise OpenTransError(
            f"--threads {options.counts!r} is not one number; --system measures one. Write "
            "--threads 1."
        )
    for key, default in (("batches", None), ("sizes", None), ("arch", "RN50"), ("checkpoint", "")):
        if (getattr(options, key, None) or default) != default:
            raise OpenTransError(f"--{key} does not go with --system. Leave it out.")
    options.threads = int(options.counts or 1)
    started = limit(options, out)
    if isinstance(started, int):
        return started
    from opentrans.systems_whole import build_whole
    from opentrans_kernels.bench.whole import measure_whole
    from opentrans_kernels.synthetic import is_mask_spec

    if not is_mask_spec(options.mask):
        raise OpenTransError(
            f"--mask {options.mask!r} is no recipe. Weights are synthetic here, so masks are too: "
            "write for instance global:0.90."
        )
    height = options.size or SIZE
    size = (height, options.size_w or height)
    with steps(out, f"bench model: {options.system}") as step:
        step("building")
        whole = build_whole(
            options.system,
            size,
            queries=options.queries,
            classes=options.classes or CLASSES,
            tree=options.tree,
        )
        session = Session("system", options, out, started)
        session.result["mask"] = {"label": options.mask, "synthetic": True}
        session.result |= measure_whole(
            whole,
            options.mask,
            size,
            rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            threads=options.threads,
            compiling=not (options.no_compile or options.quick),
            head_mask=options.head_mask,
            step=step,
        )
    show(session.result, out)
    show_repeats([(options.system, session.result["command"])], out)
    return session.finish(complete=True, failed=failures(session.result))


def failures(result: dict[str, Any]) -> list[str]:
    """A sentence for every side of ours that is inexact."""
    return [
        f"{row['name']} is inexact: {row['match']['error']:.1e} of the largest score, allowed "
        f"{row['match']['bound']:.1e}"
        for row in result["rows"]
        if row["ours"] and not row["match"]["equal"]
    ]


def show(result: dict[str, Any], out: Output) -> None:
    """Sides, what could not be timed, and times by part."""
    from opentrans_kernels.bench.parts import part_ratio

    size = f"{result['height']}x{result['width']}"
    masks = result["mask"]["label"]
    if "head_mask" in result:
        masks += f", head {result['head_mask']['label']}"
    out.heading(f"{result['system']} {size}, {masks} (synthetic weights)")
    rows = [
        [
            row["name"] + (" (fastest dense)" if row["name"] == result["baseline"] else ""),
            f"{row['median_round']['ms']:.0f}",
            f"{row['median_round']['baseline_ms']:.0f}",
            ratio_cell(row["speedup"]),
            match_cell(row["match"]),
            f"{row['argmax']:.3%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in result["rows"]
    ]
    columns = (
        "side",
        "CPU ms" if result["clock"] == "cpu" else "wall ms",
        "fastest dense beside it",
        "speed-up",
        "match",
        "same class",
        "peak MB",
    )
    out.table(None, columns, rows)
    out.text(
        f"errors against {result['reference']}; dense float32's own: {result['dense_error']:.1e}"
    )
    if result["clock"] == "wall":
        out.text(
            f"{result['threads']} threads are compared by wall time, which other work on the "
            "machine lengthens; one thread by CPU time"
        )
    if (scaling := result.get("scaling")) is not None:
        ratio, threads = scaling["ratio"], result["threads"]
        out.text(
            f"{scaling['name']}: {threads} threads over one {ratio['median']:.2f}x "
            f"({ratio['q1']:.2f}-{ratio['q3']:.2f}), {scaling['one_thread_ms']:.0f} and "
            f"{scaling['ms']:.0f} ms of wall time"
        )
    if result.get("queries"):
        out.text(
            "a masked decoder's attention masks are thresholds: one rounding may move a pixel, so "
            "an error up to 1e-4 counts as equal where 99.99 % of pixels keep their class"
        )
    for name, why in result["unavailable"].items():
        out.text(f"not timed: {name}: {why}")
    out.text()
    cells = [
        [p["part"], f"{p['dense_ms']:.1f}", f"{p['ms']:.1f}",
         part_ratio(p["dense_ms"], p["ms"]), p["what"]]
        for p in result["parts"]
    ]  # fmt: skip
    out.table(None, ("part", "eager ms", "our ms", "ratio", "what was done"), cells)
    for line in result["head"]["done"]:
        out.text(f"head: {line}")
    for line in result["head"]["left"]:
        out.text(f"left as it was: {line}")
