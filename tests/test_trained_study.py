"""The study of trained networks, from the first download to the last table, with a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import trained_tables  # noqa: E402

from benchmarks.trained.cells import cells_of  # noqa: E402
from benchmarks.trained.study import folder_of  # noqa: E402
from opentrans.trained.recipe import Recipe  # noqa: E402


def cell(f_score: float, density: float, **more: object) -> dict:
    mean = {"f_score": f_score, "mae": 0.1}
    return {
        "density": density, "macs_left": density, "cpu_seconds": 60.0,
        "agreement": {"mean": mean, "photographs": {"a": mean}}, **more,
    }  # fmt: skip


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    timed = {"dense": "eager", "dense_ms": 400.0, "ours_ms": 100.0, "clock": "cpu", "error": 1e-7,
             "speedup": {"median": 4.0, "q1": 3.9, "q3": 4.1}}  # fmt: skip
    result = {
        "schema": 1,
        "network": "hed",
        "cells": {
            "untrained/global/0.1": cell(0.6, 0.1),
            "untrained/global/0.5": cell(0.9, 0.5),
            "imp/macs-0.2": cell(0.95, 0.1, recipe={"steps": 300}, latency=timed),
            "random": cell(0.3, 0.1, steps=300),
        },
        "training_step": {
            "cell": "imp/macs-0.2", "plain_seconds": 0.9, "sparse_seconds": 0.3, "ratio": 3.0,
            "ratios": [2.9, 3.0, 3.2], "counted": "CPU seconds",
        },
        "latency": {
            "input": [320, 480], "threads": 1, "dense_ms": {"eager": 400.0}, "rounds": 9,
            "machine": {"disturbed": True}, "environment": {"machine": {"cpu": "X"}},
        },
    }  # fmt: skip
    freezing = {
        "schema": 1, "before": {"f_score": 0.6},
        "summary": {"steps": {"none": {
            key: {"mean": 0.9, "standard_error": 0.01, "seeds": 5}
            for key in ("f_score", "steps", "cpu_seconds", "kept_bytes", "frozen")
        }}},
    }  # fmt: skip
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "hed.json").write_text(json.dumps(result))
    (folder / "hed-freezing.json").write_text(json.dumps(freezing))
    return tmp_path


def test_tables_show_every_cell_the_losing_ones_too(stored: Path) -> None:
    made = trained_tables.tables(stored)["trained.md"]
    lines = made["trained-hed"].splitlines()
    assert lines[2].startswith("| imp/macs-0.2 | 300 | 90% | 0.100 | 0.950 |")
    assert "**4.00x** (3.90-4.10)" in lines[2] and "400, 100" in lines[2]
    assert lines[3].startswith("| random | 300 ") and "| - | - |" in lines[3]
    assert "0.30 s on the sparse kernels, **3.00x** (2.90-3.20; CPU" in made["trained-hed"]
    assert "disturbed machine" in made["trained-hed"] and "480x320" in made["trained-hed"]
    assert "| global | 50% | 0.500 | 0.900 |" in made["untrained-hed"]
    assert "0.9000 ± 0.0100" in made["freezing-hed"] and "5 seeds" in made["freezing-hed"]
    assert made["trained-resnet50-half"] == "No results are stored yet."


def test_refitted_cells_stand_beside_the_untrained_ones(stored: Path) -> None:
    path = stored / "trained" / "hed.json"
    result = json.loads(path.read_text())
    again = {"mean": {"f_score": 0.77, "mae": 0.1}, "photographs": {}}
    result["cells"]["fitted/global/0.1"] = cell(0.7, 0.1, recalibrated=again, cpu_seconds=12.0)
    for name in ("untrained/global/0.1", "untrained/global/0.5"):
        result["cells"][name]["recalibrated"] = {"mean": {"f_score": 0.66}, "photographs": {}}
    path.write_text(json.dumps(result))
    made = trained_tables.tables(stored)["trained.md"]
    assert "| global | 90% | 0.100 | 0.600 | 0.100 | 0.660 | 0.770 | 12 |" in made["untrained-hed"]
    assert "| global | 50% | 0.500 | 0.900 | 0.100 | 0.660 | - | - |" in made["untrained-hed"]
    assert "fitted/" not in made["trained-hed"]
    (svg,) = (v for p, v in trained_tables.figures(stored).items() if "sparsity" in p.name)
    assert "global, refitted" in svg


def test_figures_are_drawn_from_what_is_stored(stored: Path) -> None:
    drawn = {path.name: svg for path, svg in trained_tables.figures(stored).items()}
    assert set(drawn) == {"hed-sparsity.svg", "hed-frontier.svg"}
    assert "global, untrained" in drawn["hed-sparsity.svg"]
    assert "imp/macs-0.2" in drawn["hed-frontier.svg"] and "dense" in drawn["hed-frontier.svg"]


def test_cells_of_one_budget_have_the_same_steps() -> None:
    for network in ("hed", "resnet50-half"):
        cells = cells_of(network, quick=False)
        steps = {n: c.steps() for n, c in cells.items() if isinstance(c, Recipe)}
        long = {name for name in steps if name.startswith("long/")}
        assert len(long) == 5 and {steps.pop(name) for name in long} == {3000}
        assert set(steps.values()) == {300} and cells["random"][1] == 300
        places = [folder_of(Path("w"), network, name) for name in cells]
        assert len(set(places)) == len(cells), "two cells would share a folder"


@pytest.mark.slow
def test_the_quick_study_runs_whole(tmp_path: Path) -> None:
    from opentrans.trained import fetch, photographs
    from opentrans_kernels.errors import OpenTransError

    try:
        fetch("hed")
        photographs("train")
    except OpenTransError as error:
        pytest.skip(f"weights or photographs cannot be had here: {error}")
    common = ["--network", "hed", "--quick", "--out", str(tmp_path), "--work", str(tmp_path / "w")]
    scripts = {
        "study": [], "latency": ["--rounds", "2", "--dense", "eager"], "freezing": [],
    }  # fmt: skip
    for script, more in scripts.items():
        path = ROOT / "benchmarks" / "trained" / f"{script}.py"
        done = subprocess.run(
            [sys.executable, str(path), *common, *more], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "hed-quick.json").read_text())
    assert set(result["cells"]) == set(cells_of("hed", quick=True))
    trained = result["cells"]["imp/macs-0.2"]
    assert trained["density"] == pytest.approx(0.1, abs=1e-3) and trained["latency"]["ours_ms"] > 0
    runs = json.loads((tmp_path / "hed-freezing-quick.json").read_text())["runs"]
    # Neither norms nor a classifier: five sets of two seeds.
    assert len(runs["steps"]) == len(runs["seconds"]) == 10
