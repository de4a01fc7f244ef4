"""What the allocation of the zeros is worth: the same sparsity, measured latency beside quality.

Example::

    python benchmarks/bench_allocation.py --sparsity 0.90 --size 224 --isa avx2 --json alloc.json

One tower, one number of zeros, one mask per rule of ``opentrans.imp``; each masked tower is
accelerated, and all are timed interleaved. Weights that are left, by sum of magnitudes and by sum
of squares, stand beside the milliseconds: on weights without training no rule can be judged by
accuracy, and ``global`` keeps the most by definition. Rows slower than ``global`` are marked. Exit
code 1 if an accelerated tower is inexact (more than twice dense float32's own error), 2 for bad
input.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentrans.cli.bench import ISAS, chosen_cpus
from opentrans.cli.bench_rows import match_cell, ratio_cell, show_repeats
from opentrans.cli.options import (
    add_json,
    add_model,
    add_size,
    add_threads,
    input_size,
    positive,
)
from opentrans.cli.render import Output
from opentrans_kernels.bench.environment import isa_environment, missing_limits, portable_words
from opentrans_kernels.bench.rows import command_words, matched
from opentrans_kernels.errors import OpenTransError

sys.path.insert(0, str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from torch import nn

    from opentrans_kernels.masks import MaskSet
    from opentrans_kernels.plan import Plan


@dataclass(frozen=True)
class Rule:
    """One row: an allocation with its strength and floor; ``measured``: by a measured plan."""

    allocation: str
    strength: float = 0.5
    floor: float | None = None
    measured: bool = False

    @property
    def label(self) -> str:
        if self.allocation in ("global", "uniform"):
            return self.allocation
        floor = "" if self.floor is None else f", floor {self.floor:g}"
        return f"{self.allocation}{' measured' * self.measured}, strength {self.strength:g}{floor}"


RULES = (
    Rule("global"),
    Rule("uniform"),
    Rule("macs", 0.25),
    Rule("macs"),
    Rule("macs", floor=0.0),
    Rule("macs", 1.0),
    Rule("latency"),
    Rule("latency", measured=True),
    Rule("latency", 1.0, measured=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.90, metavar="S", help="default 0.90")
    add_model(parser)
    add_size(parser)
    add_threads(parser)
    parser.add_argument("--isa", choices=ISAS, default="native", help="limit of all rows")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N")
    parser.add_argument(
        "--rule", action="append", metavar="NAME", choices=[rule.label for rule in RULES],
        help="a row of the table, beside global; may be repeated (default: all)",
    )  # fmt: skip
    parser.add_argument("--save", metavar="DIR", help="also write the masks there")
    add_json(parser)
    options = parser.parse_args(given)
    try:
        if missing_limits(options.isa, options.threads):
            # The limits are read when a process starts, so this one is replaced.
            limits = isa_environment(options.isa, options.threads)
            command = [sys.executable, os.path.abspath(__file__), *given]
            os.execve(sys.executable, command, {**os.environ, **limits})
        return run(options, Output(options.json))
    except OpenTransError as error:
        sys.stderr.write(f"bench_allocation: {error}\n")
        return 2


def run(options: argparse.Namespace, out: Output) -> int:
    """The table; 1 if a row is inexact."""
    from opentrans_kernels.bench.timing import pin

    if not 0.0 < options.sparsity < 1.0:
        raise OpenTransError(f"--sparsity {options.sparsity} must lie between 0 and 1.")
    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)
    import torch
    from training_result import Watch

    from opentrans_kernels import accelerate, make_plan
    from opentrans_kernels.bench.part import TrunkModule
    from opentrans_kernels.bench.subject import load_subject
    from opentrans_kernels.bench.timing import interleave
    from opentrans_kernels.bench.variants import relative_error

    torch.set_num_threads(options.threads)
    watch = Watch("allocation", options.threads)
    size = input_size(options)
    subject = load_subject(
        f"global:{options.sparsity}",
        arch=options.arch,
        checkpoint=options.checkpoint,
        seed=options.seed,
    )
    if subject.synthetic_weights:
        out.warn("SYNTHETIC weights: the latency is measured, the quality is a proxy only.")
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(options.seed))
    calls, rows = {}, []
    with out.progress("bench allocation") as step, torch.no_grad():
        step("measuring a plan for the latency rows")
        plan = make_plan(subject.masked_copy(), input_size=size)
        for rule in RULES:
            if options.rule and rule.label not in ("global", *options.rule):
                continue
            step(f"masks and modules of {rule.label}")
            masks = masks_of(subject.model, rule, options.sparsity, size, plan)
            if options.save:
                name = rule.label.replace(", ", "-").replace(" ", "")
                os.makedirs(options.save, exist_ok=True)
                masks.save(os.path.join(options.save, f"{name}.safetensors"))
            twin = copy.deepcopy(subject.model)
            masks.apply_(twin)
            exact = TrunkModule(copy.deepcopy(twin).double())(x.double())
            own = relative_error(TrunkModule(twin)(x), exact)
            accelerate(twin, input_size=size)
            trunk = TrunkModule(twin)
            error = relative_error(trunk(x), exact)
            calls[rule.label] = partial(trunk, x)
            rows.append(quality(subject.model, masks, rule, size) | {"error": error, "dense": own})
        calls["dense eager"] = partial(TrunkModule(subject.masked_copy()), x)
        table = interleave(calls, rounds=options.rounds, warmup_s=0.3)
    clock = "cpu" if options.threads == 1 else "wall"
    for row in rows:
        ratio = table.ratio("global", row["rule"], clock)
        row |= {"ms": table[row["rule"]].by(clock).median, "speedup": ratio.to_dict()}
        row["loses"] = ratio.median < 1
        row["match"] = matched(row["error"], 2 * row["dense"])
        row["exact"] = row["match"]["equal"]
        row["command"] = portable_words(row_command(options, row["rule"]))
    dense = table["dense eager"].by(clock).median
    show(rows, dense, options, clock, out)
    for row in rows:
        if not row["exact"]:
            out.warn(f"{row['rule']} is inexact: {row['error']:.1e}, dense {row['dense']:.1e}")
    out.finish(
        {
            **watch.result(),
            "failed_checks": [f"{row['rule']} is inexact" for row in rows if not row["exact"]],
            "subject": subject.describe() | {"mask": f"sparsity {options.sparsity}"},
            "sparsity": options.sparsity,
            "input_size": size,
            "isa": options.isa,
            "clock": clock,
            "rounds": options.rounds,
            "pinned_cpus": cpus,
            "dense_eager_ms": dense,
            "rows": rows,
            "timings": table.to_dict(),
        }
    )
    return 0 if all(row["exact"] for row in rows) else 1


def row_command(options: argparse.Namespace, rule: str) -> list[str]:
    """What measures one rule again, beside ``global``."""
    return command_words(
        ("python", "benchmarks/bench_allocation.py"),
        sparsity=options.sparsity,
        arch=options.arch,
        checkpoint=options.checkpoint,
        seed=options.seed,
        size=options.size,
        size_w=options.size_w,
        threads=options.threads,
        isa=options.isa,
        rounds=options.rounds,
        rule=rule,
    )


def masks_of(
    model: nn.Module, rule: Rule, sparsity: float, size: tuple[int, int], plan: Plan
) -> MaskSet:
    """The masks of ``rule`` on the weights as they are, in the rounds that training would have."""
    from opentrans.imp import Allocation, ImpConfig, ImpSchedule, Pruner

    config = ImpConfig(
        ImpSchedule(rounds=100, rate=0.25, target_density=1 - sparsity, period=1),
        Allocation(rule.allocation, rule.strength, rule.floor),
        input_size=size,
    )
    twin = copy.deepcopy(model)
    pruner = Pruner(twin, config, plan=plan if rule.measured else None, synthetic=True)
    while not pruner.finished:
        pruner.prune()
    pruner.close()
    return pruner.masks


def quality(model: nn.Module, masks: MaskSet, rule: Rule, size: tuple[int, int]) -> dict[str, Any]:
    """What is left: weights, multiply-adds, sums of magnitudes and of squares; the least layer."""
    from opentrans_kernels.topology import conv_shapes

    shapes = conv_shapes(model, size)
    sums = dict.fromkeys(("magnitude", "squares", "macs"), 0.0)
    kept = dict(sums)
    for name, mask in masks.masks.items():
        weight = model.get_submodule(name).weight.detach().double()
        pixels = shapes[name].pixels
        for key, values in (("magnitude", weight.abs()), ("squares", weight.square())):
            sums[key] += float(values.sum())
            kept[key] += float(values[mask].sum())
        sums["macs"] += mask.numel() * pixels
        kept["macs"] += int(mask.sum()) * pixels
    densities = {name: float(mask.float().mean()) for name, mask in masks.masks.items()}
    least = min(densities, key=lambda name: densities[name])
    return {
        "rule": rule.label,
        "nnz": masks.nnz,
        "density": masks.density(),
        **{f"{key}_kept": kept[key] / sums[key] for key in sums},
        "least_layer": least,
        "least_density": densities[least],
        "densities": densities,
    }


def show(
    rows: list[dict[str, Any]], dense: float, options: argparse.Namespace, clock: str, out: Output
) -> None:
    """The table for people."""
    out.heading(
        f"{options.arch}, sparsity {options.sparsity:g}, {options.size} px, {options.threads} "
        f"thread(s), isa {options.isa}, {clock} time of {options.rounds} interleaved rounds"
    )
    cells = [
        [
            row["rule"],
            row["nnz"],
            f"{row['ms']:.1f}",
            ratio_cell(row["speedup"], 3),
            f"{dense / row['ms']:.2f}x",
            match_cell(row["match"]),
            "LOSES" if row["loses"] else "",
        ]
        for row in rows
    ]
    columns = ("rule", "weights", "ms", "over global", "over dense eager", "match", "")
    out.table(None, columns, cells, right=(1, 2, 3, 4))
    out.text()
    cells = [
        [
            row["rule"],
            f"{row['macs_kept']:.4f}",
            f"{row['magnitude_kept']:.4f}",
            f"{row['squares_kept']:.4f}",
            f"{row['least_density']:.4f} {row['least_layer']}",
        ]
        for row in rows
    ]
    columns = ("rule", "MACs left", "sum |w| left", "sum w^2 left", "emptiest layer")
    out.table(None, columns, cells)
    out.text()
    show_repeats([(row["rule"], row_command(options, row["rule"])) for row in rows], out)


if __name__ == "__main__":
    sys.exit(main())
