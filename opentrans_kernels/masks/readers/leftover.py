"""Entries that look like masks and were not read as such: never passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks.contents import Section
from opentrans_kernels.masks.files import shorten
from opentrans_kernels.masks.readers.families import unmasked_parametrizations

# Of a module whose name holds "mask" (a mask head), these are its own parameters.
_PARAMETERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SAMPLE = 256


def refuse_absent_masks(tensors: Mapping[str, torch.Tensor], masked: set[str], origin: str) -> None:
    """Raises MaskError if a weight goes through a parametrization and no mask is known for it.

    ``masked``: parameters with a mask.
    """
    bare = {
        parameter: key
        for parameter, key in unmasked_parametrizations(tensors).items()
        if parameter not in masked and tensors[key].ndim > 1
    }
    if bare:
        raise MaskError(
            f"{origin} holds the weights of {len(bare)} parametrized modules before masking and no "
            f"masks for them: {shorten(bare.values())}. torch.ao.pruning (FakeSparsity) leaves its "
            "masks out of state_dict(), so no reader can find them here. They are in the living "
            "module (module.parametrizations.weight[0].mask) and in sparsifier.state_dict(): save "
            "that one and pass it, or call sparsifier.squash_mask() and save model.state_dict() "
            "after it. For another parametrization: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight', "
            "leave_parametrized=True)."
        )


def unread_masks(
    section: Section,
    used: frozenset[str],
    weights: Mapping[str, torch.Tensor],
    beside: Mapping[str, torch.Tensor],
) -> list[str]:
    """Names of entries that look like masks and are not in ``used``.

    ``weights``: weights of modules that no mask removes anything from. ``beside``: names and
    tensors of other sections. Raises MaskError if one of the entries removes something and has the
    shape of one of ``weights`` without a zero, or stands beside it: it was saved before masking.
    """
    known = (t for k, t in section.tensors.items() if k.rpartition(".")[2] == "weight")
    shapes = {w.shape for w in known if w.ndim > 1}
    inside = {k: t for k, t in section.tensors.items() if k not in used}
    found = {k: t for k, t in {**inside, **beside}.items() if _looks_like_mask(k, t, shapes)}
    if not found:
        return []
    unmasked = {name: w for name, w in weights.items() if bool((w != 0).all())}
    dense = {w.shape for w in unmasked.values()}
    dropped = [
        k
        for k, t in found.items()
        if (t.shape in dense or _of_channels(k, unmasked)) and not bool((t != 0).all())
    ]
    if dropped:
        raise MaskError(
            f"{section.origin} holds {len(dropped)} entries that look like masks and belong to no "
            f"known kind ({shorten(dropped, 3)}), beside weights that are not masked "
            f"({shorten(sorted(unmasked), 3)}). Reading the weights alone would be another "
            "network. Save the masks by themselves, as a dict of module name -> 0/1 tensor, or the "
            "weights after masking."
        )
    return list(found)


def _of_channels(key: str, unmasked: Mapping[str, torch.Tensor]) -> bool:
    """A mask of another shape beside a weight: only its name tells what it is."""
    module, _, name = key.rpartition(".")
    return "mask" in name.lower() and module in unmasked


def _looks_like_mask(key: str, tensor: torch.Tensor, shapes: set[torch.Size]) -> bool:
    named = "mask" in key.lower()
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
    if key.rpartition(".")[2] in _PARAMETERS or not plain or tensor.numel() < 2:
        return False
    if not named and (tensor.ndim < 2 or tensor.shape not in shapes):
        return False
    flat = tensor.detach().reshape(-1)
    if not _zeros_and_ones(flat[:_SAMPLE]) or not _zeros_and_ones(flat):
        return False
    # Without the name, a buffer of zeros alone may be anything.
    return named or tensor.dtype == torch.bool or bool(flat.any() and not flat.all())


def _zeros_and_ones(values: torch.Tensor) -> bool:
    return values.dtype == torch.bool or bool(((values == 0) | (values == 1)).all())
