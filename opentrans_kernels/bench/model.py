"""``opentrans bench model``: whole networks over batch, input size and threads.

``tower`` is the whole network with its head: a CLIP encoder with its attention pool at the input
size it was made for, a classifier to its logits; ``trunk`` is the backbone at any size, as
detectors use it. One row is one setting: dense variants and ours interleaved, exactness first, and
the memory a call needs beyond the weights.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..accelerate import accelerate
from ..ops import release_memory
from .part import NETWORK, TRUNK, TrunkModule, WholeModule
from .rows import matched
from .subject import Subject
from .timing import interleave
from .variants import Run, build_variants, relative_error

TOWER = "tower"
#: The dense sides: the usual winner, and one that needs no compiler.
VARIANTS = ("compile_folded_channels_last", "folded_channels_last")


@dataclass(frozen=True)
class Setting:
    """One row to measure: sizes in pixels."""

    part: str
    batch: int
    height: int
    width: int
    threads: int

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        return f"{self.part} {size}, batch {self.batch}, {self.threads} thread(s)"


def settings(
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    tower_size: int | None,
    part: str = TRUNK,
) -> list[Setting]:
    """One axis at a time around the first value of each; the tower second, at its own size.

    part: of ``TrunkModule``, which all rows but the tower's measure.
    """
    base = batches[0], sizes[0], threads[0]
    name = TOWER if part == NETWORK else part
    found = [Setting(name, base[0], *base[1], base[2])]
    found += [Setting(name, base[0], *base[1], count) for count in threads[1:]]
    found += [Setting(name, batch, *base[1], base[2]) for batch in batches[1:]]
    found += [Setting(name, base[0], *size, base[2]) for size in sizes[1:]]
    if tower_size is not None and name != TOWER:
        found.insert(1, Setting(TOWER, base[0], tower_size, tower_size, base[2]))
    return found


def measure_setting(
    subject: Subject,
    setting: Setting,
    *,
    rounds: int = 5,
    warmup_s: float = 0.3,
    variants: Sequence[str] = VARIANTS,
    simd_bits: int | None = None,
) -> dict[str, Any]:
    """One row; see the module. The thread count of torch is left at that of the setting.

    Raises:
        OpenTransError: the model cannot be accelerated, or no dense variant runs.
    """
    torch.set_num_threads(setting.threads)
    size = (setting.height, setting.width)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, 3, *size, generator=generator)
    masked = subject.masked_copy()
    with torch.no_grad():
        exact = _part(copy.deepcopy(masked).double(), setting)(x.double())
        own = relative_error(_part(masked, setting)(x), exact)
        tower = copy.deepcopy(subject.model)
        report = accelerate(
            tower, subject.masks, input_size=size, threads=setting.threads, batch=setting.batch
        )
        ours = _part(tower, setting)
        error = relative_error(ours(x), exact)
    calls: dict[str, Run] = {"ours": _bind(ours, x)}
    unavailable = {}
    dense = WholeModule(masked) if setting.part == TOWER else masked
    for built in build_variants(dense, x, variants, simd_bits=simd_bits):
        if built.run is None:
            unavailable[built.name] = built.error
        else:
            calls[built.name] = built.run
    table = interleave(calls, rounds=rounds, warmup_s=warmup_s, settle=1)
    best = table.fastest([name for name in calls if name != "ours"])
    match = matched(error, 2 * own)
    pair = table.pair(best, "ours")
    return {
        **vars(setting),
        "dense_kind": best,
        "dense_ms": pair.slow_ms,
        "ms": pair.fast_ms,
        "cpu_ms": table["ours"].cpu.median,
        "speedup": pair.ratios.to_dict() if match["equal"] else None,
        "dense_variants_ms": {name: table[name].wall.median for name in calls if name != "ours"},
        "unavailable": unavailable,
        "contended_share": table["ours"].contended_share() if setting.threads == 1 else 0.0,
        "exact": match["equal"],
        "match": match,
        "error": error,
        "dense_error": own,
        "macs": _macs(report, setting.batch),
        "memory": {
            "dense_peak_bytes": peak_bytes(calls[best]),
            "peak_bytes": peak_bytes(calls["ours"]),
        },
    }


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes by which the process's peak during a call exceeds its size before; None where the
    system cannot tell. Memory that the kernels and the allocator keep is given back first.
    """
    try:
        release_memory()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before = _status("VmRSS:")
        call()
        return max(0, _status("VmHWM:") - before)
    except (OSError, StopIteration):
        return None


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) * 1024


def _macs(report: Any, batch: int) -> dict[str, int]:
    totals = report.to_dict()["plan"]["totals"]
    return {
        name: batch * int(totals[f"{name}_macs"]) for name in ("nominal", "effective", "executed")
    }


def _part(tower: nn.Module, setting: Setting) -> nn.Module:
    return (WholeModule if setting.part == TOWER else TrunkModule)(tower).eval()


def _bind(module: nn.Module, x: torch.Tensor) -> Run:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    return call
