"""From a finished run of ``opentrans trained prune`` to the file that comes with the package.

    opentrans trained prune hed --rounds 1 --fit 64 --select 30 --recovery 2999 \\
        --allocation latency --strength 0.3 --output hed-run
    python benchmarks/trained/ship.py --run hed-run

The study's cell ``long/select/latency-0.3`` is the same run.

``--more``: a second recovery, from a higher rate to 0 again. Then the weights are rounded to half
precision, judged as they are now, and written as a sparse checkpoint without a plan. The numbers go
into the study's JSON as the cell "shipped".
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from benchmarks.trained.study import folder_of, say, shares, store
from opentrans.trained import Crops, load, photographs
from opentrans.trained.bank import Bank
from opentrans.trained.judge import holdout, judge
from opentrans.trained.recipe import Recipe, fine_tune, save_weights
from opentrans.trained.shipped import FILES, FOLDER
from opentrans.trained.subjects import subject
from opentrans_kernels import accelerate, load_accelerated, save_accelerated
from opentrans_kernels.half import round_to_half
from opentrans_kernels.masks import MaskSet

NAME, NETWORK = "hed-090", "hed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--more", type=int, default=0, metavar="STEPS")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trained"))
    parser.add_argument("--work", type=Path, default=Path("build/trained"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen, loaded = subject(NETWORK), load(NETWORK)
    masks = MaskSet.load(options.run / "masks.safetensors")
    model = copy.deepcopy(loaded.module)
    model.load_state_dict(load_file(options.run / "weights.safetensors"))
    log = options.run / "run" / "log.json"  # the study keeps its runs without a folder of their own
    config = json.loads((log if log.exists() else options.run / "log.json").read_text())["config"]
    recipe = {k.removeprefix("extra."): v for k, v in config.items() if k.startswith("extra.")}
    done = Recipe(**recipe).steps()
    again = options.run / "again.safetensors"
    if options.more and again.exists():
        say(f"the second recovery is taken from {again}")
        model.load_state_dict(load_file(again))
    elif options.more:
        bank = Bank.build(
            loaded.module, chosen.objective, Crops(photographs("train"), chosen.crop, 1, 0),
            chosen.crops, loaded.prepare, path=options.run / "bank.safetensors",
        )  # fmt: skip
        fine_tune(
            model, chosen.objective, bank, loaded.prepare, masks, steps=options.more,
            lr=options.lr, batch=chosen.batch, first=done, path=options.run / "again.pt",
        )  # fmt: skip
        save_weights(again, model)
    changed = max(round_to_half(model).values())
    found = judge(model, loaded, chosen, holdout(loaded, chosen))
    say(f"largest rounding {changed:.1e}; agreement {found['mean']}")
    cell = {
        "recipe": recipe | {"more": options.more, "more_lr": options.lr},
        **shares(masks, model, chosen.size),
        "agreement": found,
    }
    cell["recipe"]["steps"] = done + options.more
    folder = folder_of(options.work, NETWORK, "shipped")
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "weights.safetensors", model)
    masks.save(folder / "masks.safetensors")
    path = options.out / f"{NETWORK}.json"
    if path.exists():
        result = json.loads(path.read_text())
        result["cells"]["shipped"] = cell
        store(path, result)
    accelerate(model, masks, input_size=chosen.size)
    target = FOLDER / FILES[NAME]
    says = {
        "network": "HED edge detector, pruned and trained further; see NOTICE.txt beside the file",
        "weights": f"{loaded.network.requirement}, {loaded.network.weights_licence}",
        "recipe": json.dumps(cell["recipe"], sort_keys=True),
        "agreement": json.dumps(found["mean"]),
    }
    save_accelerated(target, model, provenance=says, arch="HED", values=torch.float16, plan=False)
    again_read, _ = load_accelerated(target)
    x = loaded.prepare(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with torch.no_grad():
        same = torch.allclose(again_read(x), model(x), atol=1e-4)
    say(f"wrote {target}, {target.stat().st_size / 1e6:.2f} MB, reads back: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
