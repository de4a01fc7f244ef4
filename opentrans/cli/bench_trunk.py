"""The tables of ``opentrans bench trunk`` and the command that repeats each of their rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .bench_rows import INEXACT, match_cell, ratio_cell
from .bench_session import show_canary
from .render import Output

LAYER_ROUNDS = 7  # of the table of layers, whatever the trunk's


def row_commands(
    result: dict[str, Any], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], str, list[str]]]:
    """(row of the result, its name, what measures it again) of every row that was measured."""
    from opentrans_kernels.bench.rows import command_words, subject_words

    def words(start: tuple[str, ...], rounds: int, **more: Any) -> list[str]:
        return command_words(
            start,
            **subject_words(options),
            rounds=rounds,
            **more,
        )

    def trunk(variants: str, **more: Any) -> list[str]:
        start, rest = ("opentrans", "bench", "trunk"), {"cpus": options.cpus, "no_layers": True}
        return words(start, result["rounds"], variants=variants, **rest, **more)

    variants = {n: entry for n, entry in result["variants"].items() if entry["available"]}
    yield result["accelerated"], "accelerated", trunk(",".join(result["variants"]))
    for name, entry in variants.items():
        yield entry, name, trunk(name)
    for name, peer in result["peers"].items():
        if peer["available"]:
            known = [one for one in variants if one in peer.get("note", "").split()]
            found = trunk(known[0] if known else result["baseline"]["name"], peers=name)
            yield peer, f"peer {name}", [*found, *command_words((), peer_envs=options.peer_envs)]
    for row in (*result["layers"], *result["losing_layers"]):
        start = ("python", "benchmarks/bench_layers.py")
        yield row, row["name"], words(start, LAYER_ROUNDS, layer=row["name"])


def shown_commands(
    result: dict[str, Any], options: argparse.Namespace
) -> list[tuple[str, list[str]]]:
    """Of the rows that :func:`show` prints: of the layers the losing ones only."""
    losing = {row["name"] for row in result["losing_layers"]}
    layers = {row["name"] for row in result["layers"]} - losing
    found = {name: words for _, name, words in row_commands(result, options)}
    return [(name, words) for name, words in found.items() if name not in layers]


def show(result: dict[str, Any], out: Output) -> None:
    """The human-readable tables of a trunk result."""
    from opentrans_kernels.bench.derive import timed_variants
    from opentrans_kernels.bench.part import title

    subject, mask = result["subject"], result["mask"]
    size = "x".join(map(str, result["input"]))
    out.heading(f"{title(subject)}, {mask['label']}, input {size}")
    out.pairs(
        {
            "weights": subject["weights"],
            "density": f"{mask['parameter_density']:.3f} of weights, "
            f"{mask['flop_density']:.3f} of multiply-adds",
            "CPU": result["machine"]["cpu"],
            "threads": f"{result['threads']}, pinned to CPUs {result['pinned_cpus']}",
            "instruction set": f"{result['isa']} (torch {result['torch_cpu_capability']}, oneDNN "
            f"{result['onednn_isa']}, ours {result['opentrans_cpu_capability']})",
        }
    )
    out.text()
    best = result["baseline"]["name"]
    ours = result["accelerated"]
    rows = [variant_row("accelerated", ours, ours, None)]
    for name, entry in result["variants"].items():
        label = f"{name} (baseline)" if name == best else name
        if not entry["available"]:
            rows.append([label, *[None] * 5, entry["error"].splitlines()[0][:40]])
            continue
        note = "" if entry.get("frozen", True) else "freezing did NOT happen"
        rows.append(variant_row(label, entry, ours, entry["speedup_of_accelerated"], note))
    columns = ("variant", "wall ms", "CPU ms", "ours beside it", "speed-up of ours", "match", "")
    if not result["exact"]:
        rows = [[*row[:4], row[4] and INEXACT, *row[5:]] for row in rows]
    out.table(None, columns, rows, right=(1, 2, 3, 4))
    spread = result["speedup_spread"]
    out.text()
    if result["exact"]:
        out.text(
            f"speed-up {result['speedup']:.2f}x over {best} (quartiles {spread['q1']:.2f}-"
            f"{spread['q3']:.2f}, {result['rounds']} rounds; by CPU time "
            f"{result['speedup_cpu_time']:.2f}x)"
        )
    else:
        out.text("no speed-up is stated: the result is not exact")
    timed = timed_variants(result)
    out.text(f"{best} is the fastest of {len(timed)} dense variants timed: {', '.join(timed)}")
    out.text(
        f"max error against float64: {result['max_rel_err']:.2e}; dense float32's own: "
        f"{result['dense_own_rel_err']:.2e}"
    )
    if "thread_scaling" in result:
        _show_scaling(result["thread_scaling"], result["threads"], result["exact"], out)
    if result["layers"]:
        show_losing(result["losing_layers"], len(result["layers"]), out)
    for name, why in result.get("layers_left_out", {}).items():
        out.text(f"{name} {why}: not measured alone")
    show_peers(result["peers"], result["exact"], out)
    show_canary(result["canary"], out)


def show_peers(peers: dict[str, Any], exact: bool, out: Output, title: str | None = None) -> None:
    """Other engines: times, our speed-up over them, their error; or why they did not run."""
    rows: list[list[Any]] = []
    for name, peer in peers.items():
        if not peer["available"]:
            kind = "skipped" if peer["skipped"] else "FAILED"
            rows.append([name, *[None] * 4, f"{kind}: {peer['error'].splitlines()[0]}"])
            continue
        ratio, error = peer["speedup_of_ours"], peer["max_rel_err"]
        cell = match_cell(peer.get("match")) if error is not None else "another network"
        ours = f"{peer['ours_ms']:.2f}" if "ours_ms" in peer else None  # else a variant's row
        speed = ratio_cell(ratio if exact else None)
        rows.append([name, f"{peer['ms']:.2f}", ours, speed, cell, peer["note"]])
    if rows:
        out.text()
        columns = ("peer", "wall ms", "ours beside it", "speed-up of ours", "match", "")
        out.table(title, columns, rows, right=(1, 2, 3))


def variant_row(
    name: str,
    entry: dict[str, Any],
    ours: dict[str, Any],
    ratio: dict[str, Any] | None,
    note: str = "",
) -> list[Any]:
    """One line of the table of variants: times of the round whose ratio is shown."""
    from opentrans_kernels.bench.derive import beside

    shown = beside(entry, ours, ratio) if ratio else None
    wall = entry["wall"]
    if entry["contended_share"] > 0.2:
        note = f"{note} {entry['contended_share']:.0%} of samples were disturbed".strip()
    return [
        name,
        f"{shown.slow(2) if shown else format(entry['ms'], '.2f')} "
        f"({wall['q1']:.2f}-{wall['q3']:.2f})",
        f"{entry['cpu_ms']:.2f}",
        f"{shown.fast_ms:.2f}" if shown else None,
        ratio_cell(ratio) if ratio else None,
        match_cell(entry.get("match")),
        note,
    ]


def show_losing(losing: list[dict[str, Any]], total: int, out: Output) -> None:
    """The layers that are slower sparse than dense, measured alone."""
    if not losing:
        out.text(f"none of {total} layers is slower than oneDNN when measured alone")
        return
    out.text(f"{len(losing)} of {total} layers are slower than oneDNN when measured alone:")
    rows = [
        [
            row["name"],
            f"{row['density']:.3f}",
            f"{row['dense_ms']:.3f}",
            f"{row['sparse_ms']:.3f}",
            ratio_cell(_layer_ratio(row) if row["exact"] else None),
            match_cell(row.get("match")),
        ]
        for row in losing
    ]
    columns = ("layer", "density", "dense ms", "sparse ms", "speed-up", "match")
    out.table(None, columns, rows, right=(1, 2, 3, 4))


def _layer_ratio(row: dict[str, Any]) -> dict[str, float]:
    return {"median": row["speedup"], "q1": row["speedup_q1"], "q3": row["speedup_q3"]}


def _show_scaling(scaling: dict[str, Any], threads: int, exact: bool, out: Output) -> None:
    ratio = ratio_cell(scaling["speedup"] if exact else None)
    out.text(
        f"threads: {scaling['one_thread_ms']:.2f} ms on one, {scaling['ms']:.2f} ms on all, {ratio}"
    )
    if exact and scaling.get("stages"):
        rows = [
            [
                row["part"],
                f"{row['one_thread_ms']:.2f}",
                f"{row['ms']:.2f}",
                ratio_cell(row["speedup"]),
                f"{row['efficiency']:.0%}",
            ]
            for row in scaling["stages"]
        ]
        columns = ("part", "ms, 1 thread", f"ms, {threads} threads", "speed-up", "efficiency")
        out.table(None, columns, rows, right=(1, 2, 3, 4))
    for when in ("before", "after"):
        for check in scaling[f"cores_{when}"]:
            out.text(
                f"  core check {when}: CPUs {list(check['cpus'])}, rate together / alone "
                f"{check['rate_ratio']:.2f}: {check['verdict']}"
            )
