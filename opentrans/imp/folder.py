"""The folder of a run: what is written after each round, so that nothing kept is ever lost.

``state.pt``               everything needed to go on: masks, model, optimizer, random states
``rewind.pt``              the weights to go back to after each round, if the run rewinds
``round-001.safetensors``  the masks after each round, in the project's format
``log.json``               settings and one record per round

Every file is replaced as a whole. ``state.pt`` comes first and is what counts: masks and log are
made from it, and made again when a run that was stopped in between continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import atomic_write, open_checkpoint
from opentrans_kernels.masks.limits import brief

from ..saved import Check, check_entries, check_random, mapping, tensors
from ..state import (
    check_parts,
    load_extras,
    load_optimizer,
    random_states,
    set_random_states,
    write_state,
)
from .pruner import Pruner
from .ranks import is_first

STATE, REWIND, LOG = "state.pt", "rewind.pt", "log.json"
FORMAT_VERSION = 1
ENTRIES: dict[str, Check] = {
    **dict.fromkeys(("pruner", "extras", "random"), mapping),
    "model": tensors,
    "optimizer": lambda value: value is None or isinstance(value, dict),
}


class RunFolder:
    """Saves and restores one run in ``path``, which is created if its parent exists.

    extras: name -> object with ``state_dict`` and ``load_state_dict`` that goes along, such as a
    learning-rate scheduler. Raises CheckpointError if the folder cannot be used.
    """

    def __init__(
        self, path: str | os.PathLike[str], pruner: Pruner, extras: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.pruner, self.extras = Path(path), pruner, dict(extras or {})
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {self.path} cannot be used ({error.strerror}). Name a folder whose "
                "parent exists and is writable."
            ) from error

    @property
    def has_state(self) -> bool:
        """Whether a run was saved here."""
        return (self.path / STATE).exists()

    def mask_path(self, number: int) -> Path:
        """The mask file of round ``number``."""
        return self.path / f"round-{number:03d}.safetensors"

    def save(self) -> None:
        """Write everything after a round (or at the start). Raises CheckpointError."""
        pruner = self.pruner
        keep = pruner.state_dict()
        weights = keep.pop("rewind")
        # Written again after the first round: a run that was stopped may have left another one.
        if weights is not None and (pruner.round <= 1 or not (self.path / REWIND).exists()):
            write_state(self.path / REWIND, {"version": FORMAT_VERSION, "rewind": weights})
        state = {
            "version": FORMAT_VERSION,
            "pruner": keep,
            "model": pruner.model.state_dict(),
            "optimizer": None if pruner.optimizer is None else pruner.optimizer.state_dict(),
            "extras": {name: extra.state_dict() for name, extra in self.extras.items()},
            "random": random_states(),
        }
        write_state(self.path / STATE, state)
        self._derived()

    def load(self) -> None:
        """Put model, optimizer, extras, masks and random states back as they were saved.

        Raises:
            CheckpointError: a file is damaged, or of another model.
            PlanError: the run had other settings; the message names them.
        """
        pruner = self.pruner
        state, name = self._read(STATE, ENTRIES), str(self.path / STATE)
        keep = {**state["pruner"], "rewind": None}
        if pruner.config.rewind is not None and (self.path / REWIND).exists():
            keep["rewind"] = self._read(REWIND, {"rewind": tensors})["rewind"]
        check_parts(name, state, pruner.model, pruner.optimizer, self.extras)
        check_random(name, state["random"])
        # The settings are compared before anything is overwritten.
        pruner.load_state_dict(keep, name)
        pruner.model.load_state_dict(state["model"])
        load_optimizer(name, pruner.optimizer, state["optimizer"])
        load_extras(name, self.extras, state["extras"])
        if is_first():  # the others must not draw the same numbers
            set_random_states(state["random"])
            self._derived()

    def _derived(self) -> None:
        """Mask file of the last round and log, where they are missing or behind."""
        pruner = self.pruner
        record = pruner.records[-1] if pruner.records else None
        if record is not None and not self.mask_path(record.round).exists():
            pruner.masks.save(self.mask_path(record.round))
        log = {
            "config": pruner.config.to_dict(),
            "weights": pruner.total,
            "rounds_planned": len(pruner.targets),
            "rounds": [record.to_dict() for record in pruner.records],
        }
        atomic_write(self.path / LOG, (json.dumps(log, indent=2) + "\n").encode())

    def _read(self, name: str, entries: Mapping[str, Check]) -> dict[str, Any]:
        content = open_checkpoint(self.path / name).content
        version = content.get("version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path / name} is not the state of a pruning run that this version reads "
                f"(version {brief(version)}, expected {FORMAT_VERSION}). Name another folder; the "
                "masks of its rounds can be passed as masks= to start from them."
            )
        check_entries(str(self.path / name), content, entries)
        return content
