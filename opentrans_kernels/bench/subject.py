"""What a command works on: a tower with weights, its masks, and honest labels for both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, MaskError, UnsupportedModelError
from ..masks import MaskMatch, MaskSet, read_state_dict
from ..synthetic import MaskSpec, read_masks, synthetic_masks
from ..synthetic import load_masks_file as load_masks_file
from ..topology import conv_shapes, find_trunk, linear_modules, token_counts
from ..towers import build_tower
from ..towers import clip_image_size as clip_image_size


@dataclass
class Subject:
    """A dense tower (eval, float32, no gradients), masks for it, and where both come from.

    ``masks`` are under the tower's own names and all fit; ``match`` tells how the file's masks
    found their convolutions, and which did not.
    ``weights`` and ``mask`` are labels for people; the two flags say whether numbers measured on
    this subject concern trained weights or a trained mask at all.
    """

    model: nn.Module
    masks: MaskSet
    match: MaskMatch
    arch: str
    weights: str
    mask: str
    synthetic_weights: bool
    synthetic_mask: bool

    @property
    def synthetic(self) -> bool:
        """True unless both the weights and the mask were trained."""
        return self.synthetic_weights or self.synthetic_mask

    def masked_copy(self) -> nn.Module:
        """A copy of the tower whose pruned weights are zero."""
        twin = copy.deepcopy(self.model)
        self.masks.apply_(twin)
        return twin

    def densities(self, input_size: tuple[int, int]) -> dict[str, float]:
        """Shares of nonzeros over all trunk convolutions and masked linear layers: of weights, and
        of multiply-adds.

        An unmasked convolution counts as dense. ``input_size`` is (height, width) in pixels.
        """
        layers: dict[str, nn.Module] = {n.name: n.conv for n in find_trunk(self.model).convs()}
        shapes = conv_shapes(self.model, input_size)
        linear = {n: m for n, m in linear_modules(self.model).items() if n in self.masks.masks}
        if linear:
            layers, shapes = {**layers, **linear}, {
                **shapes, **token_counts(self.model, linear, input_size)[0],
            }  # fmt: skip
        weights = kept = work = done = 0
        for name, layer in layers.items():
            if name not in shapes:
                continue
            total = layer.weight.numel()
            mask = self.masks.masks.get(name)
            nonzero = total if mask is None else int(mask.sum())
            pixels = shapes[name].pixels
            weights, kept = weights + total, kept + nonzero
            work, done = work + total * pixels, done + nonzero * pixels
        return {"parameters": kept / weights, "flops": done / work}

    def describe(self) -> dict[str, Any]:
        """Labels for JSON."""
        return {
            "arch": self.arch,
            "weights": self.weights,
            "mask": self.mask,
            "synthetic": self.synthetic,
            "synthetic_weights": self.synthetic_weights,
            "synthetic_mask": self.synthetic_mask,
        }

    def banner(self) -> str | None:
        """A sentence that must accompany every number when something is synthetic."""
        parts = []
        if self.synthetic_weights:
            parts.append("weights")
        if self.synthetic_mask:
            parts.append("mask")
        if not parts:
            return None
        return (
            f"SYNTHETIC {' and '.join(parts)}: speed and exactness are real measurements, "
            "the network's predictions mean nothing."
        )


def load_subject(
    mask: str | None,
    *,
    arch: str = "RN50",
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> Subject:
    """Build the tower and its masks.

    Args:
        mask: a mask file, a recipe ("global:0.90", "uniform:0.90"), or None: the zeros of the
            checkpoint's weights are the mask.
        arch: as ``build_tower`` takes it: "RN50", "torchvision:NAME", "transformers:resnet50" ...
        checkpoint: weights file; without one the weights are synthetic.
        seed: seed of synthetic weights.

    Raises:
        OpenTransError: an unreadable file, an unknown arch, or masks that do not fit.
    """
    if mask is None and checkpoint is None:
        raise MaskError(
            "neither a mask nor a checkpoint was given, so there are no zeros to work on. Pass a "
            "mask file, or a recipe such as global:0.90."
        )
    # Errors of files come first: building a tower takes seconds.
    given = None if mask is None else read_masks(mask)
    state = None if checkpoint is None else read_state_dict(checkpoint)
    model = build_tower(arch, seed=seed, empty=state is not None)
    weights = f"synthetic weights (seed {seed})"
    if checkpoint is not None and state is not None:
        load_weights_from(model, state, Path(checkpoint).name)
        weights = f"weights of {Path(checkpoint).name}"
    if given is None:
        found = MaskSet.from_model_zeros(model)
    else:
        found = synthetic_masks(model, given) if isinstance(given, MaskSpec) else given
    match = found.match(model)
    if not match.masks:
        raise MaskError(f"no mask of {mask} fits {arch}.\n{match}")
    masks = replace(found, masks=match.masks)
    label = mask if mask is not None else f"zeros of {Path(str(checkpoint)).name}"
    if masks.source.synthetic:
        label = f"{label} (synthetic mask)"
    elif mask is not None:
        label = f"{Path(mask).name} ({masks.source.kind})"
    return Subject(
        model=model,
        masks=masks,
        match=match,
        arch=arch,
        weights=weights,
        mask=label,
        synthetic_weights=checkpoint is None,
        synthetic_mask=masks.source.synthetic,
    )


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load a checkpoint into ``model``, finding the prefix the tower has in the file.

    ``model`` is only written when every one of its tensors was found with its shape.

    Raises:
        CheckpointError: the file is unreadable or lacks tensors of the model.
        UnsupportedModelError: the file holds the model in other shapes.
    """
    load_weights_from(model, read_state_dict(checkpoint), Path(checkpoint).name)


def load_weights_from(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """:func:`load_weights` for tensors already read; ``where`` names them in messages."""
    own = model.state_dict()
    prefix = _matching_prefix(own, state, where)
    found = {key: state[prefix + key] for key in own if prefix + key in state}
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(own)} tensors of the model, for instance "
            f"{missing[:3]} (best prefix: {prefix!r}). Give the checkpoint of this architecture, "
            "or name its architecture with --arch."
        )
    wrong = [key for key, value in found.items() if value.shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise UnsupportedModelError(
            f"{where}: {len(wrong)} tensors have other shapes than the model, for instance {key} "
            f"is {tuple(found[key].shape)} in the file and {tuple(own[key].shape)} in the model. "
            "Name the checkpoint's architecture with --arch."
        )
    model.load_state_dict(found, strict=False)


def _matching_prefix(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], where: str
) -> str:
    """The prefix under which most of the model's tensors are in the file.

    Raises CheckpointError if the network stands there again under another prefix with other values,
    as a student and its teacher do.
    """
    anchor = next(key for key in own if key.endswith("weight"))
    candidates = sorted({key[: -len(anchor)] for key in state if key.endswith(anchor)} | {""})
    under = {prefix: [key for key in own if prefix + key in state] for prefix in candidates}
    best = max(candidates, key=lambda prefix: len(under[prefix]))
    for other in candidates:
        shared = [key for key in under[other] if key in under[best]]
        shared = [key for key in shared if state[other + key].shape == own[key].shape]
        if other == best or 2 * len(shared) < len(under[best]):
            continue
        pairs = ((state[best + key], state[other + key]) for key in shared)
        if any(one.shape == two.shape and not torch.equal(one, two) for one, two in pairs):
            names = [prefix.rstrip(".") for prefix in (best, other)]
            raise CheckpointError(
                f"{where} holds the network twice with different values, under the names "
                f"{names[0] or '(none)'} and {names[1] or '(none)'}. Choosing one would be a "
                "guess. Name the one that is meant after a colon: "
                f"{where}{'.' if ':' in where else ':'}{names[0] or names[1]}."
            )
    return best
