"""Alpha of trained networks, dense and along rounds of pruning, and what each would freeze.

    python benchmarks/trained/alpha.py --out benchmarks/results/trained

For every network of the catalog: three estimates of the dense weights (the fit of the published
code, WeightWatcher's, and FARMS), the layers on which their freeze sets differ, and the same under
magnitude masks of growing sparsity. ``--rounds NETWORK=DIR`` adds the rounds of a pruning run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.trained.study import say, store
from opentrans.freeze import alpha_along_rounds
from opentrans.trained import NETWORKS, load
from opentrans_kernels.bench.environment import environment_block
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.synthetic import synthetic_masks

SCHEMA = 1
LABELS = ("xmin_peak", "ks", "farms")
SPARSITIES = (0.5, 0.8, 0.9)


def measure(name: str, model: nn.Module, folder: Path | None) -> dict[str, Any]:
    """Stages of one network, as plain data, and the pairwise disagreement of its dense sets."""
    rounds: dict[str, MaskSet] = {}
    for sparsity in SPARSITIES:
        rounds[f"global:{sparsity:g}"] = synthetic_masks(model, f"global:{sparsity:g}")
    if folder is not None:
        for path in sorted(folder.glob("round-*.safetensors")):
            rounds[path.stem] = MaskSet.load(path)
    found = alpha_along_rounds(model, rounds, labels=LABELS)
    say(f"{name}\n{found}")
    dense = found.dense
    differ = {}
    labels = list(dense.tables)
    for i, one in enumerate(labels):
        for two in labels[i + 1 :]:
            apart = set(dense.frozen[one]) ^ set(dense.frozen[two])
            differ[f"{one} and {two}"] = sorted(apart)
    return {"stages": short(found.to_dict()["stages"]), "methods_differ": differ}


def short(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what can be computed again: alphas of single layers stay for the dense weights."""
    for number, stage in enumerate(stages):
        stage.pop("layer_zeros")
        for estimate in stage["estimates"].values():
            estimate.pop("ks_distance")
            estimate["layers"] = len(estimate["alpha"])
            estimate["remarks"] = len(estimate["remarks"])
            if number:
                estimate.pop("alpha")
            else:
                estimate["alpha"] = {
                    name: round(value, 4) if isinstance(value, float) else value
                    for name, value in estimate["alpha"].items()
                }
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", action="append", default=[], metavar="NETWORK=DIR")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trained"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = {}
    for text in options.rounds:
        name, _, folder = text.partition("=")
        folders[name] = Path(folder)
    networks = {
        name: measure(name, load(name).module, folders.get(name))
        for name in options.networks.split(",")
    }
    result = {"schema": SCHEMA, "environment": environment_block(), "networks": networks}
    store(options.out / "alpha.json", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
