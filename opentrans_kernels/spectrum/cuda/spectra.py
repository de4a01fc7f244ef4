"""All eigenvalues of all layers, on the device: the GPU counterpart of ``spectrum.solvers``.

Layers are grouped by the order n of their Gram matrices: one batch per order, whatever the larger
side. Nothing is copied to the host; doubts (NaN, no convergence, lost digits) are flags that the
caller reads together with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...errors import UnsupportedModelError
from ...ops.gram_eigenvalues.reference import NOISE
from ..layers import LayerSlices
from ..solvers import RELATIVE
from .gram import gram_into
from .solve import Solved, method, solve

__all__ = ["DEVICE_SHARE", "DeviceSpectra", "singular", "spectra"]

#: Share of the free device memory that the Gram matrices of one wave may take.
DEVICE_SHARE = 0.2
_WORKSPACES = 2.5  # a solver may need this many times the matrices on top of them

Progress = Callable[[int, int, str], None]


@dataclass
class DeviceSpectra:
    """Eigenvalues of L layers and what is doubtful about them.

    Attributes:
        values: float64 [L, M], ascending, scaled, zeros in front of shorter spectra.
        sizes: eigenvalues of each layer, without that padding.
        not_finite, unconverged, lossy: int64 [L], the matrices of each layer whose Gram holds NaN
            or infinity, whose solver gave up, whose small eigenvalues lost digits.
        methods: the routine of each layer.
        keep: what must live until the device has finished.
    """

    values: torch.Tensor
    sizes: list[int]
    not_finite: torch.Tensor
    unconverged: torch.Tensor
    lossy: torch.Tensor
    methods: list[str]
    keep: list[Solved]


def spectra(
    layers: Sequence[LayerSlices],
    device: torch.device,
    *,
    solver: str = "cusolver",
    threshold: float = 1e-5,
    budget: int | None = None,
    progress: Progress | None = None,
) -> DeviceSpectra:
    """Launch everything; the host waits only if the Gram matrices need several waves.

    Args:
        solver: a key of :data:`~.solve.SOLVERS`.
        threshold: eigenvalues below it need not be accurate to all digits.
        budget: bytes of Gram matrices at a time; None: :data:`DEVICE_SHARE` of the free memory.
        progress: called with (layers launched, layers, name of one).
    """
    sizes = [layer.num_eigenvalues for layer in layers]
    width = max(sizes)
    values = torch.zeros(len(layers), width, dtype=torch.float64, device=device)
    flags = torch.zeros(3, len(layers), dtype=torch.int64, device=device)
    waves = _waves(layers, _budget(device) if budget is None else budget)
    keep, launched = [], 0
    for number, wave in enumerate(waves):
        if number and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
            keep.clear()
        solved = _wave([layers[i] for i in wave], wave, solver, threshold, values, flags, device)
        keep.append(solved)
        for i in wave:
            launched += 1
            if progress is not None:
                progress(launched, len(layers), layers[i].name)
    values = values.sort(dim=1).values
    methods = [method(layer.small, solver) for layer in layers]
    return DeviceSpectra(values, sizes, flags[0], flags[1], flags[2], methods, keep)


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE)


def _waves(layers: Sequence[LayerSlices], budget: int) -> list[list[int]]:
    """Layer numbers, largest order first, cut where their Gram matrices exceed the budget."""
    order = sorted(range(len(layers)), key=lambda i: -layers[i].small)
    waves: list[list[int]] = []
    room = -1
    for i in order:
        need = int(8 * layers[i].num_eigenvalues * layers[i].small * (1 + _WORKSPACES))
        if need > room:
            waves.append([])
            room = budget
        waves[-1].append(i)
        room -= need
    return waves


def _wave(
    layers: Sequence[LayerSlices],
    numbers: Sequence[int],
    solver: str,
    threshold: float,
    values: torch.Tensor,
    flags: torch.Tensor,
    device: torch.device,
) -> Solved:
    """Gram matrices and eigenvalues of some layers, written to their rows of ``values``."""
    by_order: dict[int, list[tuple[int, LayerSlices]]] = {}
    for i, layer in zip(numbers, layers, strict=True):
        by_order.setdefault(layer.small, []).append((i, layer))
    matrices, owners, bad = {}, {}, {}
    for n, members in by_order.items():
        # Neighbours of one shape and scale share a GEMM.
        members.sort(key=lambda member: _key(member[1]))
        matrices[n] = _grams(members, n, device)
        owner = [i for i, layer in members for _ in range(layer.positions)]
        owners[n] = torch.tensor(owner).to(device, non_blocking=True)
        bad[n] = ~matrices[n].diagonal(dim1=1, dim2=2).sum(1).isfinite()
        # A solver may not end on NaN; such layers are refused once the flags are read.
        matrices[n].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    solved = solve(matrices, solver)
    for n, members in by_order.items():
        found = solved.values[n].clamp_min(0.0)  # below zero is rounding
        marks = torch.stack([bad[n], solved.info[n] != 0, _lossy(found, threshold)])
        flags.index_add_(1, owners[n], marks.long())
        at = 0
        for i, layer in members:
            row = found[at : at + layer.positions].flatten()
            values[i, values.shape[1] - len(row) :] = row
            at += layer.positions
    return solved


def _key(layer: LayerSlices) -> tuple[int, int, int, float]:
    """Layers of equal keys share a GEMM."""
    rows, columns = layer.weight.shape[:2]
    return rows, columns, layer.positions, layer.scale


def _grams(
    members: Sequence[tuple[int, LayerSlices]], n: int, device: torch.device
) -> torch.Tensor:
    total = sum(layer.positions for _, layer in members)
    out = torch.empty(total, n, n, dtype=torch.float64, device=device)
    at = begin = 0
    while begin < len(members):
        first = members[begin][1]
        end = begin
        while end < len(members) and _key(members[end][1]) == _key(first):
            end += 1
        size = (end - begin) * first.positions
        weights = [layer.weight.to(device, non_blocking=True) for _, layer in members[begin:end]]
        weights = [w.flatten(2) if w.dim() > 2 else w.unsqueeze(2) for w in weights]
        gram_into(out[at : at + size], weights, first.scale)
        at, begin = at + size, end
    return out


def _lossy(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """Whether squaring cost digits of an eigenvalue that will be kept, per row of [B, n]."""
    largest = values[:, -1]
    noise = NOISE * torch.finfo(torch.float64).eps * largest
    above = torch.where(values > (threshold - noise)[:, None], values, torch.inf).amin(1)
    return (largest > 0) & (noise > RELATIVE * above)


def singular(layer: LayerSlices, device: torch.device) -> torch.Tensor:
    """Eigenvalues [num_eigenvalues], ascending, from singular values of the weight itself.

    float64 on ``device``, one matrix at a time: ``torch.linalg`` would loop over the batch anyway.
    Values that float64 cannot tell from zero become exactly 0, as on the CPU.
    """
    rows = []
    for matrix in layer.matrices():
        try:
            found = torch.linalg.svdvals(matrix.to(device=device, dtype=torch.float64))
        except torch.linalg.LinAlgError as error:
            raise UnsupportedModelError(
                f"layer {layer.name!r}: its singular values did not converge on {device} "
                f"({str(error).splitlines()[0]}). Leave the layer out, or use device='cpu'."
            ) from error
        limit = layer.large * torch.finfo(torch.float64).eps * found[0]
        rows.append(torch.where(found > limit, found, 0.0))
    values = torch.cat(rows).square() * layer.scale
    return values.sort().values
