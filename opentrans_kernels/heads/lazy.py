"""Masks that are enlarged late: a tensor that remembers how it follows from small ones.

What takes a mask classifier's output apart (crops, images one by one, chosen queries) and puts it
through a sigmoid is remembered; the product with the classes then runs tile by tile. Any other
operation gets the tensor itself, made by the very operations that were asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from .recipe import Recipe, crop_of
from .scores import Scores

__all__ = ["LazyMasks", "lazy_masks"]

_NO = object()  # a function is not remembered with these arguments


class _Owner:
    """The storage that a tensor and its views would share, once something asks for it."""

    def __init__(self, recipe: Recipe, root: bool = False) -> None:
        self.recipe, self.root = recipe, root
        self.value: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        if self.value is None:
            # A copy of the root's, which what was remembered before goes on reading.
            value = self.recipe.tensor()
            self.value = value.clone() if self.root else value
        return self.value


class LazyMasks(torch.Tensor):
    """Masks [N, Q, H, W] or [Q, H, W] of a mask classifier; see :func:`lazy_masks`."""

    _owner: _Owner
    _recipe: Recipe
    #: From the owner's tensor to this view of it.
    _path: tuple[Callable[[torch.Tensor], torch.Tensor], ...]

    @staticmethod
    def __new__(
        cls, recipe: Recipe, owner: _Owner, path: tuple[Callable[..., Any], ...] = ()
    ) -> LazyMasks:
        source = recipe.source
        made = torch.Tensor._make_wrapper_subclass(
            cls, recipe.shape, strides=recipe.strides, dtype=source.dtype, device=source.device
        )
        made._recipe, made._owner, made._path = recipe, owner, path
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REMEMBERED and _takes(func, args, kwargs):
            out = _REMEMBERED[func](*args, **kwargs)
            if out is not _NO:
                return out
        elif func in _METADATA and args[0]._owner.value is None:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map_only(LazyMasks, _tensor, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyMasks, _tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __hash__(self) -> int:
        return id(self)


def lazy_masks(masks: torch.Tensor) -> torch.Tensor:
    """Mask logits ``[N, Q, h, w]`` or ``[Q, h, w]`` that remember how others follow from them.

    Remembered are ``interpolate`` to a size (bilinear, ``align_corners=False``), cutting to
    ``[..., :h, :w]``, one image or one after the other, a batch of one, chosen queries and
    ``sigmoid``; ``einsum`` of what comes of them with class probabilities is
    :func:`opentrans_kernels.ops.mask_scores`. Everything else happens to the tensor that these
    operations give, which is then made, once; of chosen queries only their maps are, equal to
    rounding, because torch interpolates few maps in another order than many. ``masks`` itself must
    not be written to.

    Returns ``masks`` as they are if they are not contiguous, not float32 on a CPU, have a gradient,
    or are traced, and under autocast.
    """
    if (
        type(masks) is not torch.Tensor
        or masks.dim() not in (3, 4)
        or masks.dtype != torch.float32
        or masks.device.type != "cpu"
        or not masks.is_contiguous()
        or masks.numel() == 0
        or masks.requires_grad
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return masks
    images = masks.dim() == 4
    recipe = Recipe(masks if images else masks[None], images=images)
    return LazyMasks(recipe, _Owner(recipe, root=True))


def _tensor(masks: LazyMasks) -> torch.Tensor:
    value = masks._owner.tensor()
    for step in masks._path:
        value = step(value)
    return value


def _takes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        _SIGNATURES[func].bind(*args, **kwargs)
    except TypeError:
        return False  # with `out`, for example
    return True


def _late(masks: Any) -> Recipe | None:
    """The recipe of a tensor that was not made yet."""
    made = not isinstance(masks, LazyMasks) or masks._owner.value is not None
    return None if made else masks._recipe


def _new(recipe: Recipe | None) -> Any:
    return _NO if recipe is None else LazyMasks(recipe, _Owner(recipe))


def _view(masks: LazyMasks, recipe: Recipe | None, step: Callable[..., Any]) -> Any:
    return _NO if recipe is None else LazyMasks(recipe, masks._owner, (*masks._path, step))


def _interpolate(
    input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Any:  # fmt: skip
    plain = mode == "bilinear" and not (align_corners or antialias or recompute_scale_factor)
    if not plain or size is None or scale_factor is not None or _traced():
        return _NO
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or not all(isinstance(n, int) for n in size):
        return _NO
    recipe = _late(input)
    if recipe is None and isinstance(input, LazyMasks) and input._owner.root and not input._path:
        # Something read the masks before, and may write to them after.
        again = lazy_masks(_tensor(input).clone())
        recipe = _late(again)
    return _NO if recipe is None else _new(recipe.resized(size))


def _sigmoid(input: Any) -> Any:
    recipe = _late(input)
    return _NO if recipe is None else _new(recipe.squashed())


def _getitem(input: Any, index: Any) -> Any:
    recipe = _late(input)
    if recipe is None:
        return _NO
    if index is None:
        return _view(input, recipe.as_batch(), lambda t: t[None])
    if isinstance(index, int) and not isinstance(index, bool):
        return _view(input, recipe.image(index), lambda t: t[index])
    if isinstance(index, torch.Tensor):
        return _new(recipe.queries(index))
    size = crop_of(index, input.dim())
    return _NO if size is None else _view(input, recipe.cut(size), lambda t: t[index])


def _unbind(input: Any, dim: int = 0) -> Any:
    recipe = _late(input)
    if recipe is None or not recipe.images or dim != 0:
        return _NO
    return tuple(input[i] for i in range(input.shape[0]))


def _unsqueeze(input: Any, dim: int) -> Any:
    recipe = _late(input)
    return _NO if recipe is None or dim not in (0, -4) else _getitem(input, None)


def _squeeze(input: Any, dim: Any = None) -> Any:
    recipe = _late(input)
    one = recipe is not None and recipe.images and recipe.source.shape[0] == 1
    return _getitem(input, 0) if one and dim in (0, -4) else _NO


def _expand(input: Any, *sizes: Any, implicit: bool = False) -> Any:
    recipe = _late(input)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if recipe is None or recipe.images or len(sizes) != 4 or sizes[0] != 1:
        return _NO
    if any(size not in (-1, own) for size, own in zip(sizes[1:], recipe.shape, strict=True)):
        return _NO
    return _view(input, recipe.as_batch(), lambda t: t.expand(*sizes))


def _itself(input: Any) -> Any:
    """What returns its argument if there is nothing to do."""
    return _NO if _late(input) is None else input


def _contiguous(input: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    recipe = _late(input)
    dense = recipe is not None and (not recipe.crop or recipe.resize or recipe.sigmoid)
    return input if dense and memory_format == torch.contiguous_format else _NO


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    # The other tensor of `to` says no more than its dtype and device.
    args, kwargs = tree_map_only(LazyMasks, _stand_in, (args, kwargs))
    if not isinstance(tensor, LazyMasks):
        return tensor.to(*args, **kwargs)
    if _late(tensor) is None or kwargs.get("copy") or kwargs.get("memory_format") is not None:
        return _NO
    wanted = _stand_in(tensor).to(*args, **kwargs)
    same = wanted.dtype == tensor.dtype and wanted.device == tensor.device
    return tensor if same and True not in args[2:] else _NO


def _stand_in(masks: LazyMasks) -> torch.Tensor:
    return torch.empty(0, dtype=masks._recipe.source.dtype, device=masks._recipe.source.device)


def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or _traced():
        return _NO
    at = 0 if isinstance(operands[0], LazyMasks) else 1
    masks, classes = operands[at], operands[1 - at]
    recipe = _late(masks)
    if recipe is None or not recipe.sigmoid or not _plain(classes):
        return _NO
    order = _order(equation, at, recipe.images)
    if order is None:
        return _NO
    if order == "kq":
        classes = classes.transpose(-1, -2)
    if classes.shape[:-1] != masks.shape[:-2]:
        return _NO
    scores = recipe.scores(classes if recipe.images else classes[None])
    scores = scores if recipe.images else scores[0]
    # Of masks at the size of the network's input: those of the picture's size come next.
    return scores if recipe.crop or recipe.resize else scores.as_subclass(Scores)


def _order(equation: str, at: int, images: bool) -> str | None:
    """Whether classes come as "qk" or "kq" in "qk,qhw->khw" and its like; None for other sums.

    at: the operand that is the masks; images: whether they have a dimension of images.
    """
    names, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = names.split(",")
    if len(terms) != 2 or len({*terms[at]}) != len(terms[at]) or len(terms[at]) not in (3, 4):
        return None
    batch, (q, h, w) = terms[at][:-3], terms[at][-3:]
    if "." in (q, h, w) or (batch != "." and bool(batch) != images):
        return None
    pair = terms[1 - at].removeprefix(batch)
    k = pair.replace(q, "")
    if len(pair) != 2 or len(k) != 1 or k in terms[at] or result != batch + k + h + w:
        return None
    if terms[1 - at] != batch + pair:
        return None
    return "qk" if pair == q + k else "kq"


def _plain(classes: Any) -> bool:
    return (
        type(classes) is torch.Tensor
        and classes.dtype == torch.float32
        and classes.device.type == "cpu"
        and not (classes.requires_grad and torch.is_grad_enabled())
    )


def _traced() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.jit.is_tracing()


_REMEMBERED: dict[Any, Callable[..., Any]] = {
    F.interpolate: _interpolate,
    torch.sigmoid: _sigmoid,
    torch.Tensor.sigmoid: _sigmoid,
    torch.special.expit: _sigmoid,
    torch.Tensor.__getitem__: _getitem,
    torch.unbind: _unbind,
    torch.Tensor.unbind: _unbind,
    torch.unsqueeze: _unsqueeze,
    torch.Tensor.unsqueeze: _unsqueeze,
    torch.squeeze: _squeeze,
    torch.Tensor.squeeze: _squeeze,
    torch.Tensor.expand: _expand,
    torch.Tensor.float: _itself,
    torch.Tensor.cpu: _itself,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.to: _to,
    torch.einsum: _einsum,
    torch.functional.einsum: _einsum,
}

_SIGNATURES = {func: inspect.signature(handler) for func, handler in _REMEMBERED.items()}

#: Answered without a value.
_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
    ),
    *(
        getattr(torch.Tensor, name)
        for name in (
            "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
            "is_floating_point", "is_complex", "element_size", "__len__",
        )
    ),
}  # fmt: skip
