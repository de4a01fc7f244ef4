"""Clipping by the norm of live gradients, kept compact until the step that follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

__all__ = ["ClippedGradients"]


class ClippedGradients:
    """Scaled live gradients by parameter, valid while ``.grad`` is what they were taken from."""

    def __init__(self) -> None:
        self._kept: dict[torch.Tensor, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def clip(
        self,
        compact: Mapping[torch.Tensor, torch.Tensor],
        dense: Iterable[torch.Tensor],
        max_norm: float,
        norm_type: float,
    ) -> torch.Tensor:
        """Scale both to ``max_norm`` as ``clip_grad_norm_`` does; returns the norm before.

        compact: parameter -> its live gradient; dense: gradients of parameters without a mask.
        """
        gradients = [*compact.values(), *dense]
        norm = torch.nn.utils.get_total_norm(gradients, norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
        self._kept = {
            parameter: (parameter.grad, parameter.grad._version, values)
            for parameter, values in compact.items()
            if parameter.grad is not None
        }
        return norm

    def of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The clipped gradient; None if ``parameter`` got or wrote another one since."""
        gradient, version, values = self._kept.get(parameter, (None, 0, None))
        if gradient is None or gradient is not parameter.grad or gradient._version != version:
            return None
        return values

    def clear(self) -> None:
        """Forget them all."""
        self._kept.clear()
