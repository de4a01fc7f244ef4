"""``plan_trunk``: measured choices for every layer of a trunk, kept on disk, and the program."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import PlanError
from ..plan.subject import PlanSubject
from .cache import TuneCache, cache_key
from .chains import Stem, chain_maker, choose_chains, links
from .clock import CudaTimer, Timer
from .kernels import Place, output_size
from .network import Layer, Network, describe_network
from .program import Program, block_sizes, build, pack_layer, sizes_of
from .tune import Choice, Tuner
from .warm import compile_all, jobs_of

__all__ = ["PlannedLayer", "TrunkPlan", "dense_program", "plan_trunk", "program_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the plan: widths, work, choice, and the milliseconds behind it.

    bytes: read and written once if everything around the convolution is fused into it.
    """

    name: str
    block: str
    variant: str
    shape: str
    out: str
    density: float
    macs: int
    bytes: int
    kernel: str
    ms: float
    dense: str
    dense_ms: float
    times: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrunkPlan:
    """What runs where, and why. ``print(plan)`` shows it.

    size: batch, height, width it was measured for; it serves any other.
    rows: layer by layer. variants: block -> width. chains: blocks whose tail runs as one kernel,
    with (milliseconds, milliseconds of what it replaces).
    dense_kernels: the best of PyTorch's own kernels per layer, for the full widths.
    cached: choices came from disk.
    """

    precision: str
    device: str
    size: tuple[int, int, int]
    rows: tuple[PlannedLayer, ...]
    variants: Mapping[str, str]
    chains: Mapping[str, tuple[str, float, float]]
    dense_kernels: Mapping[str, str]
    notes: tuple[str, ...] = ()
    cached: bool = False

    @property
    def kernels(self) -> dict[str, str]:
        return {row.name: row.kernel for row in self.rows}

    @property
    def short_of_memory(self) -> bool:
        """Whether a candidate was left out for lack of memory, and may fit another time."""
        reasons = [reason for row in self.rows for reason in row.rejected.values()]
        return any("out of memory" in reason for reason in (*reasons, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{**vars(r), "times": dict(r.times), "rejected": dict(r.rejected)}
                for r in self.rows]  # fmt: skip
        return {
            **vars(self),
            "size": list(self.size),
            "rows": rows,
            "variants": dict(self.variants),
            "chains": {name: list(value) for name, value in self.chains.items()},
            "dense_kernels": dict(self.dense_kernels),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], cached: bool = False) -> TrunkPlan:
        """Inverse of :meth:`to_dict`; KeyError or TypeError if ``record`` is something else."""
        return cls(
            precision=str(record["precision"]),
            device=str(record["device"]),
            size=tuple(record["size"]),  # type: ignore[arg-type]
            rows=tuple(PlannedLayer(**row) for row in record["rows"]),
            variants={str(k): str(v) for k, v in record["variants"].items()},
            chains={k: (str(v[0]), float(v[1]), float(v[2])) for k, v in record["chains"].items()},
            dense_kernels={str(k): str(v) for k, v in record["dense_kernels"].items()},
            notes=tuple(record["notes"]),
            cached=cached,
        )

    def __str__(self) -> str:
        n, h, w = self.size
        lines = [
            f"trunk plan for {self.device}, {self.precision}, {n} x {h}x{w}"
            + (" (choices from the cache)" if self.cached else ""),
        ]
        header = ("layer", "conv", "out", "density", "MMAC", "dense ms", "ms", "kernel")
        table = [header]
        for row in self.rows:
            table.append((
                row.name, row.shape, row.out, f"{row.density:.1%}", f"{row.macs / 1e6:.0f}",
                f"{row.dense_ms:.4f}", f"{row.ms:.4f}",
                row.kernel + (f" ({row.variant})" if row.variant == "compact" else ""),
            ))  # fmt: skip
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        for line in table:
            cells = [
                line[0].ljust(widths[0]),
                *(c.rjust(v) for c, v in zip(line[1:-1], widths[1:], strict=False)),
            ]
            lines.append("  ".join([*cells, line[-1]]))
        for name, (what, ms, instead) in self.chains.items():
            lines.append(f"{name}: {what} in one kernel, {ms:.4f} ms instead of {instead:.4f}")
        dense, ours = (sum(getattr(r, k) for r in self.rows) for k in ("dense_ms", "ms"))
        lines.append(
            f"sum over layers, each timed alone: {dense:.3f} ms dense, {ours:.3f} ms chosen"
        )
        left_out = sorted({f"{k}: {v}" for row in self.rows for k, v in row.rejected.items()})
        lines += [f"left out: {line}" for line in left_out[:12]]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan_trunk(
    subject: PlanSubject,
    place: Place,
    *,
    batch: int = 1,
    timer: Timer | None = None,
    cache: TuneCache | None = None,
    tuner: Tuner | None = None,
    network: Network | None = None,
) -> tuple[TrunkPlan, Network]:
    """Measure the candidates of every layer and choose; or take the choices from ``cache``.

    timer: None: CUDA graphs on the device. tuner: one that has measured layers of this place
    already, for plans of several networks. Raises UnsupportedModelError (no whole trunk),
    KernelUnavailable (nothing runs, or strict mode), PlanError (no timer off CUDA).
    """
    size = (batch, *subject.input_size)
    network = network or describe_network(subject)
    cache = cache or TuneCache(None)
    key = cache_key(subject, place, size)
    record = cache.load(key)
    if record is not None:
        try:
            plan = TrunkPlan.from_dict(record, cached=True)
            program_of(plan, network, place)
            return plan, network
        except (AttributeError, LookupError, TypeError, ValueError, PlanError) as error:
            _log.warning("tuning again: the cached plan cannot be used (%s)", error)
    if timer is None and tuner is None:
        if place.device.type != "cuda":
            raise PlanError(
                f"plan_trunk: no timer for {place.device.type}. Pass timer=..., or plan for cuda."
            )
        timer = CudaTimer(place.device)
    with torch.no_grad(), place.precision.applied():
        plan = _measured(network, place, size, tuner or Tuner(place, timer))
    if plan.short_of_memory:
        _log.warning("the plan is not kept: some candidates ran out of memory while it was made")
    else:
        cache.store(key, plan.to_dict())
    return plan, network


def _measured(
    network: Network, place: Place, size: tuple[int, int, int], tuner: Tuner
) -> TrunkPlan:
    if place.device.type == "cuda":
        compile_all(jobs_of(network, place, size))
    rows: list[PlannedLayer] = []
    variants: dict[str, str] = {}
    dense_kernels: dict[str, str] = {}
    at = size
    for layer in network.stem:
        choice = tuner.layer(layer, at)
        dense_kernels[layer.name] = choice.dense
        rows.append(_row(layer, "stem", "full", at, choice, choice, place))
        at = output_size(layer, at)
    where = block_sizes(network, size)
    for block in network.blocks:
        found: dict[str, list[Choice]] = {}
        for name, layers in block.variants.items():
            sizes = sizes_of(layers, where[block.name])
            found[name] = [tuner.layer(i, s) for i, s in zip(layers, sizes, strict=False)]
        best = min(found, key=lambda name: sum(c.ms for c in found[name]))
        variants[block.name] = best
        layers = block.variants[best]
        sizes = sizes_of(layers, where[block.name])
        for layer, at, choice, dense in zip(
            layers, sizes, found[best], found["full"], strict=False
        ):
            dense_kernels[layer.name] = dense.dense
            rows.append(_row(layer, block.name, best, at, choice, dense, place))
    by_name = {
        layer.name: (layer, at)
        for layer, at in zip(network.stem, sizes_of(network.stem, size), strict=False)
    } | {
        layer.name: (layer, at)
        for block in network.blocks
        for layer, at in zip(
            block.variants[variants[block.name]],
            sizes_of(block.variants[variants[block.name]], where[block.name]),
            strict=False,
        )
    }
    separate = {
        row.name: (
            row.ms,
            pack_layer(by_name[row.name][0], row.kernel, place, by_name[row.name][1]),
        )
        for row in rows
        if row.name in by_name
    }
    chains, unchained = choose_chains(network, variants, size, tuner, separate)
    stem = Stem(network.stem, size)
    fused = stem.choose(tuner, [separate[layer.name] for layer in network.stem])
    if isinstance(fused, str):
        unchained["stem"] = fused
    else:
        chains["stem"] = fused
    return TrunkPlan(
        precision=place.precision.name,
        device=str(place.device),
        size=size,
        rows=tuple(rows),
        variants=variants,
        chains=chains,
        dense_kernels=dense_kernels,
        notes=(*network.notes, *_unchained(unchained)),
    )


def _row(
    layer: Layer, block: str, variant: str, size: tuple[int, int, int], choice: Choice,
    dense: Choice, place: Place,
) -> PlannedLayer:  # fmt: skip
    out = output_size(layer, size)
    cout, cin = layer.weight.shape[:2]
    shape = f"{cin}>{cout} k{layer.kernel}" + (f" s{layer.stride}" if layer.stride > 1 else "")
    if layer.second is not None:
        shape += f" + {layer.second.weight.shape[1]}"
    pixels = out[0] * out[1] * out[2] * layer.pool**2
    itemsize = place.precision.dtype.itemsize
    return PlannedLayer(
        layer.name, block, variant, shape, f"{out[1]}x{out[2]}", layer.density,
        layer.work(pixels), layer.traffic(size, out, itemsize), choice.kernel, choice.ms,
        dense.dense, dense.dense_ms, choice.times, choice.rejected,
    )  # fmt: skip


def _unchained(reasons: Mapping[str, str]) -> list[str]:
    """One line per reason, with the blocks it holds for."""
    blocks: dict[str, list[str]] = {}
    for block, reason in reasons.items():
        blocks.setdefault(reason, []).append(block)
    return [f"not chained: {', '.join(names)}: {reason}" for reason, names in blocks.items()]


def program_of(plan: TrunkPlan, network: Network, place: Place) -> Program:
    """The planned program, packed on the device."""
    fused: dict[str, Any] = {
        link.block: chain_maker(link, place, plan.chains[link.block][0])
        for link in links(network, plan.variants, plan.size)
        if link.block in plan.chains
    }
    if "stem" in plan.chains:
        sizes = sizes_of(network.stem, plan.size)
        rest = [
            pack_layer(layer, plan.kernels[layer.name], place, at)
            for layer, at in zip(network.stem[2:], sizes[2:], strict=False)
        ]
        fused["stem"] = Stem(network.stem, plan.size).maker(place, plan.chains["stem"][0], rest)
    return build(network, place, plan.size, plan.kernels, plan.variants, fused)


def dense_program(plan: TrunkPlan, network: Network, place: Place) -> Program:
    """The same network at full width on the best of PyTorch's own kernels per layer."""
    full = {block.name: "full" for block in network.blocks}
    return build(network, place, plan.size, plan.dense_kernels, full)
