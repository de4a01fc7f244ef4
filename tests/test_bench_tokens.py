"""``opentrans bench tokens``: sides, equal work, parts, form, and bad input."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_results
import pytest
import torch

from opentrans.cli import main
from opentrans.cli.bench_tokens import METHODS as NAMED
from opentrans.cli.bench_tokens import SYSTEM_NAMES, failures, mask_, plan_of, show
from opentrans.cli.render import Output
from opentrans.ovs import Segmenter
from opentrans.systems_tokens import SHAPES, VitShape, segmenter_macs
from opentrans_kernels import native
from opentrans_kernels.bench.tokens import (
    COMPILED,
    EAGER,
    FEWER,
    POOLED,
    SMALLER,
    SPARSE,
    TokenSubject,
    measure_tokens,
    same_work,
    twin,
)
from opentrans_kernels.bench.tokens_form import check_tokens
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.tokens import METHODS, TokenPlan

SIZE = (96, 128)
FACTS = {"decoder": "mask", "classes": 5, "weights": "synthetic weights (seed 0)"}


def counted(shape: VitShape, classes: int) -> Any:
    """``TokenSubject.macs`` of a shape."""

    def macs(at: Any, plan: Any, blocks: int | None, kept: float) -> int | None:
        one = replace(shape, depth=blocks or shape.depth, kept=kept)
        return segmenter_macs(one, at, classes, plan)

    return macs


def subject(masked: bool = False) -> TokenSubject:
    torch.manual_seed(0)
    shape = VitShape(64, 3, 2)
    model = Segmenter(64, 3, 2, grid=(6, 8), classes=5).eval()
    for parameter in model.parameters():  # class tokens and positions start as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    found = TokenSubject(
        "segmenter-s16", model, "encoder", 16, counted(shape, 5), dict(FACTS), masked=masked
    )
    if masked:
        mask_(found, "uniform:0.90", lambda _: None)
    return found


def measured(plan: TokenPlan, masked: bool = False) -> dict[str, Any]:
    return measure_tokens(subject(masked), plan, SIZE, rounds=2, compiling=False, measure=False)


@pytest.fixture(scope="module")
def masked_result() -> dict[str, Any]:
    if not native.load():
        pytest.skip(str(native.reason()))
    return measured(TokenPlan(alpha=1, grid=(3, 4), expand=False), masked=True)


def stored(result: dict[str, Any]) -> dict[str, Any]:
    return {
        **bench_results.envelope("tokens"), "command": ["opentrans"], "failed_checks": [], **result
    }  # fmt: skip


def test_all_sides_of_clustering_stand_in_one_table() -> None:
    result = measured(TokenPlan(alpha=1, grid=(3, 4), expand=False))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [EAGER, "cluster", POOLED, SMALLER, FEWER]
    kinds = [row["kind"] for row in rows.values()]
    assert kinds == ["dense", "reduced", "baseline", "baseline", "baseline"]
    assert rows[EAGER]["difference"] == 0 and rows[EAGER]["same_class"] == 1
    assert rows["cluster"]["difference"] > 0 and rows[POOLED]["difference"] > 0
    assert rows["cluster"]["difference"] != rows[POOLED]["difference"]
    dense = rows[EAGER]["macs"]
    assert rows[POOLED]["macs"] < rows["cluster"]["macs"] < dense
    assert rows[SMALLER]["macs"] == segmenter_macs(VitShape(64, 3, 2), tuple(result["smaller"]), 5)
    fewer = VitShape(64, result["fewer"], 2)
    assert 0 < result["fewer"] < 3 and rows[FEWER]["macs"] == segmenter_macs(fewer, SIZE, 5)
    assert rows["cluster"]["work"] == rows["cluster"]["macs"] / dense
    assert {part["part"] for part in result["parts"]} == {"reducing", "way back"}
    assert all(0 < part["share"] <= 1 for part in result["parts"])
    assert set(result["unavailable"]) == {COMPILED} and result["baseline"] == EAGER
    json.dumps(result)
    check_tokens(stored(result), "x.json")


def test_a_mask_adds_sides_on_the_kernels(masked_result: dict[str, Any]) -> None:
    result = masked_result
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        EAGER, "cluster", SPARSE, "sparse, cluster", f"{POOLED}, sparse", f"{SMALLER}, sparse",
        f"{FEWER}, sparse",
    ]  # fmt: skip
    assert rows[SPARSE]["kind"] == "exact" and rows[SPARSE]["difference"] < 1e-5
    assert rows["sparse, cluster"]["difference"] == pytest.approx(
        rows["cluster"]["difference"], rel=1e-3
    )
    assert result["kept"] == pytest.approx(0.1, abs=1e-3)
    kept = VitShape(64, 3, 2, kept=result["kept"])
    assert rows[SPARSE]["macs"] == segmenter_macs(kept, SIZE, 5) < rows[EAGER]["macs"] / 2
    small = segmenter_macs(kept, tuple(result["smaller"]), 5)
    assert rows[f"{SMALLER}, sparse"]["macs"] == small
    assert set(result["replaced"]) == {name for name in rows if SPARSE in name}
    assert result["mask"] == {"label": "uniform:0.90 (synthetic mask)", "synthetic": True}
    check_tokens(stored(result), "x.json")
    said = io.StringIO()
    show(result, Output(stdout=said, use_rich=False))
    assert "10.0% of the weights of blocks are kept" in said.getvalue()
    assert failures({"rows": [{**rows[SPARSE], "difference": 0.1}]})


@pytest.mark.parametrize("plan, parts", [
    (TokenPlan("pool", alpha=1, grid=(3, 4), expand=True), 2),
    (TokenPlan("tome", r=4), 0),
    (TokenPlan("evit", keep=0.5, at=(1,)), 0),
    (TokenPlan("act", cell=1.0), 0),
    (TokenPlan(alpha=3, grid=(3, 4)), 0),
    (TokenPlan(alpha=1, grid=(6, 8)), 0),
])  # fmt: skip
def test_other_plans(plan: TokenPlan, parts: int) -> None:
    result = measured(plan)
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == [EAGER, plan.method] and len(result["parts"]) == parts
    assert (SMALLER in names) == (plan.method != "act") != (SMALLER in result["unavailable"])
    check_tokens(stored(result), "x.json")


def test_twins_share_tensors_but_no_modules() -> None:
    one = subject().model
    other = twin(one)
    assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not set(map(id, one.modules())) & set(map(id, other.modules()))


@pytest.mark.parametrize("size", [(640, 640), (320, 640)])
def test_the_smaller_input_has_nearly_equal_work(size: tuple[int, int]) -> None:
    shape = SHAPES["segmenter-l16"]
    one = TokenSubject("x", torch.nn.Identity(), "", 16, counted(shape, 150))
    target = segmenter_macs(shape, size, 150, TokenPlan(alpha=10, grid=(14, 14), expand=False))
    found = same_work(one, size, target)
    assert found[0] % 16 == found[1] % 16 == 0 and found[0] < size[0]
    assert segmenter_macs(shape, found, 150) == pytest.approx(target, rel=0.06)
    assert found[1] / found[0] == pytest.approx(size[1] / size[0], rel=0.05)
    published = TokenPlan(alpha=10, grid=(28, 28), expand=False)
    if size == (640, 640):
        work = segmenter_macs(shape, size, 150, published)
        assert same_work(one, size, work) == (544, 544)


def test_an_inexact_dense_side_fails() -> None:
    rows = [
        {"name": "compiled", "kind": "dense", "difference": error, "speedup": {}}
        for error in (1e-6, 0.1, float("nan"))
    ]
    found = failures({"rows": [*rows, {"name": "cluster", "kind": "reduced", "difference": 1.0}]})
    assert len(found) == 2 and "1.0e-01" in found[0]


def test_the_form_is_checked() -> None:
    result = stored(measured(TokenPlan("pool", alpha=1, grid=(3, 4))))
    for spoil, words in (
        (lambda r: r["rows"][0].pop("macs"), None),  # may be absent: it is not known for "act"
        (lambda r: r["rows"][0].update(same_class=2), "same_class is 2"),
        (lambda r: r.update(baseline="nothing"), "which is no row"),
        (lambda r: r["schema"].update(kind="trunk"), "kind and version"),
    ):
        spoilt = copy.deepcopy(result)
        spoil(spoilt)
        if words is None:
            check_tokens(spoilt, "x.json")
            continue
        with pytest.raises(OpenTransError, match=words):
            check_tokens(spoilt, "x.json")


def test_the_command_knows_what_there_is() -> None:
    assert set(SYSTEM_NAMES) == set(SHAPES) and NAMED == METHODS


def options(**given: Any) -> Any:
    names = ("alpha", "grid", "r", "keep", "temperature")
    found = dict.fromkeys(names) | {"method": "cluster", "expand": False} | given
    return type("Options", (), found)()


def test_plans_of_the_command_line() -> None:
    assert plan_of(options(), (40, 40), 24) == TokenPlan(alpha=10, grid=(28, 28), expand=False)
    given = plan_of(options(grid="20x30", alpha=2, temperature="0.02", expand=True), (40, 40), 24)
    assert given == TokenPlan(alpha=2, grid=(20, 30), temperature=0.02)
    assert plan_of(options(method="tome"), (40, 40), 24) == TokenPlan("tome", r=32)
    assert plan_of(options(method="evit", keep=0.5), (40, 40), 24) == TokenPlan("evit", keep=0.5)
    assert plan_of(options(method="act"), (40, 40), 24) == TokenPlan("act")
    for bad, words in (
        (dict(grid="28"), "not HEIGHTxWIDTH"),
        (dict(temperature="hot"), "neither a number nor auto"),
        (dict(r=3), "r=3 belongs to method 'tome'"),
        (dict(method="evit", grid="2x2"), "belongs to method 'cluster'"),
    ):
        with pytest.raises(OpenTransError, match=words):
            plan_of(options(**bad), (40, 40), 24)


def test_sizes_that_are_no_patches_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tokens", "--size", "330"]) == 2
    assert "Use 336x336" in capsys.readouterr().err


def test_two_results_are_compared_side_by_side(
    masked_result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stored(copy.deepcopy(masked_result))
    slower = copy.deepcopy(base)
    spread = slower["rows"][3]["over_eager"]
    spread |= {key: spread[key] / 2 for key in ("median", "q1", "q3")}
    inexact = copy.deepcopy(base)
    inexact["rows"][2]["difference"] = 0.5
    for name, result in (("base", base), ("slower", slower), ("inexact", inexact)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    files = {name: str(tmp_path / f"{name}.json") for name in ("base", "slower", "inexact")}
    assert main(["bench", "compare", files["base"], files["base"], "--fail-if-slower", "5%"]) == 0
    capsys.readouterr()
    words = ["bench", "compare", files["base"], files["slower"], "--fail-if-slower", "5%", "--json"]
    assert main(words) == 1
    found = json.loads(capsys.readouterr().out)
    (gone,) = [line for line in found["failed_checks"] if "slower" in line]
    label = "tokens segmenter-s16 mask, 5 classes, 96x128, cluster, alpha 1, grid 3x4"
    assert label in gone and "sparse, cluster" in gone and "100.0% slower" in gone
    assert len(found["changes"]) == 6
    assert main(["bench", "compare", files["base"], files["inexact"], "--allow-missing"]) == 0
    said = capsys.readouterr()
    assert "inexact, without a ratio: 1 of 7 rows" in said.err
    assert f"{label}" in said.err and ": sparse is in BASE only" in said.err
    (tmp_path / "broken.json").write_text(json.dumps({**base, "rows": [{}]}))
    assert main(["bench", "compare", files["base"], str(tmp_path / "broken.json")]) == 2
    assert "rows[0].name is missing" in capsys.readouterr().err
