"""Which trained networks are pruned here, how they are trained and by what they are judged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import maskable_convs

from .bank import Bank
from .load import Prepare
from .objective import EdgeMaps, FeatureMaps, Objective
from .statistics import bank_inputs, centre

__all__ = ["SUBJECTS", "Subject", "subject"]


@dataclass(frozen=True)
class Subject:
    """A network that can be pruned on photographs.

    crop: side of training crops in pixels. longest: of hold-out photographs; None: crops of
    ``crop``. size: (height, width) that ``macs`` weighs by. crops: how many different ones. lr,
    batch: of Adam. within: where the convolutions to prune are, the first one never. statistics:
    crops that batch norms are measured on (``statistics``); 0: there are none.
    """

    objective: Objective
    crop: int
    longest: int | None
    size: tuple[int, int]
    crops: int
    lr: float
    batch: int
    within: tuple[str, ...] = ("",)
    statistics: int = 0

    def ready(self, model: nn.Module, bank: Bank, prepare: Prepare) -> None:
        """Bring the dense ``model`` into a form that trains well, in place; same outputs."""
        if self.statistics:
            centre(model, bank_inputs(bank, prepare, self.statistics))

    def scope(self, model: nn.Module) -> list[str]:
        """Names of the convolutions to prune."""
        return [name for name in maskable_convs(model) if name.startswith(self.within)]


#: By the names of the catalog. Left out of the edge detector: its 1x1 side outputs, 1,472 weights.
SUBJECTS = {
    "hed": Subject(EdgeMaps(), 160, 480, (320, 480), 800, 2e-4, 1, ("blocks.",)),
    "resnet50-half": Subject(FeatureMaps(), 224, None, (224, 224), 1200, 2e-4, 4, statistics=64),
}


def subject(name: str) -> Subject:
    """Raises OpenTransError that lists those there are."""
    if name not in SUBJECTS:
        raise OpenTransError(
            f"nothing is known about how to prune {name!r}. Known are {', '.join(SUBJECTS)}."
        )
    return SUBJECTS[name]
