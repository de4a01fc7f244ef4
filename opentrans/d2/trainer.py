"""detectron2's trainer with open-vocabulary data and evaluation, and the OpenTrans hooks."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pickle
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import atomic_write

from .config import OpenTransConfig
from .data import OpenVocabularyMapper
from .evaluation import build_evaluator
from .hooks import build_opentrans_hooks
from .meta_arch_config import OPTIMIZERS, OvsConfig
from .presence import require_detectron2
from .towers import unwrap

require_detectron2()

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import (  # noqa: E402
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, defaults  # noqa: E402
from detectron2.projects.deeplab import build_lr_scheduler  # noqa: E402
from detectron2.solver import get_default_optimizer_params  # noqa: E402
from detectron2.solver.build import maybe_add_gradient_clipping  # noqa: E402
from detectron2.utils import comm  # noqa: E402

__all__ = ["Checkpointer", "Trainer", "not_held"]

log = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Keeps what a file did not hold: detectron2 only logs it."""

    missing: Sequence[str] = ()

    @property
    def fits_nowhere(self) -> bool:
        """Whether the file held no tensor of the model."""
        own = {key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")}
        return own <= set(self.missing)

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """As detectron2's. Raises CheckpointError for what cannot be fetched, read or fitted."""
        try:
            return super().load(path, *args, **kwargs)
        except OpenTransError:
            raise
        except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be loaded ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}). Name a whole checkpoint that detectron2 wrote, "
                "for the same model and optimizer where a run is resumed."
            ) from error

    def _load_model(self, checkpoint: Any) -> Any:
        found = super()._load_model(checkpoint)
        self.missing = () if found is None else tuple(found.missing_keys)
        return found


class Trainer(DefaultTrainer):
    """detectron2's trainer with open-vocabulary data and evaluation and the OpenTrans hooks."""

    def __init__(self, cfg: CfgNode) -> None:
        with _wrapping_for(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    def build_hooks(self) -> list[Any]:
        """detectron2's, with those of ``MODEL.OPENTRANS`` before evaluation and writers."""
        self.checkpointer = Checkpointer(
            self._trainer.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        return build_opentrans_hooks(self.cfg, super().build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's, and says which part of the model a checkpoint did not hold.

        Raises CheckpointError if the tower keeps random weights by it.
        """
        super().resume_or_load(resume)
        options, file = OpenTransConfig.from_cfg(self.cfg), self.cfg.MODEL.WEIGHTS
        missing = self.checkpointer.missing
        tower = [key for key in missing if key.startswith("backbone.")]
        if tower and (self.checkpointer.fits_nowhere or not options.WEIGHTS):
            raise not_held(file, tower)
        if tower:
            log.warning(
                "%s lacks %d tensors of the tower (first: %s): they stay those of "
                "MODEL.OPENTRANS.WEIGHTS=%s",
                file, len(tower), tower[0], options.WEIGHTS,
            )  # fmt: skip
        if len(missing) > len(tower):
            log.warning(
                "%s lacks %d tensors of the head: they start RANDOM, as for a tower that is "
                "transferred", file, len(missing) - len(tower),
            )  # fmt: skip
        started = ("backbone.", "classifier.", "distiller.")
        new = [name for name, p in unwrap(self.model).named_parameters()
               if p.requires_grad and not name.startswith(started)]  # fmt: skip
        if new and not file and not self.start_iter:
            log.warning("MODEL.WEIGHTS is empty: the head (%d tensors) starts RANDOM", len(new))

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


def not_held(file: str, missing: Sequence[str]) -> CheckpointError:
    """The error for a checkpoint that would leave parts of the model random."""
    return CheckpointError(
        f"{file} lacks {len(missing)} tensors of the model (first: {missing[0]}), which would stay "
        "random. Name a checkpoint of this model (same config), or weights for the tower with "
        "MODEL.OPENTRANS.WEIGHTS."
    )


@contextlib.contextmanager
def _wrapping_for(device: str) -> Iterator[None]:
    """Several processes on CPUs: detectron2 names a GPU to DistributedDataParallel, which refuses
    that for a model that is on none."""
    plain = defaults.create_ddp_model
    if device == "cpu":
        defaults.create_ddp_model = functools.partial(plain, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = plain
