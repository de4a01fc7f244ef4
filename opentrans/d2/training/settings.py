"""Which hooks with a state a run has, kept with its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from opentrans_kernels.errors import PlanError

from .base import Step

__all__ = ["SettingsStep"]


class SettingsStep(Step):
    """Refuses to resume a run with a hook taken out or added.

    A trainer ignores the state of a hook that is not there any more, so a resumed run would unmask
    or unfreeze without a word. Register it also where there are no such hooks.

    Args:
        kinds: class names of the hooks that change training.
    """

    def __init__(self, kinds: Iterable[str] = ()) -> None:
        super().__init__()
        self.kinds = sorted(kinds)

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return {"kinds": list(self.kinds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint says. Raises PlanError if the run had other hooks."""
        run = sorted(state["kinds"])
        if run != self.kinds:
            raise PlanError(
                f"the run was started with {_listed(run)}, now there is {_listed(self.kinds)}: it "
                "would go on unmasked, unfrozen, or pruned in another way. Resume with the "
                "MODEL.OPENTRANS settings of the run, or start a new run in another OUTPUT_DIR."
            )


def _listed(kinds: list[str]) -> str:
    return ", ".join(kinds) or "no MaskHook, AlphaFreezeHook or IMPHook"
