"""``make gpu`` where there is no GPU: what it says, and that one failure does not hide others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_tools import ROOT, why_no_interpreter

SCRIPT = ROOT / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import run

    return run


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, env=environment, cwd="/", timeout=200,
    )  # fmt: skip


def test_without_a_gpu_it_prints_one_line_and_exits_2() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    done = call()
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("gpu: torch sees no CUDA device, so nothing was run.")


def test_a_failing_section_is_recorded_and_the_others_go_on(run, tmp_path: Path, capsys) -> None:
    outcomes = {
        "good": {"ok": True, "result": {"ms": 1.0}, "notes": ["1 ms"], "seconds": 0.1},
        "bad": {"ok": False, "error": "RuntimeError: off by 3", "seconds": 0.1},
        "after": {"ok": True, "result": 5, "seconds": 0.1},
    }
    path = tmp_path / "new" / "gpu.json"
    limits: dict[str, float] = {}

    def one(name: str, limit: float) -> dict[str, Any]:
        limits[name] = limit
        return outcomes[name]

    sections = [("good", 30.0), ("bad", 1e9), ("after", 30.0)]
    assert run.run_all(sections, one, {"kind": "test"}, path, 60.0) == 1
    record = json.loads(path.read_text())
    assert record["failed"] == ["bad"] and record["sections"] == outcomes
    assert limits["good"] == 30.0 and limits["bad"] <= 60.0, "a section may not outlive the run"
    printed = capsys.readouterr().out
    assert "[ok] good" in printed and "1 ms" in printed and "[ok] after" in printed
    assert "[FAILED] bad" in printed and "off by 3" in printed
    assert "1 of 3 sections failed: bad" in printed
    assert run.run_all([("good", 1.0)], one, {}, path, 60.0) == 0
    assert run.run_all([("good", 1.0)], one, {}, path, 0.0) == 1, "what was not run is a failure"
    assert "the time was used up" in capsys.readouterr().out


def test_a_crash_and_a_hang_are_outcomes(run, tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "run.py"
    monkeypatch.setattr(run, "__file__", str(script))
    script.write_text("import os, sys; print('before', file=sys.stderr); sys.stderr.flush()\n"
                      "os.abort()\n")  # fmt: skip
    crashed = run.in_a_process("any", 60.0, False)
    assert not crashed["ok"] and "exit code -6" in crashed["error"] and "before" in crashed["error"]
    script.write_text("import time; time.sleep(600)\n")
    hung = run.in_a_process("any", 1.0, False)
    assert not hung["ok"] and "stopped after 1 s" in hung["error"]


def test_unknown_sections_are_refused_with_the_known() -> None:
    done = call("--only", "gramm")
    assert done.returncode == 2 and "no section 'gramm'; there are rows, ceilings" in done.stderr


def test_a_section_runs_in_a_rehearsal(tmp_path: Path) -> None:
    """The code that a GPU machine will run, on tiny shapes; every section: ``--rehearse``."""
    if (reason := why_no_interpreter()) is not None:
        pytest.skip(reason)
    path = tmp_path / "gpu.json"
    done = call("--rehearse", "--only", "gram", "fit", "--json", str(path))
    record = json.loads(path.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["rehearsal"] and record["failed"] == []
    assert record["sections"]["fit"]["result"]["spectra"] == 2
    assert record["sections"]["fit"]["result"]["time"] is None, "a rehearsal measures nothing"
    assert record["machine"]["versions"]["torch"]


def test_trunk_sections_run_in_a_rehearsal(tmp_path: Path) -> None:
    """Plan, pack, check and record as on a GPU: reference kernels, tiny shapes, no times."""
    path = tmp_path / "gpu.json"
    names = ("ceilings", "trunk bfloat16")
    done = call("--rehearse", "--only", *names, "--json", str(path))
    record = json.loads(path.read_text())
    assert done.returncode == 0 and record["failed"] == [], done.stdout + done.stderr
    cases = record["sections"]["trunk bfloat16"]["result"]["cases"]
    assert list(cases) == ["32x48 b1", "32x32 b2"]
    for case in cases.values():
        assert {"eager", "masked", "dense model", "best dense in a graph"} == set(case)
        assert case["masked"]["time"] is None and case["masked"]["error"] < 0.02
        assert len(case["masked"]["layers"]) == 21 and case["masked"]["chains"]
        assert any(row["kernel"].startswith("gemm") for row in case["masked"]["layers"])


def test_a_section_that_is_stopped_keeps_what_it_found(run, tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "run.py"
    monkeypatch.setattr(run, "__file__", str(script))
    script.write_text(
        "import json, pathlib, sys, time\n"
        "path = sys.argv[sys.argv.index('--worker') + 1]\n"
        "pathlib.Path(path).write_text(json.dumps({'result': {'a': 1}, 'partial': True}))\n"
        "time.sleep(600)\n"
    )
    stopped = run.in_a_process("any", 2.0, False)
    assert not stopped["ok"] and stopped["result"] == {"a": 1} and "stopped" in stopped["error"]
    script.write_text(script.read_text().replace("time.sleep(600)", "sys.exit('died')"))
    crashed = run.in_a_process("any", 60.0, False)
    assert not crashed["ok"] and crashed["result"] == {"a": 1} and "died" in crashed["error"]
