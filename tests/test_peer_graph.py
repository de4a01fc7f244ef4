"""The graph that other engines are given computes what the network does."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from opentrans_kernels.bench import linear_ops
from opentrans_kernels.bench.part import TrunkModule
from opentrans_kernels.bench.peers import session
from opentrans_kernels.bench.peers.graph import write_graph
from opentrans_kernels.bench.peers.process import Worker
from opentrans_kernels.bench.peers.work import network_work, operator_work
from opentrans_kernels.bench.variants import relative_error
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_masks


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(session.WORKERS))


def through_onnx(folder: Path) -> torch.Tensor:
    """What ONNX's own slow evaluator makes of the graph in ``folder``."""
    pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    path = importlib.import_module("onnx_graph").build_onnx(folder)
    x = np.load(folder / "input.npy")
    (found,) = ReferenceEvaluator(str(path)).run(None, {"input": x})
    return torch.from_numpy(found)


def answer(module: nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    np.save(folder / "input.npy", x.numpy())
    write_graph(module, x, folder)
    return through_onnx(folder)


def ready(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    return module.eval().requires_grad_(False)


class Residual(nn.Module):
    """Writes to its input's copy twice, so that a graph that forgets order is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(self.norm(self.conv(x)))
        z = y.relu_()
        z += nn.functional.adaptive_avg_pool2d(z, 1)
        y = torch.cat([y, nn.functional.hardtanh(z, -0.5, 0.5)], 1)
        return y - 2 * z.mean((2, 3), True)[:, :1]


class Tokens(nn.Module):
    """Attention of torch's own module, split and sliced tokens, a shift that no input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.shift = nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.shift.expand(1, x.shape[1], -1).softmax(-1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        one, two = self.norm(x)[:, 1:7].unflatten(1, (2, 3)).unbind(1)
        gate = torch.sigmoid(two) * (two @ one.transpose(1, 2)).softmax(-1).mean(-1, True)
        return nn.functional.silu(one) / 3 * gate - torch.tanh(one[:, 2:3] + 0.5)


NETWORKS = {
    "convolutions": (Residual, (2, 4, 13, 12)),
    "tokens": (Tokens, (2, 9, 12)),
    "average pools": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(1)), (1, 3, 9, 8)),
    "an MLP": (lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5)), (2, 7, 8)),
    "a classifier": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), (2, 4, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_computes_the_network(name: str, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    module = ready(make())
    x = torch.randn(shape)
    reference = module.double()(x.double())
    found = answer(module.float(), x, tmp_path)
    assert found.shape == reference.shape and relative_error(found, reference) < 2e-6


def test_a_masked_vision_transformer_keeps_its_zeros(tmp_path: Path) -> None:
    """The other engines get the very weights of the masked network, transposed."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    tower = ready(tower)
    masks = synthetic_masks(tower, "uniform:0.90")
    masks.apply_(tower)
    subject = SimpleNamespace(masked_copy=lambda: tower, arch="timm:x", model=tower, masks=masks)
    x = torch.randn(1, 3, 32, 32)
    work = network_work(subject, x, "native")
    work.write(tmp_path)
    work.graph(tmp_path)
    assert work.words == ("timm:x", "native") and (tmp_path / "masks.safetensors").exists()
    assert relative_error(through_onnx(tmp_path), tower.double()(x.double())) < 2e-6
    held = np.load(tmp_path / "tensors.npz")
    wide = [held[name] for name in held.files if held[name].shape == (192, 768)]
    assert len(wide) == 1 and all(0.85 < (weight == 0).mean() < 0.95 for weight in wide)
    assert np.array_equal(wide[0], tower.blocks[0].mlp.fc1.weight.float().T.numpy())


def test_a_resnets_batch_norms_are_folded(tmp_path: Path) -> None:
    resnet = pytest.importorskip("open_clip.modified_resnet")
    tower = resnet.ModifiedResNet([1, 1, 1, 1], output_dim=16, heads=2, image_size=64, width=8)
    tower = ready(tower)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        reference = TrunkModule(copy.deepcopy(tower).double())(x.double())
    subject = SimpleNamespace(masked_copy=lambda: tower, arch="RN50")
    network_work(subject, x, "native").graph(tmp_path)
    np.save(tmp_path / "input.npy", x.numpy())
    ops = [one["op"] for one in json.loads((tmp_path / "graph.json").read_text())]
    assert set(ops) == {"Conv", "Relu", "AveragePool", "Add", "Identity"}
    # No norm is left as a product and a sum: the additions are the residual ones.
    assert (ops.count("Conv"), ops.count("Relu"), ops.count("Add")) == (19, 15, 4)
    assert relative_error(through_onnx(tmp_path), reference) < 2e-6


class Unknown(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


def _causal(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: x.sort()[0], r"calls aten\.sort\.default, which the graph.*it has .*linear"),
        (lambda x: nn.functional.gelu(x, approximate="tanh"), "with approximate = 'tanh'"),
        (_causal, "with is_causal"),
        (lambda x: x.softmax(0), "along dimension 0 of 3"),
        (lambda x: torch.add(x, x, alpha=2), "with alpha = 2"),
        (lambda x: nn.functional.max_pool2d(x, 2, ceil_mode=True), "with ceil_mode"),
        (lambda x: nn.functional.linear(x, x[0]), "a weight that depends on the input"),
        (lambda x: x if x.sum() > 0 else -x, r"cannot follow this network \(\w+"),
    ],
)
def test_what_the_graph_cannot_say_is_explained(call, said: str, tmp_path: Path) -> None:
    with pytest.raises(OpenTransError, match=said) as caught:
        write_graph(Unknown(call), torch.randn(3, 5, 5), tmp_path)
    assert "Leave them out of --peers" in str(caught.value)
    assert not (tmp_path / "graph.json").exists()


def test_an_operator_is_the_same_for_all_sides(tmp_path: Path) -> None:
    """Its graph, and our worker in a process of its own, have the answer of the case."""
    shape = linear_ops.LinearCase(24, 24, 13, 40)
    case = linear_ops.linear_case("sparse_mlp", shape, 0.3, 2)
    work = operator_work(case, "reference")
    work.write(tmp_path)
    work.graph(tmp_path)
    assert relative_error(through_onnx(tmp_path), case.reference) < 1e-6
    words = [sys.executable, str(session.WORKERS / work.ours), str(tmp_path), "1", *work.words]
    root = str(Path(__file__).resolve().parents[1])
    worker = Worker("ours", words, {**os.environ, "PYTHONPATH": root})
    try:
        worker.ask(f"output {tmp_path / 'ours.npy'}")
        assert worker.ask("sample 1 1")["wall_ms"] > 0
    finally:
        worker.close()
    found = torch.from_numpy(np.load(tmp_path / "ours.npy"))
    assert found.shape == (2, 13, 24) and relative_error(found, case.reference) < 1e-6


def test_an_operator_without_such_a_form_says_so() -> None:
    case = SimpleNamespace(op="warp", module=None, arguments=(torch.ones(1),))
    with pytest.raises(OpenTransError, match="warp has no form .* --ops sparse_linear,sparse_mlp"):
        operator_work(case, "cpu")


def test_removing_channels_is_refused_for_masked_linear_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", ModuleType("torch_pruning"))
    worker = importlib.import_module("torch_pruning_worker")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4))
    masked = SimpleNamespace(masks={"1": torch.ones(4, 4)})
    with pytest.raises(OpenTransError, match="prunes 1 linear layers.*Leave this peer out"):
        worker.check_mask(SimpleNamespace(model=model, masks=masked))
    worker.check_mask(SimpleNamespace(model=model, masks=SimpleNamespace(masks={"0": None})))
