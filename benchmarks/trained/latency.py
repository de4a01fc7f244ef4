"""Milliseconds of every pruned network of a study, against the best dense PyTorch, interleaved.

    python benchmarks/trained/latency.py --network hed

Reads the JSON that ``study.py`` wrote and the weights it kept in ``--work``, and adds a "latency"
entry to every cell: one process, all cells and the dense variants in turn, one thread. The weights
of the cell "shipped" come with the package.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.trained.study import folder_of, say, store
from opentrans.trained import load
from opentrans.trained.shipped import shipped
from opentrans.trained.subjects import SUBJECTS
from opentrans_kernels import accelerate
from opentrans_kernels.bench.environment import environment_block
from opentrans_kernels.bench.subject import load_weights
from opentrans_kernels.bench.timing import interleave
from opentrans_kernels.bench.variants import WholeModule, build_variants, relative_error
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.timing.canary import look, verdict

DENSE = ("eager", "folded_channels_last", "compile_folded_channels_last", "jit_optimized")


def kept_cells(result: dict[str, Any], work: Path, network: str) -> dict[str, Path]:
    """Cell -> folder with its weights and masks, of those that were trained."""
    found = {}
    for name in result["cells"]:
        folder = folder_of(work, network, name)
        if (folder / "weights.safetensors").exists():
            found[name] = folder
    return found


def kept_network(dense: nn.Module, folder: Path) -> tuple[nn.Module, MaskSet]:
    model = copy.deepcopy(dense)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model, MaskSet.load(folder / "masks.safetensors")


def shipped_network(dense: nn.Module) -> nn.Module:
    model = copy.deepcopy(dense)
    load_weights(model, shipped("hed-090"))
    return model


def accelerated(
    model: nn.Module, masks: MaskSet | None, x: torch.Tensor
) -> tuple[nn.Module, float]:
    """The network on our kernels, and its largest relative error against itself dense."""
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        accelerate(model, masks, input_size=tuple(x.shape[2:]))
        return model, relative_error(model(x), wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(SUBJECTS), required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trained"))
    parser.add_argument("--work", type=Path, default=Path("build/trained"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dense", default=",".join(DENSE), help="dense variants")
    parser.add_argument("--quick", action="store_true", help="of a quick study")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / f"{options.network}{'-quick' if options.quick else ''}.json"
    result = json.loads(path.read_text())
    loaded = load(options.network)
    height, width = SUBJECTS[options.network].size
    image = torch.randint(
        0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    x = loaded.prepare(image)
    calls: dict[str, Any] = {}
    errors: dict[str, float] = {}
    networks: dict[str, tuple[nn.Module, MaskSet | None]] = {
        name: kept_network(loaded.module, folder)
        for name, folder in kept_cells(result, options.work, options.network).items()
    }
    if options.network == "hed" and "shipped" in result["cells"]:
        networks["shipped"] = shipped_network(loaded.module), None
    for name, (model, masks) in networks.items():
        model, errors[name] = accelerated(model, masks, x)
        calls[name] = lambda model=model: model(x)
        say(f"  {name}: error {errors[name]:.1e}")
    dense = {}
    for variant in build_variants(
        WholeModule(loaded.module), x, tuple(options.dense.split(",")), on_build=say
    ):
        if variant.run is None:
            say(f"  {variant.name} did not run: {variant.error}")
        else:
            dense[variant.name] = variant.run
    before = look(threads=1)
    with torch.no_grad():
        table = interleave(
            {**dense, **calls}, rounds=options.rounds, warmup_s=1.0,
            on_round=lambda done, total: say(f"  round {done} of {total}"),
        )  # fmt: skip
    machine = verdict(before, look(threads=1))
    best = min(dense, key=lambda name: sorted(table.timings[name].cpu_ms)[options.rounds // 2])
    for cell in result["cells"].values():
        cell.pop("latency", None)  # of another run: the facts below would not be its own
    for name in calls:
        pair = table.pair(best, name, "cpu")
        result["cells"][name]["latency"] = {
            "dense": best,
            "dense_ms": pair.slow_ms,
            "ours_ms": pair.fast_ms,
            "speedup": pair.ratios.to_dict(),
            "error": errors[name],
            "clock": "cpu",
        }
        say(f"  {name}: {pair.slow_ms:.1f} -> {pair.fast_ms:.1f} ms, {pair.ratios.median:.2f}x")
    result["latency"] = {
        "input": [height, width],
        "threads": 1,
        "dense_ms": {n: sorted(table.timings[n].cpu_ms)[options.rounds // 2] for n in dense},
        "rounds": options.rounds,
        "machine": machine,
        "environment": environment_block(),
    }
    store(path, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
