"""``opentrans accelerate`` takes what ``accelerate`` takes, and refuses early what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans import cli
from opentrans_kernels.bench import subject


def no_trunk() -> nn.Module:
    """A tower without layer1, layer2 ..."""
    return nets.randomise(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
        )
    )


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(subject, "build_tower", lambda arch, *, seed=0, empty=False: no_trunk())
    path = tmp_path / "weights.pt"
    torch.save(no_trunk().state_dict(), path)
    return path


def test_a_tower_that_is_no_resnet(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, numbers = tmp_path / "packed.safetensors", tmp_path / "numbers.json"
    code = cli.main(
        ["accelerate", str(weights), "--mask", "uniform:0.95", "--size", "64", "--arch",
         "torchvision:none", "--output", str(target), "--json", str(numbers)]
    )  # fmt: skip
    assert "load it with its network" in capsys.readouterr().out, "no name is made up for it"
    record = json.loads(numbers.read_text())
    assert record["exact"] and record["max_rel_err"] <= 2 * record["dense_own_rel_err"]
    assert record["report"]["parts_checked"] in (1, 2)  # as measured: the first is hardly pruned
    assert code == 0 and target.exists()


def test_a_missing_checkpoint_is_told_before_a_tower_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tower was built")

    monkeypatch.setattr(subject, "build_tower", refuse)
    arguments = ["accelerate", "no-such.pt", "--mask", "global:0.9"]
    assert cli.main([*arguments, "--output", str(tmp_path / "packed.safetensors")]) == 2
    assert "no-such.pt does not exist" in capsys.readouterr().err
