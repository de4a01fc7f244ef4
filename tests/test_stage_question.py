"""A stage asks one question for all of its blocks, and it is as good as one for each."""

from __future__ import annotations

import copy

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import UnsupportedModelError, accelerate


@pytest.fixture
def model(extension: None) -> nn.Module:
    net = nets.randomise(
        nets.clip_resnet.ModifiedResNet((2, 3, 1, 2), 64, 4, image_size=64, width=8)
    )
    accelerate(net, nets.random_masks(net), input_size=(64, 64), measure=False)
    return net


def asked_of_blocks(model: nn.Module, monkeypatch) -> list[str]:
    """Names of the blocks of layer2 that are asked on their own from now on."""
    asked: list[str] = []
    for name, block in model.layer2.named_children():
        own = block.opentrans_freshness.require
        monkeypatch.setattr(
            block.opentrans_freshness,
            "require",
            lambda name=name, own=own: (asked.append(name), own()),
        )
    return asked


@torch.no_grad()
def test_all_blocks_are_asked_by_one_question(model: nn.Module, monkeypatch) -> None:
    x = torch.randn(1, 32, 16, 16)
    asked = asked_of_blocks(model, monkeypatch)
    model.layer2.opentrans_whole = None
    expected = model.layer2(x)
    assert asked == ["0", "1", "2"]
    for _ in range(3):
        assert torch.equal(model.layer2(x), expected)
    assert asked == ["0", "1", "2"], "blocks were asked again, one by one"
    nn.ReLU().register_forward_hook(lambda *_: None)  # a hook somewhere: looked at once more
    for _ in range(2):
        assert torch.equal(model.layer2(x), expected)
    assert asked == ["0", "1", "2"] * 2


@torch.no_grad()
@pytest.mark.parametrize("path", ["0.downsample.0.weight", "1.bn2.running_var", "2.conv3.weight"])
def test_a_write_after_the_one_question_is_noticed(model: nn.Module, path: str) -> None:
    x = torch.randn(1, 32, 16, 16)
    for _ in range(2):
        expected = model.layer2(x)
    owner = model.layer2.get_submodule(path.rpartition(".")[0])
    tensor = getattr(owner, path.rpartition(".")[2])
    kept = tensor.clone()
    tensor.mul_(1.5)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=path.replace(".", r"\.")):
            model.layer2(x)
    tensor.copy_(kept)
    assert torch.equal(model.layer2(x), expected)
    tensor.data = kept  # the same bits at another place
    assert torch.equal(model.layer2(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("steps", ["double", "half", "half float", "double half float"])
def test_converted_weights_are_no_change(model: nn.Module, steps: str, forwards: int) -> None:
    x = torch.randn(1, 32, 16, 16)
    model.layer2.opentrans_whole = None
    for _ in range(forwards):
        expected = model.layer2(x)
    for step in steps.split():
        getattr(model, step)()
    for _ in range(3):
        assert torch.equal(model.layer2(x), expected)
    assert model.layer2.opentrans_whole.freshness.changed() is None
    model.layer2[1].conv2.weight.mul_(2)
    with pytest.raises(UnsupportedModelError, match=r"1\.conv2\.weight"):
        model.layer2(x)


@torch.no_grad()
def test_changed_blocks_after_the_one_question(model: nn.Module) -> None:
    x = torch.randn(1, 32, 16, 16)
    stage = model.layer2
    for _ in range(2):
        expected = stage(x)
    assert stage.opentrans_whole is not None
    twin = copy.deepcopy(stage)
    assert twin.opentrans_whole is None and torch.equal(twin(x), expected)

    first, last = stage._modules["0"], stage._modules["2"]
    stage._modules["2"] = nn.Identity()
    assert torch.equal(stage(x), stage[1](first(x)))
    stage._modules["2"] = twin._modules["1"]  # accelerated as well, with other weights
    for _ in range(2):
        assert torch.equal(stage(x), twin._modules["1"](stage[1](first(x))))
    stage._modules["2"] = last
    assert torch.equal(stage(x), expected)
    stage._modules["3"] = nn.Hardtanh(0, 0.5)
    assert torch.equal(stage(x), expected.clamp(0, 0.5))
    del stage._modules["3"]
    for _ in range(2):
        assert torch.equal(stage(x), expected)
    inner = stage._modules["1"].conv2.register_forward_hook(lambda *_: torch.zeros(1, 16, 8, 8))
    assert not torch.equal(stage(x), expected), "a hook inside a block was dropped"
    inner.remove()
    assert torch.equal(stage(x), expected)
    stage._modules["1"].train()
    with pytest.raises(UnsupportedModelError, match=r"Call model.eval\(\)"):
        stage(x)
    stage._modules["1"].eval()
    engine = stage._modules["1"].opentrans_engines["conv1"]
    packed = engine.bias
    engine.bias = packed + 1  # as moving a module exchanges its buffers
    assert not torch.equal(stage(x), expected)
    engine.bias = packed
    assert torch.equal(stage(x), expected)
