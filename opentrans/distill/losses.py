"""Distillation losses over regions: text-guided and visual-guided, without segmentation labels.

Names as in Han et al., "Transferable and Principled Efficiency for Open-Vocabulary Segmentation"
(arXiv 2404.07448): ``V_i`` is the student's embedding of region ``i``, ``R(I, M_j)`` the frozen
CLIP image embedding of image ``I`` under mask ``j``, ``T(Y_i)`` the CLIP text embedding of the
region's class. Pairs ``(i, j)`` are pairs of regions of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError

__all__ = ["TextForm", "TextGuidedLoss", "VisualGuidedLoss"]

TextForm = Literal["opentrans", "paper"]
TEXT_FORMS: tuple[TextForm, ...] = ("opentrans", "paper")
DEFAULT_KD_WEIGHT = 10.0  # KD_WEIGHT of the documented command


class TextGuidedLoss(nn.Module):
    """Text-guided distillation (TGKD), in the released code's form or the paper's.

    ``form="opentrans"`` is what the released code computes. With unit vectors v, c, t and a learned
    scalar s (initially 1), over the regions of image b::

        P_b = {(s t_i.t_j - v_i.c_j)^2},  p_i = |v_i - c_i|^2

    ``text_kd_weight <= 0``: ``kd_weight`` times one mean over all P_b and all p_i together.
    Otherwise ``kd_weight * mean(p) + text_kd_weight * mean(P)``.

    ``form="paper"`` is a reading of eq. 3, ``kd_weight / N * sum | |v_i - c_j| - |t_i - t_j| |``
    over pairs of one image and the N regions of the batch. Printed without the outer absolute
    value, terms of both signs cancel and the minimum matches nothing; the absolute value is ours.

    Args:
        form: "opentrans" or "paper".
        kd_weight: None means 10 for "opentrans", 1 for "paper".
        text_kd_weight: see above; "opentrans" only.
        learn_scale: whether s is trained. "paper" has no s.
    """

    def __init__(
        self,
        form: TextForm = "opentrans",
        *,
        kd_weight: float | None = None,
        text_kd_weight: float = 0.0,
        learn_scale: bool = True,
    ) -> None:
        super().__init__()
        if form not in TEXT_FORMS:
            raise OpenTransError(
                f"TextGuidedLoss has no form {form!r}. Choose one of {', '.join(TEXT_FORMS)}; "
                "without text use VisualGuidedLoss."
            )
        if form == "paper" and text_kd_weight > 0:
            raise OpenTransError(
                f"text_kd_weight={text_kd_weight:g} weighs the pair term of form 'opentrans'; eq. "
                "3 has one term only. Leave it out, or use form='opentrans'."
            )
        self.form: TextForm = form
        default = DEFAULT_KD_WEIGHT if form == "opentrans" else 1.0
        self.kd_weight = default if kd_weight is None else float(kd_weight)
        self.text_kd_weight = float(text_kd_weight)
        if form == "opentrans":
            self.scale = nn.Parameter(torch.ones(()), requires_grad=learn_scale)

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        text: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:
        """Scalar loss, float32 (float64 for float64 input), also under autocast.

        student, teacher, text: [N, D] region embeddings in image order, normalised here.
        counts: regions per image, summing to N. Without any region the result is a zero that
        depends on ``student`` and on s, so that every parameter behind them gets a gradient.

        Raises OpenTransError if shapes and counts disagree.
        """
        with torch.autocast(student.device.type, enabled=False):
            return self._loss(
                counts, *_unit_vectors(counts, student=student, teacher=teacher, text=text)
            )

    def _loss(
        self, counts: Sequence[int], v: torch.Tensor, c: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        if not len(v):
            zero = v.sum()
            return zero + 0 * self.scale.to(v.dtype) if self.form == "opentrans" else zero
        blocks = _per_image(counts, v, c, t)
        if self.form == "paper":
            return self.kd_weight * _distance_gap(
                (_cdist(a, b), _cdist(d, d)) for a, b, d in blocks
            )
        scale = self.scale.to(v)
        pairs = torch.cat([(scale * d @ d.T - a @ b.T).square().flatten() for a, b, d in blocks])
        points = (v - c).square().sum(dim=1)
        if self.text_kd_weight > 0:
            return self.kd_weight * points.mean() + self.text_kd_weight * pairs.mean()
        return self.kd_weight * torch.cat([pairs, points]).mean()

    def extra_repr(self) -> str:
        return f"{self.form}, kd_weight={self.kd_weight:g}, text_kd_weight={self.text_kd_weight:g}"


class VisualGuidedLoss(nn.Module):
    """Visual-guided distillation (VGKD), eq. 4 with an absolute value; needs no text.

    ``weight / N * sum | |v_i - c_j| - |v_i - v_j| |`` over pairs of one image and the N regions of
    the batch, with unit vectors. The absolute value is ours, for the reason given at
    :class:`TextGuidedLoss`.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = float(weight)

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Scalar loss; arguments, dtype and the case without regions as in TextGuidedLoss."""
        with torch.autocast(student.device.type, enabled=False):
            v, c = _unit_vectors(counts, student=student, teacher=teacher)
            if not len(v):
                return v.sum()
            blocks = _per_image(counts, v, c)
            return self.weight * _distance_gap((_cdist(a, b), _cdist(a, a)) for a, b in blocks)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"


def _unit_vectors(counts: Sequence[int], **embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Checked, normalised embeddings in at least float32; all but the student without gradient."""
    shape = embeddings["student"].shape
    for name, tensor in embeddings.items():
        if tensor.dim() != 2 or tensor.shape != shape:
            raise OpenTransError(
                f"{name} embeddings have shape {tuple(tensor.shape)}, the student's "
                f"{tuple(shape)}; all must be [regions, channels] of one size. Project them to a "
                "common width first (Distiller(projection=...))."
            )
    if sum(counts) != shape[0] or min(counts, default=0) < 0:
        raise OpenTransError(
            f"counts {list(counts)} add up to {sum(counts)} regions, the embeddings have "
            f"{shape[0]}. Pass the number of regions of each image, in image order."
        )
    device = embeddings["student"].device
    wide = torch.promote_types(embeddings["student"].dtype, torch.float32)
    return tuple(
        F.normalize((t if name == "student" else t.detach()).to(device, wide), dim=1)
        for name, t in embeddings.items()
    )


def _per_image(counts: Sequence[int], *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    present = zip(*(t.split(list(counts)) for t in tensors), strict=True)
    return (parts for parts in present if len(parts[0]))


def _cdist(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # The default goes through a matrix product, which loses small distances; here the gradient at
    # distance zero is zero.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _distance_gap(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    gaps = [((found - wanted).abs().sum(), len(found)) for found, wanted in pairs]
    return torch.stack([gap for gap, _ in gaps]).sum() / sum(n for _, n in gaps)
