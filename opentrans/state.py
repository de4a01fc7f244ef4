"""The state of a training run in one file: weights, optimizer, masks, freeze plan, random states.

Written as a whole or not at all, read without running anything in it. A run continued from it does
what it would have done without the interruption.
"""

from __future__ import annotations

import io
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from opentrans_kernels.errors import CheckpointError, MaskError, OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet, atomic_write, open_checkpoint
from opentrans_kernels.masks.limits import brief
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.masks.packed import pack_bits

from .saved import (
    Check,
    check_entries,
    check_random,
    count,
    guarded,
    mapping,
    masks_from,
    numpy_state,
    tensors,
)

if TYPE_CHECKING:
    from .freeze import FreezePlan

__all__ = [
    "Position",
    "SavedTraining",
    "TrainingState",
    "check_parts",
    "load_extras",
    "load_optimizer",
    "random_states",
    "read_training_state",
    "set_random_states",
    "write_state",
]

KIND, FORMAT_VERSION = "opentrans training state", 1
ENTRIES: dict[str, Check] = {
    **dict.fromkeys(("step", "round"), count),
    **dict.fromkeys(("extras", "random"), mapping),
    "config": lambda value: isinstance(value, dict),
    "model": tensors,
    **dict.fromkeys(("masks", "optimizer"), lambda value: value is None or isinstance(value, dict)),
    "freeze_plan": lambda value: value is None or isinstance(value, str),
}
MASK_ENTRIES: dict[str, Check] = {
    "digest": lambda value: isinstance(value, str),
    "synthetic": lambda value: isinstance(value, bool),
    "shapes": mapping,
    "bits": tensors,
}


class Stateful(Protocol):
    """A scheduler, a GradScaler, a data sampler: anything with its own state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class Position:
    """Where the run was: optimizer steps done, pruning rounds done."""

    step: int
    round: int


@dataclass(frozen=True)
class SavedTraining:
    """What a file says about its run, needed to set up model and optimizer before loading."""

    masks: MaskSet | None
    freeze_plan: FreezePlan | None
    config: Mapping[str, Any]
    position: Position


class TrainingState:
    """Saves and restores a run exactly.

    ::

        state = TrainingState(model, optimizer, masks=masks, extras={"scheduler": scheduler})
        state.save("run.pt", step=1000)
        ...
        saved = read_training_state("run.pt")       # in a new process: masks and plan first
        optimizer = MaskedOptimizer(AdamW, model, saved.masks, ...)
        step = TrainingState(model, optimizer, masks=saved.masks).load("run.pt").step

    Args:
        model: unwrapped (the ``module`` of a DistributedDataParallel).
        optimizer: any torch optimizer, also a MaskedOptimizer.
        masks: the pruning masks in force; None: the model is not pruned.
        freeze_plan: the plan that was applied.
        extras: name -> object with ``state_dict`` and ``load_state_dict``.
        config: plain values that must agree when the run continues (learning rate, data, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        masks: MaskSet | None = None,
        freeze_plan: FreezePlan | None = None,
        extras: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.masks = model, optimizer, masks
        self.freeze_plan = freeze_plan
        self.extras, self.config = dict(extras or {}), dict(config or {})

    def save(self, path: str | os.PathLike[str], *, step: int, round: int = 0) -> None:
        """Write everything, all or nothing; an existing file is replaced at the end.

        Raises:
            MaskError: a pruned weight of the model is not zero any more.
            CheckpointError: the path cannot be written.
            OpenTransError: an extra or the config holds something that is not plain data.
        """
        check_zeros(self.model.state_dict(), self.model, self.masks, "the model")
        state = {
            "kind": KIND,
            "version": FORMAT_VERSION,
            "step": step,
            "round": round,
            "config": self.config,
            "masks": None if self.masks is None else _packed(self.masks),
            "freeze_plan": None if self.freeze_plan is None else self.freeze_plan.to_json(),
            "model": self.model.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "extras": {name: extra.state_dict() for name, extra in self.extras.items()},
            "random": random_states(),
        }
        write_state(path, state)

    def load(self, path: str | os.PathLike[str]) -> Position:
        """Put model, optimizer, extras and random states back; returns where the run was.

        All checks come first. Raises:
            MaskError: the file's masks are not the given ones: none given, none saved, or others.
            PlanError: another freeze plan or config; the message names the differences.
            CheckpointError: damaged, no such file, or of another model, optimizer or extras.
        """
        name = os.fspath(path)
        state = _read(name)
        self._same_masks(name, state)
        self._same_plan(name, state)
        check_parts(name, state, self.model, self.optimizer, self.extras)
        check_zeros(state["model"], self.model, self.masks, name)
        load_optimizer(name, self.optimizer, state["optimizer"])
        self.model.load_state_dict(state["model"])
        load_extras(name, self.extras, state["extras"])
        set_random_states(state["random"])
        return Position(state["step"], state["round"])

    def _same_masks(self, name: str, state: Mapping[str, Any]) -> None:
        saved = None if state["masks"] is None else state["masks"]["digest"]
        given = None if self.masks is None else self.masks.content_hash()
        if saved == given:
            return
        if given is None:
            raise MaskError(
                f"{name} is the state of a pruned run (masks {saved[:12]}), and no masks are "
                "given: its zeros would grow again. Pass "
                "masks=read_training_state(PATH).masks, and make the optimizer with them."
            )
        what = "is the state of a run without masks" if saved is None else f"has masks {saved[:12]}"
        raise MaskError(
            f"{name} {what}, given are masks {given[:12]}. Continue with the masks of the run "
            "(read_training_state(PATH).masks), or start a new run with these."
        )

    def _same_plan(self, name: str, state: Mapping[str, Any]) -> None:
        saved = _plan(state)
        found = differences(state["config"], self.config)
        a = None if saved is None else saved.digest()
        b = None if self.freeze_plan is None else self.freeze_plan.digest()
        if a != b:
            before = "none" if saved is None else f"{len(saved.frozen)} layers frozen"
            now = "none" if self.freeze_plan is None else f"{len(self.freeze_plan.frozen)} layers"
            found.append(f"freeze plan: {before} in the file, {now} given")
        if found:
            raise PlanError(
                f"{name} was saved by a run with other settings: {'; '.join(found)}. Continue with "
                "the settings of the run (read_training_state(PATH)), or start a new one."
            )


def check_parts(
    name: str,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: Stateful | None,
    extras: Mapping[str, Stateful],
) -> None:
    """Whether "model", "optimizer" and "extras" of the file ``name`` are of these objects.

    Raises:
        CheckpointError: they are not; the message names the first difference.
    """
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    saved = {key: tuple(value.shape) for key, value in state["model"].items()}
    if own != saved:
        odd = sorted(k for k in {*own, *saved} if own.get(k) != saved.get(k))
        raise CheckpointError(
            f"{name} is of another model: {len(odd)} tensors differ, such as {odd[0]} "
            f"({saved.get(odd[0], 'absent')} in the file, {own.get(odd[0], 'absent')} in the "
            "model). Continue with the model of the run."
        )
    if (state["optimizer"] is None) != (optimizer is None):
        raise CheckpointError(
            f"{name} was saved {'without' if state['optimizer'] is None else 'with'} an "
            "optimizer. Continue the run the way it was started."
        )
    if set(state["extras"]) != set(extras):
        raise CheckpointError(
            f"{name} holds the extras {sorted(state['extras'])}, given are {sorted(extras)}. "
            "Continue the run with the same extras."
        )


def load_optimizer(name: str, optimizer: Stateful | None, state: Any) -> None:
    """Put the optimizer's state back. Raises CheckpointError if it does not take it."""
    if optimizer is None:
        return
    try:
        optimizer.load_state_dict(state)
    except OpenTransError:
        raise
    except Exception as error:  # foreign classes: what they raise is not specified
        raise CheckpointError(
            f"{name} was saved with another optimizer, or is damaged ({type(error).__name__}: "
            f"{brief(error)}). Continue with the class and the parameter groups the run was "
            "started with."
        ) from error


def load_extras(name: str, extras: Mapping[str, Stateful], states: Mapping[str, Any]) -> None:
    """Put back the states of further objects. Raises CheckpointError if one does not take it."""
    for key, extra in extras.items():
        with guarded(name, f"state of {key!r} cannot be put back"):
            extra.load_state_dict(states[key])


def read_training_state(path: str | os.PathLike[str]) -> SavedTraining:
    """Masks, freeze plan, config and position of a saved run; nothing is loaded into anything.

    Raises CheckpointError if the file is damaged or not the state of a training run.
    """
    state = _read(os.fspath(path))
    masks = None
    if state["masks"] is not None:
        saved = state["masks"]
        masks = masks_from(
            os.fspath(path), saved["bits"], saved["shapes"], saved["digest"], saved["synthetic"]
        )
    position = Position(state["step"], state["round"])
    return SavedTraining(masks, _plan(state), dict(state["config"]), position)


def check_zeros(
    weights: Mapping[str, torch.Tensor], model: nn.Module, masks: MaskSet | None, where: str
) -> None:
    """Raise MaskError if ``weights``, a state dict of ``model``, is not zero where masks are."""
    if masks is None:
        return
    match = masks.match(model, strict=True)
    convs = conv_modules(model)
    grown = {}
    for name, mask in match.masks.items():
        key = f"{name}.weight"
        weight = weights.get(key, convs[name].weight).detach()
        count = int(torch.count_nonzero(weight)) - int(
            torch.count_nonzero(weight[mask.to(weight.device)])
        )
        if count:
            grown[name] = count
    if grown:
        raise MaskError(
            f"{sum(grown.values())} pruned weights of {where} in {len(grown)} layers are not zero "
            f"(first: {next(iter(grown))}), so this is not the pruned network. Train with "
            "MaskedOptimizer or preserve_masks; masks.apply_(model) sets them to zero again."
        )


def differences(run: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """ "rate is 0.1 in the run, 0.2 now" for every key in which the two differ."""
    return [
        f"{key} is {run.get(key)!r} in the run, {given.get(key)!r} now"
        for key in sorted({*run, *given})
        if run.get(key) != given.get(key)
    ]


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, of every CUDA device in use too."""
    kind, key, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(key.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if "torch.cuda" in sys.modules and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what :func:`random_states` returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        np.random.set_state(numpy_state(states["numpy"]))


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """``torch.save`` that a reader sees whole or not at all.

    Raises OpenTransError for content that could not be read again without running code,
    CheckpointError if the path cannot be written.
    """
    _plain(state, os.path.basename(os.fspath(path)))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())


def _plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _plain(item, f"{where}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _plain(item, f"{where}/{index}")
    elif not (value is None or isinstance(value, torch.Tensor | bool | int | float | str)):
        raise OpenTransError(
            f"{where} is a {type(value).__name__}, which cannot be kept with the run: only tensors "
            "and plain values can be loaded again safely. Turn it into one of those."
        )


def _read(name: str) -> dict[str, Any]:
    content = open_checkpoint(name).content
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(
            f"{name} is a checkpoint, but not one of TrainingState.save. Load plain weights "
            "with model.load_state_dict, and start a new run."
        )
    if content.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: training state version {brief(content.get('version'))}, this version reads "
            f"{FORMAT_VERSION}. Update opentrans."
        )
    check_entries(name, content, ENTRIES)
    check_random(name, content["random"])
    if content["masks"] is not None:
        check_entries(name, content["masks"], MASK_ENTRIES)
    return content


def _plan(state: Mapping[str, Any]) -> FreezePlan | None:
    if state["freeze_plan"] is None:
        return None
    from .freeze import FreezePlan

    return FreezePlan.from_json(state["freeze_plan"])


def _packed(masks: MaskSet) -> dict[str, Any]:
    return {
        "digest": masks.content_hash(),
        "synthetic": masks.source.synthetic,
        "shapes": {name: list(mask.shape) for name, mask in masks.masks.items()},
        "bits": {n: torch.from_numpy(pack_bits(mask)) for n, mask in masks.masks.items()},
    }
