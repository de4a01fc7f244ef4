"""The published systems from their own checkouts, with random weights, nothing in them changed.

FC-CLIP, and the two systems of the published OpenTrans code. What they import but do not need
here, and what today's numpy, timm and pillow no longer have, is stood in for in this process.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

from .presence import require_detectron2
from .register import add_opentrans_config

TREES_NEED = "the trees' models use timm"

__all__ = ["SYSTEMS", "build", "find_tree", "give_text", "image_record", "stand_ins"]

#: System -> (folder of its checkout, its config, where it comes from).
_CONFIGS = "configs/coco/panoptic-segmentation/"
SYSTEMS = {
    "fc-clip": (
        "fc-clip",
        f"{_CONFIGS}fcclip/fcclip_convnext_large_eval_ade20k_r50.yaml",
        "https://github.com/bytedance/fc-clip",
    ),
    "han": (
        "OpenTrans",
        f"{_CONFIGS}maskformer2_R50_bs16_50ep_voca_ground_perRegion.yaml",
        "the published OpenTrans code",
    ),
    "deeplab": (
        "OpenTrans",
        f"{_CONFIGS}Deeplabv3_R50_bs16_50ep_voca_ground_perRegion.yaml",
        "the published OpenTrans code",
    ),
}
TEXT_WIDTH = 1024  # of CLIP RN50's embeddings
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

    layers = optional_module("timm.layers", TREES_NEED)
    moved_from = optional_module("timm.models.layers", TREES_NEED)
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.append(_StandIns())  # last: installed packages come first
    # An empty module: the trees then take the torch path, which is what runs on a CPU without us.
    name = "MultiScaleDeformableAttention"
    sys.modules.setdefault(name, types.ModuleType(name))
    compiled = sys.modules.setdefault("detectron2._C", types.ModuleType("detectron2._C"))
    detectron2._C = compiled
    moved = types.ModuleType("numpy.lib.utils")
    moved.get_include = numpy.get_include  # type: ignore[attr-defined]
    sys.modules["numpy.lib.utils"] = moved
    moved_from.drop = layers.drop  # type: ignore[attr-defined]
    pdb.set_trace = lambda *_, **__: None  # the evaluation of Han et al. stops in a debugger


def find_tree(system: str, given: Path | None) -> Path:
    """The checkout of ``system``: ``given``, or for FC-CLIP the one on ``PYTHONPATH``.

    A detectron2 beside it is used where none is installed.

    Raises OpenTransError if it is not there; it says what is missing.
    """
    folder, config, origin = SYSTEMS[system]
    if given is None and system == "fc-clip":
        spec = importlib.util.find_spec("fcclip")
        given = Path(spec.origin).parents[1] if spec is not None and spec.origin else None
    if given is None:
        raise OpenTransError(
            f"{system} needs a checkout of its code, and none is named. Clone {origin} and pass "
            f"--tree {folder}."
        )
    if not (given / config).is_file():
        raise OpenTransError(
            f"{system} not found: {given} is no checkout of its code, it lacks {config}. Name the "
            f"folder of {origin} with --tree."
        )
    beside = given.resolve().parent / "detectron2"
    if importlib.util.find_spec("detectron2") is None and (beside / "detectron2").is_dir():
        sys.path.append(str(beside))
    return given.resolve()


def build(
    system: str, tree: Path, prompts: int, options: tuple[str, ...] = ()
) -> tuple[nn.Module, Any]:
    """(model in eval mode, cfg) of one of ``SYSTEMS``, random weights and text embeddings.

    options: more keys and values for ``cfg.merge_from_list``. Raises DetectronMissing.
    """
    require_detectron2()
    stand_ins()
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config

    if str(tree) not in sys.path:
        sys.path.insert(0, str(tree))
    cfg = get_cfg()
    add_deeplab_config(cfg)
    keys = ["MODEL.DEVICE", "cpu"]
    test = "MODEL.MASK_FORMER.TEST."
    with _inside(tree):  # configs and class lists are opened relative to it
        if system == "fc-clip":
            from fcclip import add_fcclip_config, add_maskformer2_config

            add_maskformer2_config(cfg)
            add_fcclip_config(cfg)
            keys += ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""]
            keys += [f"{test}PANOPTIC_ON", "False", f"{test}INSTANCE_ON", "False"]
        else:
            from mask2former import add_maskformer2_config

            add_maskformer2_config(cfg)
            keys += ["MODEL.RESNETS.PRETRAINED", "None", "MODEL.TEXT_ENCODER.PRETRAINED", "None"]
            keys += [f"{test}SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", "True"]
        add_opentrans_config(cfg)  # adds keys only: the trees' own files still merge
        cfg.merge_from_file(SYSTEMS[system][1])
        cfg.merge_from_list([*keys, *options])
        if system == "han":
            # The architecture they evaluate with; the one they train with has no evaluation.
            cfg.MODEL.META_ARCHITECTURE = "OpenSegMaskFormer"
        torch.manual_seed(0)
        model = build_model(cfg).eval()
    if system == "fc-clip":
        give_text(model, prompts)
    return model, cfg


def give_text(model: Any, prompts: int) -> None:
    """FC-CLIP's text tower does not run on today's open_clip: embeddings of the same form."""
    text = torch.randn(prompts, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))
    text = nn.functional.normalize(text, dim=-1)
    model.get_text_classifier = lambda: (text, [1] * prompts)
    model.category_overlapping_mask = torch.ones(prompts)


def image_record(size: tuple[int, int], prompts: int) -> dict[str, Any]:
    """An image of noise as the models' ``batched_inputs`` have it, for every system."""
    generator = torch.Generator().manual_seed(size[0])
    tokens = torch.randint(1, 400, (prompts, 77), generator=generator)
    return {
        "image": torch.rand(3, *size, generator=generator) * 255,
        "height": size[0], "width": size[1], "caption": tokens[:4], "caption_mask": torch.ones(4),
        "all_caption": tokens, "name2id": torch.arange(prompts), "num_class": prompts,
    }  # fmt: skip


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
