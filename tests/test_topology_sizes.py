"""Feature map sizes of a trunk, and batch norms folded into its convolutions."""

from __future__ import annotations

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trunk_models import OpenAITower, Wrapper, randomise, small

from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology import (
    ConvNode,
    ConvShape,
    conv_shapes,
    find_trunk,
    fold_bn,
    forward_trunk,
)


@pytest.mark.parametrize("size", [(64, 64), (97, 51), (224, 224)])
def test_shapes_are_those_of_a_real_forward(size):
    model = OpenAITower().eval()
    trunk = find_trunk(model)
    seen: dict[str, ConvShape] = {}
    handles = [
        m.register_forward_hook(
            lambda _, args, out, n=n: seen.update(
                {n: ConvShape(*args[0].shape[2:], *out.shape[2:])}
            )
        )
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        forward_trunk(trunk, torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    # The head takes 7x7 only; other sizes must work all the same.
    assert conv_shapes(model, size) == seen == conv_shapes(trunk, size)


def test_shapes_of_a_wrapped_tower_and_of_bad_sizes():
    model = Wrapper(OpenAITower())
    shapes = conv_shapes(model, (32, 32))
    assert shapes["visual.layer2.0.conv2"] == ConvShape(8, 8, 8, 8)
    assert shapes["visual.layer2.0.conv3"].pixels == 16
    assert "extra" not in shapes  # not part of the image tower's forward
    with pytest.raises(UnsupportedModelError, match=r"2x2 image does not pass.*larger image"):
        conv_shapes(model, (2, 2))
    with pytest.raises(UnsupportedModelError, match="0x32 has no pixels"):
        conv_shapes(model, (0, 32))
    assert conv_shapes(nn.Conv2d(5, 4, 3, stride=2), (9, 8)) == {"": ConvShape(9, 8, 4, 3)}


def test_forward_trunk_equals_the_model():
    model = randomise(small())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = forward_trunk(find_trunk(model), x)
        assert [o.shape[1] for o in outputs] == [64, 256, 512, 1024, 2048]
        assert torch.equal(model.fc(outputs[-1].mean((2, 3), keepdim=True).flatten(1)), model(x))


class HomemadeFrozen(nn.Module):
    """The tensors of a frozen batch norm, no relation to torch's classes."""

    def __init__(self, n: int, relu: bool = False) -> None:
        super().__init__()
        self.relu, self.eps = relu, 1e-3
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        y = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return F.relu(y) if self.relu else y


def frozen_torchvision(n: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(n, eps=1e-4)


@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d, lambda n: nn.BatchNorm2d(n, affine=False), frozen_torchvision, HomemadeFrozen
])  # fmt: skip
def test_fold_bn_equals_the_layers(norm):
    conv = nn.Conv2d(3, 5, 3, bias=True).double()
    model = randomise(nn.Sequential(conv, norm(5))).double()
    weight, bias = fold_bn(ConvNode("0", conv, model[1], "1"), conv.weight.detach().clone())
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        assert (F.conv2d(x, weight, bias) - want).abs().max() < 1e-12 * want.abs().max()


@pytest.mark.parametrize("norm", [frozen_torchvision, HomemadeFrozen])
def test_frozen_norms_are_folded_in_blocks(norm):
    trunk = find_trunk(randomise(small(norm_layer=norm)))
    assert len(trunk.blocks) == 4 and trunk.stem is not None, trunk.notes


def test_a_norm_with_a_hidden_activation_is_refused():
    trunk = find_trunk(randomise(small(norm_layer=lambda n: HomemadeFrozen(n, relu=True))))
    assert not trunk.blocks
    assert any("not a batch norm that can be folded" in n for n in trunk.notes)


def test_fold_bn_says_what_is_wrong():
    conv = nn.Conv2d(3, 5, 1)
    weight = conv.weight.detach().double()

    def fold(bn: nn.Module) -> None:
        fold_bn(ConvNode("stem.conv1", conv, bn, "stem.bn1"), weight)

    with pytest.raises(UnsupportedModelError, match=r"stem.conv1 with stem.bn1.*model.eval\(\)"):
        fold(nn.BatchNorm2d(5).train())
    with pytest.raises(UnsupportedModelError, match=r"track_running_stats=False"):
        fold(nn.BatchNorm2d(5, track_running_stats=False).eval())
    broken = nn.BatchNorm2d(5).eval()
    broken.bias = None
    with pytest.raises(UnsupportedModelError, match=r"no bias. Restore the missing"):
        fold(broken)
    with pytest.raises(UnsupportedModelError, match=r"4 channels, the convolution 5"):
        fold(nn.BatchNorm2d(4).eval())
    negative = nn.BatchNorm2d(5).eval()
    negative.running_var[0] = -1.0
    with pytest.raises(UnsupportedModelError, match=r"NaN or Inf.*load a sound one"):
        fold(negative)
    with pytest.raises(UnsupportedModelError, match=r"needs a float64 weight"):
        fold_bn(ConvNode("c", conv), conv.weight.detach())


def test_norms_without_statistics_are_recognised_and_fail_when_folded():
    model = small(norm_layer=lambda n: nn.BatchNorm2d(n, track_running_stats=False)).eval()
    trunk = find_trunk(model)
    assert len(trunk.blocks) == 4
    node = trunk.blocks[0].convs[0]
    with pytest.raises(UnsupportedModelError, match=r"layer1.0.conv1 with layer1.0.bn1"):
        fold_bn(node, node.conv.weight.detach().double())


def test_reading_a_tower_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from opentrans_kernels.clip_resnet import ModifiedResNet\n"
        "from opentrans_kernels.topology import conv_shapes, find_trunk\n"
        "trunk = find_trunk(ModifiedResNet((1, 1, 1, 1), 16, 64, 8).eval())\n"
        "assert len(trunk.blocks) == 4 and len(conv_shapes(trunk, (64, 64))) == 19\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
    )
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr
