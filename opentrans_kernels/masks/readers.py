"""Mask files of every kind -> {conv module name: bool tensor}.

``READERS`` lists the kinds in the order in which they are tried. A reader is two functions on an
opened file: ``detect`` says whether the file is of its kind, ``read`` gives checked masks. A new
kind is one row here and a test with a small file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from opentrans_kernels.errors import CheckpointError, MaskError
from opentrans_kernels.masks import packed
from opentrans_kernels.masks.contents import tensors_of
from opentrans_kernels.masks.files import CheckpointFile, file_sha256, open_checkpoint, shorten

OPENTRANS_SECTIONS = ("backbone", "first_conv", "sem_seg_head")
MASK_SUFFIXES = (".weight_mask", ".weight.mask", ".mask", ".weight")
Masks = dict[str, torch.Tensor]
Notes = dict[str, str]


@dataclass(frozen=True)
class Reader:
    """One kind of mask file. ``read`` returns masks, notes, and whether they are synthetic."""

    summary: str
    detect: Callable[[CheckpointFile], bool]
    read: Callable[[CheckpointFile], tuple[Masks, Notes, bool]]


def read_masks(path: str | os.PathLike[str]) -> tuple[Masks, packed.Provenance]:
    """Masks of a file of any kind, with their provenance.

    Raises CheckpointError if the file cannot be read, MaskError if it can but holds no valid masks.
    """
    file = open_checkpoint(path)
    with ThreadPoolExecutor(1) as pool:  # hashing a large file takes as long as reading it
        digest = pool.submit(file_sha256, path)
        for kind, reader in READERS.items():
            if reader.detect(file):
                masks, notes, synthetic = reader.read(file)
                if not masks:
                    break
                source = packed.Provenance(kind, file.path, digest.result(), notes, synthetic)
                return masks, source
    kinds = "; ".join(f"{kind} ({reader.summary})" for kind, reader in READERS.items())
    raise MaskError(
        f"{file.path} is a readable checkpoint but holds no masks and no convolution weights. "
        f"Known kinds: {kinds}."
    )


def to_mask(name: str, tensor: torch.Tensor, origin: str) -> torch.Tensor:
    """A checked bool copy of a 0/1 tensor of any dtype. Raises MaskError on any other value."""
    if not isinstance(tensor, torch.Tensor):
        raise MaskError(
            f"mask {name!r} of {origin} is a {type(tensor).__name__}, not a tensor. Pass tensors "
            "with the shape of the weight."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise MaskError(
            f"mask {name!r} of {origin} is a {tensor.layout} tensor of {tensor.dtype}. Save masks "
            "as ordinary dense bool, uint8 or float tensors."
        )
    if tensor.numel() == 0:
        raise MaskError(
            f"mask {name!r} of {origin} is empty, of shape {tuple(tensor.shape)}. A mask has the "
            "shape of the weight it belongs to; save it again."
        )
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bool:
        return tensor.clone(memory_format=torch.contiguous_format)
    keep = tensor != 0
    ones = tensor == 1
    if not torch.equal(keep, ones):  # NaN is kept and not one
        wrong = keep ^ ones
        where = tuple(wrong.nonzero()[0].tolist())
        raise MaskError(
            f"mask {name!r} of {origin} has {int(wrong.sum())} values other than 0 and 1, the "
            f"first {tensor[where].item():g} at {where}. A mask keeps a weight with 1 and removes "
            "it with 0: threshold scores first, or pass the weights as a dense checkpoint."
        )
    return keep.contiguous()


def module_name(key: str) -> str:
    """Module name of a mask's key: "layer1.0.conv1.weight_mask" -> "layer1.0.conv1"."""
    for suffix in MASK_SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix)
        if key == suffix[1:]:  # the model is a single conv, without a name
            return ""
    return key


def collect_masks(tensors: Mapping[str, torch.Tensor], origin: str) -> tuple[Masks, Notes]:
    """Checked masks by module name.

    Entries for anything but a weight of two or more dimensions that remove nothing (a norm's ones)
    are left out, with a note. Raises MaskError on bad values or two masks for one module.
    """
    masks: Masks = {}
    left_out = []
    for key, tensor in tensors.items():
        mask = to_mask(key, tensor, origin)
        if mask.ndim < 2 and mask.all():
            left_out.append(key)
            continue
        name = module_name(key)
        if name in masks:
            raise MaskError(
                f"{origin} has two masks for module {name!r} (one is {key!r}). Keep one of them."
            )
        masks[name] = mask
    return masks, {"entries that remove nothing": shorten(left_out)} if left_out else {}


def _is_weight_mask(key: object) -> bool:
    return str(key).rpartition(".")[2] == "weight_mask"


def _tensors_or_none(file: CheckpointFile) -> dict[str, torch.Tensor] | None:
    """Detection must not raise for kinds that are laid out otherwise."""
    try:
        return tensors_of(file.content, file.path)[0]
    except CheckpointError:
        return None


def _pruned(tensors: Mapping[str, torch.Tensor], origin: str) -> tuple[Masks, Notes]:
    """Masks of a torch.nn.utils.prune state dict; a mask must have the shape of its weight."""
    chosen = {key: t for key, t in tensors.items() if _is_weight_mask(key)}
    masks, notes = collect_masks(chosen, origin)
    for key, tensor in chosen.items():
        original = tensors.get(key.removesuffix("mask") + "orig")
        if original is not None and original.shape != tensor.shape:
            raise MaskError(
                f"{origin}: mask {key!r} has shape {tuple(tensor.shape)}, but its weight_orig has "
                f"{tuple(original.shape)}. The file mixes two networks; save it again."
            )
    others = [k for k in tensors if k.rpartition(".")[2].endswith("_mask") and k not in chosen]
    if others:
        notes["masks of other parameters, not used"] = shorten(others)
    return masks, notes


def _detect_packed(file: CheckpointFile) -> bool:
    return file.container == "safetensors" and packed.is_packed(file.metadata)


def _read_packed(file: CheckpointFile) -> tuple[Masks, Notes, bool]:
    return packed.unpack(file.content, file.metadata, file.path)


def _detect_opentrans(file: CheckpointFile) -> bool:
    content = file.content
    if not isinstance(content, Mapping):
        return False
    sections = [s for s in OPENTRANS_SECTIONS if isinstance(content.get(s), Mapping)]
    return len(sections) >= 2 and any(_is_weight_mask(k) for s in sections for k in content[s])


def _read_opentrans(file: CheckpointFile) -> tuple[Masks, Notes, bool]:
    masks: Masks = {}
    notes: Notes = {}
    for section in OPENTRANS_SECTIONS:
        entries = file.content.get(section)
        if not isinstance(entries, Mapping):
            continue
        tensors = {str(k): v for k, v in entries.items() if isinstance(v, torch.Tensor)}
        found, section_notes = _pruned(tensors, f"{file.path} [{section}]")
        # The backbone's names stand alone; those of other sections must not collide with them.
        prefix = "" if section == "backbone" else f"{section}."
        masks |= {prefix + name: mask for name, mask in found.items()}
        notes |= {f"{section}: {key}": value for key, value in section_notes.items()}
    return masks, notes, False


def _detect_prune(file: CheckpointFile) -> bool:
    return any(_is_weight_mask(key) for key in _tensors_or_none(file) or ())


def _read_prune(file: CheckpointFile) -> tuple[Masks, Notes, bool]:
    tensors, notes = tensors_of(file.content, file.path)
    masks, more = _pruned(tensors, file.path)
    return masks, notes | more, False


def _detect_plain(file: CheckpointFile) -> bool:
    """Masks rather than weights: more ones than values other than 0 and 1.

    Judged on the largest rank present, so a few bad values are an error of a mask file and not a
    reason to take it for weights. A trained weight is practically never exactly 1.
    """
    tensors = _tensors_or_none(file) or {}
    if not tensors:
        return False
    rank = max(t.ndim for t in tensors.values())
    judged = [t for t in tensors.values() if t.ndim == rank]
    if rank < 2 or any(t.layout != torch.strided or t.is_quantized for t in judged):
        return False
    if not any(t.is_floating_point() or t.is_complex() for t in judged):
        return True
    nonzero = sum(int(torch.count_nonzero(t)) for t in judged)
    ones = sum(int(torch.count_nonzero(t.detach() == 1)) for t in judged)
    if nonzero == 0:  # all zero: only the names can tell
        return not any(key.endswith("weight") for key in tensors)
    return ones > nonzero - ones


def _read_plain(file: CheckpointFile) -> tuple[Masks, Notes, bool]:
    tensors, notes = tensors_of(file.content, file.path)
    masks, more = collect_masks(tensors, file.path)
    return masks, notes | more, False


def _conv_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        module_name(key): t
        for key, t in tensors.items()
        if key.rpartition(".")[2] == "weight" and t.ndim == 4 and t.is_floating_point()
    }


def _detect_dense(file: CheckpointFile) -> bool:
    return bool(_conv_weights(_tensors_or_none(file) or {}))


def _read_dense(file: CheckpointFile) -> tuple[Masks, Notes, bool]:
    tensors, notes = tensors_of(file.content, file.path)
    masks = zeros_as_masks(_conv_weights(tensors), file.path)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    notes["zeros of the weights"] = str(removed) if removed else "none: every weight is kept"
    return masks, notes, False


def count_not_finite(weight: torch.Tensor) -> int:
    """How many values are NaN or infinite. One fast pass when there are none."""
    weight = weight.detach()
    if torch.isfinite(weight.sum()):  # NaN and infinity survive a sum
        return 0
    return int((~torch.isfinite(weight)).sum())  # 0 if only the sum overflowed


def zeros_as_masks(weights: Mapping[str, torch.Tensor], origin: str) -> Masks:
    """weight != 0 per conv. Raises MaskError if a weight is NaN or infinite."""
    masks = {}
    for name, weight in weights.items():
        bad = count_not_finite(weight)
        if bad:
            raise MaskError(
                f"the weight of conv {name!r} of {origin} has {bad} values that are NaN or "
                "infinite; the training that wrote it diverged. Use an earlier checkpoint."
            )
        masks[name] = (weight.detach() != 0).cpu().contiguous()
    return masks


READERS: dict[str, Reader] = {
    "packed": Reader("bit-packed safetensors of this package", _detect_packed, _read_packed),
    "opentrans": Reader(
        "OpenTrans seg_backbone_imp*.pth: sections backbone, first_conv, sem_seg_head",
        _detect_opentrans,
        _read_opentrans,
    ),
    "prune": Reader(
        "state dict of torch.nn.utils.prune: weight_orig and weight_mask",
        _detect_prune,
        _read_prune,
    ),
    "plain": Reader("dict of name -> 0/1 tensor", _detect_plain, _read_plain),
    "dense": Reader("dense checkpoint whose zeros are the mask", _detect_dense, _read_dense),
}
