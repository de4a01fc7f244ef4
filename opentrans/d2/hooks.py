"""The hooks for detectron2's trainers; what they do is in ``opentrans.d2.training``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..freeze import FreezePlan
from .config import OpenTransConfig
from .config_check import imp_config
from .config_nodes import ConfigError
from .config_options import NODE
from .presence import require_detectron2
from .training import (
    AccelerateStep,
    FreezeStep,
    ImpStep,
    MaskStep,
    ReportStep,
    SettingsStep,
)

require_detectron2()

from detectron2.engine import HookBase  # noqa: E402

__all__ = [
    "AccelerateForEvalHook",
    "AlphaFreezeHook",
    "IMPHook",
    "MaskHook",
    "ReportHook",
    "SettingsHook",
    "build_opentrans_hooks",
]


class MaskHook(MaskStep, HookBase):
    __doc__ = MaskStep.__doc__


class AlphaFreezeHook(FreezeStep, HookBase):
    __doc__ = FreezeStep.__doc__


class IMPHook(ImpStep, HookBase):
    __doc__ = ImpStep.__doc__


class AccelerateForEvalHook(AccelerateStep, HookBase):
    __doc__ = AccelerateStep.__doc__


class ReportHook(ReportStep, HookBase):
    __doc__ = ReportStep.__doc__


class SettingsHook(SettingsStep, HookBase):
    __doc__ = SettingsStep.__doc__


def build_opentrans_hooks(
    cfg: Any, own: Iterable[HookBase | None] = (), output_dir: str | None = None
) -> list[HookBase | None]:
    """The hooks that ``MODEL.OPENTRANS`` asks for, and behind them the trainer's ``own``.

    A SettingsHook comes first, also where nothing is asked for. In this order a checkpoint or an
    evaluation of a step sees what the step did. In a trainer:
    ``def build_hooks(self): return build_opentrans_hooks(self.cfg, super().build_hooks())``.

    Args:
        cfg: a detectron2 config, or an OpenTransConfig.
        own: hooks of the trainer.
        output_dir: for mask files and the report; None: ``cfg.OUTPUT_DIR``. A LazyConfig has none:
            name it there (without it the report goes to the log only).

    Raises ConfigError for a config that cannot be, or IMP without a folder.
    """
    options = OpenTransConfig.from_cfg(cfg)
    folder = output_dir if output_dir is not None else getattr(cfg, "OUTPUT_DIR", None)
    size = (options.ACCELERATE.INPUT_SIZE[0], options.ACCELERATE.INPUT_SIZE[1])
    place = {"tower": options.TOWER}
    hooks: list[HookBase | None] = []
    mask = options.MASK
    if options.IMP.ENABLED:
        if not folder:
            raise ConfigError(
                f"MODEL.{NODE}.IMP writes a mask file after every round, and there is no folder "
                "for them: this config has no OUTPUT_DIR. Call build_opentrans_hooks(..., "
                "output_dir=cfg.train.output_dir), which is where LazyConfig files keep it."
            )
        output = Path(folder) / options.IMP.OUTPUT
        hooks.append(IMPHook(imp_config(options.IMP), output, mask.FILE or None, **place))
    elif mask.FILE:
        remove_at = None if mask.REMOVE_AT < 0 else mask.REMOVE_AT
        hooks.append(MaskHook(mask.FILE, mask.AT, remove_at, mask.SAVE, **place))
    freeze = options.FREEZE
    if freeze.RULE or freeze.PLAN:
        rule = FreezePlan.from_json(freeze.PLAN) if freeze.PLAN else freeze.RULE
        hooks.append(
            AlphaFreezeHook(rule, freeze.FIT, freeze.AT, freeze.NORMS, freeze.SKIP, **place)
        )
    # First, so that a resume under other settings is refused before any state is taken over.
    hooks.insert(0, SettingsHook([type(hook).__name__ for hook in hooks]))
    if options.ACCELERATE.ENABLED:
        hooks.append(
            AccelerateForEvalHook(
                options.ACCELERATE.DEVICE,
                size,
                options.ACCELERATE.MEASURE,
                options.ACCELERATE.THREADS or None,
                heads=options.ACCELERATE.HEADS,
                **place,
            )
        )
    if options.REPORT:
        hooks.append(ReportHook(folder, size, **place))
    return [*hooks, *own]
