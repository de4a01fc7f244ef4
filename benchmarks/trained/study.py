"""What pruning does to the answers of trained networks, on photographs nobody trained on.

    python benchmarks/trained/study.py --network hed --out benchmarks/results/trained   # hours
    python benchmarks/trained/study.py --network hed --quick --out build/quick        # minutes

Every cell is one way of pruning under one budget. A cell that is in the JSON already is not run
again, and a run that was stopped within a cell continues there (``--work``).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.trained.cells import BARE, BUDGET, LATENCY, cells_of
from opentrans import reconstruct
from opentrans.imp.milliseconds import measured_plan
from opentrans.trained import Crops, Loaded, load, photographs
from opentrans.trained.bank import Bank
from opentrans.trained.judge import Unseen, holdout, judge
from opentrans.trained.recipe import Recipe, fine_tune, prune_on_photographs, save_weights
from opentrans.trained.statistics import bank_inputs, recalibrate
from opentrans.trained.subjects import SUBJECTS, Subject
from opentrans_kernels.bench.environment import environment_block
from opentrans_kernels.masks import MaskSet, atomic_write
from opentrans_kernels.plan import Plan

SCHEMA = 1
#: Cells whose training step is timed with and without the sparse kernels: the first that was kept.
TIMED = (
    f"long/select/latency-{LATENCY}", "select/macs-0.2", "imp/macs-0.2", "long/select/global",
    "select/global",
)  # fmt: skip


@dataclass
class Data:
    """Loaded once: dense network, crops with its answers, hold-out with its answers."""

    name: str
    subject: Subject
    loaded: Loaded
    bank: Bank
    holdout: list[Unseen]
    work: Path
    quick: bool = False

    @property
    def dense(self) -> nn.Module:
        return self.loaded.module

    @property
    def prepare(self) -> Any:
        return self.loaded.prepare

    def agreement(self, model: nn.Module) -> dict[str, Any]:
        """Means over the hold-out photographs, and the values of each."""
        return judge(model, self.loaded, self.subject, self.holdout)

    def plan(self, allocation: str) -> Plan | None:
        """Measured milliseconds of the dense layers, and of their forms, for ``latency``."""
        if allocation != "latency":
            return None
        path = self.work / f"{self.name}-plan.json"
        return measured_plan(self.dense, self.subject.size, path, not self.quick)

    def measure(self, model: nn.Module) -> None:
        """Batch norms of a pruned copy, measured again; nothing where there are none."""
        if crops := self.subject.statistics:
            plain = copy.deepcopy(self.dense)
            recalibrate(model, plain, bank_inputs(self.bank, self.prepare, crops))


def prepare_data(name: str, work: Path, quick: bool) -> Data:
    """Network, bank and hold-out; the bank is kept in ``work``."""
    subject = SUBJECTS[name]
    loaded = load(name)
    count = 40 if quick else BUDGET * subject.batch  # nobody sees a crop twice
    bank = build_bank(loaded, subject, work, count)
    subject.ready(loaded.module, bank, loaded.prepare)
    photos = photographs("holdout")
    unseen = holdout(loaded, subject, photos[:3] if quick else photos)
    return Data(name, subject, loaded, bank, unseen, work, quick)


def build_bank(loaded: Loaded, subject: Subject, work: Path, count: int) -> Bank:
    """``count`` crops of the training photographs with the dense network's answers."""
    name = loaded.network.name
    say(f"{name}: the dense network's answers for {count} crops")
    return Bank.build(
        loaded.module, subject.objective, Crops(photographs("train"), subject.crop, 1, seed=0),
        count, loaded.prepare, path=work / f"{name}-bank-{count}.safetensors",
    )  # fmt: skip


# --- cells -------------------------------------------------------------------------------------


def shares(masks: MaskSet, model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Density, share of multiply-adds left (all convolutions), density layer by layer."""
    from opentrans_kernels.audit import audit

    found = audit(masks, model, input_size=size)
    return {
        "density": masks.density(),
        "macs_left": found.totals["flop_density"],
        "layers": {name: float(mask.float().mean()) for name, mask in masks.masks.items()},
    }


def run_recipe(data: Data, recipe: Recipe, folder: Path | None, scope: list[str]) -> dict[str, Any]:
    """One pruning run: agreement, what is left, seconds of training."""
    model, bank = copy.deepcopy(data.dense), data.bank
    if recipe.steps() > BUDGET and len(bank) < data.subject.crops:
        bank = build_bank(data.loaded, data.subject, data.work, data.subject.crops)
    began, cpu = time.perf_counter(), time.process_time()
    masks = prune_on_photographs(
        model, data.subject.objective, bank, data.prepare, recipe, scope=scope,
        input_size=data.subject.size, plan=data.plan(recipe.allocation), out_dir=folder,
        on_progress=_progress(),
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    if folder is not None:
        masks.save(folder / "masks.safetensors")
        save_weights(folder / "weights.safetensors", model)
    return {
        "recipe": recipe.__dict__ | {"steps": recipe.steps()},
        "seconds": seconds,
        "cpu_seconds": cpu,
        **shares(masks, model, data.subject.size),
        "agreement": data.agreement(model),
    }


def run_untrained(
    data: Data, allocation: str, strength: float, density: float, scope: list[str], fit: int = 0,
    select: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Pruned once, not trained at all; with ``fit`` refitted on that many crops, with ``select``
    turns of choosing anew which weights stay."""
    model = copy.deepcopy(data.dense)
    if allocation == "random":
        masks = random_masks(model, scope, density, 0)
        masks.apply_(model)
    else:
        recipe = Recipe(
            rounds=1, period=1, recovery=0, lr=0.0, density=density, allocation=allocation,
            strength=strength,
        )  # fmt: skip
        masks = prune_on_photographs(
            model, data.subject.objective, data.bank, data.prepare, recipe, scope=scope,
            input_size=data.subject.size, plan=data.plan(allocation),
        )  # fmt: skip
    began, cpu = time.perf_counter(), time.process_time()
    if fit:
        inputs = torch.cat(list(bank_inputs(data.bank, data.prepare, fit)))
        masks = reconstruct(model, data.dense, masks, inputs, select=select).masks
    found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    found |= shares(masks, model, data.subject.size)
    found["agreement"] = data.agreement(model)
    if data.subject.statistics:
        data.measure(model)
        found["recalibrated"] = data.agreement(model)
    return found


def run_random(data: Data, density: float, steps: int, lr: float, batch: int, scope: list[str]):
    """Random zeros, trained as long as the others."""
    model = copy.deepcopy(data.dense)
    masks = random_masks(model, scope, density, 0)
    masks.apply_(model)
    data.measure(model)
    began, cpu = time.perf_counter(), time.process_time()
    fine_tune(
        model, data.subject.objective, data.bank, data.prepare, masks, steps=steps, lr=lr,
        batch=batch, on_progress=lambda *at: _progress()("recover", *at),
    )  # fmt: skip
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "steps": steps,
        **shares(masks, model, data.subject.size),
        "agreement": data.agreement(model),
    }


def random_masks(model: nn.Module, scope: list[str], density: float, seed: int) -> MaskSet:
    """The same density in every layer, at random places."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in scope:
        shape = model.get_submodule(name).weight.shape
        order = torch.rand(shape.numel(), generator=generator).argsort()
        mask = torch.zeros(shape.numel(), dtype=torch.bool)
        mask[order[: round(density * shape.numel())]] = True
        found[name] = mask.view(shape)
    return MaskSet.from_tensors(found)


def speed_of_a_step(data: Data, masks: MaskSet, weights: nn.Module, steps: int) -> dict[str, Any]:
    """Seconds of a training step of the study's batch: plain PyTorch against sparse kernels,
    interleaved; medians."""
    from statistics import median

    times: dict[str, list[float]] = {"plain": [], "sparse": []}
    models = {way: copy.deepcopy(weights) for way in times}
    for turn in range(5):
        for way, model in models.items():
            began = time.process_time()
            fine_tune(
                model, data.subject.objective, data.bank, data.prepare, masks, steps=steps,
                lr=1e-5, batch=data.subject.batch, sparse=way == "sparse", first=turn * steps,
            )  # fmt: skip
            times[way].append((time.process_time() - began) / steps)
    ratios = [p / s for p, s in zip(times["plain"], times["sparse"], strict=True)]
    return {
        "density": masks.density(),
        "plain_seconds": median(times["plain"]),
        "sparse_seconds": median(times["sparse"]),
        "ratio": median(ratios),
        "ratios": ratios,
        "counted": "process CPU seconds per step, preparation included",
    }


def folder_of(work: Path, network: str, cell: str) -> Path:
    """Where the run of a cell is kept."""
    return work / network / cell.replace("/", "_").replace(":", "of")


def say(text: str) -> None:
    print(text, flush=True)


def _progress():
    last = [0.0]

    def show(phase: str, done: int, total: int, loss: float) -> None:
        if time.perf_counter() - last[0] > 20 or done == total:
            last[0] = time.perf_counter()
            say(f"    {phase} {done}/{total} loss {loss:.4f}")

    return show


def store(path: Path, result: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(SUBJECTS), required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trained"))
    parser.add_argument("--work", type=Path, default=Path("build/trained"), help="runs and banks")
    parser.add_argument("--cells", help="only cells whose name begins so, separated by commas")
    parser.add_argument("--quick", action="store_true", help="minutes: a few steps, few crops")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.network}{'-quick' if options.quick else ''}.json"
    result = json.loads(path.read_text()) if path.exists() else {"schema": SCHEMA, "cells": {}}
    result |= {"network": options.network, "environment": environment_block()}
    data = prepare_data(options.network, options.work, options.quick)
    result["holdout"] = [one.name for one in data.holdout]
    scope = data.subject.scope(data.dense)
    result["scope"] = scope
    wanted = tuple(options.cells.split(",")) if options.cells else ("",)
    for name, cell in cells_of(options.network, options.quick).items():
        if not name.startswith(wanted) or name in result["cells"]:
            continue
        say(f"  {name}")
        if isinstance(cell, Recipe):
            folder = folder_of(options.work, options.network, name)
            folder.parent.mkdir(parents=True, exist_ok=True)
            found = run_recipe(data, cell, folder, scope)
        elif len(cell) == 3:
            kind = next(kind for kind in BARE if name.startswith(kind))
            found = run_untrained(data, *cell, scope, **BARE[kind])
        else:
            found = run_random(data, *cell, scope)
        say(f"    {found['agreement']['mean']}, multiply-adds left {found['macs_left']:.3f}")
        result["cells"][name] = found
        store(path, result)
    folders = {name: folder_of(options.work, options.network, name) for name in TIMED}
    kept = [name for name, at in folders.items() if (at / "weights.safetensors").exists()]
    if "training_step" not in result and kept:
        timed = folders[kept[0]]
        weights = copy.deepcopy(data.dense)
        weights.load_state_dict(load_file(timed / "weights.safetensors"))
        masks = MaskSet.load(timed / "masks.safetensors")
        steps = 1 if options.quick else 20
        found = speed_of_a_step(data, masks, weights, steps)
        result["training_step"] = {"cell": kept[0], **found}
        say(f"  training step, plain over sparse: {result['training_step']['ratio']:.2f}x")
        store(path, result)
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
