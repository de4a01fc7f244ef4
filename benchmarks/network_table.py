"""The README's table: whole networks against the fastest dense PyTorch and other engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markdown_tables import EMPTY, by_machine, origin
from performance_tables import SHOWN

from opentrans_kernels.bench.compare import run_label
from opentrans_kernels.bench.derive import (
    Beside,
    agreeing,
    beside,
    median_round,
    timed_variants,
)
from opentrans_kernels.bench.machines import machine_slug
from opentrans_kernels.bench.part import title
from opentrans_kernels.bench.peers.registry import BUILT_IN

Result = Mapping[str, Any]
Row = tuple[object, ...]
COLUMNS = "network, input|mask|threads, ISA|against|its ms|our ms|speed-up (quartiles)".split("|")
SHOWN_MASK, SHOWN_SIZE = "global:0.90", 224
PEERS_OF_OTHERS = 2  # of networks of other libraries

SYSTEM_TITLES = {
    "fc-clip": "FC-CLIP",
    "han": "Han et al.",
    "deeplab": "DeepLabV3 of zs3",
    "mask2former-hf": "Mask2Former of transformers",
    "ovs-mask": "our mask classifier",
    "ovs-pixel": "our DeepLabV3",
}


def networks_table(
    trunks: Sequence[Result],
    models: Sequence[Result],
    systems: Sequence[Result],
) -> str:
    """Trunks of the first run's instruction set, its peers, towers, whole segmentation models."""
    shown = [r for r in trunks if _is_shown(r, trunks[0])]
    systems = [r for r in systems if not any(_is_fuller(other, r) for other in systems)]
    found = [(r, _trunk_row(r)) for r in shown]
    found += [(r, row) for r in shown for row in _peer_rows(r)]
    found += [(r, row) for r in models for row in _model_rows(r)]
    found += [(r, row) for r in systems for row in _system_rows(r)]
    if not found:
        return EMPTY
    used = [*shown, *models, *systems]
    return f"{by_machine(COLUMNS, found)}\n\n{origin(used)}"


def _is_fuller(other: Result, r: Result) -> bool:
    """Whether it holds the same system against more dense variants: then the best of fewer is no
    baseline."""
    key = ("system", "height", "width")
    same = all(other[name] == r[name] for name in key)
    same = same and machine_slug(other["machine"]) == machine_slug(r["machine"])
    return same and set(other["unavailable"]) < set(r["unavailable"])


def _is_shown(result: Result, first: Result) -> bool:
    """Every mask at one size and thread, one mask at every size and number of threads, and every
    mask that was trained."""
    same = _isa(result) == _isa(first)
    plain = result["threads"] == 1 and result["input"][2] == SHOWN_SIZE
    return same and (plain or _mask(result) == SHOWN_MASK or not result["mask"]["synthetic"])


def _trunk_row(r: Result) -> Row:
    _, _, height, width = r["input"]
    dense = f"{r['baseline']['name']} (fastest of {len(timed_variants(r))})"
    spread = {**r["speedup_spread"], "median": r["speedup"]}
    name = f"{title(r['subject'])}, {_size(height, width)}"
    return (name, *_where(r), dense, *_cells(beside(r["baseline"], r["accelerated"], spread), r))


def _peers(r: Result) -> list[str]:
    """All of CLIP's run whose layers are listed; of another library's network the fastest that
    compute the same, so that the page stays readable. The rest is in docs/performance.md."""
    there = [name for name, p in r["peers"].items() if name != BUILT_IN and p["available"]]
    if ":" not in r["subject"]["arch"]:
        return there if run_label(dict(r)) == SHOWN else []
    same = [name for name in there if r["peers"][name]["max_rel_err"] is not None]
    return sorted(same, key=lambda name: r["peers"][name]["ms"])[:PEERS_OF_OTHERS]


def _peer_rows(r: Result) -> Iterator[Row]:
    for name in _peers(r):
        peer = r["peers"][name]
        label = f"{name} {peer.get('version', '').split('-')[0]}".strip()
        if peer.get("note", "").startswith("another network"):
            label += ", another network"
        elif peer.get("note", "").startswith("cannot be limited"):
            label += ", any ISA"
        ours = peer.get("ours_ms", r["accelerated"]["ms"])
        cells = _cells(agreeing(peer["ms"], ours, peer["speedup_of_ours"]), r)
        arch = f"{title(r['subject'])}, {_size(*r['input'][2:])}"
        yield (arch, *_where(r), label, *cells)


def _model_rows(r: Result) -> Iterator[Row]:
    """The tower with its attention pool, the largest batch and the largest image."""
    largest = max(r["rows"], key=lambda row: row["height"] * row["width"])
    batched = max(r["rows"], key=lambda row: row["batch"])
    for row in r["rows"]:
        if row["part"] != "tower" and row is not largest and row is not batched:
            continue
        arch = r["subject"]["arch"]
        whole = row["part"] == "tower" and ":" in arch  # another library's, with its classifier
        name = f"{arch} {'to logits' if whole else row['part']}, "
        name += _size(row["height"], row["width"])
        name += f", batch {row['batch']}" * (row["batch"] > 1)
        where = _mask(r), f"{row['threads']}, {_isa(r)}"
        sides = row.get("dense_variants_ms", ())  # older results lack it
        dense = row["dense_kind"] + f" (fastest of {len(sides)})" * bool(sides)
        cells = _cells(agreeing(row["dense_ms"], row["ms"], row["speedup"]), r)
        yield (name, *where, dense, *cells)


def _system_rows(r: Result) -> Iterator[Row]:
    """Our trunk and head, and our head alone, so that the share of the mask is seen."""
    dense = next(row for row in r["rows"] if row["name"] == r["baseline"])
    count = sum(not row["ours"] for row in r["rows"])
    title = (
        f"{SYSTEM_TITLES.get(r['system'], r['system'])}, whole, {_size(r['height'], r['width'])}"
    )
    for row in r["rows"]:
        if row["ours"] and row["speedup"] is not None:
            cells = _cells(agreeing(*median_round(row, dense), row["speedup"]), r)
            against = f"{r['baseline']} (fastest of {count})"
            yield (f"{title}: {row['name']}", *_where(r), against, *cells)


def _cells(shown: Beside, r: Result) -> tuple[str, ...]:
    ratio = shown.ratio
    loses = " loses" * (ratio["median"] < 1)
    text = f"**{ratio['median']:.2f}x{loses}** ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
    text += ", disturbed machine" * r["canary"]["disturbed"]
    return shown.slow(), f"{shown.fast_ms:.1f}", text


def _where(r: Result) -> tuple[str, str]:
    return _mask(r), f"{r['threads']}, {_isa(r)}"


def _mask(r: Result) -> str:
    label = r["mask"]["label"].removesuffix(" (synthetic mask)")
    return f"{label}, head {r['head_mask']['label']}" if "head_mask" in r else label


def _isa(r: Result) -> str:
    return r["opentrans_cpu_capability"] or r["isa"]


def _size(height: int, width: int) -> str:
    return f"{height}" if height == width else f"{height}x{width}"
