"""Which weights are measured, what is refused and how, and the table that comes back."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from spectrum_cases import heavy
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.errors import OpenTransError, UnsupportedModelError
from opentrans_kernels.spectrum import AlphaTable, estimate_alpha, select


def names(source, **options) -> list[str]:
    return [layer.name for layer in select(source, **options)]


class Conv2d(nn.Module):
    """A wrapper that is no subclass, as other libraries have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(heavy(8, 4, 3, 3))
        self.norm = nn.BatchNorm2d(8)


class Adapted(nn.Linear):
    """A subclass of another name, as adapters are."""


def test_modules_count_by_the_name_of_their_class() -> None:
    model = nn.ModuleDict(
        {
            "wrapped": Conv2d(),
            "adapted": Adapted(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "conv": nn.Conv1d(4, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "embedding": nn.Embedding(9, 8),
        }
    )
    assert names(model) == ["wrapped", "conv"]
    assert names(model, match="isinstance") == ["adapted", "attention.out_proj", "conv"]
    assert names(nn.Linear(4, 5)) == ["Linear"] and select(nn.Linear(4, 5))[0].parameter == "weight"
    with pytest.raises(OpenTransError, match="match='type' is not known.*class_name"):
        select(model, match="type")


def test_an_open_clip_tower_has_its_59_layers() -> None:
    open_clip = pytest.importorskip("open_clip.modified_resnet")
    with torch.device("meta"):
        tower = open_clip.ModifiedResNet([3, 4, 6, 3], 1024, 32)
    found = names(tower.to_empty(device="cpu"))
    assert len(found) == 59 and found[0] == "conv1" and "attnpool.c_proj" in found


def test_flat_linear_layers_are_skipped_and_listed() -> None:
    weights = {"ok": heavy(10, 79), "flat": heavy(10, 80), "conv": heavy(80, 10, 1, 1)}
    table = estimate_alpha(weights, "ks")
    assert list(table.alphas()) == ["ok", "conv"]
    assert table.skipped == {"flat": "linear 10x80: aspect 8.0 >= 8"} and "1 skipped" in str(table)
    assert len(estimate_alpha(weights, "ks", linear_aspect=None)) == 3
    with pytest.raises(UnsupportedModelError, match="linear_aspect=None"):
        estimate_alpha({"flat": heavy(10, 80)})


def test_fused_projections_are_cut_in_three() -> None:
    columns, rows = heavy(32, 98), heavy(97, 32)
    layers = select({"a.attn.qkv.weight": columns, "b.attention": rows, "plain": heavy(96, 32)})
    assert [layer.name for layer in layers] == [
        *(f"a.attn.qkv_{part}" for part in "qkv"),
        *(f"b.attention_{part}" for part in "qkv"),
        "plain",
    ]
    assert [layer.shape for layer in layers[:3]] == [(32, 32), (32, 32), (32, 34)]
    assert [layer.shape for layer in layers[3:6]] == [(32, 32), (32, 32), (33, 32)]
    assert {layer.parameter for layer in layers[:3]} == {"a.attn.qkv.weight"}
    assert [layer.part for layer in layers] == [*"qkvqkv", ""]
    assert torch.equal(torch.cat([layer.weight for layer in layers[:3]], 1), columns)
    # A convolution below such a name, on which the published code stops, is one layer.
    assert names({"attn.conv": heavy(96, 32, 1, 1)}) == ["attn.conv"]


def test_params_are_those_that_train() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[1].bias.requires_grad_(False)
    assert [layer.params for layer in select(model)] == [35, 20]
    model.requires_grad_(False)
    assert [layer.params for layer in select(model)] == [0, 0]


def test_mappings_take_state_dict_keys() -> None:
    row = estimate_alpha({"stage.0.conv.weight": heavy(8, 6, 3, 3)}, "ks")["stage.0.conv"]
    assert row.parameter == "stage.0.conv.weight" and row.module == "stage.0.conv"
    with pytest.raises(OpenTransError, match="two rows are called 'a'.*Rename"):
        estimate_alpha({"a": heavy(5, 6), "a.weight": heavy(5, 6)})


def test_networks_of_torch_modules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 12))
    table = otk.estimate_alpha(model, "xmin_mid")
    assert [row.parameter for row in table] == ["0.weight", "3.weight"]
    assert [row.module for row in table] == ["0", "3"]
    assert [row.kind for row in table] == ["conv", "linear"]
    assert table["0"].params == 8 * 3 * 9 + 8 and table["3"].params == 40 * 12 + 12
    assert table.versions["torch"] == str(torch.__version__) and table.fit == "xmin_mid"


BAD_WEIGHTS = {
    "vector": (torch.ones(5), "no matrix.*v.dim\\(\\) > 1"),
    "scalar": (torch.tensor(1.0), "no matrix"),
    "empty": (torch.ones(0, 4), "empty.*Leave the layer out"),
    "integer": (torch.ones(4, 4, dtype=torch.int8), "dtype torch.int8.*weight.float"),
    "complex": (torch.ones(4, 4, dtype=torch.complex64), "dtype torch.complex64"),
    "meta": (torch.ones(4, 4, device="meta"), "meta device.*Load the weights"),
    "sparse": (torch.eye(4).to_sparse(), "sparse.*to_dense"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        "quantised.*dequantize",
    ),
    "nan": (torch.tensor([[1.0, math.nan], [1.0, 2.0]]), "1 NaN or infinite.*Load finite weights"),
    "infinite": (torch.tensor([[1.0, math.inf], [-math.inf, 2.0]]), "2 NaN or infinite"),
    "huge": (torch.full((3, 3), 1e200, dtype=torch.float64), "overflow.*Scale the weight"),
    "text": ("weight", "is a str, not a tensor"),
    "none": (None, "is a NoneType, not a tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_bad_weights_are_refused_by_name(kind: str, threads: int) -> None:
    weight, words = BAD_WEIGHTS[kind]
    weight = weight() if callable(weight) else weight
    good = {f"good{i}": heavy(6, 7, seed=i) for i in range(4)}
    with pytest.raises(UnsupportedModelError, match=f"(?s)layer 'bad.{kind}'.*{words}"):
        estimate_alpha({**good, f"bad.{kind}": weight}, threads=threads)


@pytest.mark.filterwarnings("ignore")
def test_bad_modules_are_refused_by_name() -> None:
    quantised = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match="layer '0'.*quantised.*before quantising"):
        estimate_alpha(nn.Sequential(quantised))
    with pytest.raises(UnsupportedModelError, match="layer '0'.*not initialised.*forward pass"):
        estimate_alpha(nn.Sequential(nn.LazyLinear(4)), match="isinstance")
    with pytest.raises(UnsupportedModelError, match="no module that counts.*Pass a network with"):
        estimate_alpha(nn.Sequential(nn.ReLU()))
    with pytest.raises(UnsupportedModelError, match="match='isinstance' would measure 1"):
        estimate_alpha(nn.Sequential(Adapted(3, 3)))
    with pytest.raises(UnsupportedModelError, match="mapping holds no weight"):
        estimate_alpha({})
    with pytest.raises(UnsupportedModelError, match="not a list"):
        estimate_alpha([torch.eye(3)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": "peak"}, "fit='peak' is not known.*xmin_peak, xmin_peak_fixed, xmin_mid, ks"),
        ({"precision": "half"}, "precision='half'.*'float64', 'float32'"),
        ({"xmin_pos": 1}, "xmin_pos=1 must be above 1.*Use 2"),
        ({"xmin_pos": math.nan}, "must be above 1"),
        ({"bins": 0}, "bins=0 must be a positive integer"),
        ({"evals_threshold": -1}, "evals_threshold=-1 must be.*1e-5"),
        ({"conv_norm": 0}, "conv_norm=0 must be a positive number"),
        ({"threads": 0}, "threads=0 must be a positive integer"),
        ({"device": "mps"}, "no eigenvalue solver.*'cpu' or 'cuda'"),
        ({"device": "quantum"}, "is not a device"),
    ],
)
def test_bad_arguments_are_refused_with_the_choices(options, words: str) -> None:
    with pytest.raises(OpenTransError, match=f"(?s){words}"):
        estimate_alpha({"w": heavy(6, 7)}, **options)


@pytest.fixture
def table() -> AlphaTable:
    weights = {"b": heavy(30, 40), "a": heavy(20, 9, 3, 3), "z": torch.zeros(4, 4)}
    return estimate_alpha(weights | {"tie": torch.eye(8)}, "ks")


def test_a_table_is_a_sequence_keyed_by_name(table: AlphaTable) -> None:
    assert len(table) == 4 and [row.name for row in table] == ["b", "a", "z", "tie"]
    assert table["a"] is table[1] and table[-1].alpha == math.inf and table[:2] == table.rows[:2]
    assert "a" in table and "q" not in table and table[0] in table
    with pytest.raises(OpenTransError, match="no layer 'q' in this table of 4 layers"):
        table["q"]
    assert list(table.alphas()) == ["b", "a", "z", "tie"]


def test_the_median_leaves_out_what_is_undefined(table: AlphaTable) -> None:
    finite = sorted([table["a"].alpha, table["b"].alpha])
    assert table.median() == finite[1], "of two finite ones and an infinite one"
    assert math.isnan(estimate_alpha({"z": torch.zeros(3, 3)}).median())
    pair = estimate_alpha({"a": heavy(20, 30), "b": heavy(20, 30, seed=1)}, "ks")
    assert pair.median() == pytest.approx(sum(pair.alphas().values()) / 2)
    unfitted = estimate_alpha({"a": heavy(20, 30), "z": torch.zeros(3, 3)}, "weightwatcher")
    assert unfitted["z"].alpha == -1 and unfitted.median() == unfitted["a"].alpha


def test_sorted_views(table: AlphaTable) -> None:
    finite = sorted(["a", "b"], key=lambda name: table[name].alpha)
    assert [row.name for row in table.sorted()] == [*finite, "tie", "z"]
    falling = table.sorted(descending=True)
    assert [row.name for row in falling] == ["tie", *reversed(finite), "z"]
    assert table.sorted("name")[0].name == "a" and table.sorted("num_evals")[0].name == "z"
    with pytest.raises(OpenTransError, match="cannot be sorted by 'beta'. Use one of name"):
        table.sorted("beta")


def test_json_brings_every_number_back(table: AlphaTable, tmp_path) -> None:
    path = tmp_path / "alpha.json"
    text = table.to_json(path)
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["alpha.json"]
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    for back in (AlphaTable.from_json(path), AlphaTable.from_json(text)):
        assert repr(back.rows) == repr(table.rows), "NaN and infinity included"
        assert (back.fit, back.parameters) == (table.fit, table.parameters)
        assert (back.versions, back.skipped) == (table.versions, table.skipped)
        assert str(back) == str(table)


def test_bad_json_is_refused_with_the_fix(tmp_path, table: AlphaTable) -> None:
    for content in ("{", "[1]", '{"kind": "else"}', table.to_json().replace("alpha table", "x")):
        file = tmp_path / "bad.json"
        file.write_text(content)
        with pytest.raises(OpenTransError, match="(?s)bad.json.*AlphaTable.to_json"):
            AlphaTable.from_json(file)
    for old, new in (('"format": 1', '"format": 9'), ('"ks_distance"', '"other"')):
        with pytest.raises(OpenTransError, match="AlphaTable.to_json"):
            AlphaTable.from_json(table.to_json().replace(old, new))
    with pytest.raises(OpenTransError, match="cannot be read"):
        AlphaTable.from_json(tmp_path / "absent.json")


def test_csv_has_a_line_per_layer(table: AlphaTable, tmp_path) -> None:
    text = table.to_csv(tmp_path / "alpha.csv")
    assert (tmp_path / "alpha.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in rows] == ["b", "a", "z", "tie"]
    assert rows[1]["shape"] == "20x9x3x3" and float(rows[1]["alpha"]) == table["a"].alpha
    assert rows[2]["alpha"] == "nan" and rows[3]["alpha"] == "inf"


def test_printing_shows_every_layer_and_its_reason(table: AlphaTable) -> None:
    lines = str(table).splitlines()
    assert len(lines) == 7 and lines[0].split()[:3] == ["layer", "shape", "alpha"]
    assert "all zero" in lines[3] and "20x9x3x3" in lines[2]
    assert lines[-2] == f"4 layers, fit ks, median alpha {table.median():.4f}"
    assert lines[-1].startswith("note: masked weights: 2 of 4 layers hold exact zeros (90.0% of")


def test_kept_spectra_are_returned_on_request(table: AlphaTable) -> None:
    assert table.spectra == {}
    kept = estimate_alpha({"a": heavy(20, 9, 3, 3)}, "ks", keep_spectra=True)
    assert kept.spectra["a"].dtype == torch.float64
    assert kept.spectra["a"].numel() == kept["a"].num_evals
    assert np.isclose(float(kept.spectra["a"].sum()), kept["a"].norm)


def test_training_and_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = otk.estimate_alpha(model, "ks", keep_spectra=True)
    assert model.training and not table.spectra["0"].requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
