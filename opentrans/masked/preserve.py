"""Keep a model pruned under an optimizer that already exists, with its dense state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opentrans_kernels.errors import MaskError, OpenTransError

from .live import LiveWeights, Masks, apply_masks, check_regrowth, masks_digest

__all__ = ["MaskGuard", "preserve_masks"]


class MaskGuard:
    """What :func:`preserve_masks` attached. ``digest``: SHA-256 (hex) of the masks."""

    def __init__(self, optimizer: Optimizer, live: dict[str, LiveWeights]) -> None:
        self._live = live
        self.digest = masks_digest(live)
        # Without an index, gathering would search the packed bits at every gradient.
        for weights in live.values():
            weights.build_index()
        self._handles: list[Any] = [
            weights.parameter.register_hook(weights.masked)
            for weights in live.values()
            if weights.parameter.requires_grad
        ]
        self._handles.append(optimizer.register_state_dict_pre_hook(lambda _: self.check()))
        self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_load))

    def check(self) -> None:
        """Raise MaskError, with names and counts, if a pruned weight is not zero any more."""
        check_regrowth(self._live)

    def remove(self) -> None:
        """Detach: gradients of pruned weights pass again, saving no longer checks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for weights in self._live.values():
            weights.drop_index()

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        number_of = dict(zip(parameters, numbers, strict=False))
        for weights in self._live.values():
            values = state_dict["state"].get(number_of.get(weights.parameter), {})
            for key, value in _elementwise(values, weights.parameter):
                dead = weights.dead_nonzero(value.to(weights.parameter.device))
                if dead:
                    raise MaskError(
                        f"{weights.name}: {key!r} is not zero at {dead} pruned weights, so this "
                        "state would make them grow again. Load the checkpoint of the masked run, "
                        "or start with fresh optimizer state."
                    )


def preserve_masks(model: nn.Module, optimizer: Optimizer, masks: Masks) -> MaskGuard:
    """Keep pruned weights exactly zero under ``optimizer``, without touching them in any step.

    Zeroes weights, gradients and optimizer state at pruned positions once, and from then on the
    gradients as they arrive, before clipping and before DistributedDataParallel averages them.
    ``optimizer.state_dict()`` then raises if a pruned weight grew, and ``load_state_dict`` if the
    state would make one grow. State stays dense: MaskedOptimizer is the one that saves memory.

    That zero weight, gradient and state stay zero is tried out on one weight with the options of
    every parameter group.

    Raises MaskError if masks and model disagree, OpenTransError if the optimizer moves such a
    weight. Nothing is changed then.
    """
    _prove_fixed_point(optimizer)
    live = apply_masks(model, masks)
    for weights in live.values():
        for _, value in _elementwise(optimizer.state.get(weights.parameter, {}), weights.parameter):
            value.masked_fill_(~weights.mask().to(value.device), 0)
    return MaskGuard(optimizer, live)


def _elementwise(values: dict[str, Any], parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [
        (key, value)
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    ]


def _prove_fixed_point(optimizer: Optimizer) -> None:
    """Run the optimizer's class on a zero weight with zero gradient; it must stay zero."""
    kind = type(optimizer)
    accepted = inspect.signature(kind.__init__).parameters
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k in accepted and k != "params"}
        weight = nn.Parameter(torch.zeros(4, 4))
        try:
            twin = kind([weight], **options)  # type: ignore[call-arg]
            for _ in range(3):
                weight.grad = torch.zeros_like(weight)
                twin.step()
        except Exception as error:
            raise OpenTransError(
                f"{kind.__name__} could not be tried on a single weight with the options of its "
                f"group ({type(error).__name__}: {error}), so it is not known whether pruned "
                "weights would stay zero. Use SGD, Adam or AdamW, or MaskedOptimizer."
            ) from error
        if not torch.equal(weight.detach(), torch.zeros(4, 4)):
            raise OpenTransError(
                f"{kind.__name__} moves a weight whose value, gradient and state are zero (to "
                f"{float(weight.detach().flatten()[0]):g}), so pruned weights would grow again. "
                "Use SGD, Adam or AdamW; with Adam keep eps above 0."
            )
