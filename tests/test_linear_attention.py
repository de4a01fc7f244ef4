"""nn.MultiheadAttention of vision transformers with pruned projections: packed, or as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_linear_layers import assert_same_network, image, sparse
from torch import nn
from vit_nets import prune_, vit

from opentrans_kernels.accelerate import restore
from opentrans_kernels.checkpoint import load_accelerated, save_accelerated
from opentrans_kernels.errors import MaskError, UnsupportedModelError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.synthetic import maskable_layers, synthetic_masks


def attentive(batch_first: bool = True) -> nn.Module:
    """A small vision transformer on nn.MultiheadAttention."""

    class Attends(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(width, 2, batch_first=batch_first)
            self.options: dict[str, object] = {"need_weights": False}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x if batch_first else x.transpose(0, 1)
            y = self.attn(x, x, x, **self.options)[0]
            return y if batch_first else y.transpose(0, 1)

    model = vit()
    for block in model.blocks:
        block.attn = Attends(32)
    return model.eval()


def prune_attention_(model: nn.Module) -> nn.Module:
    prune_(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data[torch.rand(96, 32) < 0.9] = 0
            nn.init.normal_(module.in_proj_bias)
    return model


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_packed(extension: None, batch_first: bool, tmp_path: Path) -> None:
    model = prune_attention_(attentive(batch_first))
    dense = copy.deepcopy(model)
    report = sparse(model)
    kinds = {u.name: (u.role, u.kind) for u in report.plan.units}
    assert kinds["blocks.0.attn.attn"] == ("attention", "sparse")
    rows = [row.name for row in report.plan.rows if row.unit == "blocks.0.attn.attn"]
    assert rows == ["blocks.0.attn.attn.in_proj", "blocks.0.attn.attn.out_proj"]
    assert report.parts_checked == 4
    assert_same_network(model, dense)
    assert all(torch.equal(t, dense.state_dict()[k]) for k, t in model.state_dict().items())
    save_accelerated(tmp_path / "model.safetensors", model)
    again = attentive(batch_first)
    load_accelerated(tmp_path / "model.safetensors", again)
    with torch.no_grad():
        assert torch.equal(again(image()), model(image()))
    model.blocks[0].attn.attn.in_proj_weight.data.mul_(2)
    with pytest.raises(UnsupportedModelError, match="was written to or replaced"):
        model(image())
    restore(model)
    assert type(model.blocks[0].attn.attn) is nn.MultiheadAttention


def test_other_calls_of_attention_run_as_they_were(
    extension: None, caplog: pytest.LogCaptureFixture
) -> None:
    for options, why in (
        ({"need_weights": True}, "weights of attention"),
        ({"need_weights": False, "attn_mask": torch.zeros(16, 16)}, "a mask was given"),
    ):
        model = prune_attention_(attentive())
        dense = copy.deepcopy(model)
        sparse(model)
        for net in (model, dense):
            net.blocks[0].attn.options = options
        caplog.clear()
        assert_same_network(model, dense)
        model(image())
        said = [r.message for r in caplog.records if "runs as it was" in r.message]
        assert len(said) == 1 and why in said[0]
    model = prune_attention_(attentive())
    dense = copy.deepcopy(model)
    sparse(model)
    called: list[int] = []
    model.blocks[1].attn.attn.out_proj.register_forward_hook(lambda *_: called.append(1))
    assert_same_network(model, dense)


def test_masks_of_attention_must_be_in_the_weights(extension: None) -> None:
    model = prune_attention_(attentive())
    name = "blocks.0.attn.attn.out_proj"
    nn.init.normal_(model.get_submodule(name).weight)
    masks = MaskSet({name: torch.rand(32, 32) < 0.1})
    with pytest.raises(MaskError, match="is read by nn.MultiheadAttention"):
        sparse(model, masks)
    masks.apply_(model)
    dense = copy.deepcopy(model)
    report = sparse(model, masks)
    assert "blocks.0.attn.attn" in {u.name for u in report.plan.units if u.kind == "sparse"}
    assert_same_network(model, dense)
    assert "0.attn.attn.out_proj" not in maskable_layers(attentive())


def test_transformers_of_open_clip(extension: None) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(32, vision, text, quick_gelu=True).visual.eval()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data[torch.rand(192, 64) < 0.9] = 0
    synthetic_masks(model, "uniform:0.90").apply_(model)
    dense = copy.deepcopy(model)
    report = sparse(model)
    roles = [u.role for u in report.plan.units if u.kind == "sparse"]
    assert sorted(roles) == ["attention", "attention", "mlp", "mlp"]
    assert_same_network(model, dense)
