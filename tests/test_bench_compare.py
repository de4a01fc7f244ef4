"""Result files: what is accepted, what is compared, and the gate that one regression closes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bench_results as make
import pytest

from opentrans.cli import main
from opentrans_kernels.bench import compare, schema
from opentrans_kernels.bench.machines import machine_differences, machine_slug
from opentrans_kernels.errors import CheckpointError, OpenTransError


def store(path: Path, result: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def put(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``result`` with the value at a dotted path replaced; ``...`` deletes it."""
    changed = copy.deepcopy(result)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    holder: Any = changed
    for part in parents:
        holder = holder[part]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return changed


@pytest.mark.parametrize("kind", sorted(make.ALL))
def test_every_kind_has_a_form_and_a_valid_example(tmp_path: Path, kind: str) -> None:
    assert set(make.ALL) == set(schema.KINDS)
    loaded = compare.load_result(store(tmp_path / "r.json", make.ALL[kind]()))
    assert schema.kind_of(loaded) == (kind, schema.VERSION)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("baseline.ms", ..., "baseline.ms is missing"),
        ("baseline.ms", -1.0, "baseline.ms is -1.0, expected a number above 0"),
        ("accelerated.ms", "fast", "accelerated.ms is 'fast'"),
        ("layers.1.exact", 1, "layers[1].exact is 1, expected true or false"),
        ("threads", True, "threads is True, expected a whole number"),
        ("canary.disturbed", ..., "canary.disturbed is missing"),
        ("variants.eager.available", None, "variants.eager.available is None"),
        ("machine", [], "machine is [], expected an object"),
        ("layers", {}, "layers is {}, expected a list"),
        ("mask.flop_density", 1.5, "mask.flop_density is 1.5, expected a number from 0 to 1"),
        ("max_rel_err", float("nan"), "max_rel_err is nan, expected a number"),
    ],
)
def test_malformed_files_are_refused_with_the_place(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    file = store(tmp_path / "r.json", put(make.trunk(), path, value))
    with pytest.raises(OpenTransError) as caught:
        compare.load_result(file)
    message = str(caught.value)
    assert said in message and "r.json" in message
    assert "Measure it again with 'opentrans bench trunk" in message


def test_all_problems_are_counted_and_three_are_shown() -> None:
    broken = make.trunk()
    for key in ("baseline", "accelerated", "speedup", "exact", "layers"):
        del broken[key]
    with pytest.raises(OpenTransError, match=r"baseline is missing; .* \(and 2 more\)"):
        schema.check_result(broken, "r.json")


def test_old_new_and_foreign_files_are_refused(tmp_path: Path) -> None:
    old = make.trunk()
    for key in ("schema", "canary", "complete", "peers"):
        del old[key]
    with pytest.raises(OpenTransError, match=r"schema version 1, needed is 2.*Measure it again"):
        schema.check_result(old, "old.json")
    with pytest.raises(OpenTransError, match="by a later version. Update opentrans_kernels"):
        schema.check_result(put(make.op(), "schema.version", 3), "new.json")
    with pytest.raises(OpenTransError, match="kind 'warp'; known are trunk, op"):
        schema.check_result(put(make.op(), "schema.kind", "warp"), "other.json")
    for foreign in ([1, 2], {}, {"schema": 2}, {"schema": {"kind": "op"}}, None):
        with pytest.raises(OpenTransError, match="no result of 'opentrans bench'"):
            schema.check_result(foreign, "foreign.json")
    (tmp_path / "cut.json").write_text('{"schema": {"kind": "tru')
    with pytest.raises(OpenTransError, match="cut.json is not JSON.*Measure it again"):
        compare.load_result(tmp_path / "cut.json")
    with pytest.raises(CheckpointError, match="cannot be read.*Name a file"):
        compare.load_result(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("cpu", "flags", "cpus", "slug"),
    [
        ("AMD EPYC", ["avx2", "avx512f"], 2, "amd-epyc-zen4-2cpu"),
        ("AMD EPYC 9B45 128-Core Processor", ["avx512f", "avx512_vp2intersect"], 8,
         "amd-epyc-9b45-zen5-8cpu"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", ["avx512f", "avx512_vnni"], 4,
         "intel-xeon-cascadelake-4cpu"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", ["avx2"], 8, "intel-core-i7-8650u-avx2-8cpu"),
        ("Neoverse/N1", ["asimd"], 1, "neoverse-n1-neon-1cpu"),
        ("", [], 2, "unknown-2cpu"),
    ],
)  # fmt: skip
def test_machine_names(cpu: str, flags: list[str], cpus: int, slug: str) -> None:
    assert machine_slug({"cpu": cpu, "flags": flags, "cpus": cpus}) == slug


def test_machines_differ_by_what_decides_speed() -> None:
    assert machine_differences(make.MACHINE, {**make.MACHINE, "load_average": [9]}) == []
    found = machine_differences(make.MACHINE, {**make.MACHINE, "flags": ["avx2"], "cpus": 4})
    assert found == ["flags: ['avx512f', 'fma'] against []", "cpus: 2 against 4"]


def gate(tmp_path: Path, base: Any, new: Any, *extra: str) -> int:
    files = store(tmp_path / "base.json", base), store(tmp_path / "new.json", new)
    return main(["bench", "compare", *files, "--fail-if-slower", "5%", *extra])


def test_one_regression_among_many_cases_closes_the_gate(tmp_path: Path, capsys) -> None:
    base = make.trunk()
    base["layers"] = [make.layer(f"layer{i}", 2.0, 1.0) for i in range(40)]
    assert gate(tmp_path, base, base) == 0
    assert "no case is slower by more than 5.0%" in capsys.readouterr().out
    new = copy.deepcopy(base)
    new["layers"][17] = make.layer("layer17", 2.0, 1.06)
    assert gate(tmp_path, base, new) == 1
    said = capsys.readouterr()
    assert "layer17 is 6.0% slower: 2.000x before, 1.887x now" in said.err
    assert said.out.count("REGRESSION") == 1
    new["layers"][17] = make.layer("layer17", 2.0, 1.04)
    assert gate(tmp_path, base, new) == 0
    faster = copy.deepcopy(base)
    faster["layers"][17] = make.layer("layer17", 2.0, 0.5)
    assert gate(tmp_path, base, faster) == 0


def test_a_slower_clock_is_no_regression_but_a_slower_kernel_is(tmp_path: Path) -> None:
    base, slow_clock = make.trunk(25.0), make.trunk(25.0)
    slow_clock["accelerated"] = make.timing(50.0)
    slow_clock["baseline"] |= make.timing(200.0)
    assert gate(tmp_path, base, slow_clock) == 0
    assert gate(tmp_path, base, make.trunk(27.0)) == 1


def test_the_yardstick_is_the_same_dense_variant_on_both_sides(tmp_path: Path) -> None:
    base, new = make.trunk(), make.trunk()
    # Another variant became the fastest: our kernel did not become slower by that.
    new["variants"]["eager"] |= {**make.timing(50.0), "speedup_of_accelerated": make.spread(2.0)}
    new["baseline"] = {"name": "eager", **make.timing(50.0)}
    new["speedup"] = 2.0
    assert gate(tmp_path, base, new) == 0


@pytest.mark.parametrize("kind", sorted(make.ALL))
def test_every_kind_can_be_compared(tmp_path: Path, kind: str) -> None:
    base = make.ALL[kind]()
    assert gate(tmp_path, base, base) == 0
    slower = {
        "trunk": lambda r: put(r, "variants.compile.speedup_of_accelerated", make.spread(3.0)),
        "op": lambda r: put(r, "rows.2.speedup", make.spread(0.5)),
        "model": lambda r: put(r, "rows.3.speedup", make.spread(3.0)),
        "alpha": lambda r: put(
            r, "sides.published xmin_peak.slower_than", {"ours xmin_peak": make.spread(1.5)}
        ),
        "training": lambda r: put(r, "results.0.rows.1.time_vs_baseline", make.spread(0.9)),
    }
    assert gate(tmp_path, base, slower[kind](base)) == 1


def test_different_machines_are_refused(tmp_path: Path, capsys) -> None:
    other = put(put(make.trunk(), "machine.cpu", "Intel Xeon"), "machine.cpus", 8)
    assert gate(tmp_path, make.trunk(), other) == 2
    said = capsys.readouterr().err
    assert "different machines (amd-epyc-zen4-2cpu and intel-xeon-skylake-8cpu" in said
    assert "Measure both on one machine" in said


def test_other_cases_and_missing_cases_are_not_passed_over(tmp_path: Path, capsys) -> None:
    base = make.trunk()
    assert gate(tmp_path, base, make.trunk(size=512)) == 2
    assert "no case in common" in capsys.readouterr().err
    fewer = put(base, "layers", base["layers"][:2])
    assert gate(tmp_path, base, fewer) == 1
    assert "1 cases of BASE were not measured in NEW" in capsys.readouterr().err
    assert gate(tmp_path, base, fewer, "--allow-missing") == 0
    inexact = put(make.op(), "rows.1.speedup", None)
    assert gate(tmp_path, make.op(), inexact) == 1


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("trunk", "subject.arch", "RN101"),
        ("trunk", "subject.weights", "weights of RN50.pt"),
        ("model", "subject.arch", "RN101"),
        ("model", "subject.weights", "weights of RN50.pt"),
        ("alpha", "subject", "RN101 with the weights of RN101.pt"),
        ("training", "mask", "uniform:0.80"),
    ],
)
def test_another_network_is_another_case(
    tmp_path: Path, capsys, kind: str, path: str, value: str
) -> None:
    base = make.ALL[kind]()
    other = put(base, path, value)
    assert gate(tmp_path, base, other) == 2
    said = capsys.readouterr().err
    assert "no case in common" in said and value in said
    assert gate(tmp_path, other, other) == 0


@pytest.mark.parametrize("kind", sorted(make.ALL))
def test_a_case_that_one_side_has_twice_is_refused(tmp_path: Path, capsys, kind: str) -> None:
    single = store(tmp_path / "single.json", make.ALL[kind]())
    for name in ("one.json", "two.json"):
        store(tmp_path / "both" / name, make.ALL[kind]())
    assert main(["bench", "compare", single, str(tmp_path / "both")]) == 2
    said = capsys.readouterr().err
    assert "one.json and in " in said and "two.json" in said and "move the other out" in said


def test_rows_of_one_file_that_are_the_same_case_are_refused() -> None:
    rows = make.op()["rows"]
    with pytest.raises(OpenTransError, match="twice in r.json.*Keep one of them"):
        compare.compare({"r.json": put(make.op(), "rows", [*rows, rows[0]])}, {"n": make.op()})


@pytest.mark.parametrize(
    ("kind", "path", "missing", "said"),
    [
        ("trunk", "exact", "trunk RN50, synthetic", "inexact, without a ratio: the whole result"),
        ("trunk", "layers.1.exact", "layer1.0.conv2", "without a ratio: 1 of 3 rows"),
        ("op", "rows.1.exact", "density 0.5", "without a ratio: 1 of 4 rows"),
        ("model", "rows.2.exact", "trunk 384x384", "without a ratio: 1 of 4 rows"),
    ],
)
def test_inexact_is_not_measured(
    tmp_path: Path, capsys, kind: str, path: str, missing: str, said: str
) -> None:
    base = make.ALL[kind]()
    wrong = put(base, path, False)
    assert gate(tmp_path, base, wrong) == 1
    err = capsys.readouterr().err
    assert said in err and "1 cases of BASE were not measured in NEW" in err
    found = compare.compare({"b": base}, {"n": wrong})
    assert len(found.missing) == 1 and missing in found.missing[0]
    assert not any(change.name in found.missing for change in found.changes)


def test_an_inexact_alpha_has_no_case() -> None:
    wrong = {**make.alpha(), "exact": False}
    with pytest.raises(OpenTransError, match="NEW has none.*Inexact results have no ratio"):
        compare.compare({"b": make.alpha()}, {"n": wrong})


def test_disturbed_and_interrupted_runs_are_named(tmp_path: Path, capsys) -> None:
    base = make.trunk()
    new = put(put(base, "canary.disturbed", True), "canary.reasons", ["the clock fell by 9%"])
    new = put(put(new, "complete", False), "versions.torch", "2.15.0")
    assert gate(tmp_path, base, new) == 0
    said = capsys.readouterr().err
    assert "disturbed machine: the clock fell by 9%" in said and "was interrupted" in said
    assert "torch differs: 2.14.1 before, 2.15.0 after" in said


def test_directories_are_compared_file_by_file(tmp_path: Path, capsys) -> None:
    for side, ms in (("a", 25.0), ("b", 30.0)):
        store(tmp_path / side / "deep" / "trunk.json", make.trunk(ms))
        store(tmp_path / side / "op.json", make.op())
    both = [str(tmp_path / side) for side in "ab"]
    target = tmp_path / "out.json"
    assert main(["bench", "compare", *both, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["changes"][0]["slower"] == pytest.approx(0.2)
    assert found["machine"] == "amd-epyc-zen4-2cpu" and found["limit"] is None
    assert len(found["changes"]) == 1 + 3 + 4
    (tmp_path / "empty").mkdir()
    assert main(["bench", "compare", both[0], str(tmp_path / "empty")]) == 2
    assert "holds no result files" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["five", "-1%", "", "nan", "inf"])
def test_impossible_limits_are_refused(text: str) -> None:
    with pytest.raises(OpenTransError, match="Write 5% or 0.05"):
        compare.parse_limit(text)
    assert compare.parse_limit("5%") == compare.parse_limit("0.05") == 0.05
