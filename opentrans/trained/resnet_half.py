"""A bottleneck ResNet-50 of half the width, trained as an image classifier, batch norms apart.

Built as the Caffe networks of its time: a stride stands on the first 1x1 of a block, and the pool
behind the stem looks beyond the lower and right edge only. Its weights come as an ONNX graph
without names, so each convolution is found by its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .filling import fill, other_network
from .onnx_file import Graph, attributes, read_onnx

__all__ = ["MEAN_RGB", "ResNetHalf", "load_resnet_half"]

WHAT = "half-width ResNet-50"
#: Of the images it was trained on, per channel, values from 0 to 255.
MEAN_RGB = (123.0, 117.0, 104.0)
LAYERS = (3, 4, 6, 3)
#: Kinds of nodes that change no value.
_SAME = ("Transpose", "Cast")


class Bottleneck(nn.Module):
    """[N, inputs, H, W] -> [N, 4 * planes, H / stride, W / stride]."""

    def __init__(self, inputs: int, planes: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if project:
            conv = nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        return self.relu(y)


class ResNetHalf(nn.Module):
    """Image classifier. ``forward(x)``: float32 [B, 3, H, W], RGB from 0 to 255 minus ``MEAN_RGB``,
    224x224 as it was trained; returns logits [B, classes]. ``features(x)`` returns the pooled
    vectors before them, [B, 32 * planes].

    Args:
        planes: channels of the first block's 3x3; 64 would be a ResNet-50.
        layers: blocks per stage.
        classes: of the last layer.
    """

    def __init__(
        self, planes: int = 32, layers: tuple[int, ...] = LAYERS, classes: int = 2
    ) -> None:
        super().__init__()
        inputs = 2 * planes  # the stem is not halved
        self.conv1 = nn.Conv2d(3, inputs, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.layers = len(layers)
        for stage, count in enumerate(layers):
            wide = planes << stage
            blocks = [Bottleneck(inputs, wide, 2 if stage else 1, True)]
            blocks += [Bottleneck(4 * wide, wide, 1, False) for _ in range(count - 1)]
            inputs = 4 * wide
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return self.pooled(self.maps(x)[-1])

    def maps(self, x: Tensor) -> list[Tensor]:
        """Maps of the last two stages, [B, C, H, W] each."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        found = []
        for stage in range(self.layers):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            found.append(x)
        return found[-2:]

    def pooled(self, x: Tensor) -> Tensor:
        """The feature vectors of the last map, [B, C]."""
        return self.avgpool(x).flatten(1)


def load_resnet_half(path: str | os.PathLike[str], model: ResNetHalf | None = None) -> ResNetHalf:
    """The classifier with the weights of its ONNX file, eval mode, no gradients.

    The graph computes ``(conv + a - mean) * scale + beta`` where a batch norm was: ``scale`` and
    ``beta`` become weight and bias, ``mean - a`` the running mean, and the variance with epsilon
    added is 1. It takes BGR; the module takes RGB.

    Args:
        model: another shape of the same network; by default the published one.

    Raises CheckpointError if the file is not of this network, OpenTransError if onnx is missing.
    """
    model = ResNetHalf() if model is None else model
    graph = read_onnx(path)
    convs, places = graph.of_kind("Conv"), list(_places(model))
    if len(convs) != len(places) or len(graph.of_kind("MaxPool")) != 1:
        raise other_network(path, WHAT, f"has {len(convs)} convolutions, not {len(places)}")
    found: dict[str, Tensor] = {}
    for node, (conv, norm) in zip(convs, places, strict=True):
        weight = graph.constant(node)
        module = model.get_submodule(conv)
        if weight is None or attributes(node).get("strides") != module.stride:
            raise other_network(path, WHAT, f"has another convolution at {node.name}, for {conv}")
        found[f"{conv}.weight"] = weight.flip(1) if conv == "conv1" else weight
        found |= _batch_norm(graph, node, norm, path, model.get_submodule(norm).eps)
    found |= _last(graph, path)
    fill(model, found, path, WHAT)
    return model


def _places(model: ResNetHalf) -> Iterator[tuple[str, str]]:
    """Convolutions and their batch norms, in the order of the graph."""
    yield "conv1", "bn1"
    for stage in range(1, model.layers + 1):
        blocks = model.get_submodule(f"layer{stage}")
        for name, block in blocks.named_children():
            at = f"layer{stage}.{name}"
            yield f"{at}.conv1", f"{at}.bn1"
            yield f"{at}.conv2", f"{at}.bn2"
            if block.downsample is not None:
                yield f"{at}.downsample.0", f"{at}.downsample.1"
            yield f"{at}.conv3", f"{at}.bn3"


def _batch_norm(
    graph: Graph, conv: object, norm: str, path: str | os.PathLike[str], eps: float
) -> dict[str, Tensor]:
    chain = graph.chain(conv, _SAME, 4)
    parts = [graph.constant(node) for node in chain]
    values = [part.flatten() for part in parts if part is not None]
    if [node.op_type for node in chain] != ["Add", "Sub", "Mul", "Add"] or len(values) != 4:
        raise other_network(path, WHAT, f"has no batch norm where {norm} should be")
    added, mean, scale, beta = values
    if added.shape != mean.shape:
        raise other_network(path, WHAT, f"has a batch norm of two widths where {norm} should be")
    return {
        f"{norm}.weight": scale,
        f"{norm}.bias": beta,
        f"{norm}.running_mean": mean - added,
        f"{norm}.running_var": torch.full_like(mean, 1 - eps),
    }


def _last(graph: Graph, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    products = graph.of_kind("MatMul")
    weight = graph.constant(products[0]) if len(products) == 1 else None
    added = graph.chain(products[0], _SAME, 1) if weight is not None else []
    bias = graph.constant(added[0]) if added and added[0].op_type == "Add" else None
    if weight is None or bias is None or weight.dim() != 2:
        raise other_network(path, WHAT, "has no fully connected layer at its end")
    return {"fc.weight": weight.t(), "fc.bias": bias}
