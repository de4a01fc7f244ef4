"""``opentrans bench model --system``: sides, errors, parts, form, tables, and bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_results
import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from d2_models import MaskFormer, Segmenter, tower  # noqa: E402

from opentrans.cli import main  # noqa: E402
from opentrans.cli.bench_system import SYSTEM_NAMES, failures, show  # noqa: E402
from opentrans.cli.render import Output  # noqa: E402
from opentrans.systems_whole import WHOLE_SYSTEMS, build_whole  # noqa: E402
from opentrans_kernels.bench import whole as whole_module  # noqa: E402
from opentrans_kernels.bench.machines import machine_slug  # noqa: E402
from opentrans_kernels.bench.parts import REST, WHOLE, Toggle, time_parts  # noqa: E402
from opentrans_kernels.bench.system_form import check_system  # noqa: E402
from opentrans_kernels.bench.timing import Timing, TimingTable  # noqa: E402
from opentrans_kernels.bench.whole import (  # noqa: E402
    ALL,
    BOTH,
    EAGER,
    HEAD,
    LAST,
    OUR_TRUNK,
    TRUNK,
    Whole,
    measure_whole,
)
from opentrans_kernels.errors import MaskError, OpenTransError  # noqa: E402
from opentrans_kernels.heads import HeadReport  # noqa: E402
from opentrans_kernels.heads.parts import Found, HeadPart, head_parts, swap_in  # noqa: E402
from opentrans_kernels.plan.models import accelerated_parts  # noqa: E402

pytestmark = pytest.mark.usefixtures("extension")
SIZE = (64, 64)


def small(make: Callable[[], nn.Module] = MaskFormer) -> Whole:
    torch.manual_seed(0)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    return Whole(
        "ovs-mask", make().eval(), "backbone", lambda model, dtype: model(image.to(dtype))[0],
        {"queries": None, "classes": 5},
    )  # fmt: skip


def measured(whole: Whole | None = None, **options: Any) -> dict[str, Any]:
    options = {"rounds": 2, "compiling": False} | options
    return measure_whole(whole or small(), "uniform:0.8", SIZE, **options)


def stored(result: dict[str, Any]) -> dict[str, Any]:
    return {
        **bench_results.envelope("system"), "command": ["opentrans", "bench"], "failed_checks": [],
        "mask": {"label": "global:0.90", "synthetic": True}, **result,
    }  # fmt: skip


def test_every_side_is_the_same_network() -> None:
    whole = small()
    result = measured(whole)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [EAGER, LAST, OUR_TRUNK, HEAD, BOTH]
    assert result["reference"] == "float64" and result["dense_error"] > 0
    for row in rows.values():
        assert row["match"]["equal"] and row["argmax"] > 0.99 and row["speedup"]["median"] > 0
        assert row["ours"] == row["name"].startswith("our ")
    # On a busy machine the trunk's narrow layers may have stayed dense: two sides then agree.
    assert len({row["match"]["error"] for row in rows.values()}) > 1, "sides share their output"
    assert result["baseline"] in (EAGER, LAST)
    assert set(result["unavailable"]) == {TRUNK, ALL}
    assert result["accelerated_layers"] > 0 and result["head"]["replaced"] >= 12
    assert result["parts"][-1]["part"] == WHOLE and result["parts"][0]["part"] == "trunk"
    assert check_system(data := json.loads(json.dumps(stored(result))), "x.json") is data
    assert not failures(result) and head_parts(whole.model) and accelerated_parts(whole.model)


@pytest.mark.parametrize(
    ("threads", "clock", "baseline", "times"),
    [(1, "cpu", LAST, (120.0, 90.0)), (2, "wall", EAGER, (100.0, 50.0))],
)
def test_one_thread_counts_cpu_time_and_more_count_wall_time(
    threads: int,
    clock: str,
    baseline: str,
    times: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tables: ModuleType,
) -> None:
    wall_and_cpu = {EAGER: (100.0, 150.0), LAST: (110.0, 120.0)}

    def timed(calls: dict[str, Any], *, rounds: int, **_: Any) -> TimingTable:
        made = {}
        for name in calls:
            wall, cpu = wall_and_cpu.get(name, (50.0, 90.0))
            made[name] = Timing(name, 1, [wall] * rounds, [cpu] * rounds)
        return TimingTable(made, rounds, 0.0)

    monkeypatch.setattr(whole_module, "interleave", timed)
    before = torch.get_num_threads()
    try:
        result = measured(threads=threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (result["clock"], result["baseline"]) == (clock, baseline)
    ours = next(row for row in result["rows"] if row["name"] == BOTH)
    assert ours["median_round"] == {"baseline_ms": times[0], "ms": times[1]}
    assert ours["speedup"]["median"] == pytest.approx(times[0] / times[1])
    assert (ours["ms"], ours["cpu_ms"]) == (50.0, 90.0)
    data = check_system(stored(result) | {"threads": threads}, "x.json")
    show(dict(data), Output(None))
    shown = capsys.readouterr().out
    assert ("CPU ms" if clock == "cpu" else "wall ms") in shown
    assert ("compared by wall time" in shown) == (clock == "wall")
    assert (f"{BOTH}: 2 threads over one" in shown) == (threads > 1)
    assert f"{'CPU' if clock == 'cpu' else 'wall'} ms" in (page := tables.system_table(data))
    assert ("Our trunk and head, 2 threads over one: **" in page) == (threads > 1)
    if scaling := data["scaling"]:
        assert scaling["one_thread_ms"] / scaling["ms"] == scaling["ratio"]["median"]
    with pytest.raises(OpenTransError, match="clock"):
        check_system({**data, "clock": "sun"}, "x.json")


def test_a_mask_of_the_head_covers_what_is_not_the_tower(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, other = small(), small()
    result = measured(whole, head_mask="uniform:0.75")
    measured(other)
    head = result["head_mask"]
    assert head["label"] == "uniform:0.75" and head["layers"] > 0
    assert head["density"] == pytest.approx(0.25, abs=0.01)
    for (name, weight), (_, plain) in zip(
        whole.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        if name.startswith(f"{whole.tower}."):
            assert torch.equal(weight, plain), name
    assert all(row["match"]["equal"] for row in result["rows"])
    check_system(stored(result), "head.json")
    show(stored(result), Output(None))
    shown = capsys.readouterr().out
    assert "head uniform:0.75" in shown and f"head: {result['head']['done'][0]}" in shown
    assert any("most weights are zero" in line for line in result["head"]["done"])
    counted = [int(line.partition(" x ")[0]) for line in result["head"]["done"]]
    assert sum(counted) == result["head"]["replaced"]
    with pytest.raises(MaskError, match="must be a uniform one"):
        measured(head_mask="global:0.90")


def test_the_sides_run_what_they_say() -> None:
    whole = small()
    seen: dict[str, tuple[int, int]] = {}
    plain = whole.run

    def run(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        if model is whole.model:
            heads = len(head_parts(model))
            seen[len(seen)] = (len(accelerated_parts(model)) - heads, heads)  # type: ignore[index]
        return plain(model, dtype)

    whole.run = run
    measured(whole, rounds=1)
    kinds = {(trunk > 0, head > 0) for trunk, head in seen.values()}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


def test_a_toggle_puts_the_very_same_modules_back() -> None:
    from opentrans_kernels import accelerate, accelerate_heads

    model = MaskFormer().eval()
    before = dict(model.named_modules())
    accelerate(model.backbone, measure=False, input_size=SIZE)
    accelerate_heads(model)
    ours = dict(model.named_modules())
    toggle = Toggle(model)
    for _ in range(2):
        toggle.dense()
        assert dict(model.named_modules()) == before
        toggle.accelerated()
        assert dict(model.named_modules()) == ours


class Positioned(nn.Module):
    """Calls ``position``; :class:`Kept` does not."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.mix = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x) + self.position(torch.ones_like(x))


class Kept(HeadPart):
    def fast(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x) + self.mix(x)


def test_a_part_that_is_called_on_one_side_only_has_no_time_on_the_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Positioned()).eval()
    found = [Found("1", "kind", Kept(model[1]), "how"), Found("1.mix", "kind", None, "why")]
    swap_in(model, found)
    x = torch.randn(1, 3, 32, 32)
    times = time_parts(model, lambda: model(x), "", HeadReport(found), rounds=2)
    rows = {part: (dense, ours) for part, dense, ours, _ in times.rows()}
    assert rows["1.position"][0] > 0 and rows["1.position"][1] == 0
    assert list(rows)[-2:] == [REST, WHOLE]
    line = next(line for line in str(times).splitlines() if line.startswith("1.position"))
    assert line.split()[2] == "0.0" and "x" not in line


def test_a_dense_side_that_fails_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: nn.Module) -> nn.Module:
        raise RuntimeError("cannot fold\nsecond line")

    monkeypatch.setattr(whole_module, "fold_batch_norms_", broken)
    result = measured(rounds=1)
    assert result["unavailable"][LAST] == "RuntimeError: cannot fold"
    assert result["baseline"] == EAGER
    check_system(stored(result), "x.json")


def test_a_dense_side_that_computes_something_else_is_no_baseline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(module.parameters()).mul_(1.1)
        return module

    monkeypatch.setattr(whole_module, "fold_batch_norms_", other)
    result = measured(rounds=1)
    assert "its scores are off by" in result["unavailable"][LAST]
    assert LAST not in {row["name"] for row in result["rows"]}


def test_what_is_inexact_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = whole_module.accelerate_heads

    def wrong(model: nn.Module) -> Any:
        report = real(model)
        part = next(iter(head_parts(model).values()))
        fast = part.fast
        part.__dict__["fast"] = lambda *args, **named: fast(*args, **named) * 1.01
        return report

    monkeypatch.setattr(whole_module, "accelerate_heads", wrong)
    result = measured(rounds=1)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows[OUR_TRUNK]["match"]["equal"]
    for name in (HEAD, BOTH):
        assert not rows[name]["match"]["equal"] and rows[name]["speedup"] is None
    assert [line.partition(" is inexact")[0] for line in failures(result)] == [HEAD, BOTH]


def test_a_head_of_no_known_kind_is_said_to_be_none() -> None:
    result = measured(small(lambda: Segmenter(tower())), rounds=1)
    assert result["unavailable"][HEAD] == "no part of the head was recognised"
    assert {row["name"] for row in result["rows"]} == {EAGER, LAST, OUR_TRUNK}


def test_a_model_that_does_not_run_in_float64_is_compared_with_float32() -> None:
    whole = small()
    plain = whole.run

    def run(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.float64:
            raise RuntimeError("expected scalar type Double but found Float")
        return plain(model, dtype)

    whole.run = run
    result = measured(whole, rounds=1)
    assert result["reference"].startswith("eager float32 (not float64: expected")
    assert all(row["match"]["equal"] for row in result["rows"])


@pytest.mark.slow
def test_the_compiled_sides() -> None:
    result = measured(compiling=True)
    assert {TRUNK, ALL} <= {row["name"] for row in result["rows"]} | set(result["unavailable"])
    assert TRUNK not in result["unavailable"], result["unavailable"]


@pytest.mark.parametrize("change", [("rows", []), ("argmax", 2.0), ("baseline", "no such side")])
def test_a_file_that_is_no_result_is_refused(change: tuple[str, Any]) -> None:
    key, value = change
    data = copy.deepcopy(stored(RESULT))
    if key == "argmax":
        data["rows"][0][key] = value
    else:
        data[key] = value
    with pytest.raises(OpenTransError, match=r"x.json is no valid result .*(argmax|baseline)"):
        check_system(data, "x.json")
    del data["schema"]
    with pytest.raises(OpenTransError, match="schema is missing|kind and version"):
        check_system(data, "x.json")


def row(name: str, ms: float, ours: bool) -> dict[str, Any]:
    return {
        "name": name, "ours": ours, "ms": ms, "cpu_ms": ms, "wall": bench_results.spread(ms),
        "speedup": bench_results.spread(100 / ms), "argmax": 1.0, "peak_bytes": 3_000_000,
        "match": {"equal": True, "error": 1e-6, "bound": 2e-6},
    }  # fmt: skip


RESULT = {
    "system": "fc-clip", "queries": 250, "classes": 150, "height": 512, "width": 512, "rounds": 5,
    "reference": "eager float32", "dense_error": 1e-6, "baseline": LAST, "accelerated_layers": 27,
    "unavailable": {ALL: "RuntimeError: no"}, "head": {"replaced": 36, "left": []},
    "rows": [row(EAGER, 110, False), row(LAST, 100, False), row(HEAD, 50, True),
             row(BOTH, 25, True)],
    "parts": [{"part": "trunk", "dense_ms": 20.0, "ms": 5.0, "what": "27 parts accelerated"},
              {"part": WHOLE, "dense_ms": 110.0, "ms": 25.0, "what": ""}],
}  # fmt: skip


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import ovs_tables

    return ovs_tables


def test_pages_are_made_from_stored_results(tables: ModuleType, tmp_path: Path) -> None:
    import network_table

    folder = tmp_path / machine_slug(bench_results.MACHINE) / "ovs"
    folder.mkdir(parents=True)
    (folder / "fc-clip-512.json").write_text(json.dumps(stored(RESULT)))
    assert tables.load(tmp_path) == []
    (result,) = tables.load_systems(tmp_path)
    text = tables.system_table(result)
    assert "channels_last (fastest dense)" in text and "**4.00x**" in text
    assert "| trunk | 20 | 5 | 27 parts accelerated |" in text and "Not timed: compiled" in text
    shown = network_table.networks_table([], [], [result])
    assert f"FC-CLIP, whole, 512: {HEAD}" in shown and "**2.00x** (1.96-2.04)" in shown
    assert f"FC-CLIP, whole, 512: {BOTH}" in shown and "(fastest of 2)" in shown
    (folder / "bad.json").write_text(json.dumps(stored(RESULT) | {"failed_checks": ["wrong"]}))
    with pytest.raises(OpenTransError, match="bad.json failed: wrong"):
        tables.load_systems(tmp_path)


def test_systems_have_one_list() -> None:
    assert set(SYSTEM_NAMES) == set(WHOLE_SYSTEMS)


@pytest.mark.parametrize(("system", "queries"), [("ovs-pixel", None), ("ovs-mask", 7),
                                                 ("mask2former-hf", 6)])  # fmt: skip
def test_systems_without_a_checkout_run(system: str, queries: int | None) -> None:
    pytest.importorskip("torchvision" if system == "ovs-pixel" else "transformers")
    whole = build_whole(system, (64, 96), queries=queries, classes=4)
    assert whole.facts == {"queries": queries, "classes": 4}
    assert whole.model.get_submodule(whole.tower) is not None
    with torch.no_grad():
        scores = whole.run(whole.model, torch.float32)
    assert scores.shape == (4, 64, 96) and scores.isfinite().all() and scores.std() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "64"], "--size belongs to --system"),
        (["--tree", "x"], "--tree belongs to --system"),
        (["--system", "ovs-mask", "--threads", "1,2"], "not one number"),
        (["--system", "ovs-mask", "--batches", "4"], "--batches does not go with --system"),
        (["--system", "ovs-mask", "--arch", "RN101"], "--arch does not go with --system"),
        (["--system", "ovs-mask", "--mask", "m.pth"], "is no recipe"),
        (["--system", "ovs-mask", "--tree", "x"], "needs no checkout"),
        (["--system", "ovs-pixel", "--queries", "9"], "has no queries"),
        (["--system", "ovs-pixel", "--size", "32"], "too small"),
        (["--system", "han"], "needs a checkout"),
        (["--system", "deeplab", "--tree", "."], "not found"),
        (["--system", "fc-clip", "--tree", "/nowhere"], "fc-clip not found"),
    ],
)
def test_bad_input_is_named_with_its_fix(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("opentrans.cli.bench_system.limit", lambda options, out: None)
    assert main(["bench", "model", *words]) == 2
    assert message in capsys.readouterr().err
