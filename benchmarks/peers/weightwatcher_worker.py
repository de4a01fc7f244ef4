"""Runs in WeightWatcher's environment: ``weightwatcher_worker.py WEIGHTS THREADS``.

WEIGHTS is a torch file name -> weight. They become a plain network of Conv2d and Linear modules,
which ``WeightWatcher.analyze()`` measures with its default arguments.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

WORKERS = Path(__file__).resolve().parents[2] / "opentrans_kernels" / "bench" / "peers" / "workers"
sys.path.insert(0, str(WORKERS))

from protocol import serve, take_stdout  # noqa: E402


def network(weights):
    """A ModuleDict with one module per weight; dots, which it does not allow, become dashes."""
    modules = {}
    for name, weight in weights.items():
        if weight.dim() == 4:
            out, inside, *kernel = weight.shape
            module = nn.Conv2d(inside, out, kernel, bias=False, device="meta")
        else:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        modules[name.replace(".", "-")] = module
    return nn.ModuleDict(modules)


def main(arguments):
    """Serve ``analyze()``."""
    answers = take_stdout()
    torch.set_num_threads(int(arguments[1]))
    weights = torch.load(arguments[0], weights_only=True)
    import weightwatcher

    watcher = weightwatcher.WeightWatcher(model=network(weights), log_level=logging.ERROR)

    def save(path):
        details = watcher.analyze()
        rows = details[["longname", "alpha", "D", "num_evals"]].to_dict("records")
        alphas = {str(row["longname"]).replace("-", "."): float(row["alpha"]) for row in rows}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(alphas, file)

    described = {"engine": "weightwatcher", "version": version("weightwatcher")}
    described["scipy"], described["torch"] = version("scipy"), torch.__version__
    serve(answers, watcher.analyze, described, save)


if __name__ == "__main__":
    main(sys.argv[1:])
