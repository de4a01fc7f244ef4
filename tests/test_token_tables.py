"""The table of segmenters with fewer tokens, from results of every method and from damaged ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_results as make
import pytest

from opentrans_kernels.bench.compare import compare, load_result
from opentrans_kernels.bench.machines import machine_slug
from opentrans_kernels.errors import OpenTransError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import token_tables

    return token_tables


def stored(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    path = folder / "one.json"
    path.write_text(json.dumps(result))
    return load_result(path)


@pytest.mark.parametrize(
    ("plan", "told"),
    [({"method": "evit", "keep": 0.7}, "keep 0.7"), ({"method": "tome", "r": 8}, "r 8"),
     ({"method": "act", "alpha": 0, "grid": None}, "alpha 0")],
)  # fmt: skip
def test_what_a_result_may_leave_out_is_an_empty_cell(tables, tmp_path, plan, told) -> None:
    """No reducing method but two has a grid."""
    one = make.tokens() | {"plan": plan, "threads": 2}
    for key in ("mask", "smaller", "fewer", "kept", "replaced", "source"):
        one.pop(key, None)
    for row in one["rows"]:
        for key in ("macs", "work", "peak_bytes"):
            del row[key]
    one = stored(tmp_path, one)
    text = tables.tokens_table([one])
    line = f"| segmenter-s16, 640x640 | sparse, cluster, {told} | 50 | **2.00x** (1.96-2.04) |"
    assert f"{line}  |  |  |" in text
    assert "| smaller input, sparse | 125 |" in text and "640x640: 2 threads, 3 rounds;" in text
    assert compare({"a": one}, {"b": one}).changes


def test_several_machines_are_told_apart(tables) -> None:
    one, other = make.tokens(), make.tokens()
    other["machine"] = {**other["machine"], "cpu": "Another Processor"}
    slugs = {machine_slug(result["machine"]) for result in (one, other)}
    assert len(slugs) == 2
    both, alone = tables.tokens_table([one, other]), tables.tokens_table([one])
    assert all(f"| {slug} |" in both for slug in slugs)
    assert all(f"on {slug}: 1 thread" in both and f"| {slug} |" not in alone for slug in slugs)


@pytest.mark.parametrize("place", ("grid", "smaller"))
@pytest.mark.parametrize("value", ([28], [1, 2, 3], "28x28", 28, {"h": 1}, [28, None]))
def test_a_size_is_two_numbers(tmp_path, place, value) -> None:
    one = make.tokens()
    (one["plan"] if place == "grid" else one)[place] = value
    with pytest.raises(OpenTransError, match=f"{place} is .*, expected height and width"):
        stored(tmp_path, one)


@pytest.mark.parametrize(("key", "value"), [("alpha", "5"), ("r", -1), ("keep", 1.5)])
def test_options_of_a_plan_are_numbers(tmp_path, key, value) -> None:
    one = make.tokens()
    one["plan"][key] = value
    with pytest.raises(OpenTransError, match=f"plan.{key} is .*, expected a"):
        stored(tmp_path, one)


def test_no_side_has_no_work(tmp_path) -> None:
    one = make.tokens()
    one["rows"][0]["work"] = 0
    with pytest.raises(OpenTransError, match=r"rows\[0\].work is 0, expected a number above 0"):
        stored(tmp_path, one)


@pytest.mark.parametrize(
    "label",
    ("uniform:0.90 (synthetic mask)", "9 masks, 1 of 9 weights kept; spec: uniform:0.90; model: M"),
)
def test_a_network_is_named_with_its_recipe(tables, label) -> None:
    one = make.tokens()
    one["mask"]["label"] = label
    assert "| segmenter-s16, 640x640, uniform:0.90 | sparse |" in tables.tokens_table([one])
