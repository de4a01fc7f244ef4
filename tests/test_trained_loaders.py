"""Weights of Keras and PyTorch into plain modules: each array in its place, nothing else taken."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained_files import randomise

from opentrans.trained import (
    load,
    load_efficientnet_lite0,
    load_focus,
    load_hed,
    load_resnet_half,
)
from opentrans.trained.efficientnet import ConvNorm, EfficientNetLite
from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.hed import Hed

h5py = pytest.importorskip("h5py")
loading = importlib.import_module("opentrans.trained.load")  # its name is a function too

BLOCKS = ((3, 4), (4, 5), (5, 6))

# HED


def hed_arrays(model: Hed) -> dict[str, np.ndarray]:
    """As Keras keeps them: [height, width, in, out], and BGR."""
    found = {}
    for number, block in enumerate(model.blocks, 1):
        convs = [layer for layer in block if isinstance(layer, nn.Conv2d)]
        for i, conv in enumerate(convs):
            weight = conv.weight.flip(1) if (number, i) == (1, 0) else conv.weight
            key = f"block{number}/layers/conv2d" + (f"_{i}" if i else "")
            found[f"{key}/vars/0"] = weight.detach().permute(2, 3, 1, 0).numpy()
            found[f"{key}/vars/1"] = conv.bias.detach().numpy()
    sides = {f"dsn{i}": side for i, side in enumerate(model.sides, 1)}
    for key, conv in {**sides, "fuse": model.fuse}.items():
        found[f"{key}/vars/0"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
        found[f"{key}/vars/1"] = conv.bias.detach().numpy()
    return found


def write_hed(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def test_hed_comes_out_of_keras_file_as_it_went_in(tmp_path: Path) -> None:
    model = randomise(Hed(BLOCKS))
    loaded = load_hed(write_hed(tmp_path / "w.h5", hed_arrays(model)), Hed(BLOCKS))
    x = torch.randn(1, 3, 13, 18)
    assert torch.equal(loaded(x), model(x)) and loaded(x).std() > 1e-3
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_kernel_of_keras_is_turned(tmp_path: Path) -> None:
    arrays = hed_arrays(Hed(BLOCKS))
    first, second = arrays["block1/layers/conv2d/vars/0"], arrays["block2/layers/conv2d_1/vars/0"]
    first[0, 2, 0, 1] = 41  # row 0, column 2, blue, output 1
    second[1, 0, 2, 3] = 43
    loaded = load_hed(write_hed(tmp_path / "w.h5", arrays), Hed(BLOCKS))
    assert loaded.blocks[0][0].weight[1, 2, 0, 2] == 41
    assert loaded.blocks[1][3].weight[3, 2, 1, 0] == 43


def test_hed_at_the_images_size() -> None:
    model = randomise(Hed(BLOCKS))
    for size in ((1, 1), (5, 3), (16, 16)):
        maps = model.maps(torch.randn(2, 3, *size))
        assert [tuple(each.shape) for each in maps] == [(2, 1, *size)] * 4


def wrong_hed(arrays: dict[str, Any], how: str) -> str:
    """Change one array; returns what the error says."""
    key = "block2/layers/conv2d/vars/0"
    if how == "missing":
        del arrays[key]
        return f"no array of numbers at {key}"
    if how == "a group":
        arrays[f"{key}/inside"] = arrays.pop(key)
        return f"no array of numbers at {key}"
    if how == "text":
        arrays[key] = "hello"
        return f"no array of numbers at {key}"
    if how == "shape":
        arrays[key] = arrays[key].transpose(3, 2, 0, 1)
        return rf"has shape \(4, 4, 3, 3\) at {key}, not \(3, 3, 4, 4\)"
    if how == "nan":
        arrays[key] = np.full_like(arrays[key], np.nan)
        return f"values at {key} that are not finite"
    arrays[key] = h5py.ExternalLink("other.h5", "/x")
    return f"keeps the values of {key} in another file"


@pytest.mark.parametrize("how", ["missing", "a group", "text", "shape", "nan", "elsewhere"])
def test_a_file_that_is_not_hed(how: str, tmp_path: Path) -> None:
    arrays = hed_arrays(randomise(Hed(BLOCKS)))
    write_hed(tmp_path / "other.h5", {"x": arrays["block2/layers/conv2d/vars/0"]})
    words = wrong_hed(arrays, how)
    path = write_hed(tmp_path / "w.h5", arrays)
    with pytest.raises(CheckpointError, match=f"{path} is no weights file of .*{words}"):
        load_hed(path, Hed(BLOCKS))


def test_an_array_announced_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    path = write_hed(tmp_path / "w.h5", hed_arrays(Hed(BLOCKS)))
    with h5py.File(path, "a") as file:
        del file["block1/layers/conv2d/vars/0"]
        file.create_dataset("block1/layers/conv2d/vars/0", (1 << 20, 1 << 20), "f4", chunks=(8, 8))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match=r"shape \(1048576, 1048576\)"):
        load_hed(path, Hed(BLOCKS))


# EfficientNet-Lite0

STAGES = ((4, 1, 3, 1, 1), (6, 2, 5, 2, 2), (8, 1, 3, 2, 2))


def small_lite() -> EfficientNetLite:
    return EfficientNetLite(4, STAGES, 16, 5)


def write_lite(path: Path, model: EfficientNetLite) -> Path:
    """With the names of the published file."""
    found = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (
            ("stem.conv", "_conv_stem"), ("stem.bn", "_bn0"), ("head.conv", "_conv_head"),
            ("head.bn", "_bn1"), ("expand.conv", "_expand_conv"), ("expand.bn", "_bn0"),
            ("depthwise.conv", "_depthwise_conv"), ("depthwise.bn", "_bn1"),
            ("project.conv", "_project_conv"), ("project.bn", "_bn2"), ("blocks.", "_blocks."),
            ("fc.", "_fc."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        found[name] = tensor
    torch.save(found, path)
    return path


def test_the_lite_network_comes_out_as_it_went_in(tmp_path: Path) -> None:
    model = randomise(small_lite())
    path = write_lite(tmp_path / "w.pth", model)  # type: ignore[arg-type]
    assert "_blocks.1._expand_conv.weight" in torch.load(path, weights_only=True)
    loaded = load_efficientnet_lite0(path, small_lite())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x)) and loaded.features(x).shape == (2, 16)
    assert loaded(x).std() > 1e-3
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("window", [3, 5])
def test_strided_windows_look_down_and_to_the_right(window: int) -> None:
    layer = randomise(ConvNorm(1, 1, window, 2, last=True))
    x, total = torch.randn(1, 1, 8, 8), window - 2
    left = total // 2  # TensorFlow's "same": 4 outputs of 8 pixels
    padded = F.pad(x, (left, total - left, left, total - left))
    assert torch.allclose(layer(x), layer.bn(F.conv2d(padded, layer.conv.weight, stride=2)))


def test_the_published_shape() -> None:
    with torch.device("meta"):
        model = EfficientNetLite()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("_conv_stem.weight", None, "has nothing for stem.conv.weight"),
        ("_blocks.1._bn0.bias", torch.zeros(3), r"\(3,\) for blocks.1.expand.bn.bias, not"),
        ("_fc.bias", torch.full((5,), torch.nan), "fc.bias that are not finite"),
        ("_fc.bias", torch.zeros(5, dtype=torch.int64), "has torch.int64"),
        ("_bn1.running_var", torch.full((16,), -1.0), "negative variances for head.bn"),
        ("_swish.weight", torch.zeros(1), "has an entry _swish.weight"),
        ("_blocks.9._bn0.bias", torch.zeros(1), "has more, such as blocks.9.expand.bn.bias"),
    ],
)
def test_a_file_that_is_not_the_lite_network(
    name: str, value: Tensor | None, words: str, tmp_path: Path
) -> None:
    path = write_lite(tmp_path / "w.pth", randomise(small_lite()))  # type: ignore[arg-type]
    stored = torch.load(path, weights_only=True)
    if value is None:
        del stored[name]
    else:
        stored[name] = value
    torch.save(stored, path)
    with pytest.raises(CheckpointError, match=words):
        load_efficientnet_lite0(path, small_lite())


# All of them

LOADERS = [
    (load_hed, "HDF5"),
    (load_resnet_half, "ONNX"),
    (load_efficientnet_lite0, ""),
    (load_focus, "ONNX"),
]


@pytest.mark.parametrize(("loader", "kind"), LOADERS)
@pytest.mark.parametrize("content", [None, b"", b"no weights at all", b"\x08\x07\x12\x00" * 9])
def test_other_files(
    loader: Callable[..., object], kind: str, content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "w"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OpenTransError, match=str(path)):
        loader(path)


@pytest.mark.parametrize(
    ("name", "package"), [("hed", "h5py"), ("resnet50-half", "onnx"), ("focus", "onnx")]
)
def test_a_missing_reader_is_named_before_anything_is_fetched(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OpenTransError, match=f"pip install {package}"):
        load(name)


def test_photographs_are_prepared_as_for_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randint(0, 256, (2, 3, 90, 160), dtype=torch.uint8)
    path = write_hed(tmp_path / "w.h5", hed_arrays(Hed(BLOCKS)))
    _, prepare = loading._LOADERS["hed"]
    small = lambda given: load_hed(given, Hed(BLOCKS))  # noqa: E731
    monkeypatch.setitem(loading._LOADERS, "hed", (small, prepare))
    hed = load("hed", path)
    assert hed.network.name == "hed" and isinstance(hed.module, Hed)
    x = hed.prepare(image)
    mean = torch.tensor([122.67892, 116.66877, 104.00699]).view(1, 3, 1, 1)
    assert torch.allclose(x + mean, image.float(), atol=1e-4)
    for wrong in (image.float(), image[0], image[:, :2]):
        with pytest.raises(OpenTransError, match=r"uint8 images \[B, 3, H, W\] in RGB, not"):
            hed.prepare(wrong)


@pytest.mark.parametrize("size", [(90, 160), (300, 200), (224, 224), (1, 60)])
def test_the_other_networks_get_224_pixels(size: tuple[int, int]) -> None:

    from opentrans.trained import load as _  # noqa: F401

    image = torch.full((1, 3, *size), 200, dtype=torch.uint8)
    half = loading._cropped_less_mean(image)
    assert half.shape == (1, 3, 224, 224)
    assert torch.allclose(half[0, :, 9, 9], torch.tensor([77.0, 83.0, 96.0]), atol=1e-3)
    lite = loading._cropped(image)
    assert lite.shape == half.shape and torch.allclose(lite, torch.tensor(73 / 128), atol=1e-3)
    focus = loading._padded(image)
    assert focus.shape == half.shape
    inside = (200 / 255 - 0.485) / 0.229
    rows = round(224 * size[0] / max(size))
    assert (focus[0, 0] > inside - 0.01).sum() == pytest.approx(
        max(1, rows) * round(224 * size[1] / max(size)), abs=224
    )
