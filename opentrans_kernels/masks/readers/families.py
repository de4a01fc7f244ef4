"""Masks that stand beside weights in a state dict, in the words of each tool that writes them.

A family is one function: a flat state dict -> the parameters it masks. What a tool calls its
entries is known here alone; reading masks and folding weights both start from these.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks.readers.checks import Masked, is_weight
from opentrans_kernels.masks.wrappers import without_wrappers

Tensors = Mapping[str, torch.Tensor]
Family = Callable[[Tensors, str], Iterator[Masked]]

_NNCF = re.compile(
    r"^(?P<prefix>(?:.*\.)?)__nncf_hooks\.(?:pre|post)_hooks\."
    r"(?P<name>.+)__\d+\.\d+\.(?P<kind>binary_mask|mask)$"
)
_PARAMETRIZED = re.compile(
    r"^(?P<module>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)$"
)


def pruned(tensors: Tensors, origin: str) -> Iterator[Masked]:
    """torch.nn.utils.prune: X_orig and X_mask. NNI's wrapper: weight and weight_mask."""
    for key, mask in tensors.items():
        stem = key.removesuffix("_mask")
        if stem == key or not stem or stem.endswith("."):
            continue
        original = f"{stem}_orig"
        if original in tensors:
            if tensors[original].shape != mask.shape:
                raise MaskError(
                    f"{origin}: mask {key!r} has shape {tuple(mask.shape)}, but its "
                    f"{original.rpartition('.')[2]} has {tuple(tensors[original].shape)}. The file "
                    "mixes two networks; save it again."
                )
            yield Masked(without_wrappers(stem), key, mask, tensors[original], (key, original))
        elif is_weight(stem):
            yield Masked(without_wrappers(stem), key, mask, tensors.get(stem), (key, stem))


def parametrized(tensors: Tensors, origin: str) -> Iterator[Masked]:
    """torch.nn.utils.parametrize: X.parametrizations.weight.original and .0.mask.

    The mask's own name is the author's choice: it is the one 0/1 tensor of the original's shape.
    """
    for parameter, entries in _parametrizations(tensors).items():
        original = entries.get("original")
        if original is None:
            continue
        masks = {
            rest: key
            for rest, key in entries.items()
            if rest[:1].isdigit()
            and tensors[key].shape == tensors[original].shape
            and ("mask" in rest or tensors[key].dtype == torch.bool)
        }
        if not masks:
            continue
        if len(masks) > 1 or len(entries) > 2:
            others = sorted(set(entries.values()) - {original})
            raise MaskError(
                f"{origin}: {parameter!r} goes through more than one mask ({', '.join(others)}), "
                "and how they are combined is not in the file. Make it permanent where the network "
                "is alive: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight', "
                "leave_parametrized=True)."
            )
        key = next(iter(masks.values()))
        yield Masked(parameter, key, tensors[key], tensors[original], (key, original))


def unmasked_parametrizations(tensors: Tensors) -> dict[str, str]:
    """Parameter -> its entry, for those whose parametrization keeps nothing in the file."""
    return {
        parameter: entries["original"]
        for parameter, entries in _parametrizations(tensors).items()
        if set(entries) == {"original"}
    }


def _parametrizations(tensors: Tensors) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        match = _PARAMETRIZED.match(key)
        if match is not None:
            found[without_wrappers(match["module"] + match["name"])][match["rest"]] = key
    return found


def nncf(tensors: Tensors, origin: str) -> Iterator[Masked]:
    """NNCF: unmasked weights, and masks in hooks; of RB-sparsity their logits."""
    for key, mask in tensors.items():
        match = _NNCF.match(key)
        if match is None:
            continue
        name = match["prefix"] + match["name"].replace(":", ".")
        if match["kind"] == "mask":
            mask = torch.sigmoid(mask.detach()) > 0.5  # as NNCF's own threshold rounds
        yield Masked(without_wrappers(name), key, mask, tensors.get(name), (key, name))


def compressed(tensors: Tensors, origin: str) -> Iterator[Masked]:
    """compressed-tensors: packed bits, and the values they keep."""
    for key, bits in tensors.items():
        stem = key.removesuffix("bitmask")
        if stem == key or not (stem.endswith(".") or not stem):
            continue
        entries = [f"{stem}{part}" for part in ("bitmask", "compressed", "shape", "row_offsets")]
        shape, values = tensors.get(entries[2]), tensors.get(entries[1])
        if shape is None or values is None:
            continue
        mask = _unpacked(key, bits, shape, values, origin)
        weight = torch.zeros(mask.shape, dtype=values.dtype)
        as_bytes = (
            torch.uint8 if values.dtype.itemsize == 1 else values.dtype
        )  # float8 cannot index
        weight.view(as_bytes)[mask] = values.detach().cpu().view(as_bytes)
        name = stem if stem.endswith("weight.") else f"{stem}weight."
        present = tuple(e for e in entries if e in tensors)
        yield Masked(without_wrappers(name[:-1]), key, mask, weight, present)


def _unpacked(
    key: str, bits: torch.Tensor, shape: torch.Tensor, values: torch.Tensor, origin: str
) -> torch.Tensor:
    """Each row of the last dimension begins at a byte; its first weight is the lowest bit."""
    whole = shape.ndim == 1 and not shape.is_floating_point() and not shape.is_complex()
    sizes = tuple(int(n) for n in shape.tolist()) if whole else ()
    expected = (*sizes[:-1], -(-sizes[-1] // 8)) if sizes and min(sizes) > 0 else None
    if expected is None or bits.dtype != torch.uint8 or tuple(bits.shape) != expected:
        raise MaskError(
            f"{origin}: packed mask {key!r} is {tuple(bits.shape)} of {bits.dtype}, which is not "
            f"the mask of a weight of shape {sizes}. The file is damaged; save it again."
        )
    unpacked = np.unpackbits(bits.numpy(), axis=-1, count=sizes[-1], bitorder="little")
    mask = torch.from_numpy(unpacked.view(np.bool_))
    kept = int(torch.count_nonzero(mask))
    if values.ndim != 1 or kept != values.numel():
        raise MaskError(
            f"{origin}: packed mask {key!r} keeps {kept} of {math.prod(sizes)} weights, but the "
            f"file has {values.numel()} values for them. The file is damaged; save it again."
        )
    return mask


def beside(tensors: Tensors, origin: str) -> Iterator[Masked]:
    """A buffer with "mask" in its name and the shape of the ``weight`` beside it (fasterai)."""
    for key, mask in tensors.items():
        module, _, name = key.rpartition(".")
        weight = f"{module}.weight" if module else "weight"
        known = name in ("weight", "weight_mask") or weight not in tensors
        if "mask" in name.lower() and not known and tensors[weight].shape == mask.shape:
            yield Masked(without_wrappers(weight), key, mask, tensors[weight], (key, weight))


FAMILIES: dict[str, Family] = {
    "prune": pruned,
    "parametrize": parametrized,
    "nncf": nncf,
    "compressed-tensors": compressed,
    "buffer": beside,
}


def masked_parameters(tensors: Tensors, origin: str) -> dict[str, list[Masked]]:
    """Family -> the parameters it masks, families without any left out.

    Raises MaskError if a mask cannot be that of its parameter, or a parameter has two.
    """
    found = {family: list(find(tensors, origin)) for family, find in FAMILIES.items()}
    seen: dict[str, str] = {}
    for masked in (m for group in found.values() for m in group):
        if masked.parameter in seen:
            raise MaskError(
                f"{origin} has two masks for {masked.parameter!r}: {seen[masked.parameter]!r} and "
                f"{masked.key!r}. Keep one of them."
            )
        seen[masked.parameter] = masked.key
        if masked.weight is not None and masked.weight.shape != masked.mask.shape:
            raise MaskError(
                f"{origin}: mask {masked.key!r} has shape {tuple(masked.mask.shape)}, but its "
                f"weight has {tuple(masked.weight.shape)}. The file mixes two networks; save it "
                "again."
            )
    return {family: group for family, group in found.items() if group}
