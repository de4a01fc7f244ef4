"""Pruned linear layers of vision transformers: found, planned, replaced, restored, saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import vit_nets
from torch import nn
from vit_nets import SIZE, Mlp, prune_, vit

import opentrans_kernels as otk
from opentrans_kernels.accelerate import accelerate, restore
from opentrans_kernels.activations import Kind
from opentrans_kernels.audit import audit
from opentrans_kernels.checkpoint import load_accelerated, save_accelerated
from opentrans_kernels.errors import MaskError, UnsupportedModelError
from opentrans_kernels.linears import AcceleratedLinear, AcceleratedMlp
from opentrans_kernels.masks import MaskSet, load_masks
from opentrans_kernels.plan import Plan, make_plan
from opentrans_kernels.synthetic import maskable_layers, synthetic_masks
from opentrans_kernels.topology import find_linears
from opentrans_kernels.topology.linears import proved_activation

PRUNED = [f"blocks.{i}.{name}" for i in (0, 1) for name in (
    "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip
UNITS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp")]


def sparse(model: nn.Module, masks=None, **options):
    """Accelerated whatever a clock says."""
    return accelerate(model, masks, measure=False, **options)


def image(n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def assert_same_network(model: nn.Module, dense: nn.Module, x: torch.Tensor | None = None) -> None:
    """Within twice dense's own error, and a few roundings of the largest output."""
    x = image() if x is None else x
    with torch.no_grad():
        exact, own = copy.deepcopy(dense).double()(x.double()), dense(x)
        error = (model(x).double() - exact).abs().max()
    bound = 2 * (own.double() - exact).abs().max() + 8 * 2.0**-23 * exact.abs().max()
    assert float(error) <= float(bound)


@pytest.mark.parametrize("given", ["zeros", "masks", "recipe"])
def test_every_pruned_layer_is_replaced_and_comes_back(extension: None, given: str) -> None:
    model = vit()
    dense = copy.deepcopy(model)
    masks: object = "uniform:0.90"
    recipe = synthetic_masks(model, "uniform:0.90")
    recipe.apply_(dense)
    if given == "zeros":
        recipe.apply_(model)
        masks = None
    elif given == "masks":
        masks = recipe
    before = {key: (t, t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    report = sparse(model, masks)
    assert [u.name for u in report.plan.units if u.kind == "sparse"] == UNITS
    assert [u.role for u in report.plan.units] == ["loose", *["linear", "linear", "mlp"] * 2]
    assert [row.name for row in report.plan.rows] == ["patches", *PRUNED]
    assert all(row.h_out == 16 and row.w_out == 1 for row in report.plan.rows[1:])
    assert isinstance(model.blocks[0].mlp, AcceleratedMlp)
    assert isinstance(model.blocks[1].attn.qkv, AcceleratedLinear)
    assert report.max_rel_err is not None and report.max_rel_err < 1e-5
    assert report.parts_checked == 6 and "8 linear layers" in str(report)
    for n in (1, 3):
        assert_same_network(model, dense, image(n))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[k] is t and torch.equal(t, bits) for k, (t, bits) in before.items())
    restore(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}


def test_a_measured_plan_says_why_and_is_carried_out_again(extension: None) -> None:
    model = prune_(vit(width=64))
    plan = make_plan(model)
    for unit in plan.units[1:]:
        assert unit.dense_ms and unit.sparse_ms and "ms" in unit.reason
    assert Plan.from_dict(plan.to_dict()) == plan
    report = accelerate(model, plan=plan, measure=False)
    assert {u.name: u.kind for u in report.plan.units} == {u.name: u.kind for u in plan.units}


def test_a_recipe_means_convolutions_wherever_there_are_any() -> None:
    assert list(maskable_layers(vit())) == PRUNED  # neither patches nor head

    class Conv(nn.Sequential):
        pass

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert list(maskable_layers(net)) == ["1"]
    assert "covers the 8 linear layers" in str(sparse(vit(), "global:0.90").plan)


def test_other_networks_keep_their_linear_layers_unless_these_are_pruned(extension: None) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        pool = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *pool, nn.Linear(32, 100)).eval()

    first = net()
    assert [u.name for u in make_plan(first, measure=False).units] == ["0"]
    with torch.no_grad():
        first[4].weight[0, 0] = 0  # one zero prunes nothing
    assert [u.name for u in make_plan(first, measure=False).units] == ["0"]
    second = prune_(net(), names=("4",))
    dense = copy.deepcopy(second)
    report = sparse(second)
    assert [(u.name, u.kind) for u in report.plan.units][1] == ("4", "sparse")
    assert_same_network(second, dense)


def test_an_mlp_whose_second_layer_is_dense_is_two_layers(extension: None) -> None:
    model = prune_(vit(depth=1), names=("blocks.0.mlp.fc1",))
    dense = copy.deepcopy(model)
    report = sparse(model)
    assert [(u.name, u.role) for u in report.plan.units[1:]] == [("blocks.0.mlp.fc1", "linear")]
    assert_same_network(model, dense)


@pytest.mark.parametrize(
    ("mlp", "kind"),
    [
        (Mlp, Kind.GELU),
        (vit_nets.sequential, Kind.RELU),
        (lambda w, h: Mlp(w, h, nn.SiLU()), Kind.SILU),
        (lambda w, h: Mlp(w, h, nn.GELU("tanh")), Kind.GELU_TANH),
        (lambda w, h: Mlp(w, h, vit_nets.QuickGELU()), Kind.QUICK_GELU),
        (vit_nets.Gated, None),
        (vit_nets.Functional, None),
        (lambda w, h: Mlp(w, h, nn.Tanh()), None),
        (lambda w, h: Mlp(w, h, vit_nets.GELUActivation()), None),
    ],
)
def test_mlps_are_known_by_what_they_compute(extension: None, mlp, kind) -> None:
    model = prune_(vit(mlp=mlp))
    dense = copy.deepcopy(model)
    found = find_linears(model).mlps
    assert [node.name for node in found] == (["blocks.0.mlp", "blocks.1.mlp"] if kind else [])
    assert all(node.activation.kind == kind for node in found)
    report = sparse(model)
    layers = sum(len([r for r in report.plan.rows if r.unit == u.name]) for u in report.plan.units)
    assert layers == 9 and all(u.kind == "sparse" for u in report.plan.units[1:])
    assert_same_network(model, dense)


def test_activations_are_proved_in_float64() -> None:
    assert proved_activation(vit_nets.QuickGELU()).kind == Kind.QUICK_GELU
    assert not proved_activation(vit_nets.GELUActivation())
    assert not proved_activation(nn.Tanh()) and not proved_activation(nn.PReLU())


def test_hooks_added_later_are_called_and_earlier_ones_keep_the_layer(extension: None) -> None:
    model = prune_(vit(depth=1))
    dense = copy.deepcopy(model)
    called: list[str] = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: called.append("before"))
    report = sparse(model)
    assert "has hooks" in report.dense["blocks.0.attn.qkv"]
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: called.append("inner"))
    model.blocks[0].attn.proj.register_forward_hook(lambda *_: called.append("outer"))
    called.clear()
    assert_same_network(model, dense)
    assert called == ["before", "outer", "inner"]
    other = vit(depth=1)
    other.blocks[0].mlp.act.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp\.act has hooks"):
        sparse(other, "uniform:0.90")


def test_a_hook_added_later_sees_the_masked_network(extension: None) -> None:
    model = vit(depth=1)
    dense = copy.deepcopy(model)
    masks = synthetic_masks(model, "uniform:0.90")
    masks.apply_(dense)
    sparse(model, masks)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert_same_network(model, dense)


def test_written_weights_are_noticed(extension: None) -> None:
    for write in (
        lambda m: m.blocks[0].mlp.fc2.weight.data.mul_(2),
        lambda m: m.blocks[0].attn.qkv.weight.data.add_(1),
        lambda m: setattr(m.blocks[0].attn.proj, "bias", nn.Parameter(torch.ones(32))),
    ):
        model = prune_(vit(depth=1))
        sparse(model)
        model(image())
        with torch.no_grad():
            write(model)
        with pytest.raises(UnsupportedModelError, match="was written to or replaced"):
            for _ in range(300):
                model(image(1))
    model = prune_(vit(depth=1))
    sparse(model)
    other = {k: t + 1 for k, t in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="cannot be loaded into an accelerated model"):
        model.load_state_dict(other)


def test_modes_dtypes_and_gradients(extension: None) -> None:
    model = prune_(vit())
    dense = copy.deepcopy(model)
    sparse(model)
    x = image().requires_grad_()
    model(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    with pytest.raises(UnsupportedModelError, match="its weights are packed for inference"):
        model.train().blocks[0].mlp(torch.randn(1, 4, 32))
    model.eval()
    with pytest.raises(UnsupportedModelError, match="computes in float32"):
        model.blocks[0].attn.qkv(torch.randn(1, 4, 32).half())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].mlp(torch.randn(1, 4, 32).bfloat16()).dtype == torch.float32


def test_copies_pickles_and_compiled_calls(extension: None) -> None:
    model = prune_(vit())
    sparse(model)
    x = image()
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["zeros", "masks"])
def test_a_sparse_checkpoint_keeps_linear_layers(
    extension: None, tmp_path: Path, masked: bool
) -> None:
    model = vit()
    masks = synthetic_masks(model, "uniform:0.90")
    if not masked:
        masks.apply_(model)
    report = sparse(model, masks if masked else None)
    save_accelerated(tmp_path / "model.safetensors", model)
    again = vit(seed=1)
    found = load_accelerated(tmp_path / "model.safetensors", again)
    assert [u.kind for u in found.plan.units] == [u.kind for u in report.plan.units]
    with torch.no_grad():
        assert torch.equal(again(image()), model(image()))
    restore(again)
    assert float((again.blocks[0].attn.qkv.weight == 0).float().mean()) > 0.89


def test_mask_files_hold_linear_layers(extension: None, tmp_path: Path) -> None:
    model = vit()
    masks = synthetic_masks(model, "uniform:0.90")
    twin = copy.deepcopy(model)
    for name, mask in masks.masks.items():
        nn.utils.prune.custom_from_mask(twin.get_submodule(name), "weight", mask)
    torch.save({f"module.{k}": t for k, t in twin.state_dict().items()}, tmp_path / "pruned.pth")
    masks.apply_(model)
    torch.save(model.state_dict(), tmp_path / "zeros.pth")
    masks.save(tmp_path / "masks.safetensors")
    for name in ("pruned.pth", "zeros.pth", "masks.safetensors"):
        match = load_masks(tmp_path / name).match(model)
        found = {n: m for n, m in match.masks.items() if not m.all()}
        assert list(found) == PRUNED and match.complete, name
        assert all(torch.equal(m, masks.masks[n]) for n, m in found.items()), name
    assert "9 convs" not in match.reason and "linear layers" in match.reason
    zeros = MaskSet.from_model_zeros(model)
    assert list(zeros.masks) == ["patches", *PRUNED]


def test_masks_of_convolutions_are_matched_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4))
    match = MaskSet({"0": torch.ones(4, 3, 1, 1, dtype=torch.bool)}).match(model)
    assert match.reason.startswith("1 of 1 masks match one of the model's 1 convs by name")
    match = MaskSet({"1": torch.ones(5, 4, dtype=torch.bool)}).match(model)
    assert "linear layer '1' has a weight of shape (4, 4)" in str(match)


def test_layers_that_are_read_and_not_called_stay(extension: None) -> None:
    class Reads(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.read = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.patches(x).flatten(2).transpose(1, 2) @ self.read.weight

    torch.manual_seed(0)
    model = prune_(Net().eval(), names=("read",))
    report = sparse(model)
    assert not report.accelerated
    assert "1 linear layers with zeros are not called for an image" in str(report)
    mask = torch.rand(8, 8) > 0.5
    with pytest.raises(MaskError, match="does not call that layer"):
        sparse(Net().eval(), MaskSet({"read": mask}))


def test_shared_layers_are_left_alone(extension: None) -> None:
    model = vit()
    model.blocks[1].attn.proj = model.blocks[0].attn.proj
    masks = synthetic_masks(model, "uniform:0.90")
    with pytest.raises(MaskError, match="is used at 2 places"):
        sparse(model, masks)
    dense = copy.deepcopy(prune_(model))
    report = sparse(model)
    assert "blocks.0.attn.proj" not in {u.name for u in report.plan.units}
    assert_same_network(model, dense)


def test_bad_weights_are_refused_and_nothing_changes() -> None:
    for change, message in (
        (lambda m: m.blocks[0].mlp.fc1.weight.data[0].fill_(float("nan")), "NaN"),
        (lambda m: m.blocks[0].mlp.double(), "float64"),
        (lambda m: m.blocks[0].mlp.fc1.train(), "training mode"),
    ):
        model = prune_(vit())
        change(model)
        modules = dict(model.named_modules())
        with pytest.raises((UnsupportedModelError, MaskError), match=message):
            sparse(model)
        assert all(modules[n] is m for n, m in model.named_modules())


def test_the_audit_has_a_row_per_masked_linear_layer() -> None:
    model = vit()
    report = audit(synthetic_masks(model, "uniform:0.90"), model, SIZE)
    assert [row.name for row in report.rows] == ["patches", *PRUNED]
    assert "1 convolutions and 8 linear layers, " in str(report)
    row = report.rows[1]
    assert (row.cin, row.cout, row.kernel, row.h_out, row.masked) == (32, 96, 1, 16, True)
    assert row.effective_macs == row.nnz * 16 and row.density == pytest.approx(0.1, abs=1e-3)
    zeros = audit(None, prune_(vit()), SIZE)
    assert [row.name for row in zeros.rows] == ["patches", *PRUNED]


def test_transformers_of_other_libraries(extension: None) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, img_size=64).eval()
    dense = copy.deepcopy(model)
    synthetic_masks(model, "uniform:0.90").apply_(dense)
    report = otk.accelerate(model, "uniform:0.90", measure=False)
    assert report.plan.input_size == (64, 64), "the size the patches are made for"
    names = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp"]
    assert [u.name for u in report.plan.units if u.kind == "sparse"] == names
    assert_same_network(model, dense, torch.randn(1, 3, 64, 64))


def test_transformers_of_transformers(extension: None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    masks = synthetic_masks(model, "uniform:0.90")
    dense = copy.deepcopy(model)
    masks.apply_(dense)
    report = sparse(model, masks)
    assert len(masks.masks) == 6 and report.plan.input_size == (32, 32)
    assert sum(u.kind == "sparse" for u in report.plan.units) >= 5
    x = image(1)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], dense(x)[0], rtol=1e-4, atol=1e-5)
