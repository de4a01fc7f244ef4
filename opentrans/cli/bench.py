"""Time things fairly. ``bench trunk``: the masked trunk (of a network without a ResNet
trunk: its features, or all of it) dense, in every way PyTorch has, against the accelerated one;
interleaved, pinned, one process. ``bench compare`` is the regression gate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import (
    bench_all,
    bench_compare,
    bench_model,
    bench_op,
    bench_peers,
    bench_schedule,
    bench_scripts,
    bench_tokens,
)
from .bench_rows import show_repeats
from .bench_session import INTERRUPTED, ISAS, chosen_cpus, command_of
from .bench_trunk import row_commands, show, shown_commands
from .options import (
    AGAIN,
    add_json,
    add_model,
    add_size,
    add_threads,
    input_size,
    positive,
    subject_of,
)
from .progress import begin, steps
from .render import Output

SUMMARY = "time dense against accelerated: ops, trunk, whole models; compare results"
#: Further targets: name -> (summary, adds its options, runs it).
TARGETS = {
    "op": (bench_op.SUMMARY, bench_op.add_arguments, bench_op.run),
    "model": (bench_model.SUMMARY, bench_model.add_arguments, bench_model.run),
    "schedule": (bench_schedule.SUMMARY, bench_schedule.add_arguments, bench_schedule.run),
    "tokens": (bench_tokens.SUMMARY, bench_tokens.add_arguments, bench_tokens.run),
    "alpha": (
        bench_scripts.ALPHA_SUMMARY, bench_scripts.add_alpha_arguments, bench_scripts.run_alpha
    ),
    "training": (
        bench_scripts.TRAINING_SUMMARY,
        bench_scripts.add_training_arguments,
        bench_scripts.run_training,
    ),
    "all": (bench_all.SUMMARY, bench_all.add_arguments, bench_all.run),
    "peers": (bench_peers.SUMMARY, bench_peers.add_arguments, bench_peers.run),
    "compare": (bench_compare.SUMMARY, bench_compare.add_arguments, bench_compare.run),
}  # fmt: skip
ROUNDS, QUICK_ROUNDS = 15, 5
#: The dense variants that ``--quick`` times: one without a compiler, and the usual winner.
QUICK_VARIANTS = ("folded_channels_last", "compile_folded_channels_last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench``."""
    targets = parser.add_subparsers(dest="target", required=True, metavar="WHAT")
    trunk = targets.add_parser(
        "trunk",
        help="a ResNet's stem to layer4; another CNN's features, or all of it",
        description="Time a ResNet's stem to layer4, or the features of another network (all of it "
        "where it has no such part), dense variants and accelerated, interleaved.",
    )
    trunk.add_argument("--mask", required=True, metavar="MASK", help="mask file or recipe")
    add_model(trunk)
    add_size(trunk)
    add_threads(trunk)
    trunk.add_argument("--batch", type=positive, default=1, metavar="N", help="images (default 1)")
    trunk.add_argument(
        "--isa",
        choices=ISAS,
        default="native",
        help="limit BOTH sides to this instruction set (default native: no limit)",
    )
    trunk.add_argument(
        "--rounds", type=positive, metavar="N", help=f"default {ROUNDS}, quick {QUICK_ROUNDS}"
    )
    trunk.add_argument(
        "--quick", action="store_true", help="two dense variants and few rounds: under 3 minutes"
    )
    trunk.add_argument(
        "--variants", metavar="A,B,...", help="dense variants to time (default: all but compile)"
    )
    trunk.add_argument(
        "--cpus", metavar="A,B,...", help="pin to these CPUs (default: the last ones available)"
    )
    trunk.add_argument(
        "--no-layers", action="store_true", help="skip the layer-by-layer table (losing layers)"
    )
    trunk.add_argument(
        "--peers",
        metavar="all|A,B,...",
        help="other engines to time, each in its own environment: 'opentrans bench peers' lists "
        "and makes them",
    )
    trunk.add_argument(
        "--peer-envs", metavar="DIR", help="where the peers' environments are (a cache directory)"
    )
    trunk.add_argument(
        "--fail-under", type=float, metavar="X", help="exit with 1 if the speed-up is below X"
    )
    add_json(trunk)
    trunk.set_defaults(run_target=run_trunk)
    for name, (summary, add, run_target) in TARGETS.items():
        target = targets.add_parser(name, help=summary, description=f"{summary}.".capitalize())
        add(target)
        target.set_defaults(run_target=run_target)


def run(options: argparse.Namespace, out: Output) -> int:
    """Hand over to the target; returns its exit code."""
    return options.run_target(options, out)


def run_trunk(options: argparse.Namespace, out: Output) -> int:
    """Start over in a limited process where needed, measure, show; 1 if inexact or too slow."""
    from opentrans_kernels.bench.environment import missing_limits, portable_words, rerun
    from opentrans_kernels.bench.peers.registry import chosen
    from opentrans_kernels.bench.timing import pin

    peers = tuple(chosen(options.peers)) if options.peers else ()
    if missing_limits(options.isa, options.threads):
        return rerun([*AGAIN, *options.arguments], options.isa, options.threads)
    cpus = chosen_cpus(options.cpus, options.threads)
    if cpus is not None:
        pin(cpus)  # before torch starts its threads, which inherit it
    begin(out, "opentrans bench trunk")
    from opentrans_kernels.bench.trunk import TrunkOptions
    from opentrans_kernels.bench.trunk import run as measure
    from opentrans_kernels.bench.variants import BASELINE

    height, width = input_size(options)
    names = QUICK_VARIANTS if options.quick else BASELINE
    settings = TrunkOptions(
        height=height,
        width=width,
        batch=options.batch,
        threads=options.threads,
        isa=options.isa,
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        variants=tuple(options.variants.split(",")) if options.variants else names,
        layers=not options.no_layers,
        cpus=tuple(cpus) if cpus is not None else None,
        peers=peers,
        peer_home=Path(options.peer_envs) if options.peer_envs else None,
    )
    settings.check()
    subject = subject_of(options, out)
    with steps(out, "bench trunk") as step:
        result = measure(subject, settings, step)
    result["command"] = command_of(options)
    for row, _, words in row_commands(result, options):
        row["command"] = portable_words(words)
    show(result, out)
    show_repeats(shown_commands(result, options), out)
    failed = failures(result, options.fail_under)
    result["failed_checks"] = failed
    out.finish(result)
    for line in failed:
        out.warn(line)
    if not result["complete"]:
        out.warn(f"interrupted: {result['rounds']} finished rounds were kept")
        return INTERRUPTED
    return 1 if failed else 0


def failures(result: dict[str, Any], fail_under: float | None) -> list[str]:
    """Sentences about every check that failed; empty when all is well."""
    failed = []
    if not result["exact"]:
        failed.append(
            f"inexact: error {result['max_rel_err']:.2e} against float64 is more than twice the "
            f"error of dense float32, {result['dense_own_rel_err']:.2e}"
        )
    failed += [
        f"{row['name']} is inexact: {row['error']:.1e} of its largest output, dense float32 "
        f"{row['dense_error']:.1e}"
        for row in result.get("layers", ())
        if not row["exact"]
    ]
    if "peers_error" in result:
        failed.append(f"the peers were not timed: {result['peers_error']}")
    if fail_under is not None and result["exact"] and result["speedup"] < fail_under:
        failed.append(f"speed-up {result['speedup']:.2f}x is below the limit {fail_under:g}x")
    return failed
