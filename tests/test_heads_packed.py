"""Parts of heads most of whose weights are zero: packed, exact, and dense again when written to."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from head_nets import Layer
from kernel_cases import assert_within
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.heads.encoder import EncoderLayer
from opentrans_kernels.heads.linear import PackedLinear
from opentrans_kernels.heads.packed import DENSEST
from opentrans_kernels.heads.pointwise import PointwiseConv
from opentrans_kernels.heads.zeros import PackedConv, WinogradConv
from opentrans_kernels.synthetic import synthetic_rn50

pytestmark = pytest.mark.usefixtures("extension")
SIZES = torch.tensor([[5, 6], [3, 4], [2, 2]])
PIXELS = int(SIZES.prod(1).sum())


class Wrapped(nn.Conv2d):
    """detectron2's: with a norm and an activation of its own."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = nn.GroupNorm(4, self.out_channels), torch.relu

    def forward(self, x):
        return self.activation(self.norm(super().forward(x)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(24, 48, 1)
        self.layer = Layer(48, 64)
        self.smooth = Wrapped(48, 48, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(48, 40, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(48, 16, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=2)
        self.classify = nn.Linear(40, 32)

    def forward(self, maps):
        tokens = torch.cat([self.project(x).flatten(2).transpose(1, 2) for x in maps], 1)
        starts = SIZES.prod(1).cumsum(0) - SIZES.prod(1)
        made = torch.Generator().manual_seed(2)
        reference = torch.rand(len(tokens), PIXELS, 3, 2, generator=made).to(tokens.dtype)
        tokens = self.layer(tokens, torch.zeros_like(tokens), reference, SIZES, starts, None)
        x = tokens[:, :30].transpose(1, 2).unflatten(2, (5, 6))
        x = self.smooth(x)
        classes = self.classify(self.strided(x).flatten(2).transpose(1, 2))
        return classes, self.dilated(x), self.grouped(x)


def masked(density: float = 0.1) -> Head:
    head = Head().eval()
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in head.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.mul_(torch.rand(layer.weight.shape, generator=made) < density)
    return head


def maps(batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 24, h, w, generator=made).to(dtype) for h, w in SIZES.tolist()]


@torch.no_grad()
def agree(head: nn.Module, dense: nn.Module, batch: int = 2) -> None:
    exact = copy.deepcopy(dense).double()(maps(batch, torch.float64))
    for found, rough, right in zip(head(maps(batch)), dense(maps(batch)), exact, strict=True):
        bound = 2 * (rough - right).abs().max() + 2e-6 * right.abs().max()
        assert (found - right).abs().max() <= bound


def test_every_kind_of_layer_is_packed_and_exact() -> None:
    dense, head = masked(), masked()
    report = otk.accelerate_heads(head)
    assert type(head.layer) is EncoderLayer and head.layer.opentrans_packed is not None
    assert type(head.layer.self_attn.value_proj) is PackedLinear
    assert type(head.project) is PointwiseConv and head.project.opentrans_packed is not None
    assert type(head.smooth) is type(head.strided) is type(head.dilated) is PackedConv
    assert type(head.classify) is PackedLinear
    assert list(head.state_dict()) == list(dense.state_dict())
    left = {part.path: part.reason for part in report.left}
    assert left == {"grouped": "most of its weights are zero, but it has groups=2: dense"}
    said = str(report)
    assert "both linear layers packed" in said and "linear layer: most weights are zero" in said
    for batch in (1, 2):
        agree(head, dense, batch)


def test_images_with_channels_last_and_planes_give_the_same() -> None:
    head = masked()
    otk.accelerate_heads(head)
    x = maps()[0]
    with torch.no_grad():
        planar = head.project(x[:1])
        assert torch.equal(
            head.project(x[:1].contiguous(memory_format=torch.channels_last)), planar
        )
        assert torch.equal(head.project(x)[:1], planar)
        wide = torch.randn(1, 48, 6, 5)
        last = wide.contiguous(memory_format=torch.channels_last)
        assert torch.equal(head.smooth(wide), head.smooth(last))


def test_what_is_not_sparse_enough_stays_dense() -> None:
    head = masked(DENSEST + 0.15)
    otk.accelerate_heads(head)
    assert type(head.layer) is EncoderLayer and head.layer.opentrans_packed is None
    assert type(head.smooth) is WinogradConv and type(head.classify) is nn.Linear
    agree(head, masked(DENSEST + 0.15))


def test_dense_convolutions_of_a_pyramid_follow_their_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head, plain = masked(1.0), masked(1.0)
    report = otk.accelerate_heads(head)
    assert type(head.smooth) is WinogradConv and "Winograd" in str(report)
    x = torch.randn(2, 48, 15, 22)
    small = x[..., :11, :13]
    with torch.no_grad():
        assert torch.equal(head.smooth(small), plain.smooth(small)), "too small to gain"
        exact, dense = copy.deepcopy(plain.smooth).double()(x.double()), plain.smooth(x)
        for same in (x, x.contiguous(memory_format=torch.channels_last)):
            assert_within(head.smooth(same), exact, dense, "smooth")
        head.smooth.weight.mul_(3)
        plain.smooth.weight.mul_(3)
        for _ in range(2):
            assert torch.equal(head.smooth(x), plain.smooth(x))
    assert len([m for m in caplog.messages if "smooth" in m and "written to" in m]) == 1
    with torch.enable_grad():
        assert head.smooth(x).requires_grad, "gradients come from the module as it was"
    otk.restore_heads(head)
    assert type(head.smooth) is Wrapped


@pytest.mark.parametrize("through_data", [False, True], ids=["counted", "uncounted"])
def test_other_weights_are_computed_densely_and_said_once(
    caplog: pytest.LogCaptureFixture, through_data: bool
) -> None:
    head = masked()
    otk.accelerate_heads(head)
    agree(head, masked())
    with torch.no_grad():
        for layer in (head.classify, head.smooth, head.project, head.layer.linear2):
            (layer.weight.data if through_data else layer.weight).mul_(-1.5)
    other = masked()
    other.load_state_dict(head.state_dict())
    with caplog.at_level(logging.WARNING):
        agree(head, other)
        agree(head, other)
    told = [r.message for r in caplog.records if "since it was packed" in r.message]
    assert len(told) == 4 and all("densely" in line for line in told)


def test_other_weights_can_be_loaded_and_packed_again() -> None:
    head, other = masked(), masked(0.05)
    otk.accelerate_heads(head)
    otk.restore_heads(head)
    head.load_state_dict(other.state_dict())
    otk.accelerate_heads(head)
    assert head.classify.opentrans_packed.density < 0.08
    agree(head, other)


def test_the_very_same_modules_come_back() -> None:
    head = masked()
    before = dict(head.named_modules())
    otk.accelerate_heads(head)
    otk.restore_heads(head)
    assert all(module is before[name] for name, module in head.named_modules())


def test_gradients_other_dtypes_and_training_are_the_original() -> None:
    dense, head = masked(), masked()
    otk.accelerate_heads(head)
    for found, right in zip(head(maps()), dense(maps()), strict=True):
        torch.testing.assert_close(found, right)
    head(maps())[0].sum().backward()
    dense(maps())[0].sum().backward()
    torch.testing.assert_close(head.classify.weight.grad, dense.classify.weight.grad)
    with torch.no_grad():
        double = copy.deepcopy(head).double()(maps(2, torch.float64))
        for found, right in zip(double, dense.double()(maps(2, torch.float64)), strict=True):
            assert torch.equal(found, right)
        copied = copy.deepcopy(head)
        assert torch.equal(copied(maps())[0], head(maps())[0])


def test_hooks_keep_firing() -> None:
    head = masked()
    otk.accelerate_heads(head)
    calls = []
    for layer in (head.classify, head.smooth):
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        head(maps())
    assert len(calls) == 2


def test_a_trunk_is_no_head() -> None:
    model = nn.ModuleDict({"trunk": synthetic_rn50(), "head": masked()}).eval()
    with torch.no_grad():
        for conv in model["trunk"].modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.mul_(torch.rand_like(conv.weight) < 0.1)
    report = otk.accelerate_heads(model)
    assert all(part.path.startswith("head.") for part in report.parts)


def test_compiles_into_one_graph() -> None:
    head = masked()
    otk.accelerate_heads(head)
    with torch.no_grad():
        wanted = head.classify(torch.ones(3, 40))
        found = torch.compile(head.classify, backend="aot_eager", fullgraph=True)(torch.ones(3, 40))
    assert torch.equal(found, wanted)
