"""Sparse checkpoints that are loaded without a model: by the file's name for it, or a function."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import accel_nets as nets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opentrans_kernels import (
    CheckpointError,
    UnsupportedModelError,
    accelerate,
    checkpoint,
    restore,
)
from opentrans_kernels.checkpoint import METADATA_KEY, load_accelerated, save_accelerated
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.topology import find_trunk
from opentrans_kernels.towers import NAMED, build_tower, check_named, empty_tower, fill_storage

RESNET = "torchvision:resnet18"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that does not say how its network is built."""
    path = tmp_path_factory.mktemp("plain") / "tower.safetensors"
    model = nets.tower()
    accelerate(model, nets.random_masks(model, 0.1), measure=False)
    save_accelerated(path, model)
    return path


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """(a file that names its network, the network)."""
    pytest.importorskip("torchvision")
    path = tmp_path_factory.mktemp("named") / "resnet.safetensors"
    model = build_tower(RESNET, seed=3)
    accelerate(model, nets.random_masks(model, 0.05), input_size=(64, 64), measure=False)
    save_accelerated(path, model, arch=RESNET)
    return path, model


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """The file with another header, whose hash fits again."""
    with safe_open(source, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY]) | changes
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    header["sha256"] = checkpoint.digest(tensors, header)
    save_file(tensors, target, {METADATA_KEY: json.dumps(header)})
    return target


def test_the_file_says_how_its_network_is_built(named: tuple[Path, nn.Module]) -> None:
    path, model = named
    before = torch.random.get_rng_state()
    loaded, report = load_accelerated(path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert report.accelerated and not loaded.training
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    restore(loaded)
    state = loaded.state_dict()
    assert not any(tensor.is_meta for tensor in state.values())
    check_named(RESNET, loaded)


def test_a_function_builds_any_other_network(plain: Path) -> None:
    loaded, report = load_accelerated(plain, build=lambda: nets.tower(seed=5).train())
    assert report.accelerated and not loaded.training
    twin = nets.tower(seed=6)
    load_accelerated(plain, twin)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), twin(x))


def test_a_file_without_a_name_asks_for_the_network(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not name its architecture.*build=FUNCTION"):
        load_accelerated(plain)
    with safe_open(plain, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    del header["arch"]  # as files written before it existed
    header["sha256"] = checkpoint.digest(tensors, header)
    save_file(tensors, tmp_path / "old", {METADATA_KEY: json.dumps(header)})
    assert load_accelerated(tmp_path / "old", nets.tower()).accelerated
    with pytest.raises(CheckpointError, match="does not name its architecture"):
        load_accelerated(tmp_path / "old")


@pytest.mark.parametrize(
    "arch", ["RN51", "timm:hf-hub:some/where", "torchvision:vgg16", "os:system", "ViT-B-32", ""]
)
def test_only_names_of_the_list_are_built(
    arch: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a name of a file reached a builder or an import")

    path = rewritten(plain, tmp_path / "odd", arch=arch)
    monkeypatch.setattr(checkpoint, "empty_tower", refuse)
    monkeypatch.setattr("opentrans_kernels.towers.optional_module", refuse)
    with pytest.raises(CheckpointError, match=r"which is not one of .*RN50, .*build=FUNCTION"):
        load_accelerated(path)


@pytest.mark.parametrize("arch", [5, ["RN50"], {"name": "RN50"}, True])
def test_a_name_that_is_no_text_is_damage(arch: Any, plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "odd", arch=arch)
    for models in ((), (nets.tower(),)):
        with pytest.raises(CheckpointError, match="header is not readable: arch is"):
            load_accelerated(path, *models)


def test_no_memory_is_taken_for_a_name_that_contradicts_the_tensors(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "fill_storage", lambda _: pytest.fail("storage was taken"))
    path = rewritten(plain, tmp_path / "large", arch="RN50x64")
    with pytest.raises(CheckpointError, match="holds another architecture"):
        load_accelerated(path)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (nn.Sequential(), "build is a Sequential, not a function.*Pass a network that exists"),
        ("torchvision.models:resnet18", "build is a str, not a function"),
        (lambda: None, "torch.nn.Module is needed, got NoneType"),
        (lambda: nets.tower, "torch.nn.Module is needed, got function"),
        (lambda: nets.tower().double(), "float64"),
    ],
)
def test_odd_builders_are_refused(build: Any, words: str, plain: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        load_accelerated(plain, build=build)


def test_a_builder_of_another_network_and_two_sources_are_refused(plain: Path) -> None:
    with pytest.raises(CheckpointError, match="holds another architecture"):
        load_accelerated(plain, build=lambda: nn.Sequential(nets.tower()))
    model = nets.tower()
    before = nets.snapshot(model)
    with pytest.raises(UnsupportedModelError, match="Pass one of them"):
        load_accelerated(plain, model, build=nets.tower)
    nets.check_unchanged(model, before)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("RN50", r"the model is not RN50: \d+ tensors differ, .* in the model and .* in RN50"),
        ("torchvision:vgg16", "not one of those that are built by name"),
        ("my.module:build", "not one of those that are built by name"),
    ],
)
def test_a_wrong_name_is_not_written(arch: str, words: str, tmp_path: Path) -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    with pytest.raises(UnsupportedModelError, match=words):
        save_accelerated(tmp_path / "x", model, arch=arch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", NAMED)
def test_every_known_name_has_a_state_that_is_its_state_dict(arch: str) -> None:
    library = arch.partition(":")[0] if ":" in arch else "open_clip"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    model = empty_tower(arch)
    own = [*model.named_parameters(), *model.named_buffers()]
    assert all(tensor.is_meta for _, tensor in own) and not model.training
    # What is not in the state dict, storage would leave undefined.
    assert {name for name, _ in own} == set(model.state_dict())
    found = find_trunk(model)
    if arch == "HED":  # no residual block, so no trunk
        assert len(found.loose) == 19 and found.stem is None
    else:
        assert len(found.stages) == 4 and found.stem is not None and len(found.blocks) >= 8


def test_storage_is_zero_and_other_names_are_refused() -> None:
    pytest.importorskip("torchvision")
    filled = fill_storage(empty_tower(RESNET))
    assert all(not tensor.any() for tensor in filled.state_dict().values())
    with pytest.raises(OpenTransError, match="not built by its name alone"):
        empty_tower("timm:vgg11")
