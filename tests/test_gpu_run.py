"""``make gpu`` where there is no GPU: what it says, and that one failure does not hide others."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import fresh_process
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
    """The script, as started from another folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return fresh_process.run(code, *arguments, environment=environment, folder=Path("/"))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The record and the words of a run on tiny shapes: the code that a GPU machine will run.

    Every section: ``--rehearse``.
    """
    if (reason := why_no_interpreter()) is not None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("rehearsal") / "gpu.json"
    names = ("rows", "gram", "fit", "deform", "ceilings", "trunk bfloat16", "two_four")
    done = call("--rehearse", "--only", *names, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    assert record["failed"] == [] and list(record["sections"]) == list(names)
    return record, done.stdout


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
    assert run.run_all(sections, one, {"kind": "test"}, path, 90.0) == 1
    record = json.loads(path.read_text())
    assert record["failed"] == ["bad"] and record["sections"] == outcomes
    assert limits["good"] == 30.0 and limits["bad"] <= 75.0, "the one behind it keeps its reserve"
    assert limits["after"] == 30.0
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


def test_sections_run_in_a_rehearsal(rehearsal: tuple[dict[str, Any], str]) -> None:
    record = rehearsal[0]
    assert record["rehearsal"]
    assert record["sections"]["fit"]["result"]["spectra"] == 2
    assert record["sections"]["fit"]["result"]["time"] is None, "a rehearsal measures nothing"
    assert record["machine"]["versions"]["torch"]
    deform = record["sections"]["deform"]["result"]
    assert list(deform) == [f"tiny, 3 queries, D 8, {kind}" for kind in ("float32", "float16")]
    assert all(case["error"] <= case["bound"] and case["ours"] is None for case in deform.values())


def test_trunk_sections_run_in_a_rehearsal(rehearsal: tuple[dict[str, Any], str]) -> None:
    """Plan, pack, check and record as on a GPU: reference kernels, tiny shapes, no times."""
    cases = rehearsal[0]["sections"]["trunk bfloat16"]["result"]["cases"]
    assert list(cases) == ["32x48 b1", "32x32 b2"]
    for case in cases.values():
        sides = {"eager", "masked", "dense model", "best dense in a graph"}
        assert sides | {"baseline"} == set(case)
        assert all(case[side]["exact"] and case[side]["bound"] > 0 for side in sides)
        excluded = {"eager": "not timed", "best dense in a graph": "not timed"}
        assert case["baseline"] == {"name": None, "ms": None, "excluded": excluded}
        assert case["masked"]["time"] is None and case["masked"]["error"] < 0.02
        assert len(case["masked"]["layers"]) == 21 and case["masked"]["chains"]
        assert any(row["kernel"].startswith("gemm") for row in case["masked"]["layers"])


def test_an_inexact_dense_side_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import trunk

    def side(ms: float, error: float, own: float | None) -> dict[str, Any]:
        return {"time": {"ms": ms}, **trunk.judged(error, "bfloat16", own)}

    record = {
        "eager": side(9.0, 0.01, None),
        "compiled": side(1.0, 0.5, 0.01),  # the fastest, and wrong
        "compiled in a graph": side(2.0, math.nan, 0.01),
        "best dense in a graph": side(6.0, 0.02, 0.01),
        "masked": side(3.0, 0.01, 0.01),
    }
    dense = tuple(name for name in record if name != "masked")
    found = trunk.with_baseline(record, dense)
    assert found["baseline"]["name"] == "best dense in a graph" and found["baseline"]["ms"] == 6.0
    assert found["masked"]["speedup"] == 2.0
    assert found["baseline"]["excluded"] == {
        "compiled": "inexact: its error is 5.0e-01, accepted are 2.0e-02",
        "compiled in a graph": "inexact: its error is not finite, accepted are 2.0e-02",
    }
    json.dumps(found, allow_nan=False)
    assert "compiled 1.000 ms (inexact" in ", ".join(trunk._times(found))
    # Eager is the yardstick: it may not excuse others by being wrong itself.
    assert not trunk.judged(math.inf, "float16")["exact"]
    assert trunk.judged(0.1, "float16", math.inf) == {"error": 0.1, "bound": 2e-3, "exact": False}
    assert trunk.judged(3e-3, "float16", 2e-3)["exact"]
    only_wrong = trunk.with_baseline({"eager": side(9.0, 5.0, None), "masked": side(1, 0, 5.0)},
                                     ("eager",))  # fmt: skip
    assert only_wrong["baseline"]["name"] is None and "speedup" not in only_wrong["masked"]


def test_a_wrong_side_of_ours_fails_the_section_and_has_no_speed_up(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import trunk

    case = {
        "eager": {"time": {"ms": 2.0}, **trunk.judged(1e-6, "float32")},
        "masked": {"time": {"ms": 1.0}, **trunk.judged(0.5, "float32", 1e-6)},
    }
    found = trunk.with_baseline(case, ("eager",))
    assert "speedup" not in found["masked"] and found["baseline"]["name"] == "eager"
    with pytest.raises(RuntimeError, match="a, masked: inexact: its error is 5.0e-01"):
        trunk._check_ours({"skipped": {"not run": "no time"}, "a": found})
    trunk._check_ours({"a": {"eager": found["masked"]}})  # a dense side fails nothing


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


def test_what_a_section_started_ends_with_it(run, tmp_path: Path, monkeypatch) -> None:
    """torch.compile leaves processes that hold the output open; the run must not wait for them."""
    script = tmp_path / "run.py"
    monkeypatch.setattr(run, "__file__", str(script))
    script.write_text(
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "os._exit(3)\n"
    )
    found = run.in_a_process("any", 60.0, False)
    assert "exit code 3" in found["error"] and found["seconds"] < 60
    status = Path("/proc") / (tmp_path / "pid").read_text() / "status"
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the process that the section started is still there")


def test_every_section_has_its_place_and_the_trunk_comes_early(run) -> None:
    listed = call("--list").stdout.split("\n")[:-1]
    assert listed == list(run.ORDER), "name a new section in run.ORDER"
    assert listed.index("trunk bfloat16") < 3


def test_the_two_four_section_runs_in_a_rehearsal_and_says_why_it_measures_nothing(
    rehearsal: tuple[dict[str, Any], str],
) -> None:
    record, said = rehearsal
    result = record["sections"]["two_four"]["result"]
    assert result["not timed"] == "a rehearsal has no GPU" and "not timed" in said
    assert list(result["layers"]) == ["layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    for entry in result["layers"].values():
        assert 0 < entry["parts"] < entry["parts_of_dense"] and entry["density"] < 0.5
