"""Modules that put a planned trunk into the place of the model's own stem and stages.

The first module of the stem runs the whole trunk, the rest of the stem passes its result on, and a
stage hands out what the trunk has computed already, if its input is the very tensor that the step
before gave out and nobody has written to it. Otherwise the stage computes its output from its
input. So models that walk their stages one by one (CLIP towers, detectron2 backbones) need no
change, and a forward pass costs one graph replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..freshness import Freshness
from ..nn import Replacement
from ..watch import Watch
from .graphs import GraphCache
from .kernels import Place
from .program import Program

__all__ = ["Passed", "PlannedStage", "PlannedStem", "TrunkRunner"]

_FIX = "Call opentrans_kernels.restore(model) first"
_MARK = "_opentrans_trunk"


@dataclass(frozen=True)
class _Mark:
    """What a trunk's output carries: who computed it, all outputs, which one this is."""

    runner: TrunkRunner
    outputs: list[torch.Tensor]
    index: int
    version: int


class TrunkRunner:
    """A planned program behind a cache of graphs; outputs come in the dtype of the image.

    kept: outputs that callers use (0 is the stem's, 1 the first stage's ...), None for all. Others
    are handed on without being copied out of the graph's memory.
    """

    def __init__(
        self, program: Program, graphs: GraphCache, kept: Sequence[int] | None = None
    ) -> None:
        self.program, self.graphs = program, graphs
        self.kept = None if kept is None else tuple(kept)

    @property
    def place(self) -> Place:
        return self.program.place

    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[stem output, output of every stage] for an image batch ``[N, C, H, W]``."""
        # Normal tensors also under inference_mode: their version counters tell of writes.
        with torch.inference_mode(False), torch.no_grad():
            outputs = self.graphs(x, x.dtype, self.kept)
            return [self._marked(outputs, i) for i in range(len(outputs))]

    def _marked(self, outputs: list[torch.Tensor], index: int) -> torch.Tensor:
        tensor = outputs[index]
        # The mark must not hold the tensor that carries it, or neither would ever be freed.
        later = [None] * (index + 1) + outputs[index + 1 :]
        setattr(tensor, _MARK, _Mark(self, later, index, tensor._version))  # type: ignore[arg-type]
        return tensor

    def stage(self, index: int, x: torch.Tensor, fresh: Freshness | None = None) -> torch.Tensor:
        """Output of stage ``index`` for ``x``, computed already or now.

        fresh: asked before something is computed.
        """
        mark = getattr(x, _MARK, None)
        if (
            isinstance(mark, _Mark)
            and mark.runner is self
            and mark.index == index
            and x._version == mark.version
        ):
            return mark.outputs[index + 1]
        if fresh is not None:
            fresh.require()
        given = x.to(self.place.precision.dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(False), torch.no_grad():
            return self.program.stage(index, given.clone() if given.is_inference() else given).to(
                x.dtype
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> TrunkRunner:
        return self  # graphs and packed weights are constant, so copies of a model share them

    def __reduce__(self) -> Any:
        raise UnsupportedModelError(
            "a model accelerated for CUDA cannot be pickled: its graphs live on one device. Save "
            f"model.state_dict(), which is that of the dense model. {_FIX} to pickle the model."
        )

    def check(self, module: nn.Module, x: torch.Tensor, watch: Watch | None) -> None:
        """Raise UnsupportedModelError, with the fix, for what the plan cannot serve."""
        if watch is not None and (why := watch.changed()) is not None:
            raise UnsupportedModelError(
                f"{why} since acceleration, and a planned trunk does not call it. Remove it. To "
                f"keep it: {_FIX}, and accelerate on the CPU, where such layers run as they are."
            )
        if module.training:
            raise UnsupportedModelError(
                f"this {type(module).__name__} is in training mode, but batch norms are folded "
                f"and weights packed for inference. Call model.eval(). To train: {_FIX}."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise UnsupportedModelError(
                "a trunk planned for CUDA computes no gradients, and its input requires one. Use "
                f"torch.no_grad() or x.detach(). To train: {_FIX}."
            )
        here = self.place.device
        if x.device.type != here.type or here.index not in (None, x.device.index):
            raise UnsupportedModelError(
                f"the trunk was packed for {self.place.device}, its input is on {x.device}. Pass "
                f"x.to({str(self.place.device)!r}). To run elsewhere: {_FIX}."
            )
        if x.dim() != 4 or not x.is_floating_point():
            raise UnsupportedModelError(
                f"the trunk takes floating images [N, C, H, W], got {x.dtype} {list(x.shape)}. "
                "Convert with x.float(), and add a batch dimension with x[None]."
            )


class PlannedStem(Replacement):
    """In the place of the stem's first module; runs the whole trunk."""

    def __init__(self, original: nn.Module, runner: TrunkRunner) -> None:
        super().__init__(original)
        self.__dict__["opentrans_runner"] = runner
        self.opentrans_watch: Watch | None = None  # of the whole stem, once all of it stands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.opentrans_runner.check(self, x, self.opentrans_watch)
        if self.opentrans_freshness is not None:
            self.opentrans_freshness.require()
        return self.opentrans_runner.run(x)[0]


class Passed(Replacement):
    """In the place of what the stem computes behind its first module; hands its input on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class PlannedStage(Replacement):
    """In the place of one stage."""

    def __init__(self, original: nn.Module, runner: TrunkRunner, index: int, name: str) -> None:
        super().__init__(original)
        self.opentrans_watch = Watch.inside(original, name, self._modules, {})
        self.__dict__["opentrans_runner"] = runner
        self.__dict__["opentrans_index"] = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.opentrans_runner.check(self, x, self.opentrans_watch)
        return self.opentrans_runner.stage(self.opentrans_index, x, self.opentrans_freshness)
