"""The training layer of OpenTrans, above the kernels.

The public names are imported when they are first used, so importing this package imports neither
torch nor the kernels.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Public name -> the module of this package that defines it.
_EXPORTS = {
    "TextCache": "distill",
    "Teacher": "distill",
    "Regions": "distill",
    "Distiller": "distill",
    "FreezePlan": "freeze",
    "freeze_plan": "freeze",
    "GradSkipReport": "gradskip",
    "restore_skipped": "gradskip",
    "skip_frozen": "gradskip",
    "ImpSchedule": "imp",
    "Pruner": "imp",
    "iterative_magnitude_pruning": "imp",
    "MaskedOptimizer": "masked",
    "preserve_masks": "masked",
    "TrainingState": "state",
    "read_training_state": "state",
    "training_flops": "accounting",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:  # "as" marks a re-export for type checkers
    from .accounting import training_flops as training_flops
    from .distill import Distiller as Distiller
    from .distill import Regions as Regions
    from .distill import Teacher as Teacher
    from .distill import TextCache as TextCache
    from .freeze import FreezePlan as FreezePlan
    from .freeze import freeze_plan as freeze_plan
    from .gradskip import GradSkipReport as GradSkipReport
    from .gradskip import restore_skipped as restore_skipped
    from .gradskip import skip_frozen as skip_frozen
    from .imp import ImpSchedule as ImpSchedule
    from .imp import Pruner as Pruner
    from .imp import iterative_magnitude_pruning as iterative_magnitude_pruning
    from .masked import MaskedOptimizer as MaskedOptimizer
    from .masked import preserve_masks as preserve_masks
    from .state import TrainingState as TrainingState
    from .state import read_training_state as read_training_state


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps a name that is also a submodule the object it exports, whoever imports the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every submodule to its package under its own name.
        if isinstance(value, ModuleType) and _EXPORTS.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
