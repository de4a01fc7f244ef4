"""Weights of ONNX graphs into plain modules, the graphs being read and not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained_files import randomise

from opentrans.trained import (
    load_focus,
    load_resnet_half,
)
from opentrans.trained.focus import FocusNet
from opentrans.trained.resnet_half import ResNetHalf
from opentrans_kernels import TokenPlan, accelerate, reduce_tokens, restore_tokens
from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.synthetic import synthetic_masks

onnx = pytest.importorskip("onnx")


# The half-width ResNet


class Written:
    """An ONNX graph that is written node by node."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def tensor(self, value: Tensor | np.ndarray) -> str:
        name = f"t{len(self.tensors)}"
        array = np.ascontiguousarray(value.detach().numpy() if isinstance(value, Tensor) else value)
        self.tensors.append(onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        name_of = attributes.pop("name", name)
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], name_of, **attributes))
        return name

    def save(self, path: Path, source: str, shape: list[Any], last: str) -> Path:
        self.nodes[-1].output[0] = last
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes, "stand-in", [value(source, 1, shape)], [value(last, 1, None)], self.tensors
        )
        opset = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset), path)
        return path


def write_resnet(path: Path, model: ResNetHalf) -> Path:
    """As the published graph is made: norms on [B, H, W, C] in four steps, BGR in, softmax out."""
    graph, added = Written(), 0.25

    def normed(x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
        weight = conv.weight.flip(1) if conv is model.conv1 else conv.weight
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        pads = [conv.padding[0]] * 4
        x = graph.node("Conv", x, graph.tensor(weight), strides=conv.stride, pads=pads)
        x = graph.node("Cast", graph.node("Transpose", x, perm=[0, 2, 3, 1]), to=1)
        mean = norm.running_mean
        x = graph.node("Add", x, graph.tensor(torch.full_like(mean, added)))
        x = graph.node("Sub", x, graph.tensor(mean + added))
        x = graph.node("Mul", x, graph.tensor(scale))
        x = graph.node("Add", x, graph.tensor(norm.bias))
        return graph.node("Transpose", x, perm=[0, 3, 1, 2])

    x = graph.node("Transpose", "image", perm=[0, 3, 1, 2])
    x = graph.node("Relu", normed(x, model.conv1, model.bn1))
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    for stage in range(1, model.layers + 1):
        for block in model.get_submodule(f"layer{stage}"):
            y = graph.node("Relu", normed(x, block.conv1, block.bn1))
            y = graph.node("Relu", normed(y, block.conv2, block.bn2))
            if block.downsample is not None:
                x = normed(x, block.downsample[0], block.downsample[1])
            x = graph.node("Relu", graph.node("Add", normed(y, block.conv3, block.bn3), x))
    x = graph.node("ReduceMean", x, axes=[2, 3], keepdims=0)
    x = graph.node("MatMul", x, graph.tensor(model.fc.weight.t()))
    graph.node("Softmax", graph.node("Add", x, graph.tensor(model.fc.bias)), axis=-1)
    return graph.save(path, "image", ["n", None, None, 3], "out")


def small_resnet() -> ResNetHalf:
    return ResNetHalf(planes=2, layers=(1, 2), classes=3)


@pytest.fixture
def resnet_file(tmp_path: Path) -> Path:
    model = randomise(small_resnet())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1 - module.eps)  # what is folded into the scale there
    return write_resnet(tmp_path / "w.onnx", model)  # type: ignore[arg-type]


def change(path: Path, edit: Callable[[Any], None]) -> Path:
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, path)
    return path


def test_the_resnet_computes_what_its_graph_does(resnet_file: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    loaded = load_resnet_half(resnet_file, small_resnet())
    x = torch.randn(2, 3, 32, 32)
    given = x.flip(1).permute(0, 2, 3, 1).contiguous().numpy()
    (expected,) = ReferenceEvaluator(str(resnet_file)).run(None, {"image": given})
    probabilities = loaded(x).softmax(1)
    assert torch.allclose(probabilities, torch.from_numpy(expected), atol=1e-6)
    assert probabilities.std() > 0.01 and loaded.features(x).shape == (2, 16)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def first_of(graph: Any, kind: str, number: int = 0) -> Any:
    return [node for node in graph.node if node.op_type == kind][number]


def tensor_of(graph: Any, name: str) -> Any:
    return next(each for each in graph.initializer if each.name == name)


def drop_a_sub(graph: Any) -> None:
    first_of(graph, "Sub", 2).op_type = "Div"


def other_stride(graph: Any) -> None:
    found = first_of(graph, "Conv", 5).attribute
    next(each for each in found if each.name == "strides").ints[:] = [1, 1]


def fewer_convs(graph: Any) -> None:
    first_of(graph, "Conv", 1).op_type = "Gemm"


def no_last(graph: Any) -> None:
    first_of(graph, "MatMul").op_type = "Gemm"


def other_shape(graph: Any) -> None:
    stored = tensor_of(graph, first_of(graph, "Conv", 2).input[1])
    stored.dims[:] = [stored.dims[1] * stored.dims[0], 1, 3, 3]


def not_finite(graph: Any) -> None:
    stored = tensor_of(graph, first_of(graph, "Conv", 2).input[1])
    stored.raw_data = np.full(len(stored.raw_data) // 4, np.inf, "f4").tobytes()


def too_few_bytes(graph: Any) -> None:
    graph.initializer[0].raw_data = graph.initializer[0].raw_data[:-4]


def elsewhere(graph: Any) -> None:
    graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    graph.initializer[0].external_data.add(key="location", value="beside.bin")
    graph.initializer[0].ClearField("raw_data")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_a_sub, "no batch norm where layer1.0.bn2 should be"),
        (other_stride, "another convolution at n.*, for layer2.0.conv1"),
        (fewer_convs, "has 11 convolutions, not 12"),
        (no_last, "no fully connected layer"),
        (other_shape, r"\(4, 1, 3, 3\) for layer1.0.conv2.weight, not \(2, 2, 3, 3\)"),
        (not_finite, "layer1.0.conv2.weight that are not finite"),
        (too_few_bytes, "tensor t0 of shape .* bytes in the file"),
        (elsewhere, "tensor t0 of shape .* has 0 bytes in the file"),
    ],
)
def test_a_graph_that_is_not_the_resnet(
    edit: Callable[[Any], None], words: str, resnet_file: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_resnet_half(change(resnet_file, edit), small_resnet())


def test_the_resnet_is_accelerated_as_it_is() -> None:
    model = randomise(ResNetHalf(planes=16, layers=(1, 1)))
    masks = synthetic_masks(model, "uniform:0.9")
    masks.apply_(model)
    x = torch.randn(1, 3, 64, 64)
    dense = model(x)
    accelerate(model, masks, input_size=(64, 64))
    assert torch.allclose(model(x), dense, rtol=1e-4, atol=1e-5 * dense.abs().max().item())


# The saliency transformer


def small_focus() -> FocusNet:
    return FocusNet(width=64, depth=2, patch=4, grid=(3, 5), channels=(8, 7, 6))


def write_focus(path: Path, model: FocusNet) -> Path:
    """The names, products and table of the published graph; its arithmetic is left out."""
    graph, stored = Written(), model.state_dict()
    width = stored["encoder.cls_token"].shape[2]

    def keep(name: str, value: Tensor) -> None:
        graph.tensors[int(graph.tensor(value)[1:])].name = name

    def product(place: str, weight: Tensor) -> None:
        graph.node("MatMul", "x", graph.tensor(weight.t()), name=f"/{place}/MatMul")

    embedding = "backbone.embeddings"
    keep(f"{embedding}.cls_token", stored["encoder.cls_token"])
    for leaf in ("weight", "bias"):
        value = stored[f"encoder.patch_embed.proj.{leaf}"]
        keep(f"{embedding}.patch_embeddings.projection.{leaf}", value)
        keep(f"backbone.layernorm.{leaf}", stored[f"encoder.norm.{leaf}"])
    for i in range(len(model.encoder.blocks)):
        ours, theirs = f"encoder.blocks.{i}", f"backbone.encoder.layer.{i}"
        slashes = theirs.replace("layer.", "layer#").replace(".", "/").replace("#", ".")
        for leaf in ("weight", "bias"):
            parts = stored[f"{ours}.attn.qkv.{leaf}"].split(width)
            linears = {
                f"attention/attention/{name}": part
                for name, part in zip(("query", "key", "value"), parts, strict=True)
            }
            linears["attention/output/dense"] = stored[f"{ours}.attn.proj.{leaf}"]
            linears |= {f"mlp/{fc}": stored[f"{ours}.mlp.{fc}.{leaf}"] for fc in ("fc1", "fc2")}
            for place, value in linears.items():
                if leaf == "weight":
                    product(f"{slashes}/{place}", value)
                else:
                    keep(f"{theirs}.{place.replace('/', '.')}.bias", value)
            for norm in ("norm1", "norm2"):
                keep(f"{theirs}.{norm}.{leaf}", stored[f"{ours}.{norm}.{leaf}"])
        for n in (1, 2):
            keep(f"{theirs}.layer_scale{n}.lambda1", stored[f"{ours}.ls{n}.gamma"])
        graph.node("MatMul", "q", "k", name=f"{slashes}/attention/attention/MatMul")
    for name, value in stored.items():
        if name.startswith("decoder.") and value.is_floating_point():
            keep(name, value)
    table = stored["encoder.pos_embed"]
    x = graph.node("Reshape", graph.tensor(table[:, 1:]), "shape")
    x = graph.node("Resize", graph.node("Transpose", x), "", "", "sizes")
    x = graph.node("Reshape", graph.node("Transpose", graph.node("Cast", x, to=1)), "shape")
    graph.node("Concat", graph.tensor(table[:, :1]), x, axis=1)
    return graph.save(path, "x", ["n"], "out")


def test_the_transformer_comes_out_as_it_went_in(tmp_path: Path) -> None:
    model = randomise(small_focus())
    loaded = load_focus(write_focus(tmp_path / "w.onnx", model), small_focus())  # type: ignore[arg-type]
    x = torch.randn(2, 3, 12, 20)
    assert torch.equal(loaded(x), model(x)) and loaded(x).shape == (2, 1, 12, 20)
    assert loaded(x).std() > 1e-3
    stored = model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())
    assert loaded(torch.randn(1, 3, 17, 9)).shape == (1, 1, 17, 9)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def no_table(graph: Any) -> None:
    first_of(graph, "Resize").op_type = "Upsample"


def no_keys(graph: Any) -> None:
    node = next(
        node for node in graph.node if node.name.endswith("layer.1/attention/attention/key/MatMul")
    )
    node.name = "/elsewhere/MatMul"


def more_in_the_head(graph: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, "f4"), "decoder.bn4.bias"))


def less_in_the_head(graph: Any) -> None:
    tensor_of(graph, "decoder.final_conv.bias").name = "elsewhere"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (no_table, "has no table of positions"),
        (no_keys, "lacks queries, keys or values .*blocks.1.attn.key.weight"),
        (more_in_the_head, "has more, such as decoder.bn4.bias"),
        (less_in_the_head, "has nothing for decoder.final_conv.bias"),
    ],
)
def test_a_graph_that_is_not_the_transformer(
    edit: Callable[[Any], None], words: str, tmp_path: Path
) -> None:
    path = write_focus(tmp_path / "w.onnx", randomise(small_focus()))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=words):
        load_focus(change(path, edit), small_focus())


def test_tokens_of_the_transformer_can_be_reduced() -> None:
    model = randomise(small_focus())
    x = torch.randn(1, 3, 24, 24)
    dense = model(x)
    for plan in (
        TokenPlan("cluster", alpha=1, grid=(3, 3)),
        TokenPlan("pool", alpha=1, grid=(3, 3)),
        TokenPlan("tome", r=4),
        TokenPlan("evit", keep=0.5, at=(1,)),
        TokenPlan("act"),
    ):
        reduce_tokens(model.encoder, plan)  # type: ignore[arg-type]
        reduced = model(x)
        restore_tokens(model)
        assert reduced.shape == dense.shape and torch.isfinite(reduced).all()
    assert torch.equal(model(x), dense)
