"""``python -m opentrans.d2.train_net``: prune by distillation, fine-tune, evaluate.

Arguments are detectron2's: ``--config-file``, ``--num-gpus``, ``--resume``, ``--eval-only`` and
``KEY VALUE`` pairs. A config file that does not exist is looked for among our own
(``opentrans/d2/configs``), so ``--config-file tiny/imp.yaml`` works anywhere.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import require_packages
from opentrans_kernels.masks import split_entry
from opentrans_kernels.synthetic import is_mask_spec

from ..ovs.mask_head import MASK_HEAD_NEEDS
from .presence import DetectronMissing, require_detectron2

try:
    require_detectron2()
except DetectronMissing as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"error: {error}\n")  # a command that cannot run needs no traceback
    sys.exit(2)

from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.engine import default_argument_parser, default_setup, launch  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY  # noqa: E402
from detectron2.projects.deeplab import add_deeplab_config  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

from ..ovs.clip import RANDOM  # noqa: E402
from . import backbone, meta_arch  # noqa: E402, F401  (register themselves)
from .attachment import attach_from_config  # noqa: E402
from .config import OpenTransConfig  # noqa: E402
from .config_nodes import ConfigError  # noqa: E402
from .data import check_datasets, register_folder  # noqa: E402
from .meta_arch_config import OvsConfig, add_ovs_config  # noqa: E402
from .register import add_opentrans_config  # noqa: E402
from .trainer import Checkpointer, Trainer, not_held  # noqa: E402

__all__ = ["Trainer", "evaluate", "find_config", "load_config", "main", "train"]

log = logging.getLogger("opentrans.d2.train_net")  # run with -m, the module is __main__

CONFIGS = Path(__file__).parent / "configs"
PANOPTIC = "OpenTransMaskClassifier"  # the architecture whose results name single objects


def load_config(file: str, options: Sequence[str] = (), *, data: bool = True) -> CfgNode:
    """The config of a file with ``KEY VALUE`` pairs on top, checked.

    data: False for pictures of any origin: the datasets of the config are left out, and need not
    be there.

    Raises ConfigError for a missing or unreadable file, unknown keys and values that do not go
    together, and OpenTransError for missing data.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_opentrans_config(cfg)
    add_ovs_config(cfg)
    path = find_config(file)
    try:
        cfg.merge_from_file(str(path))
        cfg.merge_from_list(list(options))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path.name} or a _BASE_ of it cannot be read as YAML: {error}. Correct the file, or "
            "the path behind _BASE_."
        ) from error
    except (KeyError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path.name} or the KEY VALUE pairs cannot be used: {error}.{_meant(error, cfg)} Keys "
            "are those of detectron2, of MODEL.OPENTRANS (docs/detectron2.md) and of MODEL.OVS "
            "(docs/tiny-run.md)."
        ) from error
    if not data:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    _check(cfg)
    if data:
        _check_data(cfg)
    cfg.freeze()
    return cfg


def _meant(error: Exception, cfg: CfgNode) -> str:
    """The key nearest to the one that does not exist."""
    missing = re.search(r"Non-existent (?:config )?key: (\S+?)['\"]?$", str(error))
    if missing is None:
        return ""

    def keys(node: CfgNode, path: str) -> Iterator[str]:
        for name, value in node.items():
            yield path + name
            if isinstance(value, CfgNode):
                yield from keys(value, f"{path}{name}.")

    close = difflib.get_close_matches(missing[1], list(keys(cfg, "")), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def find_config(file: str) -> Path:
    """The file itself, or the one of that name among our own. Raises ConfigError."""
    for path in (Path(file), CONFIGS / file):
        if path.is_file():
            return path
    own = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
    raise ConfigError(
        f"--config-file {file!r} is neither a file nor one of our own configs: {', '.join(own)}. "
        "Name one of them, or a file of yours."
    )


def train(cfg: CfgNode, resume: bool = False) -> Any:
    """Train as the config says, then evaluate; returns the results of the last evaluation."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", None) or {}


def evaluate(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate a checkpoint on ``DATASETS.TEST``, masked and accelerated as the config says.

    Raises CheckpointError if the checkpoint lacks a part of the model: nothing random is evaluated.
    """
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ConfigError(
            "nothing to evaluate: MODEL.WEIGHTS is empty, so the head would be random. Set "
            "MODEL.WEIGHTS to a checkpoint such as OUTPUT_DIR/model_final.pth, or pass --resume."
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if checkpointer.missing:
        raise not_held(cfg.MODEL.WEIGHTS or cfg.OUTPUT_DIR, checkpointer.missing)
    model.eval()
    attachment = _inference(model, cfg)
    log.info("%s", attachment)
    try:
        return Trainer.test(cfg, model)
    finally:
        attachment.detach()


def _inference(model: nn.Module, cfg: CfgNode) -> Any:
    """Mask and acceleration; freezing is for training.

    A mask with a schedule belongs to the run: the checkpoint has its zeros, or is beyond them.
    """
    own = cfg.clone()
    own.defrost()
    mask = own.MODEL.OPENTRANS.MASK
    if mask.AT > 0 or mask.REMOVE_AT >= 0:
        log.warning(
            "MASK.FILE %s is not applied: MASK.AT %d and MASK.REMOVE_AT %d say that it holds for a "
            "part of the training only. The checkpoint is evaluated with the zeros it has. To "
            "evaluate it masked, add MODEL.OPENTRANS.MASK.AT 0 MODEL.OPENTRANS.MASK.REMOVE_AT -1.",
            mask.FILE, mask.AT, mask.REMOVE_AT,
        )  # fmt: skip
        mask.FILE, mask.AT, mask.REMOVE_AT = "", 0, -1
    own.MODEL.OPENTRANS.FREEZE.RULE = own.MODEL.OPENTRANS.FREEZE.PLAN = ""
    own.MODEL.OPENTRANS.FREEZE.SKIP = False
    own.MODEL.OPENTRANS.FREEZE.AT = 0
    return attach_from_config(model, own)


def _check(cfg: CfgNode) -> None:
    options = OpenTransConfig.from_cfg(cfg)
    ovs = OvsConfig.from_cfg(cfg)
    panoptic = cfg.MODEL.META_ARCHITECTURE == PANOPTIC
    needs = {"open_clip": "the text encoder is open_clip's"}
    require_packages(needs | (MASK_HEAD_NEEDS if panoptic else {}))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} and torch sees no CUDA device. Add MODEL.DEVICE "
            "cpu to the command."
        )
    for key, name, registry in (
        ("META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        if name not in registry:
            own = [found for found, _ in registry if found.startswith("OpenTrans")]
            raise ConfigError(
                f"MODEL.{key}={name!r} is not registered with detectron2. Ours: {', '.join(own)}."
            )
    if ovs.PANOPTIC.ENABLED and cfg.MODEL.META_ARCHITECTURE != PANOPTIC:
        raise ConfigError(
            "MODEL.OVS.PANOPTIC.ENABLED=True needs a model that finds objects, and "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}. Write "
            f"MODEL.META_ARCHITECTURE {PANOPTIC}, or MODEL.OVS.PANOPTIC.ENABLED False."
        )
    if not ovs.clip(options)[0]:
        raise ConfigError(
            "no CLIP for the text encoder: MODEL.OVS.CLIP_WEIGHTS and MODEL.OPENTRANS.WEIGHTS are "
            "empty. Name the file of the CLIP the tower comes from, or write "
            "MODEL.OVS.CLIP_WEIGHTS random."
        )
    if not ovs.BACKBONE_MULTIPLIER and (options.FREEZE.RULE or options.FREEZE.PLAN):
        raise ConfigError(
            "MODEL.OVS.BACKBONE_MULTIPLIER=0 freezes the whole tower and leaves nothing to "
            f"MODEL.OPENTRANS.FREEZE (RULE {options.FREEZE.RULE!r}). Set RULE '' and PLAN '', or a "
            "multiplier above 0."
        )
    _check_files(cfg, options)


def _check_data(cfg: CfgNode) -> None:
    folder = OvsConfig.from_cfg(cfg).DATA_FOLDER
    if folder:
        register_folder(folder)
    if not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TRAIN and DATASETS.TEST are empty. Name datasets, such as ('shapes_train',)."
        )
    check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])


def _check_files(cfg: CfgNode, options: OpenTransConfig) -> None:
    """Every file that is named must be there: what is not loaded would stay random."""
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not Path(weights).is_file():
        raise ConfigError(
            f"MODEL.WEIGHTS={weights!r} does not exist. Name a checkpoint, or leave it empty to "
            "start from MODEL.OPENTRANS.WEIGHTS."
        )
    tower = options.WEIGHTS
    if tower not in ("", RANDOM) and not Path(split_entry(tower)[0]).is_file():
        raise ConfigError(
            f"MODEL.OPENTRANS.WEIGHTS={tower!r} is not a file. Name OpenAI's RN50.pt, an open_clip "
            f"checkpoint or a state dict, or write {RANDOM} to start from random weights."
        )
    mask = options.MASK.FILE
    if mask and not is_mask_spec(mask) and not Path(split_entry(mask)[0]).is_file():
        raise ConfigError(
            f"MODEL.OPENTRANS.MASK.FILE={mask!r} does not exist. Name a mask file, such as "
            "masks/masks.safetensors in the OUTPUT_DIR of a pruning run, or a recipe such as "
            "global:0.90, or leave it empty to train without a mask."
        )


def main(args: Any) -> Any:
    """What one process does with parsed arguments; returns the results of the evaluation."""
    args.config_file = str(find_config(args.config_file))
    cfg = load_config(args.config_file, args.opts)
    default_setup(cfg, args)
    for name in ("opentrans", "opentrans_kernels"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    return train(cfg, args.resume)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status 0, or 2 with the reason on stderr."""
    args = default_argument_parser().parse_args(arguments)
    try:
        if args.num_gpus * args.num_machines > 1:
            load_config(args.config_file, args.opts)  # an error here is no traceback of a process
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except OpenTransError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
