"""Alpha of a whole network: ours against WeightWatcher 0.7.7 and the published estimator.

    opentrans bench peers weightwatcher --setup --peer-envs /somewhere
    python benchmarks/bench_alpha.py --weightwatcher /somewhere/weightwatcher --json alpha.json
    python benchmarks/bench_alpha.py --solvers        # the table of spectrum/blas.py, here
    python benchmarks/bench_alpha.py --trained hed    # a trained network (opentrans trained list)

All sides take turns in every round, on the same pinned CPUs and with the same number of threads;
ratios are taken within a round. WeightWatcher runs in a process and an environment of its own,
with its default arguments; without one, or if it crashes, it is left out, and the output and the
result say so. Agreement is with
the plain NumPy float64 transcription in ``tests/alpha_reference.py``. Exit code 1 if an alpha is
off by more than 1e-6 of itself or a freeze set differs, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers"), str(HERE.parent / "tests")]

from alpha_solvers import solvers  # noqa: E402

from opentrans.cli.bench import chosen_cpus  # noqa: E402
from opentrans.cli.bench_rows import match_cell, ratio_cell, show_repeats  # noqa: E402
from opentrans.cli.options import add_json, add_model, add_threads, positive  # noqa: E402
from opentrans.cli.render import Output  # noqa: E402
from opentrans.trained import NETWORKS  # noqa: E402
from opentrans_kernels.bench.environment import (  # noqa: E402
    environment_block,
    isa_environment,
    portable_words,
)
from opentrans_kernels.bench.rows import command_words, matched  # noqa: E402
from opentrans_kernels.bench.timing import Timing, TimingTable, pin  # noqa: E402
from opentrans_kernels.errors import OpenTransError  # noqa: E402

FITS = ("xmin_peak", "xmin_mid", "ks")
WEIGHTWATCHER = "weightwatcher"
TOLERANCE = 1e-6


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model(parser)
    parser.add_argument(
        "--trained", choices=sorted(NETWORKS), help="a trained network of opentrans, not --arch"
    )
    add_threads(parser)
    parser.add_argument("--fits", nargs="+", choices=FITS, default=list(FITS), help="default: all")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="rounds")
    parser.add_argument("--weightwatcher", type=Path, metavar="VENV", help="its environment")
    parser.add_argument("--solvers", action="store_true", help="time the solvers instead")
    add_json(parser)
    options = parser.parse_args(argv)
    out = Output(options.json)
    try:
        return solvers(out) if options.solvers else run(options, out)
    except OpenTransError as error:
        sys.stderr.write(f"bench_alpha: {error}\n")
        return 2


def run(options: argparse.Namespace, out: Output) -> int:
    """The comparison; 1 if ours is inexact."""
    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)  # WeightWatcher's process inherits it
    import torch

    torch.set_num_threads(options.threads)
    model, label = network(options, out)
    from published_alpha import estimate as published

    from opentrans_kernels.spectrum import estimate_alpha, select

    weights = {layer.name: layer.weight.contiguous() for layer in select(model)}
    calls: dict[str, Callable[[], Any]] = {}
    tables: dict[str, Any] = {}
    for fit in options.fits:
        calls[f"ours {fit}"] = _keeping(
            tables,
            f"ours {fit}",
            lambda fit=fit: estimate_alpha(model, fit, threads=options.threads),
        )
        calls[f"published {fit}"] = _keeping(
            tables, f"published {fit}", lambda fit=fit: published(weights, fit)
        )
    memory = peak_memory(lambda: estimate_alpha(model, "xmin_peak", threads=options.threads))
    with tempfile.TemporaryDirectory() as place:
        peer, reason = start_peer(options, Path(place), weights)
        try:
            timings, lost = interleaved(calls, peer, options.repeats, out)
            if peer is not None and not lost:
                found, lost = peer_alphas(peer, Path(place, "alphas.json"))
                if lost:
                    del timings.timings[WEIGHTWATCHER]  # times without answers prove nothing
                else:
                    tables[WEIGHTWATCHER] = found
            reason = reason or lost
        finally:
            if peer is not None:
                peer.close()
    if reason:
        out.warn(f"WeightWatcher was not measured: {reason}")
    agreement = compare(weights, tables, options.fits)
    fit_ms = fit_alone(model, options.threads)
    rows, record, commands = [], {}, []
    for name, timing in timings.timings.items():
        fit = name.partition(" ")[2]
        wall = timing.wall
        cells = [name, f"{wall.median:.0f} ({wall.q1:.0f}-{wall.q3:.0f})"]
        cells.append(f"{timing.cpu.median:.0f}")
        ratios = {}
        for own in (f"ours {fit}",) if fit else ("ours ks",):
            if not name.startswith("ours") and own in calls:
                spread = timings.ratio(name, own)
                ratios[own] = spread.to_dict()
                cells.append(ratio_cell(ratios[own]))
        cells += [""] * (4 - len(cells))
        near = agreement[name]
        match = matched(near["largest"], TOLERANCE)
        cells += [match_cell(match), str(near["layers_above_1e-3"]), near["freeze_set"]]
        rows.append(cells)
        commands.append((name, row_command(options, fit)))
        record[name] = {
            **timing.to_dict(),
            "slower_than": ratios,
            "agreement": near,
            "match": match,
            "command": portable_words(commands[-1][1]),
        }
    out.heading(f"alpha of {label}, {options.threads} thread(s), {options.repeats} rounds")
    out.table(
        None,
        ("side", "wall ms", "CPU ms", "slower than ours", "match", "> 1e-3", "freeze set"),
        rows,
        right=(1, 2, 3),
    )
    out.text("match: largest |d alpha| / alpha; > 1e-3: layers off by more")
    show_repeats(commands, out)
    out.text("fit alone, ms: " + ", ".join(f"{fit} {ms:.1f}" for fit, ms in fit_ms.items()))
    if memory is not None:
        out.text(f"peak memory of ours above the weights: {memory / 2**20:.0f} MB")
    contended = max(timing.contended_share() for timing in timings.timings.values())
    if options.threads == 1 and contended > 0:
        out.warn(
            f"up to {contended:.0%} of a side's samples waited for a core that another process "
            "held; CPU time and ratios are the better numbers here"
        )
    exact = all(
        agreement[f"ours {fit}"]["largest"] <= TOLERANCE
        and agreement[f"ours {fit}"]["freeze_set"] == "equal"
        for fit in options.fits
    )
    out.finish(
        {
            "subject": label,
            "synthetic_weights": options.checkpoint is None and options.trained is None,
            "sides": record,
            "fit_alone_ms": fit_ms,
            "peak_memory_bytes": memory,
            "weightwatcher_skipped": reason or None,
            "exact": exact,
            "pinned_cpus": cpus,
            **environment_block(),
            "threads": options.threads,
        }
    )
    return 0 if exact else 1


def row_command(options: argparse.Namespace, fit: str) -> list[str]:
    """What measures one fit again, ours and published; WeightWatcher's ("") is beside ``ks``."""
    return command_words(
        ("python", "benchmarks/bench_alpha.py", "--fits", fit or "ks"),
        **(
            {"trained": options.trained}
            if options.trained
            else {"arch": options.arch, "checkpoint": options.checkpoint, "seed": options.seed}
        ),
        threads=options.threads,
        repeats=options.repeats,
        weightwatcher=None if fit else options.weightwatcher,
    )


def network(options: argparse.Namespace, out: Output) -> tuple[Any, str]:
    """The tower and what it is; planted weights are announced."""
    from alpha_subject import plant_heavy_tails_

    from opentrans.trained import load
    from opentrans_kernels.bench.subject import build_tower, load_weights

    if options.trained is not None:
        return load(options.trained).module, f"{options.trained}, trained"
    model = build_tower(options.arch, seed=options.seed)
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint)
        return model, f"{options.arch} with the weights of {Path(options.checkpoint).name}"
    plant_heavy_tails_(model, options.seed)
    out.warn(
        f"SYNTHETIC weights with planted heavy tails (seed {options.seed}): times and agreement "
        "are real measurements, the alphas mean nothing."
    )
    return model, f"{options.arch} with planted heavy tails (seed {options.seed}, SYNTHETIC)"


def _keeping(store: dict[str, Any], name: str, call: Callable[[], Any]) -> Callable[[], None]:
    def run_and_keep() -> None:
        store[name] = call()

    return run_and_keep


def start_peer(
    options: argparse.Namespace, folder: Path, weights: Mapping[str, Any]
) -> tuple[Any, str]:
    """(WeightWatcher's process or None, why not)."""
    if options.weightwatcher is None:
        return None, "no --weightwatcher VENV was given"
    python = options.weightwatcher / "bin" / "python"
    if not python.exists():
        return None, (
            f"{python} does not exist; make it with: opentrans bench peers weightwatcher --setup "
            f"--peer-envs {options.weightwatcher.parent}, and name the folder weightwatcher in it"
        )
    import torch

    from opentrans_kernels.bench.peers.process import Worker

    torch.save(dict(weights), folder / "weights.pt")
    environ = {**os.environ, **isa_environment("native", options.threads)}
    environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    script = str(HERE / "peers" / "weightwatcher_worker.py")
    command = [str(python), script, str(folder / "weights.pt"), str(options.threads)]
    try:
        return Worker(WEIGHTWATCHER, command, environ), ""
    except (OpenTransError, OSError) as error:
        return None, f"{python} did not start: {error}"


def peer_alphas(peer: Any, file: Path) -> tuple[dict[str, float], str]:
    """(layer -> alpha as WeightWatcher found it, why there is none)."""
    try:
        peer.ask(f"output {file}")
        return json.loads(file.read_text(encoding="utf-8")), ""
    except (OpenTransError, OSError, ValueError) as error:
        return {}, str(error)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], peer: Any, rounds: int, out: Output
) -> tuple[TimingTable, str]:
    """Every side once per round, in rotating order; one untimed round of ours before.

    Returns:
        The times, and why the peer was lost on the way ("" if it was not). A lost peer's times
        are left out; the other sides go on.
    """
    lost = ""
    names = [*calls, *([WEIGHTWATCHER] if peer is not None else [])]
    table = TimingTable({name: Timing(name, 1) for name in names}, rounds, 0.0)
    for name, call in calls.items():
        if name.startswith("ours"):
            call()
    with out.progress("bench alpha") as step:
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                step(f"round {index + 1} of {rounds}: {name}")
                if name == WEIGHTWATCHER:
                    if lost:
                        continue
                    try:
                        answer = peer.ask("sample 0 1")
                    except (OpenTransError, OSError) as error:
                        lost = str(error)
                        continue
                else:
                    wall, cpu = time.perf_counter(), time.process_time()
                    calls[name]()
                    answer = {
                        "cpu_ms": (time.process_time() - cpu) * 1e3,
                        "wall_ms": (time.perf_counter() - wall) * 1e3,
                    }
                table[name].wall_ms.append(answer["wall_ms"])
                table[name].cpu_ms.append(answer["cpu_ms"])
    if lost:
        del table.timings[WEIGHTWATCHER]
    return table, lost


def compare(
    weights: Mapping[str, Any], tables: Mapping[str, Any], fits: Sequence[str] = FITS
) -> dict[str, dict[str, Any]]:
    """Each side against the NumPy transcription, in the same mode."""
    import alpha_reference

    spectra = {
        name: alpha_reference.kept(alpha_reference.eigenvalues(weight.numpy()))
        for name, weight in weights.items()
    }
    exact = {
        fit: {name: alpha_reference.fit(x, fit)[0] for name, x in spectra.items()}
        for fit in {*fits, "ks"}
    }
    result = {}
    for side, table in tables.items():
        fit = side.partition(" ")[2] or "ks"
        ours = side.startswith("ours")
        alphas = table.alphas() if ours else table
        shared = [name for name in exact[fit] if name in alphas]
        errors = {n: abs(alphas[n] - exact[fit][n]) / exact[fit][n] for n in shared}
        expected, found = frozen({n: exact[fit][n] for n in shared}), frozen(alphas)
        flagged = {row.name for row in tables.get(f"ours {fit}", ()) if row.ambiguous}
        differ = sorted(expected ^ found)
        result[side] = {
            "layers": len(shared),
            "largest": max(errors.values()),
            "layers_above_1e-3": sum(error > 1e-3 for error in errors.values()),
            "unflagged_above_1e-3": [n for n, e in errors.items() if e > 1e-3 and n not in flagged],
            "freeze_set": "equal" if not differ else f"{len(differ)} differ",
            "freeze_differs": differ,
            "ambiguous": sorted(flagged),
        }
    return result


def frozen(alphas: Mapping[str, float]) -> set[str]:
    """Names below the median."""
    middle = statistics.median(alphas.values())
    return {name for name, alpha in alphas.items() if alpha < middle}


def fit_alone(model: Any, threads: int) -> dict[str, float]:
    """Best of five, milliseconds for all layers, from eigenvalues that are at hand."""
    from opentrans_kernels.spectrum import eigenvalues, fit_rows, keep, select

    found = [x.values for x in eigenvalues(select(model), threads=threads)]
    times = {}
    for fit in FITS:
        kept = [keep(values, 1e-5, fit).values for values in found]
        samples = []
        for _ in range(5):
            start = time.perf_counter()
            fit_rows(kept, fit)
            samples.append((time.perf_counter() - start) * 1e3)
        times[fit] = min(samples)
    return times


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which the peak of a call exceeds the process before it; None where unknown."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before = status("VmRSS:")
        call()
        return status("VmHWM:") - before
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
