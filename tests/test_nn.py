"""The accelerated modules on their own: exactness, gradients, state dict, refusals."""

from __future__ import annotations

import copy

import accel_nets as nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels import MaskError, UnsupportedModelError, accelerate
from opentrans_kernels.nn import AcceleratedBlock, SparseConv2d, SparseEngine


def conv(cin: int = 7, cout: int = 12, k: int = 3, **kwargs: object) -> nn.Conv2d:
    module = nn.Conv2d(cin, cout, k, **kwargs).eval().requires_grad_(False)  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize(
    "k,stride,padding", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3), (2, 2, 0)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_from_conv_is_the_masked_convolution(k: int, stride: int, padding: int, relu: bool) -> None:
    dense = conv(k=k, stride=stride, padding=padding)
    mask = torch.rand(dense.weight.shape) < 0.3
    bn = nn.BatchNorm2d(12).eval().requires_grad_(False)
    bn.running_mean.normal_()
    bn.weight.normal_()
    sparse = SparseConv2d.from_conv(dense, mask, bn, relu)
    x = torch.randn(2, 7, 13, 11)
    twin = copy.deepcopy(dense)
    twin.weight.data *= mask
    network = nn.Sequential(twin, bn, nn.ReLU() if relu else nn.Identity()).eval()
    nets.check_exact(sparse, network, x)
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    assert sparse.weight is dense.weight and sparse.stride == (stride, stride)
    assert sparse.sparse_weight().nnz == int(mask.sum())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_any_input_layout(layout: str) -> None:
    dense = conv(padding=1)
    sparse = SparseConv2d.from_conv(dense)
    x = torch.randn(2, 7, 12, 10)
    x = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3),
        "sliced": lambda: x[:, :, 1::2, ::3],
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
    }[layout]()
    before = x.clone()
    nets.check_exact(sparse, dense, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_and_unbatched(batch: int) -> None:
    dense = conv(padding=1)
    sparse = SparseConv2d.from_conv(dense)
    nets.check_exact(sparse, dense, torch.randn(batch, 7, 5, 5))
    nets.check_exact(sparse, dense, torch.randn(7, 5, 5))


def test_input_gradient_is_that_of_the_dense_convolution() -> None:
    dense = conv(padding=1, stride=2)
    sparse = SparseConv2d.from_conv(dense, relu=True)
    x = torch.randn(2, 7, 9, 8, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    sparse(x).square().sum().backward()
    F.relu(dense(other)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kwargs,reason",
    [
        ({"groups": 7, "cout": 14}, "groups=7"),
        ({"dilation": (2, 1)}, "dilation"),
        ({"k": (3, 1)}, "not square"),
        ({"padding": 1, "padding_mode": "reflect"}, "reflect"),
    ],
)
def test_unsupported_convolutions_are_refused(kwargs: dict, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as info:
        SparseConv2d.from_conv(conv(**kwargs))
    assert "leave others dense" in str(info.value)


def test_from_conv_refuses_bad_masks_dtypes_and_norms() -> None:
    dense = conv()
    with pytest.raises(MaskError, match="shape"):
        SparseConv2d.from_conv(dense, torch.ones(2, 2))
    with pytest.raises(MaskError, match="other than 0 and 1"):
        SparseConv2d.from_conv(dense, torch.full(dense.weight.shape, 0.5))
    with pytest.raises(UnsupportedModelError, match="float32"):
        SparseConv2d.from_conv(copy.deepcopy(dense).double())
    with pytest.raises(UnsupportedModelError, match="bn=None"):
        SparseConv2d.from_conv(dense, bn=nn.GroupNorm(2, 12))
    with pytest.raises(UnsupportedModelError, match="eval"):
        SparseConv2d.from_conv(dense, bn=nn.BatchNorm2d(12).train())


def test_misuse_of_an_accelerated_module_says_what_to_do() -> None:
    sparse = SparseConv2d.from_conv(conv())
    x = torch.randn(1, 7, 6, 6)
    with pytest.raises(UnsupportedModelError, match="model.eval()"):
        copy.deepcopy(sparse).train()(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(UnsupportedModelError, match="x.float()"):
            sparse(x.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x.bfloat16()).dtype == torch.float32


def test_packed_tensors_keep_their_dtype_and_follow_deepcopy() -> None:
    sparse = SparseConv2d.from_conv(conv())
    x = torch.randn(1, 7, 6, 6)
    expected = sparse(x)
    half = copy.deepcopy(sparse).half()
    assert half.weight.dtype == torch.float16
    assert half.opentrans_engine.values.dtype == torch.float32
    assert torch.equal(half(x), expected)
    twin = copy.deepcopy(sparse)
    assert twin.weight is twin.opentrans_original.weight
    assert twin.weight is not sparse.weight
    assert torch.equal(twin(x), expected)


def test_loading_other_weights_is_refused_but_the_same_ones_are_fine() -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    for key in ("conv1.weight", "bn1.running_mean", "layer1.0.conv2.weight"):
        other = {**state, key: state[key] + 1}
        with pytest.raises(UnsupportedModelError, match="restore") as info:
            model.load_state_dict(other)
        assert key in str(info.value)


def test_blocks_run_fused_unless_gradients_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    dense = nets.masked(model, masks)
    accelerate(model, masks, measure=False)
    block = model.layer2[0]
    assert isinstance(block, AcceleratedBlock) and block.opentrans_unfused is None
    calls = []
    forward = SparseEngine.forward
    monkeypatch.setattr(
        SparseEngine, "forward", lambda self, *a: calls.append(self) or forward(self, *a)
    )
    x = torch.randn(2, 32, 9, 9)
    fused = block(x)
    assert not calls
    single = block(x.requires_grad_())
    assert len(calls) == 4
    torch.testing.assert_close(single, fused, rtol=1e-5, atol=1e-5)
    single.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    dense.layer2[0](other).square().sum().backward()
    scale = float(other.grad.abs().max())
    torch.testing.assert_close(x.grad / scale, other.grad / scale, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(block(x), fused)
