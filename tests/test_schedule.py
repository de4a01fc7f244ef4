"""Units of work: bit-equal however they are split, and what their times say about N cores."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accel_nets as nets
import pytest
import torch

from opentrans.cli import bench_schedule, main
from opentrans.cli.render import Output
from opentrans_kernels import OpenTransError, accelerate, native
from opentrans_kernels.bench import schedule, schema
from opentrans_kernels.bench.parts import REST, WHOLE, PartTimes
from opentrans_kernels.bench.schedule import DEALT, KERNELS, STATIC, Region, makespan, read_regions
from opentrans_kernels.bench.stages import stage_inputs, stage_scaling
from opentrans_kernels.pack import SparseWeight

needs_kernels = pytest.mark.skipif(not native.load(), reason="no compiled kernels")


def recorded(call, cores: int, by_unit: bool):  # type: ignore[no-untyped-def]
    """What ``call`` returns when it is cut as for ``cores`` threads, and its regions."""
    record = torch.ops.opentrans_kernels
    record.record_units(cores, by_unit)
    try:
        with torch.no_grad():
            out = call()
        return out, read_regions(record.recorded_units(torch.empty(0)).tolist())
    finally:
        record.record_units(0, False)


@needs_kernels
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (96, 224)])
def test_every_split_gives_the_same_bits(size: tuple[int, int]) -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model, 0.1), measure=False, input_size=size)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    parts = list(stage_inputs(model, x))

    def run() -> torch.Tensor:
        y = x
        for _, modules, _ in parts:
            for module in modules:
                y = module(y)
        return y

    with torch.no_grad():
        expected = run()
    seen = set()
    for cores, by_unit in itertools.product((1, 2, 3, 5, 8, 16, 64, 500), (False, True)):
        found, regions = recorded(run, cores, by_unit)
        assert torch.equal(found, expected), (cores, by_unit)
        assert (cores == 1) == (not regions)
        assert all(
            len(one.seconds) == (one.units if by_unit else -(-one.units // -(-one.units // cores)))
            for one in regions
        )
        seen |= {one.dealt for one in regions}
    assert seen == {False, True}
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                assert torch.equal(run(), expected), threads
        finally:
            torch.set_num_threads(1)


@needs_kernels
def test_a_small_image_is_cut_until_every_core_has_work() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 64, 1, 1, generator=generator)
    packed = SparseWeight.from_dense(weight, torch.zeros(128))
    x = torch.randn(1, 64, 7, 7, generator=generator)
    call = lambda: torch.ops.opentrans_kernels.sparse_conv2d(  # noqa: E731
        x, packed.structure, packed.values, packed.bias, None, 128, 1, 1, 0, False
    )
    expected = call()
    whole_tiles, _ = recorded(call, 1, True)
    assert torch.equal(whole_tiles, expected)
    for cores in (4, 6, 64):
        found, regions = recorded(call, cores, True)
        assert torch.equal(found, expected)
        region = regions[-1]  # behind the copy of planes that do not end in whole vectors
        # 49 pixels are 4 vectors of 16 or more smaller ones: a cut each, times the row blocks.
        assert region.dealt == (region.units > cores) and region.units >= min(cores, 4)


@needs_kernels
def test_recording_ends_and_bad_numbers_are_refused() -> None:
    record = torch.ops.opentrans_kernels
    for bad in (-1, 5000):
        with pytest.raises(RuntimeError, match="0 to 4096"):
            record.record_units(bad, True)
    with pytest.raises(RuntimeError, match="1 to 1000000"):
        record.empty_region_seconds(0)
    assert record.empty_region_seconds(3) >= 0
    assert record.recorded_units(torch.empty(0)).numel() == 0
    with pytest.raises(OpenTransError, match="at least 1"):
        schedule.measure_schedule(SimpleNamespace(), (32, 32), [0])  # type: ignore[arg-type]


def test_a_damaged_pack_is_reported_from_a_dealt_unit() -> None:
    if not native.load():
        pytest.skip("no compiled kernels")
    packed = SparseWeight.from_dense(torch.randn(256, 64, 1, 1), torch.zeros(256))
    structure = packed.structure.clone()
    structure[-1] = -1  # codes outside of the chunk
    call = lambda: torch.ops.opentrans_kernels.sparse_conv2d(  # noqa: E731
        torch.randn(1, 64, 30, 30), structure, packed.values, packed.bias, None, 256, 1, 1, 0, False
    )
    with pytest.raises(RuntimeError, match="damaged"):
        recorded(call, 3, True)
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError, match="damaged"):
            call()
    finally:
        torch.set_num_threads(1)


def test_makespans() -> None:
    assert makespan([], 4) == 0
    assert makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0, "the free core takes the next one"
    assert makespan([1.0, 1.0, 1.0, 3.0], 2) == 4.0, "in order: the long one comes last"
    assert makespan([1.0] * 5, 2, take_s=0.5) == 4.5
    assert makespan([2.0, 1.0], 64) == 2.0


def test_regions_are_read_back() -> None:
    words = [1.0, 4.0, 2.0, 0.5, 0.25, 0.0, 3.0, 1.0, 0.125]
    assert read_regions(words) == [Region(True, 4, (0.5, 0.25)), Region(False, 3, (0.125,))]


def test_schedules_of_a_part_are_simulated_from_its_fastest_calls() -> None:
    part = schedule._Part("layer1", one_thread=1.0)
    ranges = [Region(True, 4, (0.3, 0.2)), Region(False, 2, (0.2, 0.2))]
    units = [Region(True, 4, (0.25, 0.05, 0.1, 0.1)), Region(False, 2, (0.1, 0.3))]
    slow = [Region(one.dealt, one.units, tuple(9 * s for s in one.seconds)) for one in ranges]
    part.add(2, False, schedule._Call(0.1, slow))
    part.add(2, False, schedule._Call(0.1, ranges))
    part.add(2, True, schedule._Call(0.1, units))
    barriers = 2 * 0.01
    assert part.seconds(STATIC, 2, 0.01) == pytest.approx(0.1 + barriers + 0.3 + 0.2)
    assert part.seconds(KERNELS, 2, 0.01) == pytest.approx(0.1 + barriers + 0.25 + 0.2, abs=1e-6)
    assert part.seconds(DEALT, 2, 0.01) == pytest.approx(0.1 + barriers + 0.25 + 0.3, abs=1e-6)
    row = part.row(2, 0.01)
    assert row["efficiency"][STATIC] == pytest.approx(1 / (2 * 0.62))
    assert row["regions"] == 2 and row["regions_with_too_few_units"] == 0
    assert part.row(2, 0.01)["serial_ms"] == pytest.approx(100)


def test_a_barrier_that_waited_for_a_cpu_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.load():
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(schedule, "available_cpus", lambda: [0])
    assert schedule.barrier() == (
        schedule.ASSUMED_BARRIER_S,
        "assumed: this process may use one CPU",
    )
    monkeypatch.setattr(schedule, "available_cpus", lambda: [0, 1])
    for seconds, said in ((2e-3, "assumed: 2000 us were measured"), (4e-6, "smallest of")):
        fake = SimpleNamespace(empty_region_seconds=lambda _, s=seconds: s)
        monkeypatch.setattr(torch.ops, "opentrans_kernels", fake, raising=False)
        found, how = schedule.barrier()
        assert how.startswith(said) and found == (4e-6 if seconds < 1e-4 else 5e-6)


def test_the_part_table_is_of_one_round_and_adds_up() -> None:
    times = PartTimes(
        dense={"a": [6.0, 1.0, 9.0], REST: [4.0, 9.0, 1.0], WHOLE: [10.0, 10.0, 10.0]},
        accelerated={"a": [1.0, 4.0, 2.0], REST: [3.0, 6.0, 0.5], WHOLE: [4.0, 10.0, 2.5]},
    )
    rows = {name: (dense, ours) for name, dense, ours, _ in times.rows()}
    assert rows == {"a": (6.0, 1.0), REST: (4.0, 3.0), WHOLE: (10.0, 4.0)}
    for side in (0, 1):
        assert rows[WHOLE][side] == sum(row[side] for name, row in rows.items() if name != WHOLE)
    assert "2.50x" in str(times).splitlines()[-1]


def test_efficiency_of_every_stage_is_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.tower()
    x = torch.randn(1, 3, 64, 64)
    calls = itertools.count()

    def milliseconds(parts: list) -> list[float]:
        turn = next(calls)
        assert torch.get_num_threads() == (2, 1, 1, 2, 2, 1, 1, 2)[turn]
        return [(6.0 if torch.get_num_threads() == 1 else 4.0) * (1 + turn)] * len(parts)

    monkeypatch.setattr("opentrans_kernels.bench.stages._milliseconds", milliseconds)
    try:
        rows = stage_scaling(model, model, x, 2, rounds=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert [row["part"] for row in rows][-2:] == ["layer4", "the whole"]
    ratios = sorted([6 * 3 / (4 * 4), 6 * 6 / (4 * 5), 6 * 7 / (4 * 8)])
    for row in rows:
        assert row["efficiency"] == row["speedup"]["median"] / 2 == pytest.approx(ratios[1] / 2)
        assert row["one_thread_ms"] / row["ms"] == row["speedup"]["median"]
    found = {"one_thread_ms": 2.0, "ms": 1.0, "speedup": rows[0]["speedup"]}
    form = schema.TRUNK["thread_scaling"]
    assert list(schema.problems({**found, "stages": rows}, form)) == []
    assert list(schema.problems(found, form)) == [], "files from before stages load"
    assert list(schema.problems({**found, "stages": [{}]}, form))


def check_result(result: dict, shown: str) -> None:
    """Every part and number of cores, with efficiencies that follow from the times."""
    parts = [part["part"] for part in result["parts"]]
    assert parts == ["stem", "layer1", "layer2", "layer3", "layer4", "the whole"]
    for part in result["parts"]:
        assert part["part"] in shown and [row["cores"] for row in part["rows"]] == [2, 8]
        for row in part["rows"]:
            for name in schedule.SCHEDULES:
                efficiency = part["one_thread_ms"] / (row["cores"] * row["ms"][name])
                assert row["efficiency"][name] == pytest.approx(efficiency)
    assert "caches and memory bandwidth that cores share are ignored" in shown


@needs_kernels
def test_a_model_is_measured_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = nets.tower()
    subject = SimpleNamespace(model=model, masks=nets.random_masks(model, 0.1))
    cost = (5e-6, "given")
    before = copy.deepcopy(model.state_dict())
    result = schedule.measure_schedule(subject, (64, 64), [2, 8, 2], cost=cost, rounds=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert result["barrier_us"] == 5.0 and result["barrier"] == "given"
    labels = {"subject": {"arch": "tiny"}, "mask": {"label": "random"}, "input": [1, 3, 64, 64]}
    bench_schedule.show({**result, **labels}, Output(use_rich=False))
    check_result(result, capsys.readouterr().out)
    assert main(["bench", "schedule", "--cores", "0"]) == 2


@needs_kernels
@pytest.mark.slow
def test_the_command_writes_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    words = ["bench", "schedule", "--size", "64", "--cores", "2,8", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "opentrans", *words, "--json", str(file)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["schema"]["kind"] == "schedule" and result["complete"]
    check_result(result, done.stdout)
