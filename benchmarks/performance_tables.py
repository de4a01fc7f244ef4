"""The generated tables of docs/performance.md (limits per layer, crossovers, peers) and of
docs/sparse-linears.md (linear layers against other engines)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markdown_tables import EMPTY, by_machine, table

from opentrans_kernels.bench.compare import run_label
from opentrans_kernels.bench.derive import agreeing, crossovers, layer_bytes
from opentrans_kernels.pack import SparseWeight, read_header

Result = Mapping[str, Any]
LIMITS = "convolution|output|n|density|nonzeros per visit|FLOPs per byte|GFLOP/s on nonzeros"
CROSSOVER = "kind|convolution and output|densest at which sparse wins|5 % dense|10 %|30 %|100 %"
LINEARS = "layer|kept|threads, ISA|against|its ms|our ms|our speed-up (quartiles)|its error|note"
PEERS = "run|peer|peer ms|our ms beside it|our speed-up (quartiles)|its error|note"
SHOWN = "global:0.90, 224, 1 t, avx2"  # the run whose layers are listed, if it is there
SHAPE = ("cin", "cout", "kernel", "stride", "h_out", "w_out")
SHOWN_DENSITIES = (0.05, 0.1, 0.3, 1.0)


def limits_table(trunks: Sequence[Result]) -> str:
    """Every layer of one run: what its rows look like, its rate, and the share of dense's best."""
    runs = [r for r in trunks if r["layers"]]
    if not runs:
        return EMPTY
    run = min(runs, key=lambda r: run_label(dict(r)) != SHOWN)
    batch = run["input"][0]
    groups: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for row in run["layers"]:
        groups.setdefault(tuple(row[key] for key in SHAPE), []).append(row)
    best = max(_rate(row, row["dense_ms"], _numel(row), batch) for row in run["layers"])
    rows = []
    for (cin, cout, kernel, stride, height, width), same in groups.items():
        nnz, ms = sum(row["nnz"] for row in same), sum(row["sparse_ms"] for row in same)
        numel = _numel(same[0])
        density = nnz / len(same) / numel
        chunk = chunk_channels(cin, kernel, density)
        one = {**same[0], "nnz": nnz / len(same)}
        flops = 2 * nnz / len(same) * height * width * batch
        rate = 2 * nnz * height * width * batch / ms / 1e6
        rows.append(
            (
                f"{cin}->{cout} k{kernel}" + f" s{stride}" * (stride > 1),
                f"{height}x{width}",
                len(same),
                f"{density:.3f}",
                f"{density * chunk * kernel**2:.1f}",
                f"{flops / layer_bytes(one, batch):.0f}",
                f"{rate:.0f} ({rate / best:.0%})",
            )
        )
    header = [*LIMITS.split("|")[:-1], f"{LIMITS.split('|')[-1]} (of {best:.0f}, dense's best)"]
    return f"{table(header, rows)}\n\nRun: {run_label(dict(run))}."


def crossover_table(ops: Sequence[Result]) -> str:
    """Every shape of the operator runs: where sparse starts to win, and speed-ups around it."""
    rows = []
    ops = [result for result in ops if crossovers(result["rows"])]
    for result in ops:
        for found in sorted(crossovers(result["rows"]), key=lambda one: one.kind):
            if found.backend == "reference":
                continue
            ratios = {
                row["density_asked"]: row["speedup"]["median"]
                for row in result["rows"]
                if (row["case"], row["backend"], row["batch"], row["op"])
                == (found.case, found.backend, found.batch, "sparse_conv2d")
                and row["speedup"]
            }
            cells = (f"{ratios[d]:.2f}x" if d in ratios else "" for d in SHOWN_DENSITIES)
            where = found.verdict if found.density is None else f"{found.density:.2f}"
            rows.append((found.kind, found.case, where, *cells))
    marks = (" (disturbed machine)" if r["canary"]["disturbed"] else "" for r in ops)
    runs = ", ".join(f"{run_label(dict(r))}{mark}" for r, mark in zip(ops, marks, strict=True))
    return f"{table(CROSSOVER.split('|'), rows)}\n\nRuns: {runs}." if rows else EMPTY


def peers_table(trunks: Sequence[Result]) -> str:
    """Every peer of every run, absent and failed ones with their reason."""
    rows = []
    for result in trunks:
        label, arch = run_label(dict(result)), result["subject"]["arch"]
        label = f"{arch}, {label}" if ":" in arch else label  # the page's own network has no name
        for name, peer in result.get("peers", {}).items():
            ours = peer.get("ours_ms", result["accelerated"]["ms"])
            rows.append((result, (label, *_peer_cells(name, peer, ours))))
    return by_machine(PEERS.split("|"), rows) if rows else EMPTY


def _peer_cells(name: str, peer: Mapping[str, Any], ours: float | None) -> tuple[str, ...]:
    """Name and version, its time, ours, ratio, error, note; or why it did not run."""
    if not peer["available"]:
        return (name, "", "", "", "", peer["error"].splitlines()[0])
    spread, error = peer["speedup_of_ours"], peer["max_rel_err"]
    shown = agreeing(peer["ms"], peer["ours_ms"] if ours is None else ours, spread)
    loses = " loses" * (spread["median"] < 1)
    return (
        f"{name} {peer.get('version', '').split('-')[0]}".strip(),
        shown.slow(),
        f"{shown.fast_ms:.1f}",
        f"**{spread['median']:.2f}x{loses}** ({spread['q1']:.2f}-{spread['q3']:.2f})",
        "" if error is None else f"{error:.1e}",
        peer.get("note", ""),
    )


def linears_table(ops: Sequence[Result]) -> str:
    """Every linear layer and MLP that was timed beside other engines: the fastest dense PyTorch
    of that row, then the engines."""
    rows, labels = [], []
    for result in ops:
        found = [row for row in result["rows"] if row.get("peers") and row["exact"]]
        if found:
            disturbed = " (disturbed machine)" * result["canary"]["disturbed"]
            labels.append(f"{_origin(result)}{disturbed}")
        for row in found:
            where = (
                row["case"].replace("->", " -> ") + ", GELU" * (row["kind"] == "mlp"),
                f"{row['density_asked']:.0%}",
                f"{result['threads']}, {result['opentrans_cpu_capability'] or result['isa']}",
            )
            dense = {
                "available": True, "ms": row["dense_ms"], "ours_ms": row["ms"],
                "speedup_of_ours": row["speedup"], "max_rel_err": row["dense_error"],
                "note": f"{row['clock']} time in one process",
            }  # fmt: skip
            torch_name = f"torch {result['versions']['torch']}, {row['dense_kind']}"
            for name, side in {torch_name: dense, **row["peers"]}.items():
                rows.append((result, (*where, *_peer_cells(name, side, None))))
    return f"{by_machine(LINEARS.split('|'), rows)}\n\n{'; '.join(labels)}." if rows else EMPTY


def _origin(result: Result) -> str:
    commit = str((result["source"] or {}).get("commit"))[:12]
    return f"CPU: {result['machine']['cpu']}; commit: {commit}; weights: synthetic"


def chunk_channels(cin: int, kernel: int, density: float) -> int:
    """Input channels per chunk that packing chooses: asked by packing a few rows."""
    weight = torch.zeros(16, cin, kernel, kernel)
    weight.view(-1)[: max(1, round(density * weight.numel()))] = 1
    packed = SparseWeight.from_dense(weight, torch.zeros(16), stride=1, padding=kernel // 2)
    return min(cin, read_header(packed.structure.numpy()).chunk)


def _numel(row: Mapping[str, Any]) -> int:
    return row["cin"] * row["cout"] * row["kernel"] ** 2


def _rate(row: Mapping[str, Any], ms: float, weights: float, batch: int) -> float:
    """GFLOP/s of a layer: two per weight and output pixel."""
    return 2 * weights * row["h_out"] * row["w_out"] * batch / ms / 1e6
