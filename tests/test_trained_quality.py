"""The scripts that compare trained networks: what they call agreement, and the sides they build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trained_files import randomise

from benchmarks.trained import check_loaders, tokens
from opentrans.trained.focus import FocusNet

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/trained"


def test_agreement_of_maps() -> None:
    dense = torch.tensor([[0.9, 0.9], [0.1, 0.4]])
    assert tokens.agreement(dense, dense) == {"mae": 0.0, "iou": 1.0}
    found = tokens.agreement(torch.tensor([[0.9, 0.3], [0.1, 0.6]]), dense)
    assert found["iou"] == pytest.approx(1 / 3) and found["mae"] == pytest.approx(0.8 / 4)
    assert tokens.agreement(dense / 9, dense / 9)["iou"] is None, "nothing to agree on"


def test_sides_are_the_network_made_cheaper() -> None:
    model = randomise(FocusNet(width=64, depth=3, patch=4, grid=(3, 5), channels=(8, 7, 6)))
    image = torch.randn(1, 3, 16, 16)
    dense = model(image)
    less = tokens.without((1,))(model)
    assert len(less.encoder.blocks) == 2 and len(model.encoder.blocks) == 3
    assert less.encoder.blocks[1].norm1.weight is model.encoder.blocks[2].norm1.weight
    for make in (tokens.without((1,)), tokens.smaller(8), tokens.smaller(12)):
        found = make(model)(image)
        assert found.shape == dense.shape and not torch.allclose(found, dense)
    assert torch.allclose(tokens.smaller(16)(model)(image), dense, atol=1e-6)
    assert torch.equal(model(image), dense)


def test_every_side_has_a_name_of_its_own_and_dense_comes_first() -> None:
    names = [side.name for side in tokens.sides()]
    assert names[0] == "dense" and len(set(names)) == len(names)
    methods = {side.method for side in tokens.sides()}
    assert methods == {
        "dense", "cluster", "pool", "tome", "evit", "act", "smaller input", "fewer blocks"
    }  # fmt: skip


def test_rows_are_means_over_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"a": {"mae": 0.1, "iou": 0.5}, "b": {"mae": 0.3, "iou": 0.7}}
    found["c"] = {"mae": 0.2, "iou": None}
    result = {"agreement": {side.name: found for side in tokens.sides()}}
    row = tokens.summary(result)[3]
    assert row["mae"] == pytest.approx(0.2) and row["iou"] == pytest.approx(0.6)
    assert row["least_iou"] == 0.5 and row["speedup"] is None
    tokens.show([row | {"cpu_ms": 41.6, "speedup": 1.25}])
    assert f"| {row['setting']} | 0.2000 | 0.600 | 0.500 | 42 | 1.25x |" in capsys.readouterr().out


def test_stored_results_are_of_the_present_sides() -> None:
    result = json.loads((RESULTS / "tokens.json").read_text())
    assert result["rows"] == tokens.summary(result)
    assert result["rows"][0]["mae"] == 0 and result["rows"][0]["iou"] == 1


def test_the_loaders_were_compared_and_agree() -> None:
    result = json.loads((RESULTS / "loaders.json").read_text())
    rows = result["rows"]
    assert {row["network"] for row in rows} == {
        "hed", "resnet50-half", "efficientnet-lite0", "focus"
    }  # fmt: skip
    assert all(row["largest_difference"] <= 1e-5 * max(1, row["largest_value"]) for row in rows)
    assert all(len(row["by_photograph"]) == 10 for row in rows)


def test_a_row_names_the_largest_difference() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.5, -3.0])
    row = check_loaders.row("n", "r", "o", {"one": (a, b), "two": (a, a)})
    assert row["largest_difference"] == 5 and row["largest_value"] == 3
    assert row["by_photograph"] == {"one": 5, "two": 0}
    assert check_loaders.bgr_last(torch.arange(3.0).view(1, 3, 1, 1)).tolist() == [[[[2, 1, 0]]]]
