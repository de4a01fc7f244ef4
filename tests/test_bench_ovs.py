"""``benchmarks/bench_ovs.py``: its arithmetic, the form of its result, and small real runs."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accel_nets
import bench_results
import pytest
import torch
from ovs_nets import small_clip

from opentrans_kernels import accelerate
from opentrans_kernels.bench.compare import load_results
from opentrans_kernels.bench.machines import machine_slug
from opentrans_kernels.bench.timing import Timing, TimingTable
from opentrans_kernels.errors import OpenTransError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a narrow tower, without pinning this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_ovs
    import ovs_inference
    import ovs_text

    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_ovs, "choose_cpus", lambda threads: None)
    monkeypatch.setattr("opentrans_kernels.bench.environment.onednn_isa", lambda: None)
    for module in (ovs_inference, ovs_text):
        monkeypatch.setattr(module, "synthetic_rn50", lambda image_size: accel_nets.tower())
    # Measured, layers this narrow may all stay dense.
    quick = functools.partial(accelerate, measure=False)
    monkeypatch.setattr(ovs_inference, "accelerate", quick)
    monkeypatch.setattr(ovs_text, "load_clip", lambda weights, arch: small_clip())
    yield bench_ovs
    torch.set_num_threads(threads)


@pytest.fixture
def form(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import ovs_result

    return ovs_result


def table(**milliseconds: float) -> TimingTable:
    """One sample per variant; "whole_eager" stands for "whole: eager"."""
    names = {key.replace("_", ": ", 1): value for key, value in milliseconds.items()}
    return TimingTable({name: Timing(name, 1, [ms], [ms]) for name, ms in names.items()}, 1, 0.0)


TIMES = {
    "whole_eager": 120.0, "whole_compiled": 100.0, "whole_accelerated": 75.0,
    "backbone_eager": 60.0, "backbone_compiled": 40.0, "backbone_accelerated": 10.0,
}  # fmt: skip


def test_the_baseline_is_the_fastest_dense_variant_and_bounds_follow(form: ModuleType) -> None:
    found = form.summary(table(**TIMES), exact=True)
    assert found["baseline"] == {"whole": "whole: compiled", "backbone": "backbone: compiled"}
    assert found["speedup"]["median"] == pytest.approx(100 / 75)
    assert found["backbone_speedup"]["median"] == pytest.approx(4.0)
    assert found["backbone_share_dense"] == pytest.approx(0.4)
    assert found["amdahl_bound"] == pytest.approx(1 / 0.6)
    assert found["amdahl_predicted"] == pytest.approx(1 / (0.6 + 0.4 / 4))


def test_without_exactness_there_is_no_ratio(form: ModuleType, bench: ModuleType) -> None:
    found = form.summary(table(**TIMES), exact=False)
    assert found["speedup"] is found["backbone_speedup"] is found["amdahl_predicted"] is None
    assert "inexact" in bench.faults("inference", found)[0]
    slow = form.summary(table(**{**TIMES, "whole_accelerated": 101.0}), exact=True)
    assert "0.99 is below 1" in bench.faults("inference", slow)[0]
    assert bench.faults("inference", form.summary(table(**TIMES), exact=True)) == []


def test_ours_may_err_twice_as_much_as_dense(form: ModuleType) -> None:
    row = form.error_row({"eager": 3e-6, "compiled": 1e-6, "accelerated": 6e-6})
    assert row == {"ours": 6e-6, "dense": 3e-6, "limit": 6e-6} and form.is_exact({"x": row})
    assert not form.is_exact({"x": {**row, "ours": 6.1e-6}})
    assert not form.is_exact({"x": {**row, "ours": float("nan")}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_inexact_wherever_it_stands(
    form: ModuleType, value: float
) -> None:
    good = torch.ones(3)
    outputs = {"eager": good, "accelerated": good, "accelerated, head compiled": good * value}
    for order in (outputs, dict(reversed(outputs.items()))):
        errors = form.relative_errors(order, good)
        assert errors["accelerated"] == 0 and not form.is_exact({"x": form.error_row(errors)})


def test_a_tower_that_stayed_dense_is_no_measurement(form: ModuleType) -> None:
    tower = accel_nets.tower()
    with pytest.raises(OpenTransError, match="no layer .*global:0.90"):
        form.layers_of(tower)
    accel_nets.random_masks(tower).apply_(tower)
    accelerate(tower, measure=False)
    assert form.layers_of(tower) > 0


def run_small(bench: ModuleType, folder: Path, *words: str) -> dict[str, Any]:
    file = folder / "ovs.json"
    small = ["--mask", "uniform:0.80", "--size", "64", "--train-size", "64", "--prompts", "3"]
    # Exit code 1 is a judgement about speed, and a tower this narrow has none.
    assert bench.main([*words, *small, "--rounds", "2", "--json", str(file)]) in (0, 1)
    return json.loads(file.read_text())


def test_both_parts_run_and_their_result_has_the_form(
    bench: ModuleType, form: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_small(bench, tmp_path, "--parts", "inference", "text")
    assert form.check_form(result) is result
    assert result["complete"] and {"before", "after"} <= set(result["canary"])
    assert result["command"][:3] == ["python", "benchmarks/bench_ovs.py", "--parts"]
    assert result["command"][-2:] == ["--json", "ovs.json"], "the place is nobody's business"
    assert result["source"] is None or len(result["source"]["commit"]) == 40
    found = result["parts"]["inference"]
    assert found["exact"] and found["accelerated_layers"] > 0
    assert found["errors"]["logits"]["ours"] > 0, "compared with itself"
    assert found["timings"].keys() >= {"whole: eager", "backbone: accelerated", "head: eager"}
    assert result["parts"]["text"]["speedup"]["median"] > 0
    shown = capsys.readouterr().out
    assert "Amdahl's law" in shown and "not timed: compiled: not asked for" in shown


def test_an_inexact_accelerated_tower_fails_without_a_ratio(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ovs_inference

    def broken(tower: torch.nn.Module, **options: Any) -> Any:
        with torch.no_grad():
            tower.layer4[0].conv3.weight.mul_(1.01)
        return accelerate(tower, measure=False, **options)

    monkeypatch.setattr(ovs_inference, "accelerate", broken)
    result = run_small(bench, tmp_path, "--parts", "inference")
    assert result["failed_checks"] == ["inference: the accelerated output is inexact"]
    assert result["parts"]["inference"]["speedup"] is None
    shown = capsys.readouterr().out
    assert "INEXACT" in shown and "no speed-up is given" in shown and "times faster" not in shown


def a_result(form: ModuleType) -> dict[str, Any]:
    part = {
        **form.summary(table(**TIMES), exact=True),
        "errors": {"logits": {"ours": 1e-7, "dense": 1e-7, "limit": 1e-6}},
        "unavailable": {}, "accelerated_layers": 3, "size": 64, "classes": 150,
    }  # fmt: skip
    return {
        **bench_results.envelope("ovs"), "command": ["python"], "failed_checks": [],
        "weights": "synthetic", "mask": {"label": "global:0.90", "synthetic": True}, "rounds": 1,
        "compile": True, "parts": {"inference": part},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("canary",), "canary is missing"),
        (("machine",), "machine is missing"),
        (("command",), "command is missing"),
        (("source", "dirty"), None),  # git may be unable to tell
        (("parts", "inference", "errors"), "errors is missing"),
        (("parts", "inference", "accelerated_layers"), "accelerated_layers is missing"),
    ],
)
def test_a_result_without_what_it_needs_is_refused(
    form: ModuleType, path: tuple[str, ...], message: str | None
) -> None:
    good = a_result(form)
    assert form.check_form(good) is good
    bad = copy.deepcopy(good)
    place = bad
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    if message is None:
        assert form.check_form(bad) is bad
        return
    with pytest.raises(OpenTransError, match=f"{message}.*python benchmarks/bench_ovs.py"):
        form.check_form(bad)
    with pytest.raises(OpenTransError, match="schema.kind"):
        form.check_form({**good, "schema": {"kind": "trunk", "version": 2}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "masks.safetensors"], "is no recipe.*global:0.90"),
        (["--mask", "global:2"], "global:2"),
        (["--parts", "fc-clip", "--fc-clip", "nowhere"], "cannot be measured|no checkout"),
        (["--size", "50"], "--size 50 must be a multiple of 32"),
        (["--train-size", "50"], "--train-size 50 must be a multiple of 32"),
    ],
)
def test_bad_input_is_named_with_its_fix(
    bench: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_part_that_cannot_be_measured_is_left_out_with_the_reason(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(bench, "absent", lambda options: "no detectron2")
    monkeypatch.setattr(bench, "run", lambda parts, options, out: ran.extend(parts) or 0)
    assert bench.main([]) == 0 and ran == ["inference", "text"]
    assert "fc-clip is left out: no detectron2" in capsys.readouterr().out
    assert bench.main(["--parts", "fc-clip"]) == 2
    assert "no detectron2. Clone" in capsys.readouterr().err
    monkeypatch.setattr(bench, "absent", lambda options: None)
    assert bench.main([]) == 0 and ran[2:] == ["inference", "text", "fc-clip"]


@pytest.mark.slow
def test_the_real_fc_clip_is_measured(form: ModuleType, tmp_path: Path) -> None:
    trees = Path(os.environ.get("OPENTRANS_TREES", ""))
    if not all((trees / name).is_dir() for name in ("detectron2", "fc-clip")) or not trees.name:
        pytest.skip("OPENTRANS_TREES names no folder with checkouts of detectron2 and fc-clip")
    command = [
        sys.executable, str(FOLDER / "bench_ovs.py"), "--parts", "fc-clip", "--fc-clip",
        str(trees / "fc-clip"), "--size", "128", "--rounds", "1", "--json", "ovs.json",
    ]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": str(trees / "detectron2"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    result = form.check_form(json.loads((tmp_path / "ovs.json").read_text()))
    found = result["parts"]["fc-clip"]
    assert found["exact"] and found["accelerated_layers"] > 10
    assert set(found["errors"]) >= {"stem", "res2", "res3", "res4", "res5", "sem_seg"}
    assert "PyTorch path" in found["deformable_attention"]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import ovs_tables

    return ovs_tables


@pytest.fixture
def stored(form: ModuleType, tmp_path: Path) -> tuple[Path, Path]:
    """(file of a result, folder of pages with old tables)."""
    file = tmp_path / "results" / machine_slug(bench_results.MACHINE) / "ovs" / "one.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(a_result(form)))
    (tmp_path / "docs").mkdir()
    for page, names in (("tiny-run.md", ("inference", "text")), ("fc-clip.md", ("fc-clip",))):
        marked = (f"<!-- table:ovs-{name} -->\nold {name}\n<!-- /table:ovs-{name} -->\n"
                  for name in names)  # fmt: skip
        if page == "fc-clip.md":
            marked = (*marked, "<!-- table:systems -->\nold systems\n<!-- /table:systems -->\n")
        (tmp_path / "docs" / page).write_text("before\n" + "".join(marked) + "after\n")
    return file, tmp_path / "docs"


def rewrite(tables: ModuleType, stored: tuple[Path, Path], *words: str) -> int:
    file, docs = stored
    return tables.main(["--results", str(file.parents[2]), "--docs", str(docs), *words])


def test_tables_come_from_results_and_stay_where_there_is_none(
    tables: ModuleType, stored: tuple[Path, Path]
) -> None:
    assert rewrite(tables, stored, "--check") == 1
    assert "old inference" in (stored[1] / "tiny-run.md").read_text(), "--check writes nothing"
    assert rewrite(tables, stored) == 0 and rewrite(tables, stored, "--check") == 0
    page = (stored[1] / "tiny-run.md").read_text()
    assert "old inference" not in page and "old text" in page
    assert "| compiled (fastest dense) | 100 | 40 |" in page
    assert "| accelerated | 75 | 10 |" in page
    ratios = "**1.33x**, 1.33-1.33, 100 | **4.00x**, 4.00-4.00, 40 |"
    assert f"| against the fastest dense, its ms | {ratios}" in page
    assert "The backbone is 40% of the dense time" in page and "than 1.67 times" in page
    assert "uncommitted changes: False" in page and "disturbed" not in page
    assert "old fc-clip" in (stored[1] / "fc-clip.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": False}, "was interrupted"),
        ({"failed_checks": ["inference: inexact"]}, "failed: inference: inexact"),
        ({"machine": {**bench_results.MACHINE, "cpus": 3}}, "but lies in"),
        ({"canary": None}, "canary is None"),
    ],
)
def test_results_that_may_not_be_shown_are_refused(
    tables: ModuleType,
    stored: tuple[Path, Path],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored[0].write_text(json.dumps(json.loads(stored[0].read_text()) | change))
    assert rewrite(tables, stored) == 2
    assert message in (said := capsys.readouterr().err) and "Measure it again" in said


def test_the_pages_of_this_checkout_are_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0, "run: make readme-tables"


def test_a_folder_with_such_results_can_be_reported_and_compared(
    stored: tuple[Path, Path],
) -> None:
    machine = stored[0].parents[1]
    (machine / "trunk.json").write_text(json.dumps(bench_results.trunk()))
    assert [Path(name).name for name in load_results([machine])] == ["trunk.json"]
    with pytest.raises(OpenTransError, match="'ovs'"):
        load_results([stored[0]])


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupt_keeps_the_finished_parts(
    bench: ModuleType, form: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:  # fmt: skip
    def measure(part: str, options: Any, out: Any) -> dict[str, Any]:
        if part == "text" or not finished:
            raise KeyboardInterrupt
        return a_result(form)["parts"]["inference"]

    monkeypatch.setattr(bench, "measure", measure)
    file = tmp_path / "ovs.json"
    assert bench.main(["--parts", "inference", "text", "--json", str(file)]) == 130
    assert file.exists() == bool(finished)
    if finished:
        result = form.check_form(json.loads(file.read_text()))
        assert not result["complete"] and list(result["parts"]) == ["inference"]
