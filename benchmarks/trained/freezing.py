"""Does freezing by alpha help? Recovery of a pruned trained network under six freeze sets.

    python benchmarks/trained/freezing.py --network resnet50-half --seeds 5

Every set gets the same budget twice: the same steps, and the same seconds of training. All start
from the same pruned weights (one-shot, global, 10 % left); seeds order the crops and draw the
random sets. Agreement is on hold-out photographs, with the standard error over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.trained.study import Data, prepare_data, say, store
from opentrans.freeze import FreezePlan, freeze_plan
from opentrans.trained.recipe import (
    Recipe,
    fine_tune,
    norms_of,
    prepared,
    prune_on_photographs,
)
from opentrans.trained.subjects import SUBJECTS
from opentrans_kernels.bench.environment import environment_block
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.spectrum import estimate_alpha

SCHEMA = 1
FIT = "xmin_peak"
SETS = ("none", "below", "above", "random", "prefix", "affine", "classifier")


def frozen_of(which: str, data: Data, seed: int, plans: dict[str, FreezePlan]) -> list[str]:
    """Names of the convolutions that a set freezes: half of them; or none; or all, so that only the
    classifier trains, as a norm is frozen with its convolution; or all, and the classifier, but no
    norm ("affine")."""
    convs = [n for n, m in data.dense.named_modules() if isinstance(m, nn.Conv2d)]
    if which == "none":
        return []
    if which in ("affine", "classifier"):
        return convs
    if which == "prefix":
        return convs[: len(convs) // 2]
    if which == "random":
        plan = freeze_plan(data.dense, rule=f"random:{seed}", like=plans["below"])
        return sorted(plan.modules & set(convs))
    return sorted(plans[which].modules & set(convs))


def _trains(which: str, model: nn.Module) -> bool:
    """Whether a set of :func:`frozen_of` leaves anything to train."""
    norms = {id(p) for norm in norms_of(model) for p in norm.parameters()}
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    inside = norms | {id(p) for conv in convs for p in conv.parameters()}
    if which == "affine":
        return bool(norms)
    return which != "classifier" or any(id(p) not in inside for p in model.parameters())


def saved_bytes(model: nn.Module, data: Data, batch: int) -> int:
    """Bytes of activations that autograd keeps for backward in one step; parameters not counted."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, targets = data.bank.batch(0, batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = data.subject.objective.loss(
            data.subject.objective.outputs(model, data.prepare(images)), targets
        )
    del loss
    return sum(kept.values())


def one_run(
    data: Data, start: nn.Module, masks: MaskSet, frozen: list[str], which: str, seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune once; agreement, steps, seconds, bytes kept."""
    model, affine = copy.deepcopy(start), which == "affine"
    layers = [] if affine else frozen  # their norms would be frozen with them
    data.bank.seed = seed
    began, cpu = time.perf_counter(), time.process_time()
    steps = fine_tune(
        model, data.subject.objective, data.bank, data.prepare, masks, frozen=layers,
        affine_only=affine, lr=settings["lr"], batch=settings["batch"], steps=settings["steps"],
        seconds=settings.get("seconds"),
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    with prepared(model, layers, masks):
        kept = saved_bytes(model, data, settings["batch"])
    mean = data.agreement(model)["mean"]
    return {
        "set": which, "seed": seed, "frozen": len(frozen), "steps": steps, "seconds": seconds,
        "cpu_seconds": cpu, "kept_bytes": kept, **mean,
    }  # fmt: skip


def summary(runs: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    """Mean and standard error over seeds, for every set."""
    found: dict[str, Any] = {}
    for which in SETS:
        rows = [run for run in runs if run["set"] == which]
        if not rows:
            continue
        found[which] = {}
        for key in keys:
            values = [float(row[key]) for row in rows]
            mean = sum(values) / len(values)
            spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
            found[which][key] = {
                "mean": mean,
                "standard_error": math.sqrt(spread / len(values)),
                "seeds": len(values),
            }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(SUBJECTS), default="resnet50-half")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trained"))
    parser.add_argument("--work", type=Path, default=Path("build/trained"))
    parser.add_argument("--quick", action="store_true", help="minutes: two seeds, a few steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.seeds, options.steps, options.seconds = 2, 3, 2.0
    data = prepare_data(options.network, options.work, options.quick)
    start = copy.deepcopy(data.dense)
    scope = data.subject.scope(start)
    masks = prune_on_photographs(
        start, data.subject.objective, data.bank, data.prepare,
        Recipe(rounds=1, period=1, recovery=0, lr=0.0), scope=scope, input_size=data.subject.size,
    )  # fmt: skip
    data.measure(start)
    plans = {
        "below": freeze_plan(data.dense, estimate_alpha(data.dense, fit=FIT), rule="median"),
        "above": freeze_plan(data.dense, estimate_alpha(data.dense, fit=FIT), rule="above_median"),
    }
    pruned = freeze_plan(start, estimate_alpha(start, fit=FIT), rule="median")
    name = f"{options.network}-freezing{'-quick' if options.quick else ''}.json"
    path = options.out / name
    settings = {"lr": options.lr, "batch": options.batch}
    budgets = {
        "steps": settings | {"steps": options.steps},
        "seconds": settings | {"steps": 10**9, "seconds": options.seconds},
    }
    result = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    if result.get("budgets", budgets) != budgets:
        say(f"{path} holds runs of other budgets; remove it or name another --out")
        return 1
    result |= {
        "schema": SCHEMA, "network": options.network, "environment": environment_block(),
        "fit": FIT, "budgets": budgets, "density": masks.density(),
        "before": data.agreement(start)["mean"],
        "frozen_of_dense_weights": sorted(plans["below"].modules),
        "frozen_of_pruned_weights": sorted(pruned.modules),
    }  # fmt: skip
    sets = [which for which in SETS if _trains(which, data.dense)]
    for which in sorted(set(SETS) - set(sets)):
        say(f"no set {which!r}: nothing of this network would train")
    keys = tuple(result["before"]) + ("steps", "cpu_seconds", "kept_bytes", "frozen")
    for budget, chosen in budgets.items():
        runs = result["runs"].setdefault(budget, [])
        for seed in range(options.seeds):
            for which in sets:
                if any(run["set"] == which and run["seed"] == seed for run in runs):
                    continue
                frozen = frozen_of(which, data, seed, plans)
                runs.append(one_run(data, start, masks, frozen, which, seed, chosen))
                say(f"  same {budget}, seed {seed}, {which}: {runs[-1]}")
                result.setdefault("summary", {})[budget] = summary(runs, keys)
                store(path, result)
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
