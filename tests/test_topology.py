"""Trunks are recognised by structure and proved by tracing; the unusual is said, not guessed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from trunk_models import OpenAITower, Wrapper, resnet, small

from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology import (
    ConvShape,
    conv_shapes,
    find_trunk,
    find_trunks,
    forward_trunk,
)


def open_clip_tower(layers: list[int], width: int = 64) -> nn.Module:
    module = pytest.importorskip("open_clip.modified_resnet")
    return module.ModifiedResNet(layers, 16, 4, image_size=64, width=width).eval()


def test_open_clip_rn50_alone_and_inside_a_clip_model():
    tower = open_clip_tower([3, 4, 6, 3], width=16)
    trunk = find_trunk(tower)
    assert (trunk.family, trunk.prefix, len(trunk.blocks), trunk.loose) == ("open_clip", "", 16, ())
    assert not trunk.notes
    assert [c.name for c in trunk.stem.convs] == ["conv1", "conv2", "conv3"]
    assert [c.act_name for c in trunk.stem.convs] == ["act1", "act2", "act3"]
    assert [(b.name, b.pool, b.down_pool) for b in trunk.blocks if b.downsample is not None] == [
        ("layer1.0", 1, 1), ("layer2.0", 2, 2), ("layer3.0", 2, 2), ("layer4.0", 2, 2)
    ]  # fmt: skip
    assert trunk.blocks[3].downsample.name == "layer2.0.downsample.0"
    assert [(b.stage, b.index) for b in trunk.blocks[:5]] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    assert len(list(trunk.convs())) == 55

    wrapped = find_trunk(Wrapper(tower))
    assert wrapped.prefix == "visual."
    assert wrapped.conv("visual.layer4.2.conv3").conv is tower.layer4[2].conv3
    assert [c.name for c in wrapped.loose] == ["extra"]
    assert wrapped.stem.pool_name == "visual.avgpool"


@pytest.mark.parametrize("layers, width", [([3, 4, 23, 3], 8), ([4, 6, 10, 6], 10)])
def test_open_clip_other_depths(layers, width):
    trunk = find_trunk(open_clip_tower(layers, width))
    assert (trunk.family, len(trunk.blocks), trunk.notes) == ("open_clip", sum(layers), ())


def test_openai_names():
    trunk = find_trunk(OpenAITower())
    assert (trunk.family, len(trunk.blocks), trunk.notes) == ("openai", 4, ())
    assert trunk.blocks[2].convs[0].act_name == "layer2.0.relu1"
    assert trunk.blocks[2].convs[2].act_name is None  # behind the addition
    assert trunk.stem.steps[:3] == ("conv1", "bn1", "relu1")


@pytest.mark.parametrize("name, blocks, kind", [
    ("resnet18", 8, "basic"), ("resnet34", 16, "basic"), ("resnet50", 16, "bottleneck")
])  # fmt: skip
def test_torchvision(name, blocks, kind):
    trunk = find_trunk(getattr(resnet, name)(num_classes=2))
    assert (trunk.family, len(trunk.blocks), trunk.notes) == ("torchvision", blocks, ())
    assert {b.kind for b in trunk.blocks} == {kind}
    assert trunk.stem.steps == ("conv1", "bn1", "relu", "maxpool")
    assert trunk.blocks[0].convs[0].act_name is None  # one ReLU module serves the whole block


def test_timm():
    timm = pytest.importorskip("timm")
    trunk = find_trunk(timm.create_model("resnet50", pretrained=False, num_classes=2))
    assert (trunk.family, len(trunk.blocks), trunk.notes) == ("timm", 16, ())
    deep = find_trunk(timm.create_model("resnet26t", pretrained=False, num_classes=2))
    assert deep.stem is None and any("conv1 is Sequential" in n for n in deep.notes)
    assert any("ceil_mode=True" in n for n in deep.notes)
    stem = {c.name: c for c in deep.loose}
    assert stem["conv1.0"].bn_name == "conv1.1" and stem["conv1.0"].relu
    # Its norm lies outside of the Sequential, of which a hook would see what lies between.
    assert stem["conv1.6"].bn_name == "bn1" and stem["conv1.6"].act_name == "act1"
    assert [path for path, _ in stem["conv1.6"].through] == ["conv1"]


class Squeezed(resnet.Bottleneck):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.se = nn.Conv2d(self.conv3.out_channels, self.conv3.out_channels, 1)


class Gelu(resnet.Bottleneck):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.relu = nn.GELU()


class Scaled(resnet.Bottleneck):
    """Looks ordinary, computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(0.5 * y + shortcut)


class Swapped(resnet.Bottleneck):
    """Same modules, ReLU before the second norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.bn2(self.relu(self.conv2(y)))))
        return self.relu(y + shortcut)


class Functional(resnet.Bottleneck):
    """Written differently, computes the same: shortcut last, functional ReLU, sum reversed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)), inplace=True)))
        return F.relu((x if self.downsample is None else self.downsample(x)) + y)


@pytest.mark.parametrize("kwargs, reason, norms", [
    ({"block": Squeezed}, "squeeze-and-excitation", (1, 2, 3)),
    ({"block": Gelu}, "relu is GELU, not ReLU", (1, 2, 3)),
    ({"block": Scaled}, "computes something else", (1, 2, 3)),
    ({"block": Swapped}, "computes something else", (1, 3)),
    ({"groups": 4}, "groups=4", (1, 2, 3)),
    ({"norm_layer": nn.InstanceNorm2d}, "not a batch norm that can be folded", ()),
])  # fmt: skip
def test_unusual_blocks_become_loose_with_their_reason(kwargs, reason, norms):
    trunk = find_trunk(small(**kwargs))
    assert not trunk.blocks
    assert any(reason in note for note in trunk.notes), trunk.notes
    names = {c.name for c in trunk.loose}
    assert {f"layer{s}.0.conv{i}" for s in (1, 2, 3, 4) for i in (1, 2, 3)} <= names
    for conv in trunk.loose:
        if "layer" in conv.name and (last := conv.name.split(".")[-1]).startswith("conv"):
            expected = conv.name.replace("conv", "bn") if int(last[-1]) in norms else None
            assert conv.bn_name == expected and conv.act is None


def test_only_the_unusual_block_is_refused():
    model = small()
    model.layer4.append(resnet.Bottleneck(2048, 512, groups=2))
    trunk = find_trunk(model)
    assert [b.name for b in trunk.blocks] == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert [c.name for c in trunk.loose] == [f"layer4.1.conv{i}" for i in (1, 2, 3)]
    assert "layer4.1.conv2 has groups=2" in trunk.notes[0]


def test_a_dilated_block_is_one_like_any_other():
    model = small(replace_stride_with_dilation=[False, False, True])
    model.layer4.append(resnet.Bottleneck(2048, 512, dilation=2))
    trunk = find_trunk(model)
    assert [b.name for b in trunk.blocks][-2:] == ["layer4.0", "layer4.1"] and not trunk.loose


def test_the_same_computation_written_differently_is_accepted():
    assert len(find_trunk(small(block=Functional)).blocks) == 4


def test_a_block_used_twice_is_refused():
    model = small()
    model.layer1.append(resnet.Bottleneck(256, 64))
    model.layer1.append(model.layer1[1])
    trunk = find_trunk(model)
    assert any("used at several places" in n for n in trunk.notes)
    assert "layer1.1" not in {b.name for b in trunk.blocks}
    assert "layer1.1.conv1" not in {c.name for c in trunk.loose}  # shared, so left alone


def test_a_stem_that_does_more_is_refused():
    class Doubled(resnet.ResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    trunk = find_trunk(Doubled(resnet.BasicBlock, [1, 1, 1, 1]))
    assert trunk.stem is None and len(trunk.blocks) == 4
    assert any("what reaches the first block is not" in n for n in trunk.notes)
    with pytest.raises(UnsupportedModelError, match="Call the model's own forward"):
        forward_trunk(trunk, torch.zeros(1, 3, 32, 32))


def test_convolution_with_its_own_forward_is_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), None, self.stride, self.padding)

    model = small()
    model.layer1[0].conv2 = Standardised(64, 64, 3, padding=1, bias=False)
    trunk = find_trunk(model)
    assert "layer1.0.conv2" not in {c.name for c in trunk.convs()}
    assert any("Standardised with its own forward" in n for n in trunk.notes)


def test_two_trunks_and_none():
    model = nn.ModuleDict({"a": small(), "b": OpenAITower()})
    assert [t.prefix for t in find_trunks(model)] == ["a.", "b."]
    first = find_trunk(model)
    assert first.prefix == "a." and "b.layer1.0.conv1" in {c.name for c in first.loose}
    assert any("1 more trunk(s) at 'b'" in n for n in first.notes)

    generic = find_trunk(nn.Conv2d(3, 4, 3))
    assert (generic.family, generic.stem, generic.blocks) == ("generic", None, ())
    assert [c.name for c in generic.loose] == [""]
    with pytest.raises(UnsupportedModelError, match=r"Linear has no Conv2d.*Pass a convolutional"):
        find_trunk(nn.Linear(3, 3))


def test_replaced_modules_are_seen_through():
    class Fast(nn.Module):
        """Stands in for an accelerated block: children stay, the original hangs on an attribute."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            for name, child in block.named_children():
                self.add_module(name, child)
            object.__setattr__(self, "opentrans_original", block)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("must not be traced")

    model = OpenAITower()
    plain, sizes = find_trunk(model), conv_shapes(model, (64, 64))
    model.layer1[1] = Fast(model.layer1[1])
    stem_act = model.relu1
    model.relu1 = nn.Identity()
    object.__setattr__(model.relu1, "opentrans_original", stem_act)
    seen = find_trunk(model)
    assert [b.module for b in seen.blocks] == [b.module for b in plain.blocks]
    assert seen.stem == plain.stem and not seen.notes
    assert conv_shapes(model, (64, 64)) == sizes


def test_finding_changes_nothing_and_runs_no_hook():
    model = small().train()
    calls: list[int] = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trunk = find_trunk(model)
    conv_shapes(model, (40, 40))
    assert len(trunk.blocks) == 4 and not calls and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert len(model.layer1[0].conv1._forward_hooks) == 1
    assert not model.layer1[0]._forward_pre_hooks


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_pruned_and_parametrised_convolutions_are_found():
    model = small()
    prune.random_unstructured(model.layer1[0].conv1, "weight", 0.5)
    parametrize.register_parametrization(model.layer1[0].conv2, "weight", Doubled())
    trunk = find_trunk(model)
    assert len(trunk.blocks) == 4, trunk.notes
    assert conv_shapes(model, (64, 64))["layer1.0.conv2"] == ConvShape(16, 16, 16, 16)
