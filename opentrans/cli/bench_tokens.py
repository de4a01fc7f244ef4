"""``opentrans bench tokens``: a Segmenter with fewer tokens, dense in two ways, and what the same
work buys otherwise, interleaved; with a mask also on the sparse kernels."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from .bench_rows import ratio_cell, show_repeats
from .bench_session import Session, add_limits, limit
from .options import add_json, positive
from .progress import steps
from .render import Output

SUMMARY = "fewer tokens in a vision transformer, against a smaller input and pooled tokens"
SYSTEM_NAMES = ("segmenter-s16", "segmenter-b16", "segmenter-l16")
METHODS = ("cluster", "pool", "tome", "evit", "act")
SIZE, CLASSES, ROUNDS, QUICK_ROUNDS = 640, 150, 5, 2
#: Options of a plan by the command line's names; those left out keep the plan's own defaults.
PLAN_OPTIONS = ("alpha", "grid", "r", "keep", "temperature")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench tokens``."""
    parser.add_argument("--system", choices=SYSTEM_NAMES, default="segmenter-b16")
    parser.add_argument("--size", type=positive, default=SIZE, metavar="PX", help=f"default {SIZE}")
    parser.add_argument("--size-w", type=positive, metavar="PX", help="width, if not square")
    parser.add_argument("--method", choices=METHODS, default="cluster", help="default cluster")
    parser.add_argument(
        "--alpha", type=int, metavar="N", help="blocks at full size (cluster, pool: 5 of 12)"
    )
    parser.add_argument(
        "--grid", metavar="HxW", help="reduced map (cluster, pool: 0.7 of the map's sides)"
    )
    parser.add_argument(
        "--r", type=int, metavar="N", help="tome: merged per block (2 %% of the map)"
    )
    parser.add_argument("--keep", type=float, metavar="X", help="evit: share kept (0.8)")
    parser.add_argument("--temperature", metavar="T", help="cluster: a number or auto (auto)")
    parser.add_argument(
        "--mask",
        metavar="MASK",
        help="mask file, or a recipe such as uniform:0.90: sides on sparse kernels as well",
    )
    parser.add_argument("--decoder", choices=("mask", "linear"), default="mask")
    parser.add_argument(
        "--classes", type=positive, default=CLASSES, metavar="K", help=f"default {CLASSES}"
    )
    parser.add_argument(
        "--expand", action="store_true",
        help="cluster, pool: bring features back before the decoder, not logits behind it",
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"default {ROUNDS}, quick 2")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    add_limits(parser)
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Measure and show; 1 if the compiled side is not the dense model."""
    from opentrans_kernels.errors import OpenTransError

    size = (options.size, options.size_w or options.size)
    if any(side % 16 for side in size):
        raise OpenTransError(
            f"--size {size[0]}x{size[1]}: the work of a side is counted for whole patches of 16 "
            f"pixels. Use {-(-size[0] // 16) * 16}x{-(-size[1] // 16) * 16}."
        )
    started = limit(options, out)
    if isinstance(started, int):
        return started
    from opentrans.ovs import build_vit_segmenter
    from opentrans.systems_tokens import SHAPES, VitShape, segmenter_macs
    from opentrans_kernels.bench.tokens import TokenSubject, measure_tokens

    shape = SHAPES[options.system]
    if options.decoder == "linear":
        shape = VitShape(shape.width, shape.depth, shape.heads, decoder_layers=0)
    maps = (size[0] // shape.patch, size[1] // shape.patch)
    plan = plan_of(options, maps, shape.depth)
    plan.blocks(shape.depth)  # refuses what does not fit before anything is built
    with steps(out, f"bench tokens: {options.system}") as step:
        step("building")
        subject = TokenSubject(
            options.system,
            build_vit_segmenter(
                options.system, classes=options.classes, decoder=options.decoder,
                image_size=max(size),
            ),
            "encoder",
            shape.patch,
            lambda at, given, blocks, kept: segmenter_macs(
                replace(shape, depth=blocks or shape.depth, kept=kept), at, options.classes, given
            ),
            {
                "decoder": options.decoder,
                "classes": options.classes,
                "weights": "synthetic weights (seed 0)",
                "mask": None,
            },
            masked=options.mask is not None,
        )  # fmt: skip
        if options.mask is not None:
            mask_(subject, options.mask, step)
        session = Session("tokens", options, out, started)
        session.result |= measure_tokens(
            subject,
            plan,
            size,
            rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            threads=options.threads,
            compiling=not (options.no_compile or options.quick),
            step=step,
        )
    show(session.result, out)
    show_repeats([(options.system, session.result["command"])], out)
    return session.finish(complete=True, failed=failures(session.result))


def mask_(subject: Any, given: str, step: Any) -> None:
    """Set the masked weights of the subject's model to zero.

    Raises:
        MaskError, CheckpointError: no mask of this model.
    """
    from opentrans_kernels.synthetic import is_mask_spec, masks_for

    step(f"mask {given}")
    masks = masks_for(given, subject.model)
    masks.apply_(subject.model)
    spec = is_mask_spec(given)
    label = f"{given} (synthetic mask)" if spec else str(masks)
    subject.facts["mask"] = {"label": label, "synthetic": spec}


def plan_of(options: argparse.Namespace, maps: tuple[int, int], depth: int) -> Any:
    """The plan of the command line, with a default for what its method needs.

    Raises:
        OpenTransError: an option that does not fit.
    """
    from opentrans_kernels.tokens import TokenPlan

    given = {name: getattr(options, name) for name in PLAN_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if "grid" in given:
        given["grid"] = _grid(given["grid"])
    if "temperature" in given and given["temperature"] != "auto":
        given["temperature"] = _number(given["temperature"])
    if options.method in ("cluster", "pool"):
        given.setdefault("alpha", depth * 5 // 12)
        given.setdefault("grid", tuple(max(1, round(0.7 * side)) for side in maps))
        given["expand"] = options.expand
    elif options.method == "tome":
        given.setdefault("r", max(1, maps[0] * maps[1] // 50))
    elif options.method == "evit":
        given.setdefault("keep", 0.8)
    return TokenPlan(options.method, **given)


def _grid(text: str) -> tuple[int, int]:
    from opentrans_kernels.errors import OpenTransError

    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise OpenTransError(
            f"--grid {text!r} is not HEIGHTxWIDTH. Write for example --grid 28x28."
        )
    return int(height), int(width)


def _number(text: str) -> float:
    from opentrans_kernels.errors import OpenTransError

    try:
        return float(text)
    except ValueError as error:
        raise OpenTransError(
            f"--temperature {text!r} is neither a number nor auto. Write for example "
            "--temperature 0.02."
        ) from error


def failures(result: dict[str, Any]) -> list[str]:
    """A sentence for every dense side that is not the dense model."""
    from opentrans_kernels.bench.tokens_form import inexact

    return [
        f"{row['name']} is inexact: its logits are off by {row['difference']:.1e} of the largest"
        for row in result["rows"]
        if inexact(row)
    ]


def show(result: dict[str, Any], out: Output) -> None:
    """All sides, what could not be timed, and the share of reduction in the reduced side."""
    plan = result["plan"]
    told = [f"{name} {plan[name]}" for name in ("alpha", "r", "keep") if plan[name] is not None]
    told += [f"grid {plan['grid'][0]}x{plan['grid'][1]}"] if plan["grid"] else []
    size = f"{result['height']}x{result['width']}"
    out.heading(f"{result['system']} {size}: {', '.join([plan['method'], *told])}")
    rows = []
    for row in result["rows"]:
        name = row["name"] + (" (fastest dense)" if row["name"] == result["baseline"] else "")
        if row["name"].startswith("smaller") and result["smaller"]:
            name += f", {result['smaller'][0]}x{result['smaller'][1]}"
        if row["name"].startswith("fewer") and result["fewer"]:
            name += f", {result['fewer']}"
        rows.append(
            [
                name, f"{row['cpu_ms']:.0f}", ratio_cell(row["speedup"]),
                ratio_cell(row["over_eager"]),
                "" if row["macs"] is None else f"{row['macs'] / 1e9:.1f}",
                "" if row["work"] is None else f"{1 / row['work']:.2f}x",
                f"{row['same_class']:.1%}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            ]
        )  # fmt: skip
    columns = (
        "side",
        "CPU ms",
        "speed-up",
        "over eager",
        "GMAC",
        "less work",
        "same class",
        "peak MB",
    )
    out.table(None, columns, rows, right=range(1, len(columns)))
    reduced = f"sparse, {plan['method']}" if result["mask"] else plan["method"]
    if result["mask"]:
        out.text(
            f"{result['mask']['label']}; {result['kept']:.1%} of the weights of blocks are kept; "
            "GMAC of sparse sides count what is kept"
        )
    for part in result["parts"]:
        out.text(f"{part['part']}: {part['cpu_ms']:.1f} ms, {part['share']:.1%} of {reduced!r}")
    if not result["parts"]:
        out.text("share of reduction: not measured apart, it is inside the blocks, or does nothing")
    for name, why in result["unavailable"].items():
        out.text(f"not timed: {name}: {why}")
    out.text(
        f'{result["weights"]}: times are real, "same class" (pixels whose class is that of the '
        "dense model at full size) says nothing about trained ones"
    )
