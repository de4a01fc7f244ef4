"""What a run prunes, freezes and costs, in the log and as a file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import atomic_write
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.topology import conv_shapes

from ..norms import norms_in_training
from .base import Step, is_main

__all__ = ["ReportStep"]

log = logging.getLogger(__name__)


class ReportStep(Step):
    """Densities, trainable parameters and multiply-adds, when training starts and when it ends.

    Args:
        output: folder for ``opentrans_report.json``; None: the log only.
        input_size: (height, width) in pixels the multiply-adds are counted for.
        tower: module path of the tower, "" to find it.
    """

    def __init__(
        self,
        output: str | os.PathLike[str] | None = None,
        input_size: tuple[int, int] = (512, 512),
        *,
        tower: str = "",
    ) -> None:
        super().__init__(tower)
        self.output, self.input_size = output, input_size
        self.records: list[dict[str, Any]] = []

    def before_train(self) -> None:
        super().before_train()
        self._report("start")

    def after_train(self) -> None:
        self._report("end")

    def summary(self) -> dict[str, Any]:
        """Counts of the trainer's model as it is now; MACs per image of the tower."""
        convs = conv_modules(self.tower)
        alive = {name: int(torch.count_nonzero(conv.weight)) for name, conv in convs.items()}
        weights = sum(conv.weight.numel() for conv in convs.values())
        parameters = list(self.model.parameters())
        tower = list(self.tower.parameters())
        found: dict[str, Any] = {
            "tower": self._found.path if self._found is not None else "",
            "convolutions": len(convs),
            "weights": weights,
            "alive": sum(alive.values()),
            "density": sum(alive.values()) / max(1, weights),
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "tower_parameters": sum(p.numel() for p in tower),
            "tower_trainable": sum(p.numel() for p in tower if p.requires_grad),
            "norms_in_training": norms_in_training(self.tower),
        }
        try:
            shapes = conv_shapes(self.tower, self.input_size)
        except OpenTransError as error:
            return found | {"macs": None, "reason": str(error)}
        pixels = {name: shape.h_out * shape.w_out for name, shape in shapes.items()}
        return found | {
            "input_size": list(self.input_size),
            "nominal_macs": sum(convs[n].weight.numel() * count for n, count in pixels.items()),
            "effective_macs": sum(alive[name] * count for name, count in pixels.items()),
        }

    def _report(self, when: str) -> None:
        found = {"when": when, "steps": int(self.trainer.iter), **self.summary()}
        self.records.append(found)
        log.info(
            "tower %r: density %.4f of %d weights, %d of %d parameters train (model: %d of %d)",
            found["tower"], found["density"], found["weights"], found["tower_trainable"],
            found["tower_parameters"], found["trainable"], found["parameters"],
        )  # fmt: skip
        if found.get("nominal_macs"):
            nominal, effective = found["nominal_macs"], found["effective_macs"]
            log.info(
                "tower at %dx%d: %.2f GMAC nominal, %.2f effective (%.1f %%)",
                *found["input_size"], nominal / 1e9, effective / 1e9, 100 * effective / nominal,
            )  # fmt: skip
        self.put("density", found["density"])
        self.put("trainable_parameters", found["trainable"])
        if self.output is not None and is_main():
            folder = Path(self.output)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"records": self.records}, indent=1) + "\n"
            atomic_write(folder / "opentrans_report.json", text.encode("utf-8"))
