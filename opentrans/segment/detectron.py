"""Segmenters of detectron2: ours from their configs, and those of a tree on ``PYTHONPATH``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import opentrans.d2
from opentrans_kernels.errors import CheckpointError, OpenTransError, UnsupportedModelError
from opentrans_kernels.heads import install_ms_deform_attn

from ..d2.config_nodes import ConfigError
from ..d2.presence import require_detectron2
from ..ovs.text_store import encoder_identity, load_vocabulary, stored
from .plain import Loaded
from .recipe import Recipe

__all__ = ["find_config", "load_detectron"]

log = logging.getLogger(__name__)

OURS = "OpenTrans"  # how the names of our architectures begin
PIXELS = "OpenTransDeepLab"  # its scores are logits
#: Package of a tree -> functions that add its keys to a config, in the order they are called.
TREES = {
    "fcclip": ("add_maskformer2_config", "add_fcclip_config"),
    "mask2former": ("add_maskformer2_config",),
}
TEXT_CHUNK = 256  # prompts per run of a text encoder


def find_config(file: str) -> str:
    """Path of a config, or of the one of that name among ours. Raises ConfigError."""
    folder = Path(opentrans.d2.__file__).parent / "configs"
    for path in (Path(file), folder / file):
        if path.is_file():
            return str(path.resolve())
    own = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    raise ConfigError(
        f"--config {file!r} is neither a file nor one of our own configs: {', '.join(own)}. Name "
        "one of them, or a file of yours."
    )


def load_detectron(recipe: Recipe) -> Loaded:
    """The model of a config with the weights of a checkpoint.

    Raises DetectronMissing, ConfigError for a config that cannot be used, CheckpointError for
    weights that are not those of the model, and UnsupportedModelError for one that cannot take
    other classes or gives no score per pixel.
    """
    install_ms_deform_attn()  # before a tree imports the compiled one
    require_detectron2()
    if _architecture(recipe).startswith(OURS):
        return _ours(recipe)
    return _foreign(recipe)


def _architecture(recipe: Recipe) -> str:
    from detectron2.config import CfgNode

    options = dict(zip(recipe.options[::2], recipe.options[1::2], strict=False))
    if "MODEL.META_ARCHITECTURE" in options:
        return options["MODEL.META_ARCHITECTURE"]
    try:
        content = CfgNode.load_yaml_with_base(recipe.config, allow_unsafe=False)
    except Exception as error:  # yaml, a missing _BASE_: whatever its reader raises
        raise ConfigError(
            f"{recipe.config} or a _BASE_ of it cannot be read as YAML: {error}. Correct the file, "
            "or the path behind _BASE_."
        ) from error
    model = content.get("MODEL") or {} if isinstance(content, dict) else {}
    return str(model.get("META_ARCHITECTURE", ""))


def _ours(recipe: Recipe) -> Loaded:
    from ..d2 import train_net

    assert recipe.config is not None
    options = [*recipe.options, "MODEL.WEIGHTS", recipe.weights, "MODEL.DEVICE", "cpu"]
    cfg = train_net.load_config(recipe.config, options, data=False)
    model = train_net.Trainer.build_model(cfg)
    checkpointer = train_net.Checkpointer(model)
    checkpointer.load(recipe.weights)
    if checkpointer.missing:
        raise train_net.not_held(recipe.weights, checkpointer.missing)
    model.eval()
    load_vocabulary(model.classifier, recipe.classes, recipe.text_cache)
    mask, note = cfg.MODEL.OPENTRANS.MASK, ""
    if mask.FILE and (mask.AT > 0 or mask.REMOVE_AT >= 0):
        note = f"the mask of the config holds for a part of its training only: {mask.FILE} is not "
        note += "applied, the checkpoint is used with the zeros it has"
    own_mask = None if note else mask.FILE or None
    asked = {"vocabulary": recipe.classes}
    name = cfg.MODEL.META_ARCHITECTURE
    return _loaded(recipe, cfg, model, asked, name, name == PIXELS, own_mask, note)


def _foreign(recipe: Recipe) -> Loaded:
    from detectron2.modeling import build_model

    cfg = _foreign_config(recipe)
    name = cfg.MODEL.META_ARCHITECTURE
    try:
        model = build_model(cfg)
        missing, note = _fill(model, recipe.weights)
    except (KeyError, AttributeError) as error:
        raise ConfigError(
            f"no {name} can be built from {recipe.config} ({type(error).__name__}: {error}). Put "
            "the tree it belongs to on PYTHONPATH, start in its folder, and name what registers it "
            "with --setup MODULE:FUNCTION."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        offline = (
            " Of a checkpoint that holds all weights nothing needs to be downloaded: for FC-CLIP, "
            "--set MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS ''."
        )
        raise CheckpointError(
            f"{name} cannot be built with {recipe.weights} ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Name a checkpoint of this config; paths in the config "
            f"are relative to the folder of its tree.{offline * ('download' in str(error).lower())}"
        ) from error
    if missing:
        raise CheckpointError(
            f"{recipe.weights} lacks {len(missing)} tensors of {name} (first: {missing[0]}), which "
            "would stay random. Name a checkpoint of this config."
        )
    model.eval()
    for switch, value in (("semantic_on", True), ("panoptic_on", False), ("instance_on", False)):
        if hasattr(model, switch):  # only the score per pixel is used
            setattr(model, switch, value)
    _give_classes(model, name, recipe)
    return _loaded(recipe, cfg, model, {}, name, False, None, note)


def _fill(model: nn.Module, weights: str) -> tuple[list[str], str]:
    """Load a checkpoint; names of the tensors that it does not hold and must, and a remark.

    A part that is frozen was filled when it was built, as FC-CLIP's CLIP is: checkpoints of such
    trees may leave it out.
    """
    from ..d2.trainer import Checkpointer

    checkpointer = Checkpointer(model)
    checkpointer.load(weights)
    missing = list(checkpointer.missing)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if checkpointer.fits_nowhere or not set(missing) <= frozen:
        return missing, ""
    if not missing:
        return [], ""
    return [], (
        f"{weights} lacks {len(missing)} frozen tensors (first: {missing[0]}); they stay what the "
        "config filled them with when the model was built"
    )


def _foreign_config(recipe: Recipe) -> Any:
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    _without_compiled()
    for function in _setups(recipe):
        function(cfg)
    opentrans.d2.add_opentrans_config(cfg)
    try:
        cfg.merge_from_file(recipe.config)
        options = [*recipe.options, "MODEL.WEIGHTS", recipe.weights, "MODEL.DEVICE", "cpu"]
        cfg.merge_from_list(options)
    except (KeyError, AssertionError, ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"{recipe.config} cannot be used: {error}. If the key belongs to a tree, name the "
            "function that adds its keys: --setup MODULE:FUNCTION (known without: "
            f"{', '.join(TREES)}, with the tree on PYTHONPATH)."
        ) from error
    cfg.freeze()
    return cfg


def _setups(recipe: Recipe) -> list[Callable[[Any], Any]]:
    """What adds keys: the functions that are named, else those of the first tree that is there."""
    if recipe.setup:
        return [_function(text) for text in recipe.setup]
    for package, functions in TREES.items():
        if importlib.util.find_spec(package) is not None:
            module = _imported(package)
            return [getattr(module, name) for name in functions]
    return []


def _function(text: str) -> Callable[[Any], Any]:
    module, _, name = text.partition(":")
    function = getattr(_imported(module), name, None) if module and name else None
    if not callable(function):
        raise ConfigError(
            f"--setup {text!r} is no MODULE:FUNCTION that can be imported. Write for example "
            "fcclip:add_fcclip_config, with the tree on PYTHONPATH."
        )
    return function


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a tree may fail in any way when it is imported
        raise OpenTransError(
            f"{name} cannot be imported ({type(error).__name__}: {error}). Install what it needs; "
            "docs/fc-clip.md lists what stops trees with today's packages, and ways round."
        ) from error


def _without_compiled() -> None:
    """Trees import ``detectron2._C`` and, on a CPU, use nothing of it."""
    name = "detectron2._C"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = sys.modules["detectron2"]._C = ModuleType(name)  # type: ignore[attr-defined]


def _give_classes(model: Any, name: str, recipe: Recipe) -> None:
    """Other classes than those of the config, where the model can take them."""
    if not callable(getattr(model, "set_metadata", None)):
        own = getattr(getattr(model, "sem_seg_head", None), "num_classes", None)
        raise UnsupportedModelError(
            f"{name} cannot take other classes: it has no set_metadata, as FC-CLIP has, and knows "
            f"{f'the {own} classes' if own else 'only the classes'} it was trained on. Use a model "
            "with an open vocabulary, such as FC-CLIP or our own configs."
        )
    names = list(recipe.classes)
    model.set_metadata(SimpleNamespace(stuff_classes=names, thing_classes=names))
    if not hasattr(model, "test_text_classifier"):
        return
    prompts, counts = list(model.test_class_names), list(model.test_num_templates)
    encode = _encoder(model)
    if encode is None:
        return  # the tree encodes by its own means, and keeps the result
    clip = model.backbone.clip_model
    model.test_text_classifier = stored(
        recipe.text_cache,
        encoder_identity(clip),
        [name, prompts, counts],
        sum(counts),
        lambda: _ensemble(encode(prompts), sum(counts)),
    )


def _encoder(model: Any) -> Callable[[list[str]], torch.Tensor] | None:
    """The text encoder that open_clip gives; a tree's own walk through it may assume an order of
    dimensions that open_clip no longer has."""
    backbone = getattr(model, "backbone", None)
    clip, tokenizer = (getattr(backbone, n, None) for n in ("clip_model", "text_tokenizer"))
    if not hasattr(clip, "encode_text") or not callable(tokenizer):
        return None

    def encode(prompts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            parts = [
                clip.encode_text(tokenizer(prompts[at : at + TEXT_CHUNK]))
                for at in range(0, len(prompts), TEXT_CHUNK)
            ]
        return torch.cat(parts).float()

    return encode


def _ensemble(rows: torch.Tensor, names: int) -> torch.Tensor:
    """[names * T, D], T prompts one after the other -> unit-length means [names, D]."""
    unit = F.normalize(rows, dim=1).view(names, -1, rows.shape[1])
    return F.normalize(unit.mean(1), dim=1)


def _loaded(
    recipe: Recipe, cfg: Any, model: nn.Module, asked: dict[str, Any], name: str, logits: bool,
    mask: str | None, note: str,
) -> Loaded:  # fmt: skip
    blue_first = cfg.INPUT.FORMAT == "BGR"
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; pictures are RGB or BGR here.")

    def scores(pixels: np.ndarray) -> torch.Tensor:
        ordered = pixels[:, :, ::-1] if blue_first else pixels
        image = torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1)))
        height, width = pixels.shape[:2]
        found = model([{"image": image, "height": height, "width": width, **asked}])[0]
        maps = found.get("sem_seg") if isinstance(found, dict) else None
        if not isinstance(maps, torch.Tensor) or maps.shape[0] != len(recipe.classes):
            shape = tuple(maps.shape) if isinstance(maps, torch.Tensor) else "no sem_seg"
            raise UnsupportedModelError(
                f"{name} gave {shape} for {len(recipe.classes)} classes; sem_seg [K, H, W] is "
                "needed. Use a config that evaluates semantic segmentation."
            )
        return maps.softmax(0) if logits else maps

    size = recipe.size or int(cfg.INPUT.MIN_SIZE_TEST)
    longest = max(int(cfg.INPUT.MAX_SIZE_TEST), size)
    return Loaded(model, scores, size, longest, name, note, mask)
