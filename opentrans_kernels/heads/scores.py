"""Scores of classes that are resized once more by what gets them, perhaps to the size they have.

Frameworks end with a resize to the size of the picture. torch computes it where the size is the
same already: every pixel is then one times itself and zero times its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["Scores"]


class Scores(torch.Tensor):
    """A tensor [..., K, H, W] whose bilinear resize to its own size is itself.

    Cutting and expanding give another of this kind; everything else, copies and files too, an
    ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.interpolate and _to_own_size(*args, **kwargs):
                return args[0].as_subclass(torch.Tensor).contiguous()
            out = func(*args, **kwargs)
            return out.as_subclass(cls) if func in _VIEWS and type(out) is torch.Tensor else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).clone()


_VIEWS = (torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.unsqueeze, torch.unsqueeze)


def _to_own_size(
    input: Any = None, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> bool:  # fmt: skip
    if not isinstance(input, Scores) or mode != "bilinear" or align_corners or antialias:
        return False
    if scale_factor is not None or recompute_scale_factor or size is None or input.dim() != 4:
        return False
    size = (size, size) if isinstance(size, int) else tuple(size)
    return size == tuple(input.shape[2:]) and input.numel() > 0
