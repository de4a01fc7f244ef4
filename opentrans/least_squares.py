"""Give a pruned network the dense network's answers back without training it.

Layer by layer, in the order in which they run, the weights that a mask keeps are set to the least
squares solution: what the pruned network feeds the layer is the input, what the dense network's
layer gives on the same images is the target. No label and no gradient is needed: one forward of
either network and one solution per layer, a minute or three in all. Errors of earlier layers are
seen by later ones, which correct what they can.

Asked to ``select``, it also chooses anew, inside every layer, which weights to keep
(:mod:`opentrans.support`).

Least squares with a fixed support is old (Hassibi and Stork, 1992; layer by layer for convolutional
networks: Dong et al., arXiv 1705.07565; He et al., arXiv 1707.06168).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentrans_kernels.errors import MaskError, OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet, Provenance

from .support import best_support, largest

__all__ = ["LayerFit", "Reconstruction", "reconstruct"]


@dataclass(frozen=True)
class LayerFit:
    """One layer. before, after: squared error of its output on the images, relative to the variance
    of the dense layer's output; the input is the pruned network's both times. moved: share of the
    kept weights that were not kept before. shifted: where the constant part went ("bias", name of a
    batch norm, or "" for none). why: not changed, and why.
    """

    name: str
    density: float
    before: float = float("nan")
    after: float = float("nan")
    seconds: float = 0.0
    moved: float = 0.0
    shifted: str = ""
    why: str = ""


@dataclass
class Reconstruction:
    """What :func:`reconstruct` did, layer by layer in the order of the forward.

    masks: of the network as it is now; those that were given, unless weights were selected.
    """

    masks: MaskSet
    layers: list[LayerFit] = field(default_factory=list)

    @property
    def skipped(self) -> list[LayerFit]:
        return [row for row in self.layers if row.why]

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.layers], default=5)
        lines = [f"{'layer':<{width}}  density  error before  after  seconds"]
        for row in self.layers:
            numbers = (
                f"as it was: {row.why}"
                if row.why
                else f"{row.before:12.4f}  {row.after:5.4f}  {row.seconds:7.2f}"
            )
            lines.append(f"{row.name:<{width}}  {row.density:7.3f}  {numbers}")
        return "\n".join(lines)


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    masks: MaskSet,
    inputs: Tensor,
    *,
    positions: int = 8192,
    ridge: float = 1e-3,
    select: int = 0,
    seed: int = 0,
    forward: Callable[[nn.Module, Tensor], object] | None = None,
) -> Reconstruction:
    """Refit the kept weights of every masked layer of ``model`` to the outputs of ``dense``.

    In place. Masked weights stay zero. A layer's constant part goes into its bias, or into the
    running mean of the batch norm that reads its output (found by running ``dense``); with neither
    the fit goes through the origin.

    Args:
        model: the pruned network in eval mode, float32 or float64; its masked weights are zero
            afterwards.
        dense: the network it came from, or any other with layers of the same names and shapes.
        masks: of ``nn.Conv2d`` and ``nn.Linear`` layers of ``model``.
        inputs: images or tokens as one batch, the first argument of ``forward``; both networks run
            it once, so it decides the memory.
        positions: rows of the least squares problem, drawn from all output positions of the batch.
        ridge: how hard weights are held at their old values, relative to the mean square of the
            layer's inputs.
        select: turns of choosing anew, inside every layer, which weights to keep: as many as the
            mask keeps, starting from the dense network's. 30 is enough; 0: those of the mask.
            Patterns such as 2:4 are not kept.
        seed: of the draw.
        forward: ``forward(model, inputs)``; by default the model is called.

    Time: about nnz**3 / 3 multiply-adds per output channel with nnz weights left, once for
    channels that share their support. On one core a ResNet-50 of half the width takes 46 seconds
    at a tenth of its weights; above a third of a wide layer it is minutes for each. Selecting
    takes another ``select`` products of C x C by C x K for C inputs and K outputs.

    Raises:
        MaskError: masks do not fit the model.
        PlanError: no layer can be fitted, settings that make no sense, a network in training mode.
        OpenTransError: values that are not finite.
    """
    if select < 0:
        raise PlanError(f"select is {select}: the turns of choosing must be 0 (none) or more.")
    if positions < 2 or not ridge > 0:
        raise PlanError(
            f"positions is {positions} and ridge {ridge}: at least 2 rows and a ridge above 0 are "
            "needed for a least squares problem with one solution."
        )
    for which, network in (("pruned", model), ("dense", dense)):
        if training := [n or "itself" for n, m in network.named_modules() if m.training]:
            raise PlanError(
                f"the {which} network is in training mode ({training[0]}), in which a forward "
                "changes it. Call eval() first."
            )
    chosen = dict(masks.match(model, strict=True).masks)
    masks.apply_(model)
    run = forward or (lambda network, x: network(x))
    layers = {name: module for name, module in model.named_modules() if name in chosen}
    targets = _Targets(dense, layers, positions, seed)
    found = Reconstruction(MaskSet(dict(chosen), masks.source))
    handles = []
    with torch.no_grad():
        targets.run(run, inputs)
        for name, layer in layers.items():
            density = float(chosen[name].float().mean())
            if why := targets.unusable(name):
                found.layers.append(LayerFit(name, density, why=why))
                continue
            norm = targets.norms.get(name, "")
            hook = _Fit(name, chosen, targets, norm, model, ridge, select, density, found)
            handles.append(layer.register_forward_pre_hook(hook))
        if not handles:
            raise PlanError(
                "no masked layer can be refitted: "
                + "; ".join(f"{row.name}: {row.why}" for row in found.layers[:4])
            )
        try:
            run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    if select:
        notes = {**masks.source.notes, "selected": f"least squares, {select} turns"}
        kind, synthetic = masks.source.kind, masks.source.synthetic
        found.masks = MaskSet(chosen, Provenance(kind, notes=notes, synthetic=synthetic))
    return found


class _Targets:
    """Outputs of the dense layers at drawn positions, and which batch norm reads each."""

    def __init__(
        self, dense: nn.Module, layers: dict[str, nn.Module], positions: int, seed: int
    ) -> None:
        self.dense, self.positions = dense, positions
        self.generator = torch.Generator().manual_seed(seed)
        self.calls = dict.fromkeys(layers, 0)
        self.rows: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.norms: dict[str, str] = {}
        self.why: dict[str, str] = {}
        named = dict(dense.named_modules())
        for name, layer in layers.items():
            other = named.get(name)
            weight = getattr(other, "weight", None)
            if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
                shape = tuple(layer.weight.shape)
                raise MaskError(
                    f"the dense network has no layer {name} with a weight {shape} to refit by. "
                    "Give the network that was pruned."
                )
            if why := _unsupported(layer):
                self.why[name] = why

    def run(self, run: Callable[[nn.Module, Tensor], object], inputs: Tensor) -> None:
        latest: list[tuple[str, Tensor]] = []

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, out: Tensor) -> None:
                self.calls[name] += 1
                flat = _flat(out, isinstance(named[name], nn.Conv2d))
                order = torch.randperm(len(flat), generator=self.generator)
                self.rows[name] = order[: self.positions].sort().values.to(flat.device)
                self.outputs[name] = flat[self.rows[name]]
                latest[:] = [(name, out)]

            return hook

        def read(norm: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if latest and args and args[0] is latest[0][1]:
                    self.norms[latest[0][0]] = norm

            return hook

        named = dict(self.dense.named_modules())
        handles = [named[name].register_forward_hook(note(name)) for name in self.calls]
        handles += [
            module.register_forward_pre_hook(read(name))
            for name, module in named.items()
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.track_running_stats
        ]
        try:
            run(self.dense, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def weight(self, name: str) -> Tensor:
        """Of the dense layer, ``[K, C]``."""
        return self.dense.get_submodule(name).weight.detach().flatten(1)

    def unusable(self, name: str) -> str:
        """Why a layer cannot be fitted, or nothing."""
        if name in self.why:
            return self.why[name]
        if self.calls[name] != 1:
            return f"it runs {self.calls[name]} times in a forward"
        if not len(self.rows[name]):
            return "its output is empty"
        if not torch.isfinite(self.outputs[name]).all():
            raise OpenTransError(
                f"the dense network's layer {name} gives values that are not finite on these "
                "inputs. Give images as the network expects them."
            )
        return ""


def _unsupported(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"a {type(layer).__name__} is no convolution or linear layer"
    if layer.weight.dtype not in (torch.float32, torch.float64):
        return f"its weights are {layer.weight.dtype}"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode!r}"
    return ""


class _Fit:
    """Solves one layer when its input arrives, so that it already runs refitted."""

    def __init__(
        self, name: str, masks: dict[str, Tensor], targets: _Targets, norm: str,
        model: nn.Module, ridge: float, select: int, density: float, found: Reconstruction,
    ) -> None:  # fmt: skip
        self.name, self.targets, self.ridge, self.select = name, targets, ridge, select
        self.masks = masks  # of all layers, where the one of this is put if it changes
        self.norm_name, self.density, self.found = norm, density, found
        self.norm = model.get_submodule(norm) if norm else None

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.name not in self.targets.outputs:
            raise PlanError(
                f"layer {self.name} runs once in the dense network and more often in the pruned "
                "one. Leave its mask out."
            )
        began = time.perf_counter()
        y = self.targets.outputs.pop(self.name).double()
        x = _patches(layer, args[0], self.targets.rows.pop(self.name))
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.detach().flatten(1).double()
        shifts = layer.bias is not None or self.norm is not None
        errors = [0.0, 0.0]
        constant = torch.zeros_like(weight[:, 0])
        given = self.masks[self.name].flatten(1).to(weight.device)
        mask = given.clone()
        per = len(weight) // groups
        for group in range(groups):
            rows = slice(group * per, (group + 1) * per)
            own, wanted = x[group], y[:, rows]
            mean_x = own.mean(0) if shifts else torch.zeros_like(own[0])
            mean_y = wanted.mean(0) if shifts else torch.zeros_like(wanted[0])
            own, wanted = own - mean_x, wanted - mean_y.to(wanted)
            left = wanted - (own @ weight[rows].to(own).t()).double()
            errors[0] += float(left.square().sum())
            product = own.t() @ own  # of which both make a Gram matrix
            if self.select:
                first = self.targets.weight(self.name)[rows].to(own)
                mask[rows] = self._chosen(product, own, wanted, first, int(mask[rows].sum()))
                weight[rows] = (first * mask[rows]).double()
                left = wanted - (own @ weight[rows].to(own).t()).double()
            weight[rows] += _solve(product, own, left, mask[rows], self.ridge, self.name)
            left = wanted - (own @ weight[rows].to(own).t()).double()
            errors[1] += float(left.square().sum())
            constant[rows] = mean_y.double() - weight[rows] @ mean_x.double()
        layer.weight.copy_(weight.view_as(layer.weight))
        self._shift(layer, constant)
        if self.select:
            self.masks[self.name] = mask.view_as(layer.weight).to(self.masks[self.name].device)
        spread = float((y - y.mean(0)).square().sum()) or 1.0
        self.found.layers.append(
            LayerFit(
                self.name, self.density, errors[0] / spread, errors[1] / spread,
                time.perf_counter() - began, float((mask & ~given).sum() / max(1, int(mask.sum()))),
                "bias" if layer.bias is not None else self.norm_name,
            )
        )  # fmt: skip

    def _chosen(self, product: Tensor, x: Tensor, y: Tensor, first: Tensor, count: int) -> Tensor:
        """Which weights [K, C] to keep for inputs [R, C], outputs [R, K]; ``first``: guessed."""
        gram, right = product / len(x), (x.t() @ y.to(x)) / len(x)
        held = self.ridge * float(gram.diagonal().mean())
        start = first.t().contiguous()
        if not held > 0 or not math.isfinite(held):  # constant inputs; the solution tells of others
            return (largest(start, count) != 0).t()
        gram.diagonal().add_(held)
        return best_support(gram, right + held * start, start, count, self.select).t()

    def _shift(self, layer: nn.Module, constant: Tensor) -> None:
        if layer.bias is not None:
            layer.bias.copy_(constant)
        elif self.norm is not None:
            self.norm.running_mean.sub_(constant.to(self.norm.running_mean))


def _solve(
    product: Tensor, x: Tensor, left: Tensor, mask: Tensor, ridge: float, name: str
) -> Tensor:
    """Change of the weights [K, C] float64, zero outside ``mask``, for inputs [R, C], their product
    [C, C] and what is left of the outputs [R, K]: the least squares solution with a ridge towards
    no change."""
    gram = product.double() / len(x)
    right = (x.double().t() @ left) / len(x)
    held = ridge * float(gram.diagonal().mean())
    change = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    if not math.isfinite(held):
        raise OpenTransError(
            f"the pruned network feeds layer {name} values that are not finite. Give images as the "
            "network expects them."
        )
    if not held > 0:  # all inputs are constant: the constant part has it all
        return change
    supports, which = mask.unique(dim=0, return_inverse=True)
    for number, support in enumerate(supports):
        kept = support.nonzero().squeeze(1)
        if not len(kept):
            continue
        rows = (which == number).nonzero().squeeze(1)
        part = gram[kept][:, kept]
        part.diagonal().add_(held)
        factor, failed = torch.linalg.cholesky_ex(part)
        if int(failed):
            raise PlanError(
                f"the least squares problem of layer {name} has no unique solution to rounding "
                f"with a ridge of {ridge}. Use a larger one; the default is 0.001."
            )
        solution = torch.cholesky_solve(right[kept][:, rows], factor)
        change[rows.unsqueeze(1), kept] = solution.t()
    return change


def _flat(out: Tensor, planes: bool) -> Tensor:
    """[rows, channels] of an output [N, K, H, W] or [..., K]."""
    return (out.movedim(1, -1) if planes else out).reshape(-1, out.shape[1 if planes else -1])


def _patches(layer: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """What output positions ``rows`` see: [groups, rows, C / groups * kh * kw], in weight order."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[rows].unsqueeze(0)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    x = F.pad(x, layer._reversed_padding_repeated_twice)
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    image, place = rows // (height * width), rows % (height * width)
    top, left = place // width * sh, place % width * sw
    taps = [x[image, :, top + i * dh, left + j * dw] for i in range(kh) for j in range(kw)]
    seen = torch.stack(taps, 2)  # [rows, C, kh * kw]
    return seen.view(len(rows), layer.groups, -1).transpose(0, 1)
