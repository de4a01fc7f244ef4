"""Commands on a vision transformer, whose recipe covers linear layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_linear_layers import PRUNED, image
from vit_nets import vit

from opentrans import cli
from opentrans_kernels.bench import subject
from opentrans_kernels.bench.part import TrunkModule
from opentrans_kernels.towers import clip_image_size


@pytest.fixture(autouse=True)
def tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "build_tower", lambda arch, *, seed=0, empty=False: vit())


def numbers_of(tmp_path: Path, *words: str) -> dict:
    target = tmp_path / "numbers.json"
    arch = ("--arch", "torchvision:none", "--size", "32", "--json", str(target))
    assert cli.main([*words, *arch]) == 0
    return json.loads(target.read_text())


def test_plan_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = numbers_of(tmp_path, "plan", "uniform:0.90", "--no-measure")["plan"]
    assert [row["name"] for row in plan["rows"]] == ["patches", *PRUNED]
    assert {unit["role"] for unit in plan["units"]} == {"loose", "linear", "mlp"}
    assert "1 convolutions and 8 linear layers" in capsys.readouterr().out
    audit = numbers_of(tmp_path, "inspect", "uniform:0.90")["audit"]
    assert [row["name"] for row in audit["rows"]] == ["patches", *PRUNED]
    assert audit["totals"]["linear_layers"] == 8


def test_the_benchmark_runs_the_whole_network() -> None:
    found = subject.load_subject("uniform:0.90", arch="torchvision:none")
    with torch.no_grad():
        assert torch.equal(TrunkModule(found.model)(image()), found.model(image()))
    shares = found.densities((32, 32))
    assert 0.1 < shares["parameters"] < 0.4, "patches are dense, the blocks keep a tenth"


def test_names_of_towers() -> None:
    assert clip_image_size("open_clip:RN50x4") == clip_image_size("RN50x4") == 288
