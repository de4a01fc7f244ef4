"""Hugging Face's ResNets are trunks like the others: recognised, fused, exact, put back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import opentrans_kernels as otk
from opentrans.gradskip import restore_skipped, skip_frozen
from opentrans_kernels.audit import audit
from opentrans_kernels.bench.part import TrunkModule
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.synthetic import synthetic_masks
from opentrans_kernels.topology import find_trunk, forward_trunk

transformers = pytest.importorskip("transformers")
SIZE = (64, 48)


def network(kind: str = "bottleneck", whole: bool = False, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48, 64, 80], depths=[2, 1, 2, 1], layer_type=kind,
        out_features=["stage1", "stage2", "stage3", "stage4"], num_labels=5, **options,
    )  # fmt: skip
    kinds = transformers.ResNetForImageClassification, transformers.ResNetBackbone
    model = kinds[0 if whole else 1](config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_trunk_with_stem_and_blocks(kind: str, whole: bool) -> None:
    model = network(kind, whole)
    trunk = find_trunk(model)
    prefix = "resnet." if whole else ""
    assert (trunk.family, trunk.prefix, trunk.notes) == ("transformers", prefix, ())
    assert [b.name for b in trunk.blocks[:3]] == [
        f"{prefix}encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(block.kind == kind for block in trunk.blocks) and not trunk.loose
    assert trunk.stem is not None and trunk.stem.steps[-1] == f"{prefix}embedder.pooler"
    first = trunk.blocks[0]
    assert first.convs[0].name.endswith("layer.0.convolution") and first.downsample is not None
    assert trunk.blocks[1].downsample is None
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        maps = forward_trunk(trunk, x)
        if not whole:
            for found, right in zip(maps[1:], model(x).feature_maps, strict=True):
                assert torch.equal(found, right)
        assert torch.equal(TrunkModule(model)(x), maps[-1])


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_accelerated_as_blocks_exact_and_put_back(kind: str, extension: None) -> None:
    model = network(kind, whole=True)
    masks = synthetic_masks(model, "uniform:0.90")
    dense = copy.deepcopy(model)
    masks.apply_(dense)
    before = dict(model.named_modules())
    report = otk.accelerate(model, masks, input_size=SIZE, measure=False)
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("layers.1")} == {
        type(model.get_submodule("resnet.encoder.stages.2.layers.1")).__name__
    }
    assert "encoder.stages.0.layers.1" in str(report)
    for size in (SIZE, (33, 40)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            exact = copy.deepcopy(dense).double()(x.double()).logits
            rough, found = dense(x).logits, model(x).logits
            hidden = model(x, output_hidden_states=True).hidden_states
        allowed = 2 * (rough - exact).abs().max() + 1e-7 * exact.abs().max()
        assert float((found - exact).abs().max()) <= float(allowed)
        assert [h.shape[1] for h in hidden] == [16, 32, 48, 64, 80]
    otk.restore(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(after[n] is m for n, m in before.items())


def test_another_activation_is_left_alone() -> None:
    trunk = find_trunk(network(hidden_act="gelu"))
    assert not trunk.blocks and trunk.stem is None and "not ReLU" in " ".join(trunk.notes)
    assert len(trunk.loose) == 23


def test_a_block_that_computes_something_else_is_left_alone() -> None:
    model = network()
    block = model.encoder.stages[0].layers[1]
    own = type(block)
    changed = type("Changed", (own,), {"forward": lambda self, x: own.forward(self, x) * 2})
    block.__class__ = changed
    trunk = find_trunk(model)
    assert len(trunk.blocks) == 5 and "something else" in " ".join(trunk.notes)


def test_the_audit_counts_it() -> None:
    model = network()
    report = audit(synthetic_masks(model, "global:0.80"), model, input_size=SIZE)
    assert len(report.rows) == 23 and "transformers ResNet, blocks 2-1-2-1" in str(report)


def test_a_stage_is_not_planned_as_a_whole() -> None:
    from opentrans_kernels.gpu.network import describe_network
    from opentrans_kernels.plan.subject import prepare

    with pytest.raises(UnsupportedModelError, match="one by one"):
        describe_network(prepare(network(), "uniform:0.90", SIZE))


def test_frozen_layers_are_skipped_in_training() -> None:
    model = network().double()
    plain = copy.deepcopy(model)
    names = [n.name for block in find_trunk(model).blocks[::2] for n in block.convs]
    skip_frozen(model, names)
    for name in names:
        plain.get_submodule(name).weight.requires_grad_(False)
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    sums = []
    for one in (model, plain):
        sums.append(sum(m.square().mean() for m in one(x).feature_maps))
        sums[-1].backward()
    assert torch.allclose(*sums)
    trained = 0
    other = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.allclose(parameter.grad, other[name].grad, rtol=1e-8, atol=1e-12), name
            trained += 1
    assert trained > 8
    restore_skipped(model)
