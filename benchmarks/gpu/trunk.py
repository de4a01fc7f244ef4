"""Sections of the trunk: ceilings, every kernel's correctness, eager, compiled and planned trunks.

Weights and masks are synthetic (``tower.py``, ``global:0.90``); speed and error are real. A trunk
section is one precision; its cases run in the order of :data:`CASES` while its time lasts.

Every side, dense ones included, is compared with float64 before its time counts: an inexact dense
side is excluded from the baseline with its reason, and an inexact side of ours gets no speed-up and
fails the section once all cases are measured. ``baseline`` is the fastest of a section's own dense
sides: torch.compile has a section of its own, to be read beside "trunk bfloat16".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from sections import Context, check, section
from tower import Tower, build_tower, eager_trunk

from opentrans_kernels.gpu import (
    GraphCache,
    Place,
    Precision,
    TrunkPlan,
    TuneCache,
    dense_program,
    plan_trunk,
    program_of,
)
from opentrans_kernels.gpu.clock import CudaTimer
from opentrans_kernels.gpu.graphs import CudaCapturer
from opentrans_kernels.gpu.network import Network
from opentrans_kernels.gpu.tune import Tuner
from opentrans_kernels.plan.subject import PlanSubject, prepare
from opentrans_kernels.synthetic import synthetic_masks

MASK = "global:0.90"
#: height, width, batch; the most important first.
CASES = ((800, 1216, 1), (512, 512, 1), (800, 1216, 8), (512, 512, 8))
TINY = ((32, 48, 1), (32, 32, 2))
#: An error is relative to the largest output; nothing below this is a defect.
FLOORS = {"float16": 2e-3, "bfloat16": 1.2e-2, "tf32": 2e-3, "float32": 2e-6}
#: Eager's error is the yardstick of the others; beyond this many floors it is a defect itself.
EAGER_FLOORS = 10
OURS = ("masked", "dense model")


def tower(context: Context) -> Tower:
    return build_tower(layers=(2, 2, 1, 1), width=16) if context.rehearsal else build_tower()


def masked(net: Tower, masks: Any) -> Tower:
    twin = copy.deepcopy(net)
    masks.apply_(twin)
    return twin


def images(context: Context, case: tuple[int, int, int]) -> torch.Tensor:
    height, width, batch = case
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator).to(context.device)


def worst(found: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest relative error of any output; NaN counts as infinite."""
    errors = []
    for got, exact in zip(found, want, strict=True):
        error = float((got.double() - exact).abs().max() / exact.abs().max())
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors)


def judged(error: float, precision: str, own: float | None = None) -> dict[str, Any]:
    """``error``, its ``bound`` and ``exact``. own: eager's error, None to judge eager itself.

    The bound is twice eager's error and at least the floor; an eager that is wrong bounds nothing.
    A JSON file holds no infinity: an error that is not finite is None.
    """
    limit = EAGER_FLOORS * FLOORS[precision]
    if own is None:
        bound = limit
    else:
        bound = max(FLOORS[precision], 2 * own if own <= limit else 0.0)
    known = error if math.isfinite(error) else None
    return {"error": known, "bound": bound, "exact": error <= bound}


def with_baseline(record: dict[str, Any], dense: tuple[str, ...]) -> dict[str, Any]:
    """``record`` with ``baseline``, the fastest exact one of its dense sides, and our speed-ups.

    ``baseline`` holds ``name`` and ``ms`` (None where nothing exact was timed) and ``excluded``:
    dense side -> why it does not count. ``speedup`` is written into "masked" if that is exact;
    "dense model" is ours on another network and has none.
    """
    excluded, timed = {}, {}
    for name in (name for name in dense if name in record):
        side = record[name]
        if not side["exact"]:
            excluded[name] = _inexact(side)
        elif side["time"] is None:
            excluded[name] = "not timed"
        else:
            timed[name] = side["time"]["ms"]
    best = min(timed, key=lambda name: timed[name], default=None)
    record["baseline"] = {"name": best, "ms": timed.get(best), "excluded": excluded}
    ours = record.get("masked")
    if best is not None and ours is not None and ours["exact"] and ours["time"] is not None:
        ours["speedup"] = timed[best] / ours["time"]["ms"]
    return record


def _inexact(side: dict[str, Any]) -> str:
    error = "not finite" if side["error"] is None else f"{side['error']:.1e}"
    return f"inexact: its error is {error}, accepted are {side['bound']:.1e}"


def _check_ours(cases: dict[str, Any]) -> None:
    """Fail the section if one of our sides is inexact; called when every case was measured."""
    wrong = [
        f"{label}, {name}: {_inexact(case[name])}"
        for label, case in cases.items()
        for name in OURS
        if not case.get(name, {"exact": True})["exact"]
    ]
    check(not wrong, "; ".join(wrong))


@section("ceilings", 40)
def ceilings(context: Context) -> dict[str, Any]:
    """What a copy and a matrix product reach here: the roofline's two lines."""
    return measure_ceilings(context, ("bfloat16", "float16", "tf32", "float32"))


def measure_ceilings(context: Context, names: tuple[str, ...]) -> dict[str, Any]:
    size, order = (1 << 20, 64) if context.rehearsal else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=context.device).zero_()
    target = torch.empty_like(source)
    time = context.time(lambda: target.copy_(source))
    found: dict[str, Any] = {"copy": time}
    found["copy_bytes_per_s"] = None if time is None else 2 * size / (1e-3 * time["ms"])
    for name in names:
        precision = Precision.of(name)
        a, b = (
            torch.randn(order, order, device=context.device).to(precision.dtype) for _ in range(2)
        )
        with precision.applied():
            time = context.time(lambda a=a, b=b: a @ b)
        rate = None if time is None else 2 * order**3 / (1e-3 * time["ms"])
        found[name] = {"time": time, "flop_per_s": rate}
    if found["copy_bytes_per_s"]:
        context.notes.append(
            f"copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s; "
            + ", ".join(f"{n} {found[n]['flop_per_s'] / 1e12:.0f} TFLOP/s" for n in names)
        )
    return found


def reference_outputs(context: Context, net: Tower, x: torch.Tensor) -> list[torch.Tensor]:
    """Float64 outputs for the first image."""
    twin = copy.deepcopy(net).double().to(context.device)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # float64 runs once: no search for it
    try:
        with torch.no_grad():
            return eager_trunk(twin, x[:1].double())
    finally:
        torch.backends.cudnn.benchmark = before


def eager(
    context: Context, net: Tower, x: torch.Tensor, precision: Precision
) -> Callable[[], list[torch.Tensor]]:
    """The masked network as a user runs it: channels_last, autocast for half precision."""
    there = copy.deepcopy(net).to(context.device, memory_format=torch.channels_last)
    given = x.contiguous(memory_format=torch.channels_last)
    half = precision.dtype != torch.float32

    def run() -> list[torch.Tensor]:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision.tf32
        with torch.no_grad(), torch.autocast(context.device.type, precision.dtype, enabled=half):
            return eager_trunk(there, given)

    return run


def planned(
    subject: PlanSubject, place: Place, batch: int, tuner: Tuner
) -> tuple[TrunkPlan, Network]:
    return plan_trunk(subject, place, batch=batch, cache=TuneCache(None), tuner=tuner)


def _no_time(name: str, run: Callable[[], Any]) -> float:
    """A rehearsal's timer: everything runs once, our kernels win."""
    run()
    return 0.5 if any(word in name for word in ("gemm", "chain", "stem", "sparse")) else 1.0


def graphed(context: Context, program: Any, place: Place, x: torch.Tensor) -> GraphCache:
    like = torch.empty(0, dtype=place.precision.dtype, device=context.device)
    capturer = CudaCapturer(context.device) if context.device.type == "cuda" else None
    cache = GraphCache(program, like, capture_after=1, capturer=capturer)
    cache(x)
    return cache


def peak(context: Context, run: Callable[[], Any]) -> float | None:
    """Peak device memory of one call, MB."""
    if context.device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def layer_table(plan: TrunkPlan, rates: dict[str, Any], precision: str) -> list[dict[str, Any]]:
    """Per layer: choice, times, and the share of the roofline that the chosen kernel reaches."""
    rows = []
    flops, copy_rate = rates[precision]["flop_per_s"], rates["copy_bytes_per_s"]
    for row in plan.rows:
        record = {k: getattr(row, k) for k in ("name", "variant", "shape", "out", "kernel", "ms",
                                               "dense", "dense_ms", "density")}  # fmt: skip
        record["times"] = dict(row.times)
        record["rejected"] = {k: v for k, v in row.rejected.items() if not k.startswith("matmul")}
        if flops:
            floor = 1e3 * max(2 * row.macs / flops, row.bytes / copy_rate)
            record["floor_ms"], record["of_roofline"] = floor, floor / row.ms
        rows.append(record)
    return rows


def trunk_section(context: Context, name: str) -> dict[str, Any]:
    precision = Precision.of(name)
    place = Place.of(context.device, precision)
    net = tower(context)
    masks = synthetic_masks(net, MASK)
    sparse = masked(net, masks)
    rates = measure_ceilings(context, (name,))
    found: dict[str, Any] = {"mask": MASK + " (synthetic)", "ceilings": rates, "cases": {}}
    for case in TINY if context.rehearsal else CASES:
        height, width, batch = case
        label = f"{height}x{width} b{batch}"
        if context.left() < 15:
            found["cases"][label] = {"not run": f"{context.left():.0f} s were left"}
            continue
        found["cases"][label] = record = {}
        x = images(context, case)
        want = reference_outputs(context, sparse, x)
        run = eager(context, sparse, x, precision)
        own = worst([y[:1] for y in run()], want)
        record["eager"] = {
            "time": context.time(run), **judged(own, name), "peak_mb": peak(context, run)
        }  # fmt: skip
        context.save(found)
        timer: Any = CudaTimer(context.device) if context.device.type == "cuda" else _no_time
        tuner = Tuner(place, timer)  # layers that both networks have are measured once
        for what, given in (("masked", masks), ("dense model", None)):
            subject = prepare(copy.deepcopy(net), given, (height, width))
            plan, network = planned(subject, place, batch, tuner)
            program = program_of(plan, network, place)
            cache = graphed(context, program, place, x)
            outputs = cache(x)
            exact, limit = want, own
            if given is None:  # another network, with an eager error of its own
                exact = reference_outputs(context, net, x)
                limit = worst([y[:1] for y in eager(context, net, x, precision)()], exact)
            error = worst([y[:1] for y in outputs], exact)
            entry: dict[str, Any] = {
                "time": context.time(lambda c=cache, x=x: c(x, None, ())),
                "time_outputs_copied": context.time(lambda c=cache, x=x: c(x)),
                "time_cold_l2": context.time(lambda c=cache, x=x: c(x, None, ()), cold=True),
                **judged(error, name, limit),
                "peak_mb": peak(context, lambda p=program, x=x: p(_given(x, place))),
                "launches": program.launches,
                "chains": {k: list(v) for k, v in plan.chains.items()},
                "notes": list(plan.notes),
            }
            if given is not None:
                entry["layers"] = layer_table(plan, rates, name)
                dense = graphed(context, dense_program(plan, network, place), place, x)
                record["best dense in a graph"] = {
                    **judged(worst([y[:1] for y in dense(x)], want), name, own),
                    "time": context.time(lambda c=dense, x=x: c(x, None, ())),
                    "time_cold_l2": context.time(lambda c=dense, x=x: c(x, None, ()), cold=True),
                }
            record[what] = entry
            with_baseline(record, ("eager", "best dense in a graph"))
            context.save(found)
        context.notes.append(f"{label}: " + ", ".join(_times(record)))
    _check_ours(found["cases"])
    return found


def _given(x: torch.Tensor, place: Place) -> torch.Tensor:
    return x.to(place.precision.dtype).contiguous(memory_format=torch.channels_last)


def _times(record: dict[str, Any]) -> list[str]:
    """One phrase per side; then the baseline, and what was excluded from it."""
    found = []
    sides = {name: side for name, side in record.items() if name != "baseline"}
    for name, side in sides.items():
        ms = "-" if side["time"] is None else f"{side['time']['ms']:.3f} ms"
        found.append(f"{name} {ms}" + ("" if side["exact"] else f" ({_inexact(side)})"))
    baseline = record["baseline"]
    if baseline["name"] is not None:
        found.append(f"baseline {baseline['name']}")
    if "speedup" in sides.get("masked", ()):
        found.append(f"speed-up {sides['masked']['speedup']:.2f}x")
    return found


@section("trunk bfloat16", 170)
def trunk_bfloat16(context: Context) -> dict[str, Any]:
    return trunk_section(context, "bfloat16")


@section("compiled bfloat16", 150)
def compiled_bfloat16(context: Context) -> dict[str, Any]:
    """torch.compile, max-autotune, of the masked network; alone and inside a CUDA graph.

    The strongest form of it: weights in bfloat16 beforehand, frozen, so that it folds batch norms.
    """
    precision = Precision.of("bfloat16")
    sparse = masked(net := tower(context), synthetic_masks(net, MASK)).to(context.device)
    exact = copy.deepcopy(sparse)
    sparse = sparse.to(precision.dtype, memory_format=torch.channels_last)
    found: dict[str, Any] = {}
    backend: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"}
    if context.rehearsal:
        backend = {"backend": "aot_eager"}
    else:
        import torch._inductor.config as inductor

        inductor.freezing = True
    for case in TINY[:1] if context.rehearsal else CASES:
        label = f"{case[0]}x{case[1]} b{case[2]}"
        if context.left() < 40 and not context.rehearsal:
            found[label] = {"not run": f"{context.left():.0f} s were left"}
            continue
        image = images(context, case)
        x = image.to(precision.dtype, memory_format=torch.channels_last)
        torch._dynamo.reset()
        module = torch.compile(lambda t: eager_trunk(sparse, t), dynamic=False, **backend)

        def run(m=module, x=x) -> list[torch.Tensor]:
            with torch.no_grad():
                return m(x)

        want = reference_outputs(context, exact, image)
        own = worst([y[:1] for y in eager(context, exact, image, precision)()], want)
        error = worst([y[:1] for y in run()], want)
        record = {"compiled": {"time": context.time(run), **judged(error, "bfloat16", own)}}
        if context.device.type == "cuda":
            replay, outputs = CudaCapturer(context.device).capture(run)
            time = context.time(replay)
            error = worst([y[:1] for y in outputs], want)
            record["compiled in a graph"] = {"time": time, **judged(error, "bfloat16", own)}
        record["eager"] = {"time": None, **judged(own, "bfloat16")}
        found[label] = with_baseline(record, ("compiled", "compiled in a graph"))
        context.notes.append(f"{label}: " + ", ".join(_times(found[label])))
        context.save(found)
    return found


@section("trunk float32", 100)
def trunk_float32(context: Context) -> dict[str, Any]:
    return trunk_section(context, "float32")


@section("trunk float16", 80)
def trunk_float16(context: Context) -> dict[str, Any]:
    return trunk_section(context, "float16")


@section("trunk tf32", 80)
def trunk_tf32(context: Context) -> dict[str, Any]:
    return trunk_section(context, "tf32")
