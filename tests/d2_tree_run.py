"""One real tree, one process: build its model with random weights, mask, compare, accelerate.

    OPENTRANS_TREES=/path/with/trees python tests/d2_tree_run.py fc-clip

The folder holds checkouts named ``detectron2``, ``fc-clip`` and ``OpenTrans``, as cloned. Nothing
in them is changed: what they import but do not need here, and what today's numpy, timm and
pillow no longer have, is stood in for in this process (``stand_ins``).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

SIZES = ((512, 512), (480, 672), (333, 501))  # two that detectron2's resizing gives, one padded
PROMPTS = 7
# Imported somewhere by the trees, used by nothing that runs here.
OPTIONAL = (
    "nltk", "panopticapi", "loralib", "tensorboardX", "bs4", "requests", "pandas", "cv2",
    "weightwatcher", "lvis", "cityscapesscripts",
)  # fmt: skip


class _Nothing:
    """Whatever is asked of it, it is there and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Empty(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        known = name.partition(".")[0] in OPTIONAL
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_ins() -> None:
    """What the trees import in vain, or import from where it no longer is."""
    import pdb

    import detectron2
    import numpy
    import timm.layers
    import timm.models.layers

    sys.meta_path.append(_StandIns())  # last: installed packages come first
    empty = types.ModuleType("MultiScaleDeformableAttention")
    sys.modules["MultiScaleDeformableAttention"] = empty  # the trees then take the torch path
    compiled = sys.modules.setdefault("detectron2._C", types.ModuleType("detectron2._C"))
    detectron2._C = compiled
    moved = types.ModuleType("numpy.lib.utils")
    moved.get_include = numpy.get_include  # type: ignore[attr-defined]
    sys.modules["numpy.lib.utils"] = moved
    timm.models.layers.drop = timm.layers.drop  # type: ignore[attr-defined]
    pdb.set_trace = lambda *_, **__: None  # the evaluation of Han et al. stops in a debugger


def build(tree: str, root: Path) -> tuple[Any, Any]:
    """(model in eval mode, cfg)."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config

    folder = root / ("fc-clip" if tree == "fc-clip" else "OpenTrans")
    os.chdir(folder)  # configs and class lists are opened relative to it
    sys.path.insert(0, str(folder))
    cfg = get_cfg()
    add_deeplab_config(cfg)
    options = ["MODEL.DEVICE", "cpu"]
    configs = "configs/coco/panoptic-segmentation/"
    if tree == "fc-clip":
        from fcclip import add_fcclip_config, add_maskformer2_config

        add_maskformer2_config(cfg)
        add_fcclip_config(cfg)
        configs += "fcclip/fcclip_convnext_large_eval_ade20k_r50.yaml"
        options += ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""]
        test = "MODEL.MASK_FORMER.TEST."
        options += [test + "PANOPTIC_ON", "False", test + "INSTANCE_ON", "False"]
    else:
        from mask2former import add_maskformer2_config

        add_maskformer2_config(cfg)
        name = "maskformer2" if tree == "han" else "Deeplabv3"
        ending = "R50_bs16_50ep_voca_ground_perRegion.yaml"
        configs += f"{name}_{ending}"
        options += [
            "MODEL.RESNETS.PRETRAINED", "None", "MODEL.TEXT_ENCODER.PRETRAINED", "None",
            "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", "True",
        ]  # fmt: skip
    from opentrans.d2 import add_opentrans_config

    add_opentrans_config(cfg)  # adds keys only: the trees' own files still merge
    cfg.merge_from_file(configs)
    cfg.merge_from_list(options)
    if tree == "han":
        # The architecture they evaluate with; the one they train with has no evaluation.
        cfg.MODEL.META_ARCHITECTURE = "OpenSegMaskFormer"
    model = build_model(cfg).eval()
    if tree == "fc-clip":
        give_text(model)
    return model, cfg


def give_text(model: Any) -> None:
    """FC-CLIP's text tower does not run on today's open_clip: embeddings of the same form."""
    import torch

    generator = torch.Generator().manual_seed(3)
    text = torch.nn.functional.normalize(torch.randn(PROMPTS, 1024, generator=generator), dim=-1)
    model.get_text_classifier = lambda: (text, [1] * PROMPTS)
    model.category_overlapping_mask = torch.ones(PROMPTS)


def predict(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Predictions for one image of noise, and the backbone's features."""
    import torch

    generator = torch.Generator().manual_seed(size[0])
    tokens = torch.randint(1, 400, (PROMPTS, 77), generator=generator)
    image = torch.rand(3, *size, generator=generator) * 255
    given = {
        "image": image, "height": size[0], "width": size[1], "caption": tokens[:4],
        "caption_mask": torch.ones(4), "all_caption": tokens, "name2id": torch.arange(PROMPTS),
        "num_class": PROMPTS,
    }  # fmt: skip
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

    stand_ins()
    torch.manual_seed(0)
    model, cfg = build(tree, root)
    from opentrans.d2 import attach, find_tower
    from opentrans_kernels.synthetic import synthetic_masks

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
