"""Are row blocks that are dealt to free threads faster than one range of them per thread?

Both ways run in turns in one process, stage by stage, on the same accelerated trunk; only who
computes a unit differs, so the results are equal bit by bit, which is checked. It needs as many
free CPUs as threads: what it prints on a busy machine means nothing.

    python benchmarks/bench_threads.py --threads 2 --cpus 0,1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from opentrans_kernels import accelerate, native
from opentrans_kernels.bench.stages import WHOLE, stage_inputs
from opentrans_kernels.bench.timing import choose_cpus, median_pair, pin
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50
from opentrans_kernels.timing.canary import look, verdict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Dealt units against ranges of them.")
    parser.add_argument("--mask", default="global:0.90")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpus", help="A,B,... (default: the last ones available)")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args(argv)
    try:
        native.require("dealing units")
        if min(options.threads, options.rounds, options.size) < 1:
            raise OpenTransError("--threads, --rounds and --size must be at least 1.")
        cpus = [int(one) for one in options.cpus.split(",")] if options.cpus else None
        cpus = cpus or choose_cpus(options.threads)
        if cpus is not None:
            pin(cpus)
        measure(options)
    except (OpenTransError, ValueError) as error:
        sys.stderr.write(f"bench_threads: {error}\n")
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """Print the median ratio, ranges over dealt, of every part of the trunk."""
    torch.set_num_threads(options.threads)
    size = options.size
    model = synthetic_rn50()
    accelerate(model, synthetic_masks(model, options.mask), input_size=(size, size))
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    parts = list(stage_inputs(model, x))
    before = look(threads=options.threads)
    spent: dict[bool, list[list[float]]] = {False: [], True: []}
    outs: dict[bool, list[torch.Tensor]] = {}
    ranges = torch.ops.opentrans_kernels.deal_in_ranges
    try:
        for number in range(options.rounds + 1):
            for side in (True, False) if number % 2 else (False, True):
                ranges(side)
                times, outs[side] = [], []
                with torch.no_grad():
                    for _, modules, y in parts:
                        start = time.perf_counter()
                        for module in modules:
                            y = module(y)
                        times.append((time.perf_counter() - start) * 1e3)
                        outs[side].append(y)
                if number:  # the first round warms up
                    spent[side].append([*times, sum(times)])
    finally:
        ranges(False)
    if not all(map(torch.equal, outs[False], outs[True])):
        raise OpenTransError("the two ways gave different bits. Report this.")
    found = verdict(before, look(threads=options.threads))
    sys.stdout.write(f"{'part':10} {'ranges ms':>10} {'dealt ms':>10}  ratio (quartiles)\n")
    for number, name in enumerate([*(name for name, _, _ in parts), WHOLE]):
        pair = median_pair(*([one[number] for one in spent[side]] for side in (True, False)))
        r = pair.ratios
        sys.stdout.write(
            f"{name:10} {pair.slow_ms:10.2f} {pair.fast_ms:10.2f}  {r.median:.3f} "
            f"({r.q1:.3f}-{r.q3:.3f})\n"
        )
    for reason in found["reasons"]:
        sys.stdout.write(f"disturbed machine: {reason}\n")


if __name__ == "__main__":
    sys.exit(main())
