"""One estimate shared out over the ranks of ``torch.distributed``.

Every rank solves some layers, and all ranks receive the values of all: nothing is computed twice,
so tables, and the freeze plans made from them, are the same bits everywhere, even if machines
differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import OpenTransError
from .estimate import versions
from .layers import LINEAR_ASPECT, LayerSlices, select
from .options import FitOptions
from .parts import Progress, solving_cost, spectra_of, weight_digest
from .rows import rows_of
from .rules import keep
from .seen import masked_note
from .table import AlphaTable

__all__ = ["check_same", "estimate_alpha_distributed", "shares"]


def estimate_alpha_distributed(
    source: nn.Module | Mapping[str, torch.Tensor],
    fit: str = "xmin_peak",
    *,
    weights: str = "dense",
    xmin_pos: float = 2.0,
    bins: int = 100,
    evals_threshold: float = 1e-5,
    conv_norm: float = 0.5,
    match: str = "class_name",
    linear_aspect: float | None = LINEAR_ASPECT,
    threads: int | None = None,
    keep_spectra: bool = False,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> AlphaTable:
    """:func:`estimate_alpha` with the layers shared out over the ranks of ``group``.

    Every rank of the group must call it with the same network and arguments, whole weights in hand
    (as under DistributedDataParallel). One collective, of a few kilobytes, or of all eigenvalues
    with ``keep_spectra``. Without a process group it runs alone. Other arguments: as there.

    Raises:
        OpenTransError: on *every* rank, if any rank failed, or if the ranks were given different
            layers, weights or arguments. The rank and its reason are named.
    """
    rank, world = _place(group)
    mine: dict[str, Any] = {"error": None, "request": "", "rows": {}, "spectra": {}}
    names: list[str] = []
    skipped: dict[str, str] = {}
    notes: list[str] = []
    arguments = {
        "weights": weights,
        "xmin_pos": xmin_pos,
        "bins": bins,
        "evals_threshold": evals_threshold,
        "conv_norm": conv_norm,
        "match": match,
        "linear_aspect": linear_aspect,
    }
    try:
        options = FitOptions(fit, xmin_pos, bins, evals_threshold)
        layers = select(
            source, match=match, conv_norm=conv_norm, linear_aspect=linear_aspect, skipped=skipped,
            weights=weights, notes=notes,
        )  # fmt: skip
        names = [layer.name for layer in layers]
        digests = [weight_digest(layer.weight) for layer in layers] if world > 1 else []
        request = [fit, arguments, keep_spectra, names, [layer.shape for layer in layers], digests]
        mine["request"] = hashlib.sha256(json.dumps(request).encode()).hexdigest()
        part = [layers[index] for index in shares(layers, world)[rank]]
        spectra = spectra_of(part, threshold=evals_threshold, threads=threads, progress=progress)
        rows = rows_of(part, spectra, options)
        mine["rows"] = {row.name: row for row in rows}
        if keep_spectra:
            mine["spectra"] = {
                layer.name: keep(spectrum.values, evals_threshold, fit).values.cpu()
                for layer, spectrum in zip(part, spectra, strict=True)
            }
    except Exception as error:  # reported to all ranks below; raising here would hang the others
        mine["error"] = f"{type(error).__name__}: {error}"
        failure = error
    found = _gather(mine, world, group)
    failed = {index: one["error"] for index, one in enumerate(found) if one["error"]}
    if failed:
        if rank in failed and isinstance(failure, OpenTransError):
            raise failure
        told = "; ".join(f"rank {index}: {reason}" for index, reason in failed.items())
        raise OpenTransError(
            f"alpha could not be estimated on {len(failed)} of {world} ranks, so no rank has a "
            f"table. {told}"
        )
    _check_equal([one["request"] for one in found], "layers, weights or arguments of the estimate")
    merged = {name: row for one in found for name, row in one["rows"].items()}
    kept = {name: values for one in found for name, values in one["spectra"].items()}
    parameters = {**arguments, "precision": "float64", "ranks": world}
    rows = tuple(merged[name] for name in names)
    return AlphaTable(
        rows,
        fit,
        parameters,
        versions(),
        skipped,
        {name: kept[name] for name in names} if keep_spectra else {},
        tuple(filter(None, (*notes, masked_note(rows)))),
    )


def shares(layers: Sequence[LayerSlices], world: int) -> list[list[int]]:
    """Indices of the layers of each rank: the costliest first, each to the least loaded rank.

    The same on every rank. The largest share is at most 4/3 of the best possible one (Graham).
    """
    order = sorted(range(len(layers)), key=lambda index: (-solving_cost(layers[index]), index))
    loads, found = [0.0] * world, [[] for _ in range(world)]
    for index in order:
        rank = loads.index(min(loads))
        found[rank].append(index)
        loads[rank] += solving_cost(layers[index])
    return [sorted(part) for part in found]


def check_same(what: str, digest: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank unless ``digest`` is equal on all of them.

    For instance ``check_same("freeze plan", plan.digest())`` before training starts.

    Raises:
        OpenTransError: the ranks differ; it says which.
    """
    _, world = _place(group)
    _check_equal(_gather(digest, world, group), what)


def _check_equal(digests: Sequence[str], what: str) -> None:
    different = [rank for rank, one in enumerate(digests) if one != digests[0]]
    if different:
        raise OpenTransError(
            f"{what}: ranks {', '.join(map(str, different))} differ from rank 0. All ranks must "
            "start from the same model, masks and settings: broadcast the weights from rank 0, as "
            "DistributedDataParallel does when it is built, and read the same files."
        )


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, number of ranks) of this process in the group; (0, 1) without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise OpenTransError(
            "this process is not in the group it passed. Call it on the ranks of the group only."
        )
    return rank, dist.get_world_size(group)


def _gather(value: Any, world: int, group: dist.ProcessGroup | None) -> list[Any]:
    """``value`` of every rank, in rank order."""
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value, group=group)
    return found
