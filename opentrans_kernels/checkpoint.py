"""The sparse checkpoint: a pruned network without its zeros, with masks and plan, in one file.

A safetensors file. Each convolution with zeros is stored as its mask, one bit per weight, and its
nonzero float32 values; every other tensor of the ``state_dict`` as it is. One metadata entry holds
JSON: the format version, shapes, the plan and where all of it comes from. Packing is repeated on
loading (a second or two), so a file depends neither on the instruction set nor on the layout of
the packed form, and a loaded model has a complete ``state_dict`` and can be restored: pruned
weights come back as zeros. A file may name its architecture, one of a fixed list; no other code is
ever run because a file names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Mapping
from datetime import UTC, datetime
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from .accelerate import Report, accelerate, record_of
from .errors import CheckpointError, MaskError, PlanError, UnsupportedModelError
from .masks import MaskSet, atomic_write, make_permanent, open_checkpoint
from .masks.limits import Malformed, brief, parse_json
from .masks.names import find_prefixes, owner_of, rename
from .masks.packed import is_shape, pack_bits
from .plan import Plan
from .plan.subject import check_model
from .topology import original, packed_projections, parameter_name
from .towers import NAMED, check_named, empty_tower, fill_storage, shapes_of

__all__ = ["load_accelerated", "save_accelerated"]

METADATA_KEY = "opentrans_accelerated"
FORMAT_VERSION, WITHOUT_HEADER = 2, 1  # the older one's hash covers the tensors only
FIELDS = {"sha256": str, "shapes": dict, "masks_given": bool, "plan": dict}
_NOT_GIVEN = object()
_VALUES, _MASK, _DENSE = "values/", "mask/", "dense/"


def save_accelerated(
    path: str | os.PathLike[str],
    model: nn.Module,
    masks: MaskSet | None = None,
    provenance: Mapping[str, str] | None = None,
    *,
    arch: str | None = None,
) -> None:
    """Write an accelerated model, all or nothing.

    Args:
        path: the new file; an existing one is replaced only when the new one is complete.
        model: after ``accelerate(model, ...)``.
        masks: those given to ``accelerate``; None takes them from the model.
        provenance: text entries to keep with the file, such as the training run.
        arch: one of ``opentrans_kernels.towers.NAMED`` ("RN50", "torchvision:resnet50" ...), if
            the model is one; :func:`load_accelerated` then needs no model.

    Raises:
        PlanError: the model was not accelerated, or with other masks.
        UnsupportedModelError: the model is not ``arch``, or ``arch`` is not a known name.
        CheckpointError: the path cannot be written.
    """
    from safetensors.torch import save

    target = _checked_path(path)
    record = record_of(model)
    if record is None:
        raise PlanError(
            "save_accelerated: the model was not accelerated. Call accelerate(model, masks) first; "
            "it keeps the plan that is stored."
        )
    plan: Plan = record["plan"]
    if arch is not None:
        check_named(arch, model)
    bits = _mask_bits(model, record)
    if masks is not None:
        if not isinstance(masks, MaskSet):
            raise MaskError(
                f"masks must be a MaskSet, got {type(masks).__name__}. Convert with "
                "MaskSet.from_tensors, or leave it out: the model keeps the masks it was given."
            )
        _same_masks(masks, bits, plan)
    tensors: dict[str, torch.Tensor] = {}
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
        tensors[_MASK + name] = torch.from_numpy(packed)
        tensors[_VALUES + name] = weight.detach().reshape(-1)[torch.from_numpy(keep)].float()
    for key, tensor in state.items():
        tensors[_DENSE + key] = tensor.detach().cpu().contiguous().clone()
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "arch": arch,
        "shapes": {name: list(shape) for name, (shape, _) in bits.items()},
        "masks_given": bool(record["masks"]),
        "plan": plan.to_dict(),
        "provenance": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": type(model).__name__,
            "torch": torch.__version__,
            **{key: str(value) for key, value in (provenance or {}).items()},
        },
    }
    header["sha256"] = _digest(tensors, header)
    atomic_write(target, save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)}))


@overload
def load_accelerated(path: str | os.PathLike[str], model: nn.Module) -> Report: ...


@overload
def load_accelerated(
    path: str | os.PathLike[str], *, build: Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, Report]: ...


def load_accelerated(
    path: str | os.PathLike[str],
    model: Any = _NOT_GIVEN,  # None would be a mistake of the caller, and is refused as one
    *,
    build: Callable[[], nn.Module] | None = None,
) -> Report | tuple[nn.Module, Report]:
    """Load a sparse checkpoint and accelerate it as planned in the file.

    Args:
        path: a file of :func:`save_accelerated`.
        model: the same architecture, freshly built, float32 and in eval mode; its weights are
            overwritten. Without it the network is built here.
        build: a function without arguments that returns such a model, which is set to eval mode;
            by default the architecture that the file names, without random numbers.

    Returns:
        The report, without timings: the plan's were measured where the file was made. Without
        ``model``: the model that was built, and the report.

    Raises:
        CheckpointError: not such a file, damaged, of another architecture, or without the name of
            one where neither ``model`` nor ``build`` is given.
        PlanError: its plan is not one, or for another network.
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
    tensors, header = _read(name)
    plan = Plan.from_dict(header["plan"])
    if not given:
        model = _named(name, tensors, header) if build is None else _from(build)
    report = _fill(name, tensors, header, plan, model)
    return report if given else (model, report)


def _fill(
    path: str,
    tensors: dict[str, torch.Tensor],
    header: Mapping[str, Any],
    plan: Plan,
    model: nn.Module,
) -> Report:
    """Load the tensors into a checked model and accelerate it. Consumes ``tensors``."""
    own = model.state_dict()
    state, masks = _unpack(path, tensors, header, own)
    before = {key: tensor.detach().clone() for key, tensor in own.items()}
    try:
        model.load_state_dict(state)
        given = masks if header["masks_given"] else None
        return accelerate(model, given, plan=plan, measure=False)
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
    _same_layout(path, shapes_of(own), _shapes_of_file(tensors, header, own))
    return fill_storage(model)


def _shapes_of_file(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], own: Container[str]
) -> dict[str, tuple[int, ...]]:
    """Dense shapes of every entry, whole and sparse."""
    whole = {k.removeprefix(_DENSE): t for k, t in tensors.items() if k.startswith(_DENSE)}
    sparse = {parameter_name(n, own): tuple(shape) for n, shape in header["shapes"].items()}
    return shapes_of(whole) | sparse


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


def _digest(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any] | None) -> str:
    """SHA-256 (hex) over the header, and names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256()
    if header is not None:
        covered = {key: value for key, value in header.items() if key != "sha256"}
        digest.update(json.dumps(covered, sort_keys=True).encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _checked_path(path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"path={path!r} is no path. Pass a file name.")
    return os.fspath(path)


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    file = open_checkpoint(path)
    if METADATA_KEY not in file.metadata:
        raise CheckpointError(
            f"{path} is a {file.container} file, but not one that save_accelerated wrote. Load "
            "dense weights with load_state_dict, then call accelerate(model, masks)."
        )
    try:
        header = parse_json(file.metadata[METADATA_KEY])
    except Malformed as error:
        raise _damaged(path, f"its header is not readable: {error}") from error
    if not isinstance(header, dict) or "format_version" not in header:
        raise _damaged(path, "its header is not readable: it has no format version")
    version = header["format_version"]
    if version not in (WITHOUT_HEADER, FORMAT_VERSION) or isinstance(version, bool | float):
        raise CheckpointError(
            f"{path}: sparse checkpoint format version {brief(version)}, this version of "
            f"opentrans_kernels reads {WITHOUT_HEADER} and {FORMAT_VERSION}. Update "
            "opentrans_kernels."
        )
    for key, kind in FIELDS.items():
        if not isinstance(header.get(key), kind):
            raise _damaged(path, f"its header is not readable: {key} is {brief(header.get(key))}")
    if not isinstance(header.get("arch"), str | None):
        raise _damaged(path, f"its header is not readable: arch is {brief(header['arch'])}")
    if not all(is_shape(shape) for shape in header["shapes"].values()):
        raise _damaged(path, "its table of shapes holds something else")
    names = {key.removeprefix(_MASK) for key in file.content if key.startswith(_MASK)}
    if names != set(header["shapes"]):
        raise _damaged(path, "its table of shapes and its masks disagree")
    covered = None if version == WITHOUT_HEADER else header
    if _digest(file.content, covered) != header["sha256"]:
        raise _damaged(path, "its content does not have the recorded SHA-256")
    return dict(file.content), header


def _damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a sparse checkpoint, but {what}: it was changed or damaged after it was "
        "written. Copy it again from its source, or save it again."
    )


def _unpack(
    path: str,
    tensors: dict[str, torch.Tensor],
    header: Mapping[str, Any],
    own: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(dense state dict, masks) for a model with the state dict ``own``. Consumes ``tensors``."""
    masks: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    _same_layout(path, shapes_of(own), _shapes_of_file(tensors, header, own))
    for name, shape in header["shapes"].items():
        values, packed = tensors.pop(_VALUES + name, None), tensors.pop(_MASK + name)
        count = math.prod(shape)
        sizes = packed.dtype == torch.uint8 and packed.shape == (-(-count // 8),)
        if not sizes or values is None or values.ndim != 1 or values.dtype != torch.float32:
            raise _damaged(path, f"the tensors of {name} do not have the recorded sizes")
        keep = torch.from_numpy(np.unpackbits(packed.numpy(), count=count).view(np.bool_))
        if int(torch.count_nonzero(keep)) != values.numel():
            raise _damaged(path, f"{name} has {values.numel()} values for another mask")
        weight = torch.zeros(count)
        weight[keep] = values
        state[parameter_name(name, own)] = weight.view(shape)
        masks[name] = keep.view(shape)
    for key in [key for key in tensors if key.startswith(_DENSE)]:
        state[key.removeprefix(_DENSE)] = tensors.pop(key)
    for key, tensor in state.items():
        kinds = [one.is_floating_point() + 2 * one.is_complex() for one in (tensor, own[key])]
        if kinds[0] != kinds[1]:
            raise _damaged(path, f"{key} is {tensor.dtype}, in the model {own[key].dtype}")
    return state, masks


def _same_layout(
    path: str, own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise CheckpointError(
            f"{path} holds another architecture: {len(missing)} tensors of the model are not in it "
            f"{missing[:3]}, {len(extra)} of its tensors are not in the model {extra[:3]}. Build "
            "the architecture it was saved from."
        )
    wrong = [key for key in own if own[key] != given[key]]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{path} holds another architecture: {len(wrong)} tensors have other shapes, {key} is "
            f"{given[key]} in the file and {own[key]} in the model. Build the architecture it was "
            "saved from."
        )
