"""Time things fairly. ``bench trunk``: the masked trunk dense, in every way PyTorch has, against
the accelerated one; interleaved, pinned, one process. ``bench compare`` is the regression gate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import bench_all, bench_compare, bench_model, bench_op, bench_peers, bench_scripts
from .bench_session import INTERRUPTED, ISAS, chosen_cpus, command_of, show_canary
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
INEXACT = "inexact"  # shown in place of a ratio: a wrong answer has no speed
#: The dense variants that ``--quick`` times: one without a compiler, and the usual winner.
QUICK_VARIANTS = ("folded_channels_last", "compile_folded_channels_last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench``."""
    targets = parser.add_subparsers(dest="target", required=True, metavar="WHAT")
    trunk = targets.add_parser(
        "trunk",
        help="stem to layer4 of a CLIP ResNet",
        description="Time stem to layer4, dense variants and accelerated, interleaved.",
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
        "--variants", metavar="A,B,...", help="dense variants to time (default: all)"
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
    from opentrans_kernels.bench.environment import missing_limits, rerun
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
    from opentrans_kernels.bench.variants import NAMES

    height, width = input_size(options)
    names = QUICK_VARIANTS if options.quick else NAMES
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
    show(result, out)
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


def show(result: dict[str, Any], out: Output) -> None:
    """The human-readable tables of a trunk result."""
    subject, mask = result["subject"], result["mask"]
    size = "x".join(map(str, result["input"]))
    out.heading(f"{subject['arch']} trunk, {mask['label']}, input {size}")
    out.pairs(
        {
            "weights": subject["weights"],
            "density": f"{mask['parameter_density']:.3f} of weights, "
            f"{mask['flop_density']:.3f} of multiply-adds",
            "CPU": result["machine"]["cpu"],
            "threads": f"{result['threads']}, pinned to CPUs {result['pinned_cpus']}",
            "instruction set": f"{result['isa']} (torch {result['torch_cpu_capability']}, oneDNN "
            f"{result['onednn_isa']}, ours {result['opentrans_cpu_capability']})",
        }
    )
    out.text()
    best = result["baseline"]["name"]
    rows = [variant_row("accelerated", result["accelerated"], None)]
    for name, entry in result["variants"].items():
        label = f"{name} (baseline)" if name == best else name
        if not entry["available"]:
            rows.append([label, None, None, None, None, entry["error"].splitlines()[0][:60]])
            continue
        note = "" if entry.get("frozen", True) else "freezing did NOT happen"
        rows.append(variant_row(label, entry, entry["speedup_of_accelerated"], note))
    columns = ("variant", "wall ms", "quartiles", "CPU ms", "speed-up of ours", "")
    if not result["exact"]:  # a wrong answer has no speed
        rows = [[*row[:4], row[4] and INEXACT, row[5]] for row in rows]
    out.table(None, columns, rows)
    spread = result["speedup_spread"]
    out.text()
    if result["exact"]:
        out.text(
            f"speed-up {result['speedup']:.2f}x over {best} (quartiles {spread['q1']:.2f}-"
            f"{spread['q3']:.2f}, {result['rounds']} rounds; by CPU time "
            f"{result['speedup_cpu_time']:.2f}x)"
        )
    else:
        out.text("no speed-up is stated: the result is not exact")
    out.text(
        f"max error against float64: {result['max_rel_err']:.2e}; dense float32's own: "
        f"{result['dense_own_rel_err']:.2e}"
    )
    if "thread_scaling" in result:
        _show_scaling(result["thread_scaling"], result["exact"], out)
    if result["layers"]:
        show_losing(result["losing_layers"], len(result["layers"]), out)
    show_peers(result["peers"], result["exact"], out)
    show_canary(result["canary"], out)


def show_peers(peers: dict[str, Any], exact: bool, out: Output) -> None:
    """Other engines: times, our speed-up over them, their error; or why they did not run."""
    rows: list[list[Any]] = []
    for name, peer in peers.items():
        if not peer["available"]:
            kind = "skipped" if peer["skipped"] else "FAILED"
            rows.append([name, None, None, None, f"{kind}: {peer['error'].splitlines()[0]}"])
            continue
        ratio, error = peer["speedup_of_ours"], peer["max_rel_err"]
        text = f"{ratio['median']:.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
        error = None if error is None else f"{error:.1e}"
        rows.append([name, f"{peer['ms']:.2f}", text if exact else INEXACT, error, peer["note"]])
    if rows:
        out.text()
        columns = ("peer", "wall ms", "speed-up of ours", "its error", "")
        out.table(None, columns, rows, right=(1, 2, 3))


def variant_row(
    name: str, entry: dict[str, Any], ratio: dict[str, Any] | None, note: str = ""
) -> list[Any]:
    """One line of the table of variants."""
    wall = entry["wall"]
    if entry["contended_share"] > 0.2:
        note = f"{note} {entry['contended_share']:.0%} of samples were disturbed".strip()
    return [
        name,
        f"{entry['ms']:.2f}",
        f"{wall['q1']:.2f}-{wall['q3']:.2f}",
        f"{entry['cpu_ms']:.2f}",
        f"{ratio['median']:.2f}x" if ratio else None,
        note,
    ]


def show_losing(losing: list[dict[str, Any]], total: int, out: Output) -> None:
    """The layers that are slower sparse than dense, measured alone."""
    if not losing:
        out.text(f"none of {total} layers is slower than oneDNN when measured alone")
        return
    out.text(f"{len(losing)} of {total} layers are slower than oneDNN when measured alone:")
    rows = [
        [
            row["name"],
            f"{row['density']:.3f}",
            f"{row['dense_ms']:.3f}",
            f"{row['sparse_ms']:.3f}",
            f"{row['speedup']:.2f}x" if row["exact"] else INEXACT,
        ]
        for row in losing
    ]
    out.table(None, ("layer", "density", "dense ms", "sparse ms", "speed-up"), rows)


def _show_scaling(scaling: dict[str, Any], exact: bool, out: Output) -> None:
    ratio = f"{scaling['speedup']['median']:.2f}x" if exact else INEXACT
    out.text(
        f"threads: {scaling['one_thread_ms']:.2f} ms on one, {scaling['ms']:.2f} ms on all, {ratio}"
    )
    for when in ("before", "after"):
        for check in scaling[f"cores_{when}"]:
            out.text(
                f"  core check {when}: CPUs {list(check['cpus'])}, rate together / alone "
                f"{check['rate_ratio']:.2f}: {check['verdict']}"
            )
