"""The state of a training run in one file: weights, optimizer, masks, freeze plan, random states.

Written as a whole or not at all, read without running anything in it. A run continued from it does
what it would have done without the interruption.
"""

from __future__ import annotations

import io
import math
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
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.masks.packed import Provenance, pack_bits

if TYPE_CHECKING:
    from .freeze import FreezePlan

__all__ = [
    "Position",
    "SavedTraining",
    "TrainingState",
    "check_parts",
    "random_states",
    "read_training_state",
    "set_random_states",
    "write_state",
]

KIND, FORMAT_VERSION = "opentrans training state", 1


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
        if self.optimizer is not None:
            try:
                self.optimizer.load_state_dict(state["optimizer"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{name} was saved with another optimizer ({error}). Continue with the class "
                    "and the parameter groups the run was started with."
                ) from error
        self.model.load_state_dict(state["model"])
        for key, extra in self.extras.items():
            extra.load_state_dict(state["extras"][key])
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


def read_training_state(path: str | os.PathLike[str]) -> SavedTraining:
    """Masks, freeze plan, config and position of a saved run; nothing is loaded into anything.

    Raises CheckpointError if the file is damaged or not the state of a training run.
    """
    state = _read(os.fspath(path))
    masks = None
    if state["masks"] is not None:
        bits, shapes = state["masks"]["bits"], state["masks"]["shapes"]
        masks = MaskSet(
            {name: _unpacked(bits[name], shapes[name]) for name in shapes},
            Provenance("training state", os.fspath(path), synthetic=state["masks"]["synthetic"]),
        )
        if masks.content_hash() != state["masks"]["digest"]:
            raise CheckpointError(
                f"{os.fspath(path)}: its masks do not have the recorded hash; the file was changed "
                "or damaged. Use an earlier one."
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
        kind, key, *rest = states["numpy"]
        np.random.set_state((kind, key.numpy().astype("uint32"), *rest))


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
            f"{name}: training state version {content.get('version')!r}, this version reads "
            f"{FORMAT_VERSION}. Update opentrans."
        )
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


def _unpacked(bits: torch.Tensor, shape: list[int]) -> torch.Tensor:
    flat = np.unpackbits(bits.numpy(), count=math.prod(shape)).view(np.bool_)
    return torch.from_numpy(flat.copy()).view(shape)
