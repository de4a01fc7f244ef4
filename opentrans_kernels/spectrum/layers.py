"""Which weights are measured, and how each is seen as a stack of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import MaskError, OpenTransError, UnsupportedModelError
from ..masks import MaskSet
from . import seen

__all__ = ["CLASS_NAMES", "LINEAR_ASPECT", "MATCHES", "LayerSlices", "select"]

#: Lowercased class names of the measured modules, as the published estimator compares them.
CLASS_NAMES = ("conv2d", "conv1d", "linear")
_CLASSES = (nn.Conv2d, nn.Conv1d, nn.Linear)
MATCHES = ("class_name", "isinstance")
#: A linear layer whose larger side is this many times the smaller one is left out.
LINEAR_ASPECT = 8.0
_ATTENTION = ("attn", "attention")
#: What a module's weight is called among its parameters: as it is, pruned, parametrized.
_WEIGHTS = ("weight", "weight_orig", "parametrizations.weight.original")


@dataclass(frozen=True)
class LayerSlices:
    """One weight as ``positions`` matrices of ``rows x columns``, without a copy.

    Attributes:
        name, parameter, part, kind, params: as in :class:`~.table.LayerAlpha`.
        weight: [O, I] or [O, I, *kernel], detached, on any device, of any floating dtype.
        scale: factor on the eigenvalues: ``conv_norm`` for kernels, 1 for matrices.
    """

    name: str
    parameter: str
    part: str
    kind: str
    weight: torch.Tensor
    scale: float
    params: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def positions(self) -> int:
        """Kernel positions, the number of matrices."""
        count = 1
        for size in self.weight.shape[2:]:
            count *= size
        return count

    @property
    def small(self) -> int:
        """Smaller side of each matrix: its number of eigenvalues."""
        return min(self.weight.shape[0], self.weight.shape[1])

    @property
    def large(self) -> int:
        """Larger side of each matrix."""
        return max(self.weight.shape[0], self.weight.shape[1])

    @property
    def num_eigenvalues(self) -> int:
        """Eigenvalues of all matrices together."""
        return self.positions * self.small

    def matrices(self) -> torch.Tensor:
        """View [positions, small, large] of the weight; unscaled."""
        stack = self.weight.flatten(2) if self.weight.dim() > 2 else self.weight.unsqueeze(2)
        stack = stack.permute(2, 0, 1)
        return stack if stack.shape[1] <= stack.shape[2] else stack.transpose(1, 2)


def select(
    source: nn.Module | Mapping[str, torch.Tensor],
    *,
    match: str = "class_name",
    conv_norm: float = 0.5,
    linear_aspect: float | None = LINEAR_ASPECT,
    skipped: dict[str, str] | None = None,
    weights: str = "masked",
    masks: MaskSet | None = None,
    notes: list[str] | None = None,
) -> list[LayerSlices]:
    """The layers of a network, in the order of ``named_modules()`` or of the mapping.

    Modules count by the name of their class (``conv2d``, ``conv1d``, ``linear``, in any case), as
    in the published estimator: subclasses of another name, such as ``MultiheadAttention``'s output
    projection, do not, nor do bare parameters such as ``in_proj_weight``. In a mapping every entry
    counts; a trailing ".weight" of its key is left out of the name. Masks that a pruned network or
    state dict holds are no layers; ``weights`` says whether they are applied.

    A 2-D weight below a name with "attn" or "attention" whose one side is a third of the other is
    cut into the layers ``name_q``, ``name_k``, ``name_v``; the third takes the remainder.

    Args:
        match: ``"isinstance"`` counts instances of Conv2d, Conv1d and Linear instead.
        conv_norm: factor on the eigenvalues of weights with kernel dimensions.
        linear_aspect: linear layers of at least this aspect are left out; None: none is.
        skipped: receives name -> reason for those.
        weights: of a source that holds weights beside their masks: ``"masked"``, what the network
            computes with, or ``"dense"``, the weights under the masks.
        masks: zero what these remove, in the copy that is measured.
        notes: receives what must be said about masks.

    Raises:
        MaskError: ``masks``, or masks in a mapping, that do not fit the weights.
        UnsupportedModelError: no layer, or a weight without two dimensions, empty, quantised,
            sparse, complex, integer, on the meta device or not initialised; the layer is named.
        OpenTransError: unknown ``match`` or ``weights``.
    """
    seen.check_weights(weights)
    if match not in MATCHES:
        raise OpenTransError(
            f"match={match!r} is not known. Use one of {', '.join(map(repr, MATCHES))}."
        )
    skipped = {} if skipped is None else skipped
    removed: dict[str, float] = {}
    if isinstance(source, nn.Module):
        under = seen.Under.of(source) if weights == "dense" else seen.Under()
        entries, removed = _of_modules(source, match, under), under.removed
        told = [under.note, seen.left_out_note(removed)]
    else:
        entries = _of_mapping(source, weights, removed)
        told = []
    given = seen.given_masks(source, masks)
    layers: list[LayerSlices] = []
    for name, parameter, kind, weight, extra in entries:
        weight = _checked(name, weight)
        if parameter in given:
            weight = _under(name, weight, given[parameter])
        rows, columns = weight.shape[:2]
        aspect = max(rows, columns) / min(rows, columns)
        if kind == "linear" and linear_aspect is not None and aspect >= linear_aspect:
            skipped[name] = f"linear {rows}x{columns}: aspect {aspect:.1f} >= {linear_aspect:g}"
            continue
        kernel = weight.dim() > 2
        scale = float(conv_norm) if kernel else 1.0
        for suffix, part, cut in _parts(name, weight):
            trainable = cut.numel() if extra is None or extra[0] else 0
            params = trainable + (0 if extra is None else extra[1])
            layers.append(
                LayerSlices(
                    f"{name}{suffix}",
                    parameter,
                    part,
                    "conv" if kernel else "linear",
                    cut,
                    scale,
                    params,
                )
            )
    if notes is not None:
        told = told or [seen.left_out_note(removed)]
        notes += [note for note in told if note]
    if not layers:
        raise UnsupportedModelError(_nothing(source, match, skipped))
    return layers


_Entry = tuple[str, str, str, object, tuple[bool, int] | None]


def _of_modules(model: nn.Module, match: str, under: seen.Under) -> Iterator[_Entry]:
    """(name, parameter, kind, weight, (weight is trainable, other trainable elements))."""
    for name, module in model.named_modules():
        if not _counts(module, match):
            continue
        weight = getattr(module, "weight", None)
        label = _class_name(module)
        kind = (
            label
            if match == "class_name"
            else ("linear", "conv")[not isinstance(module, nn.Linear)]
        )
        trained = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        others = sum(p.numel() for key, p in trained if key not in _WEIGHTS and not _is_lazy(p))
        trainable = any(key in _WEIGHTS for key, _ in trained)
        parameter = f"{name}.weight" if name else "weight"
        measured = under.weight(parameter, weight)
        yield name or type(module).__name__, parameter, kind, measured, (trainable, others)


def _counts(module: nn.Module, match: str) -> bool:
    if match == "isinstance":
        return isinstance(module, _CLASSES)
    return _class_name(module) in CLASS_NAMES


def _class_name(module: nn.Module) -> str:
    """Lowercased; of the class itself where torch put a parametrized one in its place."""
    kind = type(module)
    return (kind.__mro__[1] if is_parametrized(module) else kind).__name__.lower()


def _of_mapping(
    source: Mapping[str, torch.Tensor], weights: str, removed: dict[str, float]
) -> Iterator[_Entry]:
    if not isinstance(source, Mapping):
        raise UnsupportedModelError(
            f"estimate_alpha takes a torch.nn.Module or a mapping name -> weight, not a "
            f"{type(source).__name__}. Pass model, or {{name: tensor}}."
        )
    for key, weight in seen.of_mapping(source, weights, removed).items():
        kind = "linear" if getattr(weight, "ndim", 0) == 2 else "conv"
        name = str(key).removesuffix(".weight") or str(key)
        yield name, str(key), kind, weight, None


def _is_lazy(weight: object) -> bool:
    return isinstance(weight, nn.parameter.UninitializedTensorMixin)


def _checked(name: str, weight: object) -> torch.Tensor:
    """The detached weight; raises for one that has no eigenvalues to measure."""

    def refuse(what: str, fix: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"layer {name!r}: {what}, so it has no spectrum. {fix}")

    if not isinstance(weight, torch.Tensor):
        if callable(weight):
            raise refuse(
                "its weight is a method, as that of quantised modules is",
                "Estimate alpha before quantising, or pass {name: module.weight().dequantize()}.",
            )
        raise refuse(
            f"its weight is a {type(weight).__name__}, not a tensor",
            "Pass a mapping of the tensors that are meant.",
        )
    if _is_lazy(weight):
        raise refuse("its weight is not initialised", "Run one forward pass through it first.")
    if weight.is_quantized:
        raise refuse(
            f"its weight is quantised ({weight.dtype})",
            "Estimate alpha before quantising, or pass {name: weight.dequantize()}.",
        )
    if weight.layout != torch.strided:
        raise refuse(f"its weight is sparse ({weight.layout})", "Pass {name: weight.to_dense()}.")
    if weight.device.type == "meta":
        raise refuse("its weight is on the meta device, without values", "Load the weights first.")
    if not weight.dtype.is_floating_point:
        raise refuse(
            f"its weight has dtype {weight.dtype}",
            "Pass a real floating-point weight, for instance weight.float().",
        )
    if weight.dim() < 2:
        raise refuse(
            f"its weight has shape {tuple(weight.shape)} and is no matrix",
            "Pass weights of at least two dimensions: {k: v for k, v in state.items() if "
            "v.dim() > 1}.",
        )
    if weight.numel() == 0:
        raise refuse(f"its weight of shape {tuple(weight.shape)} is empty", "Leave the layer out.")
    return weight.detach()


def _under(name: str, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.shape != weight.shape:
        raise MaskError(
            f"layer {name!r}: its mask has shape {tuple(mask.shape)}, its weight "
            f"{tuple(weight.shape)}. Pass masks of this network."
        )
    return weight.masked_fill(~mask.to(weight.device), 0)


def _parts(name: str, weight: torch.Tensor) -> list[tuple[str, str, torch.Tensor]]:
    """(suffix, part, view) of the one layer, or of the three of a fused attention projection."""
    rows, columns = weight.shape[:2]
    if weight.dim() == 2 and any(word in name for word in _ATTENTION):
        for axis, small, large in ((1, rows, columns), (0, columns, rows)):
            if small == large // 3:
                sizes = [small, small, large - 2 * small]
                cuts = weight.split(sizes, dim=axis)
                return [(f"_{p}", p, cut) for p, cut in zip("qkv", cuts, strict=True)]
    return [("", "", weight)]


def _nothing(source: object, match: str, skipped: Mapping[str, str]) -> str:
    if skipped:
        return (
            f"every layer was left out for its shape ({'; '.join(skipped.values())}), so there is "
            "nothing to measure. Pass linear_aspect=None to measure them."
        )
    if not isinstance(source, nn.Module):
        return "the mapping holds no weight, so there is nothing to measure. Pass {name: tensor}."
    other = MATCHES[match == MATCHES[0]]
    count = sum(_counts(module, other) for module in source.modules())
    fix = (
        f"match={other!r} would measure {count} of them."
        if count
        else "Pass a network with Conv2d, Conv1d or Linear modules, or a mapping of weights."
    )
    return (
        f"{type(source).__name__} has no module that counts as {', '.join(CLASS_NAMES)} "
        f"(match={match!r}), so there is nothing to measure. {fix}"
    )
