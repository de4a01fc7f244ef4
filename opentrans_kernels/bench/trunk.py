"""``opentrans bench trunk``: the masked trunk, dense in every way and accelerated, interleaved.

Of a network without a ResNet trunk :mod:`.part` says what is measured.

Everything runs in one process on pinned CPUs. The caller has already limited the instruction set
(see :mod:`.environment`); this module checks that the limit holds and records it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..accelerate import accelerate
from ..errors import OpenTransError
from . import canary
from .cores import CoreCheck, physical_core_check
from .environment import SIMD_BITS, environment_block, missing_limits, onednn_isa
from .layers import LayerRow, left_out, measure_layers
from .part import TrunkModule
from .rows import matched
from .schema import envelope
from .stages import stage_scaling
from .subject import Subject
from .timing import TimingTable, available_cpus, interleave
from .variants import BASELINE, NAMES, Variant, build_variants, relative_error

OURS = "accelerated"
ONE_THREAD = "accelerated_one_thread"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrunkOptions:
    """What to measure. Sizes in pixels; ``cpus`` are the pinned CPUs or None if not pinned."""

    height: int = 224
    width: int = 224
    batch: int = 1
    threads: int = 1
    isa: str = "native"
    rounds: int = 15
    warmup_s: float = 0.5
    variants: tuple[str, ...] = BASELINE
    seed: int = 0
    layers: bool = True
    core_attempts: int = 3
    cpus: tuple[int, ...] | None = None
    peers: tuple[str, ...] = ()
    peer_home: Path | None = None

    def check(self) -> None:
        """Raise OpenTransError for numbers that make no sense, before anything is built."""
        for name in ("height", "width", "batch", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise OpenTransError(
                    f"{name} is {getattr(self, name)}; it must be at least 1. Correct the option."
                )
        missing = missing_limits(self.isa, self.threads)
        if missing:
            raise OpenTransError(
                f"this process was not started for isa={self.isa} and threads={self.threads}: "
                f"{', '.join(missing)} are not set accordingly, so the two sides could run on "
                "different instruction sets. Start it with 'opentrans bench trunk', which sets "
                "them."
            )


def run(
    subject: Subject, options: TrunkOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure and return the whole result as plain values; see ``benchmarks/README.md``.

    Raises:
        OpenTransError: bad options, a model that cannot be accelerated, or no dense variant that
            runs.
    """
    tell = progress or (lambda _: None)
    options.check()
    part = TrunkModule(subject.model).part
    torch.set_num_threads(options.threads)
    cores_before = _core_checks(options, tell)
    tell("fixed dense kernel, before")
    before_run = canary.look(threads=options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(options.batch, 3, options.height, options.width, generator=generator)
    masked = subject.masked_copy()

    tell("float64 reference")
    with torch.no_grad():
        reference = TrunkModule(copy.deepcopy(masked).double())(x.double())
        eager = TrunkModule(masked)(x)
    own_error = relative_error(eager, reference)

    trunks, calls, before, report = _accelerated(subject, x, options, tell)
    ours = trunks[OURS]
    with torch.no_grad():
        error = relative_error(ours(x), reference)
    variants = build_variants(
        masked,
        x,
        options.variants,
        simd_bits=SIMD_BITS[options.isa],
        on_build=lambda name: tell(f"building {name}"),
    )
    running = [variant for variant in variants if variant.run is not None]
    if not running:
        reasons = "; ".join(f"{variant.name}: {variant.error}" for variant in variants)
        raise OpenTransError(
            f"no dense variant runs here, so there is no baseline ({reasons}). Choose others "
            f"with --variants; known: {', '.join(NAMES)}."
        )
    errors = {variant.name: relative_error(variant.run(), reference) for variant in running}
    calls.update({variant.name: variant.run for variant in running})
    started = time.time()
    table = interleave(
        calls,
        rounds=options.rounds,
        warmup_s=options.warmup_s,
        before=before,
        on_round=lambda done, total: tell(f"round {done} of {total}"),
        keep_finished=True,
    )
    seconds = time.time() - started
    cores_after = _core_checks(options, tell, attempts=1)
    tell("fixed dense kernel, after")
    after_run = canary.look(threads=options.threads)
    size = options.height, options.width
    rows: list[LayerRow] = []
    if options.layers and not table.interrupted:
        rows = measure_layers(
            subject,
            size,
            batch=options.batch,
            on_layer=lambda done, total, name: tell(f"layer {done + 1} of {total}: {name}"),
        )
    result = envelope("trunk", complete=not table.interrupted)
    result.update(summarise(table, variants, errors, 2 * own_error))
    result["canary"] = canary.verdict(before_run, after_run, shares=_shares(table, options))
    if rows:
        result["ceilings"] = canary.ceilings(before_run, after_run, options.threads)
    result.update(max_rel_err=error, dense_own_rel_err=own_error, timed_seconds=seconds)
    result["accelerated"]["match"] = matched(error, 2 * own_error)
    result["exact"] = result["accelerated"]["match"]["equal"]
    if options.threads > 1:
        tell("stages on one thread and on all")
        towers = (trunks[name].tower for name in (ONE_THREAD, OURS))
        pair = table.pair(ONE_THREAD, OURS)
        result["thread_scaling"] = {
            "one_thread_ms": pair.slow_ms,
            "ms": pair.fast_ms,
            "speedup": pair.ratios.to_dict(),
            "stages": stage_scaling(*towers, x, options.threads, options.rounds),
            "cores_before": [check.to_dict() for check in cores_before],
            "cores_after": [check.to_dict() for check in cores_after],
        }
    result["report"] = report
    result["layers"] = [row.to_dict() for row in rows]
    result["layers_left_out"] = left_out(subject, size) if rows else {}
    result["losing_layers"] = [row.to_dict() for row in rows if row.loses]
    result["peers"] = {}
    if options.peers and result["complete"]:
        try:
            result["peers"], interrupted = _peers(subject, x, reference, options, result, tell)
            result["complete"] = not interrupted
        except OpenTransError as failure:
            result["peers_error"] = str(failure)  # ours in a process of its own: see failures()
    result.update(_labels(subject, options, part))
    return result


def summarise(
    table: TimingTable, variants: list[Variant], errors: dict[str, float], bound: float
) -> dict[str, Any]:
    """Baseline, accelerated, speed-up and every variant of an interleaved run.

    ``speedup`` is the median over rounds of baseline / accelerated wall time within a round, that
    of ``median_round``; ``speedup_of_medians`` divides the two medians. bound: of ``errors``, up to
    which they match.
    """
    dense = [variant.name for variant in variants if variant.run is not None]
    best = table.fastest(dense)
    pair = table.pair(best, OURS)
    every: dict[str, Any] = {}
    for variant in variants:
        entry: dict[str, Any] = {"available": variant.run is not None, **variant.detail}
        if variant.run is None:
            entry["error"] = variant.error
        else:
            entry.update(table[variant.name].to_dict())
            entry["rel_err"] = errors[variant.name]
            entry["match"] = matched(errors[variant.name], bound)
            entry["speedup_of_accelerated"] = table.ratio(variant.name, OURS).to_dict()
        every[variant.name] = entry
    base, fast = table[best].to_dict(), table[OURS].to_dict()
    return {
        "baseline": {"name": best, **base},
        "accelerated": fast,
        "speedup": pair.ratios.median,
        "speedup_spread": pair.ratios.to_dict(),
        "median_round": {"baseline_ms": pair.slow_ms, "ms": pair.fast_ms},
        "speedup_cpu_time": table.ratio(best, OURS, "cpu").median,
        "speedup_of_medians": base["ms"] / fast["ms"],
        "rounds": table.rounds,
        "variants": every,
    }


def _accelerated(
    subject: Subject, x: torch.Tensor, options: TrunkOptions, tell: Progress
) -> tuple[dict[str, TrunkModule], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The accelerated trunks, their timed calls and preparations by name, and the report."""
    size = (options.height, options.width)
    calls: dict[str, Any] = {}
    before: dict[str, Any] = {}
    trunks: dict[str, TrunkModule] = {}
    counts = {OURS: options.threads}
    if options.threads > 1:
        counts[ONE_THREAD] = 1
    report: dict[str, Any] = {}
    for name, threads in counts.items():
        tell(f"accelerating for {threads} thread{'s' if threads > 1 else ''}")
        torch.set_num_threads(threads)
        tower = copy.deepcopy(subject.model)
        start = time.perf_counter()
        outcome = accelerate(
            tower, subject.masks, input_size=size, threads=threads, batch=options.batch
        )
        if name == OURS:
            seconds = time.perf_counter() - start
            report = {"seconds": seconds, "text": str(outcome), **outcome.to_dict()}
        trunks[name] = TrunkModule(tower)
        trunks[name].eval()
        calls[name] = _no_grad(trunks[name], x)
    torch.set_num_threads(options.threads)
    if options.threads > 1:
        before[ONE_THREAD] = lambda: torch.set_num_threads(1)
        for name in (OURS, *options.variants):
            before[name] = lambda: torch.set_num_threads(options.threads)
    return trunks, calls, before, report


def _peers(
    subject: Subject,
    x: torch.Tensor,
    reference: torch.Tensor,
    options: TrunkOptions,
    result: dict[str, Any],
    tell: Progress,
) -> tuple[dict[str, Any], bool]:
    """Entries of the peers, and whether they were interrupted."""
    from .peers.environments import default_home
    from .peers.registry import BUILT_IN
    from .peers.session import measure_peers
    from .peers.work import network_work

    entries: dict[str, Any] = {}
    if BUILT_IN in options.peers:
        compiled = {
            name: entry
            for name, entry in result["variants"].items()
            if name.startswith("compile") and entry["available"]
        }
        entries[BUILT_IN] = {
            "available": False, "skipped": True,
            "error": "no compiled dense variant was timed; add one with --variants",
        }  # fmt: skip
        if compiled:
            best = min(compiled, key=lambda name: compiled[name]["ms"])
            entries[BUILT_IN] = {
                **compiled[best],
                "speedup_of_ours": compiled[best]["speedup_of_accelerated"],
                "max_rel_err": compiled[best]["rel_err"],
                "note": f"the dense variant {best} of this run",
            }
    found, interrupted = measure_peers(
        network_work(subject, x, options.isa),
        reference,
        [name for name in options.peers if name != BUILT_IN],
        home=options.peer_home or default_home(),
        isa=options.isa,
        threads=options.threads,
        allowed=2 * result["dense_own_rel_err"],
        rounds=max(3, options.rounds // 2),
        tell=tell,
    )
    return {**entries, **found}, interrupted


def _shares(table: TimingTable, options: TrunkOptions) -> dict[str, float]:
    """Interrupted share of the samples of each side; only one thread can tell."""
    if options.threads > 1:
        return {}
    return {name: timing.contended_share() for name, timing in table.timings.items()}


def _no_grad(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    return call


def _core_checks(
    options: TrunkOptions, tell: Progress, attempts: int | None = None
) -> list[CoreCheck]:
    """Core checks for two threads; repeated while the two CPUs share a core."""
    if options.threads != 2 or options.cpus is None or len(options.cpus) != 2:
        return []
    checks = []
    for attempt in range(attempts or options.core_attempts):
        tell(f"do CPUs {list(options.cpus)} share a core? (attempt {attempt + 1})")
        checks.append(physical_core_check(options.cpus))
        if checks[-1].verdict == "two physical cores":
            break
    return checks


def _labels(subject: Subject, options: TrunkOptions, part: str) -> dict[str, Any]:
    density = subject.densities((options.height, options.width))
    return {
        "subject": {**subject.describe(), "part": part},
        "mask": {
            "label": subject.mask,
            "synthetic": subject.synthetic_mask,
            "parameter_density": density["parameters"],
            "flop_density": density["flops"],
        },
        "input": [options.batch, 3, options.height, options.width],
        "threads": options.threads,
        "isa": options.isa,
        "onednn_isa": onednn_isa(),
        "pinned_cpus": list(options.cpus) if options.cpus is not None else None,
        "available_cpus": available_cpus(),
        **environment_block(),
    }
