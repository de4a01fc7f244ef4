"""Zeros in layers that cannot be replaced: said, never counted as none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_linear_layers import assert_same_network, sparse
from torch import nn
from torch.nn.utils import parametrizations, prune
from vit_nets import SIZE, prune_, vit

from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.plan import make_plan


def said(model: nn.Module) -> str:
    return " ".join(make_plan(model, None, SIZE, measure=False).notes)


def test_zeros_elsewhere_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.up = nn.Conv2d(3, 8, 8, 8), nn.ConvTranspose2d(8, 4, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.patches(x))

    model = Net().eval()
    assert "no weight is zero" in str(make_plan(model, measure=False))
    with torch.no_grad():
        model.up.weight[:6] = 0
    text = str(make_plan(model, measure=False))
    assert "no weight is zero" not in text
    assert "only 96 of 128 weights of 1 ConvTranspose2d layer are zero" in text


def test_tied_layers_are_named_with_the_reason() -> None:
    model = vit(depth=1)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    for name in ("attn", "mlp"):
        setattr(model.blocks[1], name, getattr(model.blocks[0], name))
    prune_(model, names=("blocks.0.attn.qkv",))
    text = said(model)
    assert "no weight is zero" not in text and "of 1 Linear layer" in text
    assert "blocks.0.attn.qkv is used at 2 places" in text


def test_attention_that_cannot_be_packed_is_named_with_the_reason() -> None:
    model = vit(depth=1)
    model.extra = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    model.extra.in_proj_weight.data[:, :4] = 0
    text = said(model.eval())
    assert "96 of 192 weights of 1 MultiheadAttention layer" in text
    assert "extra.in_proj belongs to an nn.MultiheadAttention that adds keys" in text


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_not_taken_for_dense_ones(extension: None) -> None:
    quantised = pytest.importorskip("torch.ao.quantization", reason="torch without quantisation")
    if not hasattr(quantised, "quantize_dynamic"):
        pytest.skip("torch without dynamic quantisation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantised.quantize_dynamic(prune_(vit()), {nn.Linear}, torch.qint8)
    report = sparse(model, input_size=SIZE)
    text = str(report)
    assert not report.accelerated and "no weight is zero" not in text
    assert "no weight that can be read is zero" in text
    assert "9 Linear (packed integers; blocks.0.attn.qkv" in text
    assert "before they were quantised" in text


def test_integer_weights_and_weights_without_values_are_named() -> None:
    model = vit(depth=1)
    layer = model.blocks[0].attn.qkv
    layer.weight = nn.Parameter(torch.zeros(96, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="torch.int8, no plain floating-point tensor"):
        said(model)
    layer.weight.data.fill_(1)
    found = next(note for note in make_plan(model, None, SIZE, measure=False).notes
                 if "no floating-point numbers" in note)  # fmt: skip
    assert "1 Linear (int8; blocks.0.attn.qkv)" in found


@pytest.mark.parametrize("how", ["prune", "parametrization", "weight norm", "old weight norm"])
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_are_used_or_left_with_a_reason(extension: None, how: str) -> None:
    model = prune_(vit(), 0.5)  # a row of zeros has no norm
    layer = model.blocks[0].attn.qkv
    if how == "prune":
        prune.custom_from_mask(layer, "weight", (layer.weight != 0).float())
    elif how == "parametrization":

        class Half(nn.Module):
            def forward(self, weight: torch.Tensor) -> torch.Tensor:
                return weight / 2

        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    elif how == "weight norm":
        parametrizations.weight_norm(layer)
    else:
        torch.nn.utils.weight_norm(layer)
    dense = prune_(vit(), 0.5)
    if how == "parametrization":
        dense.blocks[0].attn.qkv.weight.data /= 2
    report = sparse(model, input_size=SIZE)
    assert_same_network(model, dense)
    kinds = {u.name: (u.kind, u.reason) for u in report.plan.units}
    kind, reason = kinds["blocks.0.attn.qkv"]
    assert kind == "sparse" or how == "old weight norm" and "has hooks" in reason
    assert "no weight is zero" not in str(report)
