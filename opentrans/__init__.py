"""The training layer of OpenTrans, above the kernels.

The public names are imported when they are first used, so importing this package imports neither
torch nor the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentrans_kernels.lazy import lazy_exports

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
    "reconstruct": "least_squares",
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
    from .least_squares import reconstruct as reconstruct
    from .masked import MaskedOptimizer as MaskedOptimizer
    from .masked import preserve_masks as preserve_masks
    from .state import TrainingState as TrainingState
    from .state import read_training_state as read_training_state

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
