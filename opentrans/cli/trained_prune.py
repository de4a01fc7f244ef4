"""``opentrans trained prune``: the whole recipe on a trained network and real photographs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_json, add_threads, positive
from .progress import begin, progress_bar
from .render import Output, check_writable, make_folder

SUMMARY = "prune a trained network on photographs, by distillation alone, and judge it on others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans trained prune``."""
    parser.add_argument("name", metavar="NAME", help="hed or resnet50-half")
    parser.add_argument("--output", default="trained-run", metavar="DIR", help="of the run; "
                        "the same command continues it (default trained-run)")  # fmt: skip
    parser.add_argument("--images", metavar="DIR", help="train on this folder instead")
    parser.add_argument("--density", type=float, default=0.1, help="weights left (default 0.1)")
    parser.add_argument("--rounds", type=positive, default=22, metavar="N", help="default 22")
    parser.add_argument(
        "--period", type=positive, default=25, metavar="N", help="steps between rounds: 25"
    )
    parser.add_argument(
        "--recovery", type=positive, default=1800, metavar="N",
        help="steps after the last round, at a falling rate (default 1800)",
    )  # fmt: skip
    parser.add_argument("--allocation", default="macs", help="as opentrans prune; default macs")
    parser.add_argument("--strength", type=float, default=0.2, help="of macs, latency: 0.2")
    parser.add_argument("--pattern", default="unstructured", help="as opentrans prune")
    parser.add_argument(
        "--fit", type=positive, default=0, metavar="N",
        help="refit the kept weights to the dense network's outputs on N crops after every round "
        "that leaves few of them (64 with --rounds 1; default 0: training alone)",
    )  # fmt: skip
    parser.add_argument(
        "--select", type=positive, default=0, metavar="N",
        help="choose the weights to keep, layer by layer, in N turns of least squares before the "
        "last refit, as many as the rounds kept (30; default 0: the largest stay)",
    )  # fmt: skip
    parser.add_argument("--crops", type=positive, metavar="N", help="different training crops")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of crops")
    parser.add_argument(
        "--dense-training", action="store_true", help="train without the sparse kernels"
    )
    add_threads(parser)
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Prune, judge, and say where the files are."""
    begin(out, "opentrans trained prune")
    folder = check_writable(options.output, directory=True)
    import torch

    from opentrans.imp.milliseconds import measured_plan
    from opentrans.trained.judge import holdout, judge
    from opentrans.trained.load import load
    from opentrans.trained.recipe import Recipe, prune_on_photographs, save_weights
    from opentrans.trained.subjects import subject

    torch.set_num_threads(options.threads)
    chosen = subject(options.name)
    recipe = Recipe(
        rounds=options.rounds, density=options.density, period=options.period,
        recovery=options.recovery, lr=chosen.lr / 2, recovery_lr=chosen.lr, batch=chosen.batch,
        allocation=options.allocation, strength=options.strength, pattern=options.pattern,
        seed=options.seed, sparse=not options.dense_training, statistics=chosen.statistics,
        fit=options.fit, select=options.select,
    )  # fmt: skip
    loaded = load(options.name)
    make_folder(folder)
    bank = _bank(options, loaded, chosen, folder, out)
    unseen = holdout(loaded, chosen)
    model = loaded.module
    chosen.ready(model, bank, loaded.prepare)
    scope, plan = chosen.scope(model), None
    if recipe.allocation == "latency":
        out.text("measuring what every layer costs ...")
        plan = measured_plan(model, chosen.size, folder / "plan.json")
    with progress_bar(out, "prune") as bar:
        masks = prune_on_photographs(
            model, chosen.objective, bank, loaded.prepare, recipe, scope=scope,
            input_size=chosen.size, plan=plan, out_dir=_run_of(folder),
            on_progress=lambda phase, done, total, loss: bar(done, total, f"{phase}, {loss:.4g}"),
        )  # fmt: skip
    masks.save(folder / "masks.safetensors")
    save_weights(folder / "weights.safetensors", model)
    found = judge(model, loaded, chosen, unseen)
    out.heading(f"{options.name}: {masks.density():.1%} of the weights left")
    keys = list(found["mean"])
    out.table(
        None,
        ("photograph", *keys),
        [(name, *(f"{one[key]:.3f}" for key in keys)) for name, one in found["photographs"].items()]
        + [("mean", *(f"{found['mean'][key]:.3f}" for key in keys))],
    )
    out.text(f"\nmasks {folder / 'masks.safetensors'}", whole=True)
    out.text(f"weights {folder / 'weights.safetensors'}", whole=True)
    out.finish(
        {
            "folder": str(folder),
            "network": options.name,
            "recipe": vars(recipe),
            "density": masks.density(),
            "content_hash": masks.content_hash(),
            "agreement": found,
        }
    )
    return 0


def _run_of(folder: Path) -> Path:
    """Where the state of the run is kept."""
    return folder / "run"


def _bank(options: argparse.Namespace, loaded: Any, chosen: Any, folder: Path, out: Output) -> Any:
    """The dense network's answers for the training crops, made once per folder."""
    from opentrans.trained.bank import Bank
    from opentrans.trained.crops import Crops
    from opentrans.trained.photographs import folder_photographs, photographs

    photos = folder_photographs(options.images) if options.images else photographs("train")
    count = options.crops or chosen.crops
    with progress_bar(out, "dense answers") as bar:
        return Bank.build(
            loaded.module, chosen.objective, Crops(photos, chosen.crop, 1, options.seed), count,
            loaded.prepare, path=folder / "bank.safetensors", again=not _run_of(folder).exists(),
            on_crop=lambda done, total: bar(done, total, "crops"),
        )  # fmt: skip
