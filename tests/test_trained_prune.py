"""``opentrans trained prune``: from photographs in a folder to masks, weights and a judgement."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opentrans.cli import main
from opentrans.trained import catalog, judge
from opentrans.trained.load import Loaded
from opentrans.trained.photographs import folder_photographs
from opentrans_kernels.hed import Hed
from opentrans_kernels.masks import MaskSet

STEPS = ["--rounds", "2", "--period", "1", "--recovery", "2", "--crops", "2"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A narrow network in the place of the published one, and two photographs of noise."""
    torch.manual_seed(0)
    model = Hed(((4, 4), (6, 6))).eval().requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def load(name: str) -> Loaded:
        fresh = Hed(((4, 4), (6, 6))).eval().requires_grad_(False)
        fresh.load_state_dict(state)
        return Loaded(catalog.network(name), fresh, lambda x: x.float() / 64 - 2)

    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(2):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    # The package exports the function under the name of its module.
    module = importlib.import_module("opentrans.trained.load")
    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(judge, "photographs", lambda split: folder_photographs(folder))
    return folder


def run(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    words = ["trained", "prune", "hed", "--images", str(folder), "--output", str(out), *STEPS]
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_fit_is_part_of_the_recipe(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extension: None
) -> None:
    """It changes what comes out, is written down, and a run is not continued without it."""
    words = ["trained", "prune", "hed", "--images", str(small), *STEPS, "--recovery", "1", "--json"]
    found = {}
    for crops in (None, "2"):
        out = str(tmp_path / f"run-{crops}")
        assert main([*words, "--output", out, *(["--fit", crops] if crops else [])]) == 0
        found[crops] = json.loads(capsys.readouterr().out)
    assert [one["recipe"]["fit"] for one in found.values()] == [0, 2]
    assert found[None]["agreement"] != found["2"]["agreement"]
    assert main([*words, "--output", str(tmp_path / "run-2")]) == 2
    assert "other settings" in capsys.readouterr().err


def test_weights_are_selected_by_measured_milliseconds(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extension: None
) -> None:
    """Selection needs a fit; what was selected is kept, and a finished run gives it again."""
    out = tmp_path / "run"
    words = ["trained", "prune", "hed", "--images", str(small), *STEPS, "--recovery", "2"]
    words += ["--allocation", "latency", "--output", str(out), "--json"]
    assert main([*words, "--select", "4"]) == 2
    assert "Set fit" in capsys.readouterr().err
    words += ["--select", "4", "--fit", "2"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["recipe"]["select"] == 4 and (out / "plan.json").exists()
    masks = MaskSet.load(out / "masks.safetensors")
    assert masks.content_hash() == MaskSet.load(out / "run" / "selected.safetensors").content_hash()
    weights = load_file(out / "weights.safetensors")
    for name, mask in masks.masks.items():
        assert not weights[f"{name}.weight"][~mask].any()
    rounds = sorted((out / "run").glob("*round*"))
    assert rounds, "the rounds kept their own"
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["content_hash"] == first["content_hash"]
    assert again["agreement"] == first["agreement"]
    (out / "plan.json").write_text("{")
    assert main(words) == 2
    assert "plan.json" in capsys.readouterr().err


def test_masks_weights_and_agreement(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extension: None
) -> None:
    found = run(small, tmp_path / "run", capsys)
    assert found["density"] == pytest.approx(0.1, abs=0.01)
    assert set(found["agreement"]["photographs"]) == {"0.png", "1.png"}
    assert 0 <= found["agreement"]["mean"]["f_score"] <= 1
    assert found["recipe"]["rounds"] == 2 and found["recipe"]["allocation"] == "macs"
    masks = MaskSet.load(tmp_path / "run" / "masks.safetensors")
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert masks.content_hash() == found["content_hash"]
    assert set(masks.masks) == {"blocks.0.2", "blocks.1.1", "blocks.1.3"}
    for name, mask in masks.masks.items():
        assert not weights[f"{name}.weight"][~mask].any()
    again = run(small, tmp_path / "run", capsys)
    assert again["content_hash"] == found["content_hash"], "a finished run is not run again"
    words = ["trained", "prune", "hed", "--images", str(small), "--output", str(tmp_path / "run")]
    assert main([*words, *STEPS, "--crops", "3"]) == 2
    assert "other crops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["focus"], "how to prune 'focus'"),
        (["hed", "--allocation", "nonsense"], "nonsense"),
        (["hed", "--density", "0"], "density=0.0"),
        (["hed", "--density", "1.5"], "density=1.5"),
        (["hed", "--images", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if "--images" in words else ["--images", str(small)]
    out = ["--output", str(tmp_path / "bad")]
    assert main(["trained", "prune", *words, *more, *out, *STEPS]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no other")
def test_an_output_folder_that_cannot_be_made_is_one_line(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trained", "prune", "hed", "--images", str(small), "--output", "/proc/self/task/run"]
    assert main([*words, *STEPS]) == 2
    assert "/proc/self/task/run" in capsys.readouterr().err
