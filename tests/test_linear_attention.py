"""nn.MultiheadAttention of vision transformers with pruned projections: packed, or as it was."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from test_linear_layers import assert_same_network, image, sparse
from torch import nn
from vit_nets import SIZE, prune_, vit

from opentrans_kernels.accelerate import restore
from opentrans_kernels.audit import audit
from opentrans_kernels.checkpoint import load_accelerated, save_accelerated
from opentrans_kernels.errors import MaskError, UnsupportedModelError
from opentrans_kernels.masks import MaskSet, load_masks, read_state_dict
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
    model = prune_attention_(attentive())
    dense = copy.deepcopy(model)
    sparse(model)
    for net in (model, dense):
        net.blocks[0].attn.options = {"need_weights": True}
    assert_same_network(model, dense)
    model(image())
    said = [r.message for r in caplog.records if "runs as it was" in r.message]
    assert len(said) == 1 and "weights of attention" in said[0]
    for options in ({"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}):
        model.blocks[0].attn.options = {"need_weights": False, **options}
        with pytest.raises(RuntimeError):  # torch's own words
            model(image())
    model = prune_attention_(attentive())
    dense = copy.deepcopy(model)
    sparse(model)
    called: list[int] = []
    model.blocks[1].attn.attn.out_proj.register_forward_hook(lambda *_: called.append(1))
    assert_same_network(model, dense)


CAUSAL = torch.full((16, 16), -torch.inf).triu(1)
PADDING = torch.arange(16) >= torch.tensor([[16], [11]])
OWN = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(7)) < 0.3
MASKED = {
    "causal": {"attn_mask": CAUSAL},
    "causal, bool": {"attn_mask": CAUSAL < 0},
    "causal, as a hint": {"attn_mask": CAUSAL, "is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "padding, numbers": {"key_padding_mask": torch.randn(2, 16)},
    "both": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING},
    "both, and the hint": {"attn_mask": CAUSAL, "key_padding_mask": PADDING.float() * -9,
                           "is_causal": True},
    "its own for every head": {"attn_mask": OWN},
    "numbers for every head": {"attn_mask": OWN * 3.0, "key_padding_mask": PADDING.float() * -9},
}  # fmt: skip


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_attention_are_applied(
    extension: None, caplog: pytest.LogCaptureFixture, batch_first: bool
) -> None:
    model = prune_attention_(attentive(batch_first))
    dense = copy.deepcopy(model)
    sparse(model)
    plain = model(image())
    for what, options in MASKED.items():
        for net in (model, dense):
            for block in net.blocks:
                block.attn.options = {"need_weights": False, **options}
        with torch.no_grad():
            found, want = model(image()), dense(image())
        torch.testing.assert_close(found, want, msg=lambda m, what=what: f"{what}: {m}")
        assert not torch.allclose(found, plain, atol=1e-3), f"{what}: the mask does nothing"
    assert "runs as it was" not in caplog.text


NAME = "blocks.0.attn.attn"


def attention_masks() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return {
        f"{NAME}.in_proj": torch.rand(96, 32, generator=random) < 0.2,
        f"{NAME}.out_proj": torch.rand(32, 32, generator=random) < 0.2,
    }


def masked_twin(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    attention = twin.get_submodule(NAME)
    attention.in_proj_weight.data *= masks[f"{NAME}.in_proj"]
    attention.out_proj.weight.data *= masks[f"{NAME}.out_proj"]
    return twin


def write_masks(kind: str, path: Path, model: nn.Module, masks: dict[str, torch.Tensor]) -> str:
    """A file of one kind that holds the two masks of an attention."""
    names = {f"{NAME}.in_proj_weight": f"{NAME}.in_proj", f"{NAME}.out_proj.weight": (
        f"{NAME}.out_proj")}  # fmt: skip
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if kind == "plain":
        state = {key: masks[name] for key, name in names.items()}
    elif kind == "plain, named as masks":
        state = {f"module.{key}_mask": masks[name].float() for key, name in names.items()}
    elif kind == "torch.nn.utils.prune":
        for key, name in names.items():
            state[f"{key}_orig"], state[f"{key}_mask"] = state.pop(key), masks[name].float()
    elif kind == "dense":
        for key, name in names.items():
            state[key] = state[key] * masks[name]
    else:
        MaskSet(masks).save(path / "masks.safetensors")
        return str(path / "masks.safetensors")
    torch.save(state, path / "masks.pth")
    return str(path / "masks.pth")


@pytest.mark.parametrize(
    "kind", ["plain", "plain, named as masks", "torch.nn.utils.prune", "dense", "packed"]
)
def test_masks_of_projections_come_from_files(
    extension: None, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, masks = attentive(), attention_masks()
    dense = masked_twin(model, masks)
    file = write_masks(kind, tmp_path, model, masks)
    found = load_masks(file)
    for name, mask in masks.items():
        (key,) = [one for one in found.masks if one.endswith(name)]
        assert torch.equal(found.masks[key], mask)
    (row,) = [r for r in audit(found, model, SIZE).rows if r.name == f"{NAME}.in_proj"]
    assert row.nnz == int(masks[f"{NAME}.in_proj"].sum()) and (row.cout, row.h_out) == (96, 16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = sparse(model, file)
    assert [u.name for u in report.plan.units if u.kind == "sparse" and u.role == "attention"] == [
        NAME
    ]
    rows = {row.name: row.nnz for row in report.plan.rows}
    assert all(rows[name] == int(mask.sum()) for name, mask in masks.items())
    assert_same_network(model, dense)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    save_accelerated(tmp_path / "model.safetensors", model)
    again = attentive()
    load_accelerated(tmp_path / "model.safetensors", again)
    with torch.no_grad():
        assert torch.equal(again(image()), model(image()))
    assert type(restore(again)) is type(None)
    torch.testing.assert_close(again.state_dict(), dense.state_dict(), rtol=0, atol=0)
    folded = read_state_dict(file) if "plain" not in kind and kind != "packed" else None
    if folded is not None:
        key = f"{NAME}.in_proj_weight"
        assert torch.equal(folded[key], dense.state_dict()[key])
    loaded = attentive()
    found.apply_(loaded)
    assert int((loaded.get_submodule(NAME).in_proj_weight == 0).sum()) == int(
        (~masks[f"{NAME}.in_proj"]).sum()
    )


def test_other_calls_of_a_masked_attention_are_masked_as_well(
    extension: None, caplog: pytest.LogCaptureFixture
) -> None:
    model, masks = attentive(), attention_masks()
    dense = masked_twin(model, masks)
    sparse(model, masks)
    for net in (model, dense):
        net.blocks[0].attn.options = {"need_weights": True}
    assert_same_network(model, dense)
    assert "weights of attention" in caplog.text
    handle = model.get_submodule(NAME).out_proj.register_forward_hook(lambda *_: None)
    assert_same_network(model, dense)
    handle.remove()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model.blocks[0].attn.attn)))
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        want = dense.get_submodule(NAME)(x, x, x)[0]
        torch.testing.assert_close(twin(x, x, x)[0], want)


def test_projections_that_cannot_be_packed_are_named(extension: None) -> None:
    model = attentive()
    model.blocks[0].attn.attn = nn.MultiheadAttention(32, 2, add_bias_kv=True, batch_first=True)
    model.eval()
    with pytest.raises(MaskError, match=r"in_proj' cannot be applied.*adds keys"):
        sparse(model, attention_masks())
    MaskSet(attention_masks()).apply_(model)
    dense = copy.deepcopy(model)
    sparse(model, attention_masks())
    assert_same_network(model, dense)
    apart = attentive()
    apart.blocks[0].attn.attn = nn.MultiheadAttention(32, 2, kdim=16, vdim=16)
    with pytest.raises(
        MaskError, match="in_proj_weight of nn.MultiheadAttention are masked|no mod"
    ):
        sparse(apart, {f"{NAME}.q_proj_weight": torch.zeros(32, 32, dtype=torch.bool)})
    pruned = attentive()
    torch.nn.utils.prune.random_unstructured(pruned.get_submodule(NAME), "in_proj_weight", 0.5)
    with pytest.raises(MaskError, match=r"prune.remove\(module, 'in_proj_weight'\)"):
        MaskSet(attention_masks()).apply_(pruned)
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
