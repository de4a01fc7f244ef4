"""One real tree, one process: build its model with random weights, mask, compare, accelerate.

    OPENTRANS_TREES=/path/with/trees python tests/d2_tree_run.py fc-clip

The folder holds checkouts named ``detectron2``, ``fc-clip`` and ``OpenTrans``, as cloned.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

SIZES = ((512, 512), (480, 672), (333, 501))  # two that detectron2's resizing gives, one padded
PROMPTS = 7


def predict(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Predictions for one image of noise, and the backbone's features."""
    import torch

    from opentrans.d2.trees import image_record

    given = image_record(size, PROMPTS)
    features: list[Any] = []
    handle = model.backbone.register_forward_hook(lambda _m, _i, out: features.append(out))
    write, torch.save = torch.save, lambda *_, **__: None  # they write features to the folder
    try:
        with torch.no_grad():
            found = model([given])[0]
    finally:
        torch.save = write
        handle.remove()
    maps = features[0]
    named = maps if isinstance(maps, dict) else {str(i): m for i, m in enumerate(maps)}
    # FC-CLIP puts its text into the dict of feature maps.
    kept = {f"backbone.{k}": v for k, v in named.items() if getattr(v, "ndim", 0) == 4}
    return {"sem_seg": found["sem_seg"], **kept}


def distance(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Per output: largest difference over largest value."""
    if a.keys() != b.keys():
        raise SystemExit(f"other outputs: {sorted(a)} and {sorted(b)}")
    return {k: float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in b}


def main(tree: str, root: Path) -> dict[str, Any]:
    import torch

    from opentrans.d2 import attach, find_tower
    from opentrans.d2.trees import SYSTEMS, build, find_tree
    from opentrans_kernels.synthetic import synthetic_masks

    folder = find_tree(tree, root / SYSTEMS[tree][0])
    model, _ = build(tree, folder, PROMPTS)
    os.chdir(folder)  # some open files relative to it while they run
    tower = find_tower(model)
    # A mask as it comes from a CLIP tower: other prefix, matched by name.
    found = synthetic_masks(tower.module, "global:0.90")
    masks = {f"module.encoder.{name}": mask for name, mask in found.masks.items()}
    keys = {k: v.shape for k, v in model.state_dict().items()}
    paths = [name for name, _ in model.named_modules() if "opentrans" not in name]
    report: dict[str, Any] = {"tree": tree, "tower": tower.path, "family": tower.family}
    dense: list[dict[str, Any]] = []
    unmasked = predict(model, SIZES[0])
    attach(model, masks=masks)
    report["mask_changes"] = distance(predict(model, SIZES[0]), unmasked)["sem_seg"]
    for size in SIZES:
        dense.append(predict(model, size))
    torch.backends.mkldnn.enabled = False  # the same network by other dense kernels: a yardstick
    other = predict(model, SIZES[-1])
    torch.backends.mkldnn.enabled = True
    report["dense_by_other_kernels"] = distance(other, dense[-1])
    frozen = sum(not p.requires_grad for p in tower.module.parameters())
    done = attach(model, freeze="all_3x3", accelerate=True, input_size=(512, 512))
    report["speedup"] = done.report.speedup if done.report is not None else None
    report["frozen_more"] = sum(not p.requires_grad for p in tower.module.parameters()) - frozen
    report["notes"] = done.notes
    report["errors"] = {
        f"{size[0]}x{size[1]}": distance(predict(model, size), expected)
        for size, expected in zip(SIZES, dense, strict=True)
    }
    report["milliseconds"] = times(model, done, SIZES[0])
    report["same_keys"] = keys == {k: v.shape for k, v in model.state_dict().items()}
    left = {name for name, _ in model.named_modules()}
    report["paths_lost"] = [name for name in paths if name not in left]
    done.detach()
    report["restored"] = distance(predict(model, SIZES[0]), dense[0])
    return report


def times(model: Any, done: Any, size: tuple[int, int]) -> dict[str, float]:
    """Best of three of the whole model, accelerated and dense, in milliseconds."""
    from opentrans_kernels.accelerate import accelerate, restore

    best = {"accelerated": 1e9, "dense": 1e9}
    for _ in range(3):
        for name in best:
            if name == "dense":
                restore(done.tower.module)
            began = time.perf_counter()
            predict(model, size)
            best[name] = min(best[name], 1000 * (time.perf_counter() - began))
        accelerate(done.tower.module, plan=done.report.plan, measure=False)
    return best


if __name__ == "__main__":
    trees = os.environ.get("OPENTRANS_TREES")
    if not trees or len(sys.argv) != 2:
        raise SystemExit("usage: OPENTRANS_TREES=FOLDER python tests/d2_tree_run.py TREE")
    sys.path.insert(0, str(Path(trees) / "detectron2"))
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1], Path(trees)), indent=1) + "\n")
