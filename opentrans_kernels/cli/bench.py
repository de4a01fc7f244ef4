"""Time things fairly. ``bench trunk``: the masked trunk dense, in every way PyTorch has, against
the accelerated one; interleaved, pinned, one process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_json, add_model, add_size, add_threads, input_size, positive, subject_of
from .render import Output

SUMMARY = "time dense variants against the accelerated trunk"
ISAS = ("native", "avx2", "avx512")


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
    trunk.add_argument("--rounds", type=positive, default=15, metavar="N", help="default 15")
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
        "--fail-under", type=float, metavar="X", help="exit with 1 if the speed-up is below X"
    )
    add_json(trunk)


def run(options: argparse.Namespace, out: Output) -> int:
    """Start over in a limited process where needed, measure, show; 1 if inexact or too slow."""
    from ..bench.environment import missing_limits, rerun
    from ..bench.timing import pin

    if missing_limits(options.isa, options.threads):
        return rerun(options.arguments, options.isa, options.threads)
    cpus = chosen_cpus(options.cpus, options.threads)
    if cpus is not None:
        pin(cpus)  # before torch starts its threads, which inherit it
    from ..bench.trunk import TrunkOptions
    from ..bench.trunk import run as run_trunk
    from ..bench.variants import NAMES

    height, width = input_size(options)
    settings = TrunkOptions(
        height=height,
        width=width,
        batch=options.batch,
        threads=options.threads,
        isa=options.isa,
        rounds=options.rounds,
        variants=tuple(options.variants.split(",")) if options.variants else NAMES,
        layers=not options.no_layers,
        cpus=tuple(cpus) if cpus is not None else None,
    )
    settings.check()
    subject = subject_of(options, out)
    with out.progress("bench trunk") as step:
        result = run_trunk(subject, settings, step)
    # Where the result was written to is nobody else's business; what was run is.
    told = {str(options.json): Path(str(options.json)).name}
    result["command"] = ["opentrans", *(told.get(word, word) for word in options.arguments)]
    show(result, out)
    failed = failures(result, options.fail_under)
    result["failed_checks"] = failed
    out.finish(result)
    for line in failed:
        out.warn(line)
    return 1 if failed else 0


def chosen_cpus(text: str | None, threads: int) -> list[int] | None:
    """CPUs of ``--cpus``, or the last ``threads`` available ones; None where pinning is absent.

    Raises:
        OpenTransError: not a list of numbers.
    """
    from ..bench.timing import choose_cpus
    from ..errors import OpenTransError

    if text is None:
        return choose_cpus(threads)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OpenTransError(
            f"--cpus {text!r} is not a list of CPU numbers. Write for example --cpus 0,1."
        ) from error


def failures(result: dict[str, Any], fail_under: float | None) -> list[str]:
    """Sentences about every check that failed; empty when all is well."""
    failed = []
    if not result["exact"]:
        failed.append(
            f"inexact: error {result['max_rel_err']:.2e} against float64 is more than twice the "
            f"error of dense float32, {result['dense_own_rel_err']:.2e}"
        )
    if fail_under is not None and result["speedup"] < fail_under:
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
    out.table(None, columns, rows)
    spread = result["speedup_spread"]
    out.text()
    out.text(
        f"speed-up {result['speedup']:.2f}x over {best} (quartiles {spread['q1']:.2f}-"
        f"{spread['q3']:.2f}, {result['rounds']} rounds; by CPU time "
        f"{result['speedup_cpu_time']:.2f}x)"
    )
    out.text(
        f"max error against float64: {result['max_rel_err']:.2e}; dense float32's own: "
        f"{result['dense_own_rel_err']:.2e}"
    )
    if "thread_scaling" in result:
        _show_scaling(result["thread_scaling"], out)
    if result["layers"]:
        show_losing(result["losing_layers"], len(result["layers"]), out)


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
            f"{row['speedup']:.2f}x",
        ]
        for row in losing
    ]
    out.table(None, ("layer", "density", "dense ms", "sparse ms", "speed-up"), rows)


def _show_scaling(scaling: dict[str, Any], out: Output) -> None:
    out.text(
        f"threads: {scaling['one_thread_ms']:.2f} ms on one, {scaling['ms']:.2f} ms on all, "
        f"{scaling['speedup']['median']:.2f}x"
    )
    for when in ("before", "after"):
        for check in scaling[f"cores_{when}"]:
            out.text(
                f"  core check {when}: CPUs {list(check['cpus'])}, rate together / alone "
                f"{check['rate_ratio']:.2f}: {check['verdict']}"
            )
