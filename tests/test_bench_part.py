"""The benchmarks measure any CNN: its trunk, its features, or all of it, and say which."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans.cli import bench_model, bench_trunk
from opentrans.cli.options import arch_packages
from opentrans.cli.render import Output
from opentrans_kernels import accelerate
from opentrans_kernels.bench import environment, layers, model, schema, trunk
from opentrans_kernels.bench.part import NETWORK, TRUNK, TrunkModule, WholeModule, title
from opentrans_kernels.bench.stages import stage_inputs, stage_scaling
from opentrans_kernels.bench.subject import Subject
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.report import trunk_page
from opentrans_kernels.synthetic import synthetic_masks
from opentrans_kernels.towers import build_tower

SIZE = (40, 48)


def conv(cin: int, cout: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, **{"padding": kernel // 2, **more})


class Chain(nn.Module):
    """As VGG: features, and a classifier behind them; ``scale``: what the image is divided by."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            conv(16, 24), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
            nn.Sequential(conv(24, 24, groups=24), nn.ReLU6()),
            conv(24, 16, 1), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Linear(16, 5)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x / self.scale if self.scale > 1 else x).mean((2, 3)))


class Two(nn.Module):
    """Convolutions at two places, of every form; several results."""

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 7, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.ModuleList(
            [conv(16, 16, 5, groups=16), conv(16, 24, groups=4),
             conv(24, 24, dilation=2, padding=2), nn.Conv2d(24, 8, (3, 1), padding=(1, 0))]
        )  # fmt: skip
        self.head = nn.Linear(8, 5)
        self.several = several

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for one in self.body:
            x = one(x).relu()
        y = self.head(x.mean((2, 3)))
        return {"logits": y, "maps": [x], "size": 3} if self.several else y


class Listed(nn.Module):
    """All convolutions in a list, which is given nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([conv(3, 8), conv(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x).relu()
        return x


def subject_of(network: nn.Module, skip: tuple[str, ...] = ()) -> Subject:
    nets.randomise(network)
    given = synthetic_masks(network, "uniform:0.70")
    given = MaskSet({n: m for n, m in given.masks.items() if n not in skip})
    match = given.match(network)
    return Subject(network, given, match, "tiny:net", "synthetic", "uniform:0.70", True, True)


def unmeasured(*given: Any, **options: Any) -> Any:
    """Nothing is timed, so that the same layers are replaced on any machine."""
    return accelerate(*given, **options, measure=False)


def image() -> torch.Tensor:
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "part"),
    [
        (Chain, "features"),
        (lambda: Chain(scale=2.0), NETWORK),
        (Two, NETWORK),
        (Listed, NETWORK),
        (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8)), NETWORK),
        (lambda: nn.Sequential(nn.Sequential(Chain(), nn.ReLU()), nn.Flatten()), "0.0.features"),
        (nets.tower, TRUNK),
    ],
)
def test_the_part_is_named_and_is_what_the_network_computes(
    network: Callable[[], nn.Module], part: str
) -> None:
    one = nets.randomise(network())
    found = TrunkModule(one)
    assert found.part == part
    with torch.no_grad():
        if part == NETWORK:
            assert torch.equal(found(image()), one(image()))
        elif part != TRUNK:
            assert torch.equal(found(image()), one.get_submodule(part)(image()))
    assert title({"arch": "a", "part": part}) == f"a {part}"
    assert title({"arch": "a"}) == "a trunk", "results from before they said it"


@pytest.mark.parametrize("network", [Chain, Two])
def test_the_part_stays_when_only_some_layers_are_replaced(network: type, extension: None) -> None:
    one = subject_of(network())
    before = TrunkModule(one.model)
    with torch.no_grad():
        accelerate(one.model, one.masks, input_size=SIZE, measure=False)
    after = TrunkModule(one.model)
    assert (after.part, after.pieces) == (before.part, before.pieces)


def test_a_chain_is_cut_behind_pools_and_around_blocks() -> None:
    one = nets.randomise(Chain())
    pieces = [name for name, _, _ in stage_inputs(one, image())]
    assert pieces == ["features.0", "features.3", "features.6", "features.7"]
    with torch.no_grad():
        for _, modules, x in stage_inputs(one, image()):
            for module in modules:
                x = module(x)
        assert torch.equal(x, one.features(image()))
    assert TrunkModule(Two()).pieces == [(NETWORK, [""])]
    threads = torch.get_num_threads()
    try:
        rows = stage_scaling(one, one, image(), 2, rounds=2)
    finally:
        torch.set_num_threads(threads)
    assert [row["part"] for row in rows] == [*pieces, "the whole"]


def test_everything_a_network_returns_is_compared_and_compiles() -> None:
    one = nets.randomise(Two(several=True))
    with torch.no_grad():
        whole = one(image())
        expected = torch.cat([whole["logits"].flatten(), whole["maps"][0].flatten()])
        for made in (TrunkModule(one), WholeModule(one)):
            assert torch.equal(made(image()), expected)
            compiled = torch.compile(made, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(image()), expected)
        del one.stem[1:]
        one.forward = lambda x: {"size": 3}  # type: ignore[method-assign]
        with pytest.raises(OpenTransError, match="no floating tensor"):
            WholeModule(one)(image())


def test_layers_of_every_form_are_exact_or_left_out_by_name() -> None:
    one = subject_of(Two())
    rows = {row.name: row for row in layers.measure_layers(one, SIZE, rounds=1, warmup_s=0)}
    assert set(rows) | set(layers.left_out(one, SIZE)) == set(one.masks.masks)
    forms = {name: (row.kernel, row.groups, row.stride) for name, row in rows.items()}
    assert forms == {
        name: found
        for name, found in {
            "stem.0": (7, 1, 2), "body.0": (5, 16, 1), "body.1": (3, 4, 1), "body.2": (3, 1, 1),
        }.items() if name in one.masks.masks
    }  # fmt: skip
    assert all(row.exact for row in rows.values()), rows
    left = layers.left_out(one, SIZE)
    assert list(left) == ["body.3"] and "not square" in left["body.3"]
    with pytest.raises(OpenTransError, match="is called 'body.3'"):
        layers.measure_layers(one, SIZE, only=["body.3"])


@pytest.mark.parametrize(("network", "part"), [(Chain, "features"), (Two, NETWORK)])
def test_the_trunk_benchmark_runs_on_any_cnn(
    network: type, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.isa_environment("native", 1).items():
        monkeypatch.setenv(name, value)
    one = subject_of(network(), skip=("body.3",))
    monkeypatch.setattr(trunk, "accelerate", unmeasured)
    options = trunk.TrunkOptions(
        height=SIZE[0], width=SIZE[1], rounds=1, warmup_s=0, variants=("eager", "folded")
    )
    result = trunk.run(one, options)
    # Five numbers: that the error is twice dense's own would be luck.
    assert result["subject"]["part"] == part and result["max_rel_err"] < 1e-5
    assert all(entry["rel_err"] < 1e-5 for entry in result["variants"].values())
    assert [row["name"] for row in result["layers"]] == list(one.masks.masks)
    assert not list(schema.problems(result, schema.FORMS["trunk"]))
    shown = io.StringIO()
    bench_trunk.show(result, Output(stdout=shown))
    assert f"tiny:net {part}, uniform:0.70" in shown.getvalue()
    assert f"tiny:net {part}" in trunk_page(result)


def test_the_error_of_a_wrong_layer_is_seen() -> None:
    one = nets.randomise(Two(several=True))
    with torch.no_grad():
        exact = TrunkModule(copy.deepcopy(one).double())(image().double())
        one.body[3].weight[0] += 0.1
        assert trunk.relative_error(TrunkModule(one)(image()), exact) > 1e-4


def test_whole_networks_have_one_kind_of_row(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        part: [one.part for one in model.settings([1, 2], [(32, 32)], [1], 32, part)]
        for part in (TRUNK, "features", NETWORK)
    }
    assert parts == {
        TRUNK: ["trunk", "tower", "trunk"],
        "features": ["features", "tower", "features"],
        NETWORK: ["tower", "tower"],
    }
    monkeypatch.setattr(model, "accelerate", unmeasured)
    for part in ("features", "tower"):
        setting = model.Setting(part, 1, *SIZE, 1)
        row = model.measure_setting(
            subject_of(Chain()), setting, rounds=1, warmup_s=0, variants=["folded"]
        )
        assert row["error"] < 1e-5 and row["part"] == part
        assert not list(schema.problems({**row, "command": []}, schema.MODEL_ROW))
        assert "40x48" in bench_model._name(row)


def test_transformers_networks_are_named_in_one_place() -> None:
    class Options:
        arch = "transformers:resnet18"

    assert arch_packages(Options()) == {  # type: ignore[arg-type]
        "transformers": "arch 'transformers:resnet18' needs transformers"
    }
    pytest.importorskip("transformers")
    found = TrunkModule(build_tower("transformers:resnet18"))
    assert found.part == TRUNK and len(found.pieces) == 5
    with torch.no_grad():
        maps = found.tower(image()).feature_maps
        assert len(maps) == 1 and torch.equal(found(image()), maps[0])
        assert torch.equal(WholeModule(found.tower)(image()), maps[0])
    with pytest.raises(OpenTransError, match="no network 'bert'.*resnet50"):
        build_tower("transformers:bert")


def test_two_threads_are_told_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.isa_environment("native", 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trunk, "accelerate", unmeasured)
    options = trunk.TrunkOptions(
        height=SIZE[0], width=SIZE[1], threads=2, rounds=2, warmup_s=0, variants=("eager",),
        layers=False,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        result = trunk.run(subject_of(Chain()), options)
    finally:
        torch.set_num_threads(threads)
    stages = [row["part"] for row in result["thread_scaling"]["stages"]]
    assert stages == ["features.0", "features.3", "features.6", "features.7", "the whole"]
    assert not list(schema.problems(result, schema.FORMS["trunk"]))
    result["exact"] = True  # so that ratios are shown
    shown = io.StringIO()
    bench_trunk.show(result, Output(stdout=shown))
    assert "efficiency" in shown.getvalue() and "features.7" in shown.getvalue()
