"""What the hooks do, without detectron2: each class follows any trainer of detectron2's shape.

Such a trainer has ``model``, ``optimizer``, ``iter`` (of the step that runs), ``start_iter``,
``storage.put_scalar`` and, if it saves, ``checkpointer.save``; it calls ``before_train``,
``before_step``, ``after_step`` and ``after_train``, and keeps ``state_dict`` with its checkpoints.
``opentrans.d2.hooks`` makes HookBase classes of these.
"""

from __future__ import annotations

from .base import Step
from .evaluate import AccelerateStep
from .freeze import FreezeStep
from .imp import ImpStep
from .mask import MaskStep
from .report import ReportStep
from .settings import SettingsStep

__all__ = [
    "AccelerateStep",
    "FreezeStep",
    "ImpStep",
    "MaskStep",
    "ReportStep",
    "SettingsStep",
    "Step",
]
