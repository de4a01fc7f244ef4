"""What it costs to see that nobody wrote to the weights behind a packed copy.

Example::

    python benchmarks/bench_freshness.py --threads 1 --json freshness.json

CLIP's RN50 with a synthetic mask. A forward pass of the accelerated trunk and a training
step of skip_frozen on the sparse kernels, each as it is and without its looks, which a user cannot
turn off. CPU time of the process, interleaved rounds, ratio within a round: median and quartiles.
A row matches if its output, or gradient, errs against float64 at most twice as much as dense. Exit
code 1 if looking costs an inference more than --limit or a row does not match, 2 for bad input.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from opentrans.cli.bench import chosen_cpus
from opentrans.cli.bench_rows import match_cell, ratio_cell, show_repeats
from opentrans.cli.options import add_json, add_threads, positive
from opentrans.cli.render import Output
from opentrans_kernels.bench.environment import portable_words
from opentrans_kernels.bench.rows import command_words, matched
from opentrans_kernels.errors import OpenTransError

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mask", default="global:0.90", help="recipe of a synthetic mask")
    parser.add_argument("--set", default="published", help="frozen convolutions of the step")
    parser.add_argument("--size", type=positive, default=224, metavar="PX", help="default 224")
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="of the step")
    parser.add_argument("--rounds", type=positive, default=31, metavar="N")
    parser.add_argument("--limit", type=float, default=1.02, metavar="RATIO")
    add_threads(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    try:
        return run(options, Output(options.json))
    except OpenTransError as error:
        sys.stderr.write(f"bench_freshness: {error}\n")
        return 2


def run(options: argparse.Namespace, out: Output) -> int:
    """The table; 1 if inference pays more than the limit."""
    import torch

    from opentrans_kernels.bench.timing import pin

    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)
    torch.set_num_threads(options.threads)
    rows = [inference(options), step(options)]
    out.table(
        f"Looking at the weights, {options.mask}, {options.threads} thread(s), CPU time",
        ["case", "without ms", "with ms", "with / without", "match"],
        [
            [
                row["case"],
                f"{row['without_ms']:.2f}",
                f"{row['with_ms']:.2f}",
                ratio_cell(row["ratio"], 4),
                match_cell(row["match"]),
            ]
            for row in rows
        ],
        right=(1, 2, 3),
    )
    show_repeats([("all", row_command(options))], out)
    for row in rows:
        row["command"] = portable_words(row_command(options))
        if not row["match"]["equal"]:
            out.warn(f"{row['case']} is inexact: {match_cell(row['match'])}")
    out.finish({"rows": rows, "threads": options.threads, "mask": options.mask})
    slow = rows[0]["ratio"]["median"] > options.limit
    return int(slow or not all(row["match"]["equal"] for row in rows))


def row_command(options: argparse.Namespace) -> list[str]:
    """What measures both rows again."""
    return command_words(
        ("python", "benchmarks/bench_freshness.py"),
        mask=options.mask,
        set=options.set,
        size=options.size,
        batch=options.batch,
        rounds=options.rounds,
        limit=options.limit,
        threads=options.threads,
    )


def inference(options: argparse.Namespace) -> dict[str, Any]:
    """The trunk of one image, accelerated without measuring."""
    import torch

    from opentrans_kernels import accelerate
    from opentrans_kernels.bench.variants import relative_error
    from opentrans_kernels.freshness import Freshness
    from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50
    from opentrans_kernels.topology import find_trunk, forward_trunk

    model = synthetic_rn50()
    masks, x = synthetic_masks(model, options.mask), torch.randn(1, 3, options.size, options.size)
    dense = copy.deepcopy(model)
    masks.apply_(dense)
    with torch.no_grad():
        own = forward_trunk(find_trunk(dense), x)[-1]
        exact = forward_trunk(find_trunk(dense.double()), x.double())[-1]
        accelerate(model, masks, measure=False)
        trunk = find_trunk(model)
        error = relative_error(forward_trunk(trunk, x)[-1], exact)
    match = matched(error, 2 * relative_error(own, exact))

    def forward() -> None:
        with torch.no_grad():
            forward_trunk(trunk, x)

    blind = mock.patch.object(Freshness, "require", lambda self: None)
    return compared("accelerated trunk, forward", forward, blind, options.rounds) | {"match": match}


def step(options: argparse.Namespace) -> dict[str, Any]:
    """A training step; blind, what was packed is used again as long as PyTorch counts no write."""
    import torch
    from torch import nn
    from training_gradients import gradient_error, gradients
    from training_variants import freeze_plainly, freeze_set

    from opentrans import skip_frozen
    from opentrans_kernels.ops.contents import Source
    from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50

    model = synthetic_rn50()
    model.attnpool = nn.Identity()
    model.requires_grad_(True)
    masks = synthetic_masks(model, options.mask)
    masks.apply_(model)
    x, names = (
        torch.randn(options.batch, 3, options.size, options.size),
        freeze_set(model, options.set),
    )
    dense = freeze_plainly(copy.deepcopy(model), names, "all")
    exact = gradients(copy.deepcopy(dense).double(), x.double())
    skip_frozen(model, names, masks=masks)
    own = gradient_error(dense, x, exact)
    match = matched(gradient_error(model, x, exact), 2 * own)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-6)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    blind = mock.patch.object(Source, "still", Source.unmoved)
    case = f"skip_frozen ({options.set}) on sparse kernels, step of {options.batch}"
    return compared(case, train, blind, max(3, options.rounds // 3)) | {"match": match}


def compared(case: str, call: Callable[[], None], blind: Any, rounds: int) -> dict[str, Any]:
    """``call`` as it is and inside ``blind``, by turns."""
    from opentrans_kernels.bench.timing import interleave

    def without() -> None:
        with blind:
            call()

    calls = {"without": without, "with": call}
    table = interleave(calls, rounds=rounds, warmup_s=0.2, settle=1)
    ratio = table.ratio("with", "without", "cpu")  # of the times, with / without
    return {
        "case": case,
        "without_ms": table["without"].cpu.median,
        "with_ms": table["with"].cpu.median,
        "ratio": ratio.to_dict(),
    }


if __name__ == "__main__":
    sys.exit(main())
