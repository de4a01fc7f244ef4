"""``python -m opentrans.d2.train_net``: prune by distillation, fine-tune, evaluate.

Arguments are detectron2's: ``--config-file``, ``--num-gpus``, ``--resume``, ``--eval-only`` and
``KEY VALUE`` pairs. A config file that does not exist is looked for among our own
(``opentrans/d2/configs``), so ``--config-file tiny/imp.yaml`` works anywhere.
"""

from __future__ import annotations

import json
import logging
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import atomic_write

from .presence import DetectronMissing, require_detectron2

try:
    require_detectron2()
except DetectronMissing as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"error: {error}\n")  # a command that cannot run needs no traceback
    sys.exit(2)

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.data import (  # noqa: E402
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import (  # noqa: E402
    DefaultTrainer,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.projects.deeplab import add_deeplab_config, build_lr_scheduler  # noqa: E402
from detectron2.solver import get_default_optimizer_params  # noqa: E402
from detectron2.solver.build import maybe_add_gradient_clipping  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

from . import backbone, meta_arch  # noqa: E402, F401  (register themselves)
from .attachment import attach_from_config  # noqa: E402
from .config import ConfigError, OpenTransConfig, add_opentrans_config  # noqa: E402
from .data import OpenVocabularyMapper, check_datasets, register_folder  # noqa: E402
from .evaluation import build_evaluator  # noqa: E402
from .hooks import build_opentrans_hooks  # noqa: E402
from .meta_arch_config import OvsConfig, add_ovs_config  # noqa: E402

__all__ = ["Trainer", "evaluate", "find_config", "load_config", "main", "train"]

log = logging.getLogger("opentrans.d2.train_net")  # run with -m, the module is __main__

CONFIGS = Path(__file__).parent / "configs"
PANOPTIC = "OpenTransMaskClassifier"  # the architecture whose results name single objects
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


class Checkpointer(DetectionCheckpointer):
    """Keeps what a file did not hold: detectron2 only logs it."""

    missing: Sequence[str] = ()

    def _load_model(self, checkpoint: Any) -> Any:
        found = super()._load_model(checkpoint)
        self.missing = () if found is None else tuple(found.missing_keys)
        return found


class Trainer(DefaultTrainer):
    """detectron2's trainer with open-vocabulary data and evaluation and the OpenTrans hooks."""

    def build_hooks(self) -> list[Any]:
        """detectron2's, with those of ``MODEL.OPENTRANS`` before evaluation and writers."""
        self.checkpointer = Checkpointer(
            self._trainer.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        return build_opentrans_hooks(self.cfg, super().build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's. Raises CheckpointError if the tower keeps random weights by it."""
        super().resume_or_load(resume)
        options = OpenTransConfig.from_cfg(self.cfg)
        missing = [key for key in self.checkpointer.missing if key.startswith("backbone.")]
        if missing and not options.WEIGHTS:
            raise _not_held(self.cfg.MODEL.WEIGHTS, missing)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Records of ``DATASETS.TRAIN``, images without labelled objects included."""
        names = list(cfg.DATASETS.TRAIN)
        panoptic = OvsConfig.from_cfg(cfg).PANOPTIC.ENABLED
        return build_detection_train_loader(
            cfg,
            mapper=OpenVocabularyMapper(cfg, names, training=True, panoptic=panoptic),
            dataset=get_detection_dataset_dicts(names, filter_empty=False),
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Images of one dataset, with its vocabulary."""
        mapper = OpenVocabularyMapper(cfg, [dataset_name], training=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """mIoU; panoptic quality where ``MODEL.OVS.PANOPTIC.ENABLED``."""
        output = str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)
        Path(output).mkdir(parents=True, exist_ok=True)
        return build_evaluator(dataset_name, output, OvsConfig.from_cfg(cfg).PANOPTIC.ENABLED)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """As detectron2's; also writes ``inference/DATASET/results.json`` below OUTPUT_DIR."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            names = cfg.DATASETS.TEST
            for name, found in (results if len(names) > 1 else {n: results for n in names}).items():
                plain = {task: {k: float(v) for k, v in row.items()} for task, row in found.items()}
                file = Path(cfg.OUTPUT_DIR) / "inference" / name / "results.json"
                atomic_write(file, (json.dumps(plain, indent=1) + "\n").encode())
        return results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW or SGD; the tower has its own learning rate."""
        options = OvsConfig.from_cfg(cfg)

        def factor(name: str) -> float:
            return options.BACKBONE_MULTIPLIER if name.startswith("backbone.") else 1.0

        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            lr_factor_func=factor,
        )
        extra = {"momentum": cfg.SOLVER.MOMENTUM} if options.OPTIMIZER == "SGD" else {}
        kind = OPTIMIZERS[options.OPTIMIZER]
        optimizer = kind(parameters, cfg.SOLVER.BASE_LR, **extra)
        return maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """detectron2's schedules and DeepLab's polynomial one (WarmupPolyLR)."""
        return build_lr_scheduler(cfg, optimizer)


def load_config(file: str, options: Sequence[str] = ()) -> CfgNode:
    """The config of a file with ``KEY VALUE`` pairs on top, checked.

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
            f"{path.name} or the KEY VALUE pairs cannot be used: {error}. Keys are those of "
            "detectron2, of MODEL.OPENTRANS (docs/detectron2.md) and of MODEL.OVS "
            "(docs/tiny-run.md)."
        ) from error
    _check(cfg)
    cfg.freeze()
    return cfg


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
        raise _not_held(cfg.MODEL.WEIGHTS or cfg.OUTPUT_DIR, checkpointer.missing)
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
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} and torch sees no CUDA device. Add MODEL.DEVICE "
            "cpu to the command."
        )
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not Path(weights).is_file():
        raise ConfigError(
            f"MODEL.WEIGHTS={weights!r} does not exist. Name a checkpoint, or leave it empty to "
            "start from MODEL.OPENTRANS.WEIGHTS."
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
    if ovs.DATA_FOLDER:
        register_folder(ovs.DATA_FOLDER)
    if not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TRAIN and DATASETS.TEST are empty. Name datasets, such as ('shapes_train',)."
        )
    check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])


def _not_held(file: str, missing: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{file} lacks {len(missing)} tensors of the model (first: {missing[0]}), which would stay "
        "random. Name a checkpoint of this model (same config), or weights for the tower with "
        "MODEL.OPENTRANS.WEIGHTS."
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
