"""Training step of the CLIP RN50 trunk: memory kept for backward and time, all variants.

Example::

    python benchmarks/bench_training.py --json training.json
    python benchmarks/bench_training.py --sets odd first27 --rounds 9 --mask none

A step is zero_grad, forward, mean of squares, backward; no optimizer. Variants of one freeze set
run interleaved on the same pinned CPUs and are compared by the ratio within a round. On one thread
CPU time of the process decides, because wall time counts what other processes take.

Baselines, each in both memory layouts, of which the faster counts:

- "baseline": ``requires_grad = False`` and every batch norm as scale and shift in buffers, as
  detectron2 does;
- "baseline, affine trains": the same behind frozen convolutions, and eval-mode batch norms whose
  scale and shift train behind the others. "skip, affine trains" computes these gradients too, so
  this, and not the one above, is the same training step in plain PyTorch; ratios to both are told.

"plain" is the usual eval-mode batch norm with every scale and shift training; "selective saving" is
the baseline with convolutions that keep their input only if their weight trains, the idea of
memsave_torch (Bhatia and Dangel, arXiv 2404.12406), written anew. Losing variants are in the table.
An interrupt keeps the freeze sets that were finished. Weights and masks are synthetic. Exit code 1
if a step of ours keeps more than its baseline, or is slower than ``--fail-above`` times the
baseline in its own layout, or, in the better layout of both, than the fastest baseline.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opentrans.cli.bench_rows import match_cell, ratio_cell, show_repeats
from opentrans.cli.render import Output
from opentrans_kernels.bench.environment import portable_words
from opentrans_kernels.bench.rows import command_words, matched
from opentrans_kernels.bench.timing import TimingTable, choose_cpus, interleave, pin
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training_gradients import gradient_error, gradients, run_trunk, step  # noqa: E402
from training_result import Watch  # noqa: E402
from training_variants import SETS, freeze_set, variants  # noqa: E402

MIB = 2**20
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Variants that are also run in channels_last: the baselines, because the faster layout of each
#: counts, and what is compared with them.
BOTH = ("baseline", "baseline, affine trains", "skip", "skip, affine trains")


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes saved for backward, each storage once, without what lasts: parameters, buffers, packed
    patterns, and the image.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        pattern = t.dtype == torch.int32  # of a sparse layer: lives as long as the model
        if storage.data_ptr() not in own and storage.nbytes() and not pattern:
            seen[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run_trunk(model, x)
    return sum(nbytes for nbytes, _ in seen.values())


def measure_set(kind: str, options: argparse.Namespace, out: Output) -> dict[str, Any]:
    tower = synthetic_rn50(image_size=options.size).requires_grad_(True)
    names = freeze_set(tower, kind)
    masks = None
    if options.mask != "none":
        masks = synthetic_masks(tower, options.mask)
        masks.apply_(tower)
    x = torch.randn(options.batch, 3, options.size, options.size,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    subjects: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    for layout in options.layouts:
        form, first = LAYOUTS[layout], layout == options.layouts[0]
        for name, make in variants(masks, names).items():
            if first or name in BOTH:
                full = name if layout == "contiguous" else f"{name}, {layout}"
                model = make(copy.deepcopy(tower).to(memory_format=form))
                subjects[full] = model, x.contiguous(memory_format=form)
    with out.progress(f"bench training: {kind}") as told:
        table: TimingTable = interleave(
            {name: lambda pair=pair: step(*pair) for name, pair in subjects.items()},
            rounds=options.rounds,
            warmup_s=0.1,
            settle=0,
            on_round=lambda done, total: told(f"round {done} of {total}"),
        )
    clock = "cpu" if options.threads == 1 else "wall"
    frozen = [n for n in subjects if n.startswith("baseline") and "affine" not in n]
    affine = [n for n in subjects if n.startswith("baseline, affine")]
    # Of each kind of baseline the gradients in float64, and how far its own are from them.
    exact = {names[0]: gradients(copy.deepcopy(subjects[names[0]][0]).double(), x.double())
             for names in (frozen, affine)}  # fmt: skip
    own = {
        names[0]: max(gradient_error(*subjects[name], exact[names[0]]) for name in names)
        for names in (frozen, affine)
    }
    kept = {name: kept_bytes(*pair) / MIB for name, pair in subjects.items()}
    rows = []
    for name, (model, image) in subjects.items():
        trains = "affine trains" in name or name == "plain"
        fastest = table.fastest(affine if trains else frozen, clock)
        like = (affine if trains else frozen)[0]
        error = gradient_error(model, image, exact[like])
        rows.append(
            {
                "set": kind,
                "frozen": len(names),
                "variant": name,
                "kept_mib": kept[name],
                "kept_baseline_mib": min(kept[n] for n in (affine if trains else frozen)),
                "cpu_ms": table[name].cpu.to_dict(),
                "wall_ms": table[name].wall.to_dict(),
                "baseline": fastest,
                "time_vs_baseline": table.ratio(name, fastest, clock).to_dict(),
                "time_vs_same_layout": table.ratio(
                    name, _in_layout_of(name, affine if trains else frozen), clock
                ).to_dict(),
                "time_vs_frozen_norms": table.ratio(
                    name, table.fastest(frozen, clock), clock
                ).to_dict(),
                "gradient_error": error,
                "match": matched(error, 2 * own[like]),
                "command": portable_words(row_command(options, kind)),
            }
        )
    return {"set": kind, "names": names, "rows": rows}


def show(result: dict[str, Any], options: argparse.Namespace, out: Output) -> None:
    cells = []
    for row in result["rows"]:
        ratio = row["time_vs_baseline"]
        cells.append(
            [
                row["variant"],
                f"{row['kept_mib']:.1f}",
                f"{row['kept_mib'] / max(row['kept_baseline_mib'], 1e-9):.2f}",
                f"{row['cpu_ms']['median']:.0f}",
                ratio_cell(ratio, 3),
                f"{row['time_vs_frozen_norms']['median']:.3f}",
                match_cell(row["match"]),
                "LOSES" if ratio["median"] > 1 and not row["variant"].startswith("base") else "",
            ]
        )
    out.heading(f"{result['set']}: {len(result['names'])} of 55 convolutions frozen")
    out.text(
        "share: of what its baseline keeps; time: of its fastest baseline; frozen: of the fastest "
        "with frozen norms"
    )
    columns = ("variant", "kept MiB", "share", "CPU ms", "time", "frozen", "match", "")
    out.table(None, columns, cells, right=range(1, 6))
    show_repeats([(result["set"], row_command(options, result["set"]))], out)


def row_command(options: argparse.Namespace, kind: str) -> list[str]:
    """What measures one freeze set again: its rows are ratios to each other."""
    return command_words(
        ("python", "benchmarks/bench_training.py", "--layouts", *options.layouts, "--sets", kind),
        mask=options.mask,
        size=options.size,
        batch=options.batch,
        threads=options.threads,
        rounds=options.rounds,
        fail_above=f"{options.fail_above:g}",
    )


def _in_layout_of(name: str, baselines: Sequence[str]) -> str:
    last = name.endswith("channels_last")
    return next((b for b in baselines if b.endswith("channels_last") == last), baselines[0])


def failures(results: Sequence[dict[str, Any]], fail_above: float) -> list[str]:
    """What keeps more than its baseline, is slower than the baseline in its own layout, or, in the
    better layout of each, slower than the fastest baseline; in words.
    """
    found = []
    for result in results:
        fastest: dict[str, float] = {}
        ours = [row for row in result["rows"] if row["variant"].startswith("skip")]
        for row in ours:
            kind = row["variant"].removesuffix(", channels_last")
            ratio = row["time_vs_baseline"]["median"]
            fastest[kind] = min(fastest.get(kind, ratio), ratio)
            same = row["time_vs_same_layout"]["median"]
            if same > fail_above:
                found.append(f"{row['set']}, {row['variant']}: {same:.3f} of its layout's baseline")
            if row["kept_mib"] > row["kept_baseline_mib"]:
                found.append(
                    f"{row['set']}, {row['variant']}: keeps {row['kept_mib']:.1f} MiB, its "
                    f"baseline {row['kept_baseline_mib']:.1f}"
                )
        found += [
            f"{result['set']}, {kind}: {ratio:.3f} of the fastest baseline, in the better layout"
            for kind, ratio in fastest.items()
            if ratio > fail_above
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--mask", default="global:0.90", help="recipe, or none")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--fail-above", type=float, default=1.03, metavar="RATIO")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", default=None)
    options = parser.parse_args(argv)
    out = Output(options.json)
    try:
        cpus = choose_cpus(options.threads)
        if cpus is not None:
            pin(cpus)
        torch.set_num_threads(options.threads)
        watch = Watch("training", options.threads)
        results: list[dict[str, Any]] = []
        try:
            for kind in options.sets:
                results.append(measure_set(kind, options, out))
                show(results[-1], options, out)
        except KeyboardInterrupt:
            if not results:
                raise
            out.warn(f"interrupted: {len(results)} finished freeze sets were kept")
    except OpenTransError as error:
        sys.stderr.write(f"bench_training: {error}\n")
        return 2
    bad = failures(results, options.fail_above)
    for line in bad:
        out.warn(line)
    out.finish(
        {
            **watch.result(complete=len(results) == len(options.sets)),
            "benchmark": "training",
            "weights": "synthetic",
            "mask": options.mask,
            "size": options.size,
            "batch": options.batch,
            "layouts": options.layouts,
            "fail_above": options.fail_above,
            "failed_checks": bad,
            "rounds": options.rounds,
            "results": results,
        }
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
