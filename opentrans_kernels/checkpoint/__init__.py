"""The sparse checkpoint: a pruned network without its zeros, with masks and plan, in one file.

A safetensors file. Each convolution with zeros is stored as its mask, one bit per weight, and its
kept values, float32 or half precision; every other tensor of the ``state_dict`` as it is. One
metadata entry holds JSON: the format version, shapes, the plan and where all of it comes from.
Packing is repeated on loading (a second or two), so a file depends neither on the instruction set
nor on the layout of the packed form, and a loaded model has a complete ``state_dict`` and can be
restored: pruned weights come back as zeros. A file may name its architecture, one of a fixed list;
no other code is ever run because a file names it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from ..accelerate import Report, accelerate, record_of
from ..errors import CheckpointError, MaskError, PlanError, UnsupportedModelError
from ..half import as_half
from ..masks import MaskSet, atomic_write, make_permanent
from ..masks.limits import brief
from ..masks.names import find_prefixes, owner_of, rename
from ..masks.packed import pack_bits
from ..masks.sparse_file import (
    DENSE,
    DTYPES,
    FORMAT_VERSION,
    MASK,
    METADATA_KEY,
    PORTABLE,
    VALUES,
    digest,
)
from ..plan import Plan
from ..plan.subject import check_model
from ..topology import original, packed_projections, parameter_name
from ..towers import NAMED, check_named, empty_tower, fill_storage, shapes_of
from .file import read, same_layout, shapes_of_file, unpack

__all__ = ["load_accelerated", "provenance_of", "save_accelerated"]

_NOT_GIVEN = object()


def save_accelerated(
    path: str | os.PathLike[str],
    model: nn.Module,
    masks: MaskSet | None = None,
    provenance: Mapping[str, str] | None = None,
    *,
    arch: str | None = None,
    values: torch.dtype = torch.float32,
    plan: bool = True,
) -> None:
    """Write an accelerated model, all or nothing.

    Args:
        path: the new file; an existing one is replaced only when the new one is complete.
        model: after ``accelerate(model, ...)``.
        masks: those given to ``accelerate``; None takes them from the model.
        provenance: text entries to keep with the file, such as the training run.
        arch: one of ``opentrans_kernels.towers.NAMED`` ("RN50", "torchvision:resnet50" ...), if
            the model is one; :func:`load_accelerated` then needs no model.
        values: of the kept weights in the file. torch.float16 takes half the room and is written
            only if each of them is a number of half precision, as after ``round_to_half``; they
            are loaded as float32, the same numbers.
        plan: False leaves the plan out, for a file that goes to other machines: loading it makes
            one there, measured.

    Raises:
        PlanError: the model was not accelerated, or with other masks.
        UnsupportedModelError: the model is not ``arch``, ``arch`` is not a known name, or
            ``values`` would change a weight or is another dtype.
        CheckpointError: the path cannot be written, or ``provenance`` is no mapping of texts.
    """
    from safetensors.torch import save

    target = _checked_path(path)
    record = record_of(model)
    if record is None:
        raise PlanError(
            "save_accelerated: the model was not accelerated. Call accelerate(model, masks) first; "
            "it keeps the plan that is stored."
        )
    if values not in DTYPES.values():
        raise UnsupportedModelError(
            f"save_accelerated: values={values!r} is none that kept weights are stored in. Pass "
            "torch.float32, or torch.float16."
        )
    if provenance is not None and not (
        isinstance(provenance, Mapping) and all(isinstance(key, str) for key in provenance)
    ):
        raise CheckpointError(
            f"save_accelerated: provenance must be text entries by name, got {brief(provenance)}. "
            "Pass for example {'run': '2026-11'}."
        )
    if arch is not None:
        check_named(arch, model)
    bits = _mask_bits(model, record)
    if masks is not None:
        if not isinstance(masks, MaskSet):
            raise MaskError(
                f"masks must be a MaskSet, got {type(masks).__name__}. Convert with "
                "MaskSet.from_tensors, or leave it out: the model keeps the masks it was given."
            )
        _same_masks(masks, bits, record["plan"])
    tensors: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    for name, (shape, packed) in bits.items():
        weight = state.pop(parameter_name(name, state), None)
        if weight is None:  # computed from other tensors, which are stored as they are
            layer = packed_projections(model).get(name) or original(model.get_submodule(name))
            raise PlanError(
                f"{name}: its weight is computed from others (pruned or parametrized). Make it "
                f"permanent before accelerating: {make_permanent(*owner_of(layer))}."
            )
        keep = np.unpackbits(packed, count=math.prod(shape)).view(np.bool_)
        tensors[MASK + name] = torch.from_numpy(packed)
        kept[name] = weight.detach().reshape(-1)[torch.from_numpy(keep)].float()
    if values == torch.float16:
        kept = as_half(kept)
    tensors |= {VALUES + name: tensor for name, tensor in kept.items()}
    for key, tensor in state.items():
        tensors[DENSE + key] = tensor.detach().cpu().contiguous().clone()
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "arch": arch,
        "shapes": {name: list(shape) for name, (shape, _) in bits.items()},
        "masks_given": bool(record["masks"]),
        "plan": record["plan"].to_dict() if plan else None,
        "provenance": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": type(model).__name__,
            "torch": torch.__version__,
            **{key: str(value) for key, value in (provenance or {}).items()},
        },
    }
    if not plan or values != torch.float32:  # which older versions of this package cannot read
        stored = next(name for name, dtype in DTYPES.items() if dtype == values)
        header |= {"format_version": PORTABLE, "values": stored}
    header["sha256"] = digest(tensors, header)
    atomic_write(target, save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)}))


@overload
def load_accelerated(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    replan: bool = False,
    input_size: tuple[int, int] | None = None,
) -> Report: ...


@overload
def load_accelerated(
    path: str | os.PathLike[str],
    *,
    build: Callable[[], nn.Module] | None = None,
    replan: bool = False,
    input_size: tuple[int, int] | None = None,
) -> tuple[nn.Module, Report]: ...


def load_accelerated(
    path: str | os.PathLike[str],
    model: Any = _NOT_GIVEN,  # None would be a mistake of the caller, and is refused as one
    *,
    build: Callable[[], nn.Module] | None = None,
    replan: bool = False,
    input_size: tuple[int, int] | None = None,
) -> Report | tuple[nn.Module, Report]:
    """Load a sparse checkpoint and accelerate it: as planned in the file, or as is fastest here.

    Args:
        path: a file of :func:`save_accelerated`.
        model: the same architecture, freshly built, float32 and in eval mode; its weights are
            overwritten. Without it the network is built here.
        build: a function without arguments that returns such a model, which is set to eval mode;
            by default the architecture that the file names, without random numbers.
        replan: make a plan here, which times every layer and the whole (seconds to a minute), and
            leave what does not pay. A file without a plan always does. Without, a plan that was
            made on another machine is carried out, and the report says so.
        input_size: (height, width) in pixels to plan for, as ``accelerate`` takes it.

    Returns:
        The report; of the file's plan without timings, which were measured where it was made.
        Without ``model``: the model that was built, and the report.

    Raises:
        CheckpointError: not such a file, damaged, of another architecture, or without the name of
            one where neither ``model`` nor ``build`` is given.
        PlanError: its plan is not one, for another network, or for another ``input_size``.
        UnsupportedModelError: the model cannot take it. The model is unchanged in every case.
    """
    name = _checked_path(path)
    given = model is not _NOT_GIVEN
    if given and build is not None:
        raise UnsupportedModelError(
            "load_accelerated: a model and a function that builds one were given. Pass one of them."
        )
    if build is not None and (isinstance(build, nn.Module) or not callable(build)):
        raise UnsupportedModelError(
            f"load_accelerated: build is a {type(build).__name__}, not a function that returns the "
            "network. Pass a network that exists already as model: load_accelerated(path, model)."
        )
    if given:
        check_model(model)
    tensors, header = read(name)
    plan = None if header["plan"] is None else Plan.from_dict(header["plan"])
    if not given:
        model = _named(name, tensors, header) if build is None else _from(build)
    report = _fill(name, tensors, header, None if replan else plan, model, input_size)
    return report if given else (model, report)


def provenance_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text entries kept with a sparse checkpoint: when and of what it was made, notices.

    Raises CheckpointError as :func:`load_accelerated` does.
    """
    found = read(_checked_path(path))[1].get("provenance")
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _fill(
    path: str,
    tensors: dict[str, torch.Tensor],
    header: Mapping[str, Any],
    plan: Plan | None,
    model: nn.Module,
    input_size: tuple[int, int] | None,
) -> Report:
    """Load the tensors into a checked model and accelerate it. Consumes ``tensors``."""
    own = model.state_dict()
    state, masks = unpack(path, tensors, header, own)
    before = {key: tensor.detach().clone() for key, tensor in own.items()}
    try:
        model.load_state_dict(state)
        given = masks if header["masks_given"] else None
        return accelerate(model, given, plan=plan, input_size=input_size, measure=plan is None)
    except BaseException:
        model.load_state_dict(before)
        raise


def _from(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` returns, in eval mode, checked."""
    model = build()
    if isinstance(model, nn.Module):
        model.eval()
    check_model(model)
    return model


def _named(path: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> nn.Module:
    """The network the file names, all zero. Memory is taken only once the shapes agree."""
    arch = header.get("arch")
    ways = "Pass the network, load_accelerated(path, model), or build=FUNCTION that returns it"
    if arch is None:
        raise CheckpointError(
            f"{path} does not name its architecture. {ways}; save_accelerated(..., arch='RN50') "
            "writes the name of a known one."
        )
    if arch not in NAMED:
        raise CheckpointError(
            f"{path} names the architecture {brief(arch)}, which is not one of those that are "
            f"built by name ({', '.join(NAMED)}). {ways}."
        )
    model = empty_tower(arch)
    own = model.state_dict()
    same_layout(path, shapes_of(own), shapes_of_file(tensors, header, own))
    return fill_storage(model)


def _mask_bits(
    model: nn.Module, record: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Convolution -> (shape, packed bits): the masks, or the weights' own zeros."""
    if record["masks"]:
        return dict(record["masks"])
    found = {}
    whole = {f"{u.name}.in_proj" for u in record["plan"].units if u.role == "attention"}
    for row in record["plan"].rows:
        if row.name in whole:  # no weight of a module's own: stored densely
            continue
        weight = original(model.get_submodule(row.name)).weight.detach()  # type: ignore[union-attr]
        keep = weight != 0  # type: ignore[operator]
        if not bool(keep.all()):
            found[row.name] = (tuple(keep.shape), pack_bits(keep))
    return found


def _same_masks(
    masks: MaskSet, bits: Mapping[str, tuple[tuple[int, ...], np.ndarray]], plan: Plan
) -> None:
    """Raise PlanError unless ``masks`` remove what the stored bits remove, under any prefix."""
    shapes = {name: shape for name, (shape, _) in bits.items()}
    prefix_mask, prefix_model = find_prefixes(
        {name: tuple(mask.shape) for name, mask in masks.masks.items()}, shapes
    )
    given = {rename(n, prefix_mask, prefix_model): m for n, m in masks.masks.items()}
    full = {row.name for row in plan.rows} - set(bits)
    for name, mask in given.items():
        stored = None if name not in bits else bits[name][1]
        same = bool(mask.all()) if name in full else (
            stored is not None and np.array_equal(pack_bits(mask), stored)
        )  # fmt: skip
        if not same or not set(bits) <= set(given):
            raise PlanError(
                f"save_accelerated: the masks given are not those the model was accelerated with "
                f"(they differ at {name!r}). Leave masks out, or accelerate again with these."
            )


def _checked_path(path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"path={path!r} is no path. Pass a file name.")
    return os.fspath(path)
