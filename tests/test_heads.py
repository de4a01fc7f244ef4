"""Parts of heads: recognised, proved, replaced under the same names, and put back."""

from __future__ import annotations

import copy
import logging

import fresh_process
import pytest
import torch
from head_nets import Another, Attention, Encoder, Layer, encoder_inputs
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels import heads
from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.heads.deform import DeformableAttention
from opentrans_kernels.heads.encoder import EncoderLayer

pytestmark = pytest.mark.usefixtures("extension")


def accelerated(layers: int = 2) -> tuple[Encoder, Encoder]:
    """(dense, accelerated) with the same weights."""
    dense = Encoder(layers)
    model = copy.deepcopy(dense)
    otk.accelerate_heads(model)
    return dense, model


def test_parts_are_replaced_and_put_back() -> None:
    model = Encoder()
    before = dict(model.named_modules())
    keys = {key: value.shape for key, value in model.state_dict().items()}
    report = otk.accelerate_heads(model)
    kinds = {part.path: type(part.replacement) for part in report.replaced}
    assert kinds["layers.0"] is EncoderLayer
    assert kinds["layers.1.self_attn"] is DeformableAttention
    assert len(report.replaced) == 2 * 6 and not report.left
    assert {key: value.shape for key, value in model.state_dict().items()} == keys
    assert set(dict(model.named_modules())) == set(before)
    assert isinstance(model.layers[1].self_attn, DeformableAttention)
    assert model.layers[1].self_attn.n_points == 4
    text = str(report)
    assert "2 x deformable attention" in text and "2 x encoder layer" in text and "error" in text
    assert len(report.to_dict()["replaced"]) == 12
    otk.restore_heads(model)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items()) and len(after) == len(
        before
    )
    otk.restore_heads(model)  # nothing left to do


@pytest.mark.parametrize("n", (1, 3))
def test_outputs_err_no_more_than_dense(n: int) -> None:
    dense, model = accelerated(3)
    src, pos, *rest = encoder_inputs(n)
    with torch.no_grad():
        for position in (pos, None):
            rough = dense(src, position, *rest)
            found = model(src, position, *rest)
            double = [t.double() if t is not None and t.is_floating_point() else t for t in
                      (src, position, *rest)]  # fmt: skip
            exact = copy.deepcopy(dense).double()(*double)
            assert (found - exact).abs().max() <= 2 * (rough - exact).abs().max() + 1e-6
    same = model(src, pos, *rest)  # with gradients on
    torch.testing.assert_close(same, dense(src, pos, *rest))


def test_training_runs_the_original_modules() -> None:
    dense, model = accelerated(1)
    inputs = encoder_inputs()
    for one in (dense, model):
        one.train()
        torch.manual_seed(0)  # dropout
        one(*inputs).square().sum().backward()
    right = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, right[name].grad), name
    model.eval()
    dense.eval()
    torch.testing.assert_close(model(*inputs), dense(*inputs))


def test_gradients_in_eval_mode_reach_parameters() -> None:
    dense, model = accelerated(1)
    inputs = encoder_inputs()
    for one in (dense, model):
        one(*inputs).square().sum().backward()
    right = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name].grad, rtol=2e-3, atol=2e-3)


def test_weights_may_be_written_and_loaded() -> None:
    dense, model = accelerated(1)
    inputs = encoder_inputs()
    with torch.no_grad():
        state = {key: value + 0.1 for key, value in dense.state_dict().items()}
        dense.load_state_dict(state)
        model.load_state_dict(state)
        torch.testing.assert_close(model(*inputs), dense(*inputs))
        dense.layers[0].linear1.weight.mul_(2)
        model.layers[0].linear1.weight.mul_(2)
        torch.testing.assert_close(model(*inputs), dense(*inputs))


def test_hooks_fire(caplog) -> None:
    dense, model = accelerated(1)
    inputs = encoder_inputs()
    seen = []

    def hook(name):
        return lambda *_: seen.append(name)

    layer = model.layers[0]
    layer.register_forward_hook(hook("layer"))
    layer.self_attn.register_forward_hook(hook("attention"))
    layer.norm1.register_forward_hook(hook("norm"))
    layer.self_attn.value_proj.register_forward_pre_hook(hook("value"))
    with torch.no_grad():
        found = model(*inputs)
    assert seen == ["value", "attention", "norm", "layer"]
    handle = layer.linear1.register_forward_hook(hook("linear1"))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        again = model(*inputs)
        model(*inputs)
    assert seen[4:9] == ["value", "attention", "norm", "linear1", "layer"]
    assert sum("linear1 has hooks" in record.message for record in caplog.records) == 1
    torch.testing.assert_close(again, found)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(*inputs), found)


def test_other_tensors_run_the_original() -> None:
    dense, model = accelerated(1)
    inputs = encoder_inputs()
    double = [t.double() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        assert torch.equal(
            copy.deepcopy(model).double()(*double), copy.deepcopy(dense).double()(*double)
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(*inputs), dense(*inputs))


def test_what_was_exchanged_inside_is_used() -> None:
    _, model = accelerated(1)
    inputs = encoder_inputs()
    with torch.no_grad():
        before = model(*inputs)
        new = nn.Linear(32, 32).eval()
        model.layers[0].self_attn.output_proj = new
        found = model(*inputs)
        assert not torch.allclose(found, before)
        otk.restore_heads(model)
    assert model.layers[0].self_attn.output_proj is not None


def test_copies_and_files(tmp_path) -> None:
    _, model = accelerated(1)
    inputs = encoder_inputs()
    with torch.no_grad():
        right = model(*inputs)
        assert torch.equal(copy.deepcopy(model)(*inputs), right)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        fresh = Encoder(1)
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        torch.testing.assert_close(fresh(*inputs), right)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    """What inductor makes of the op itself is in test_ms_deform_attn."""
    _, model = accelerated(1)
    inputs = encoder_inputs()
    with torch.no_grad():
        right = model(*inputs)
        found = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_relatives_stay_with_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "other": Another(),
            "hooked": Attention(),
            "odd": Attention(),
            "rounded": Attention(),
            "learning": Attention(),
        }
    ).eval()
    model["hooked"].register_forward_hook(lambda *_: None)
    model["odd"].sampling_offsets = nn.Linear(32, 7)
    model["rounded"].to(torch.bfloat16)
    model["learning"].train()
    report = otk.accelerate_heads(model)
    reasons = {part.path: part.reason for part in report.left}
    assert "computes something else" in reasons["other"]
    assert reasons["hooked"] == "has hooks"
    assert "offsets" in reasons["odd"]
    assert "training mode" in reasons["learning"]
    assert "rounded" in reasons and not report.replaced
    assert "stays as it was" in str(report)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="training mode"):
        otk.accelerate_heads(Encoder(1).train())
    with pytest.raises(UnsupportedModelError, match="torch.nn.Module"):
        otk.accelerate_heads(3)  # type: ignore[arg-type]
    model = Encoder(1)
    otk.accelerate_heads(model)
    with pytest.raises(PlanError, match="restore_heads"):
        otk.accelerate_heads(model)
    alone = Layer()
    assert "the model itself" in str(otk.accelerate_heads(alone))
    assert "no part" in str(otk.accelerate_heads(nn.Linear(2, 2).eval()))


def test_trunk_and_head_are_undone_in_any_order() -> None:
    model = Encoder(1)
    first = model.layers[0]
    otk.accelerate_heads(model)
    otk.restore(model)
    assert model.layers[0] is first and isinstance(first.self_attn, Attention)
    assert not heads.parts.head_parts(model)


TRANSFORMERS = (
    ("mask2former", "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention", (32, 4, 3, 4)),
    ("oneformer", "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention", (32, 4, 3, 4)),
)
CONFIGURED = (
    ("deformable_detr", "DeformableDetr", {"d_model": 32}, (4, 4)),
    ("grounding_dino", "GroundingDino", {"d_model": 32}, (4, 4)),
    ("rt_detr", "RTDetr", {"d_model": 32, "num_feature_levels": 3}, (4, 4)),
)


def test_modules_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    import importlib

    model = nn.ModuleDict()
    for family, name, sizes in TRANSFORMERS:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        model[family] = getattr(module, name)(*sizes)
    for family, prefix, options, sizes in CONFIGURED:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        config = getattr(importlib.import_module("transformers"), f"{prefix}Config")(**options)
        kind = getattr(module, f"{prefix}MultiscaleDeformableAttention")
        model[family] = kind(config, *sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    report = otk.accelerate_heads(model.eval())
    assert not report.left, str(report)
    assert {p.path for p in report.replaced} >= set(model)
    assert model["mask2former"].mask_is_padding and not model["deformable_detr"].mask_is_padding


def run_alone(code: str) -> str:
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_module_that_trees_import() -> None:
    code = """
        import torch, opentrans_kernels as otk
        otk.install_ms_deform_attn()
        otk.install_ms_deform_attn()
        import MultiScaleDeformableAttention as MSDA
        shapes = torch.tensor([(4, 5), (2, 3)])
        starts = torch.tensor([0, 20])
        value, at = torch.randn(2, 26, 3, 8), torch.rand(2, 7, 3, 2, 4, 2)
        weight = torch.rand(2, 7, 3, 2, 4)
        out = MSDA.ms_deform_attn_forward(value, shapes, starts, at, weight, 64)
        leaves = [t.clone().requires_grad_() for t in (value, at, weight)]
        right = otk.ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
        assert torch.equal(out, right)
        grad = torch.randn_like(out)
        found = MSDA.ms_deform_attn_backward(value, shapes, starts, at, weight, grad, 64)
        for a, b in zip(found, torch.autograd.grad(right, leaves, grad)):
            assert torch.equal(a, b)
        half = (value.half(), shapes, starts, at.half(), weight.half())
        assert MSDA.ms_deform_attn_forward(*half, 1).dtype == torch.half
        grads = MSDA.ms_deform_attn_backward(*half, grad.half(), 1)
        assert {g.dtype for g in grads} == {torch.half}
        try:
            MSDA.ms_deform_attn_forward(value, shapes, starts + 1, at, weight, 64)
        except RuntimeError as error:
            assert "level_start_index" in str(error)
            print("refused")
        otk.uninstall_ms_deform_attn()
        try:
            import importlib; importlib.import_module("MultiScaleDeformableAttention")
        except ModuleNotFoundError:
            print("gone")
        """
    assert run_alone(code).split() == ["refused", "gone"]


def test_another_module_of_that_name_is_left_alone(tmp_path) -> None:
    (tmp_path / "MultiScaleDeformableAttention.py").write_text("ms_deform_attn_forward = 'real'\n")
    code = f"""
        import sys, types, opentrans_kernels as otk
        sys.path.insert(0, {str(tmp_path)!r})
        print(otk.install_ms_deform_attn().ms_deform_attn_forward)
        otk.uninstall_ms_deform_attn()
        print("MultiScaleDeformableAttention" in sys.modules)
        sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("empty")
        try:
            otk.install_ms_deform_attn()
        except otk.OpenTransError as error:
            print("empty" in str(error))
        """
    assert run_alone(code).split() == ["real", "True", "True"]


def test_originals_that_ran_meanwhile_hold_originals_again() -> None:
    model = Encoder()
    before = dict(model.named_modules())
    otk.accelerate_heads(model)
    model.train()
    model(*encoder_inputs())  # each part runs as it was, on the children it has now
    otk.restore_heads(model.eval())
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items())


class PixelDecoder(nn.Module):
    """An encoder between projections, as pixel decoders have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 32, 1), nn.GroupNorm(4, 32)) for width in (24, 40, 8)
        )
        self.encoder = Encoder(1)
        self.lateral = Normed(16, 32, 1, bias=False)
        self.smooth = nn.Conv2d(32, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 1, groups=2)
        self.mask_features = nn.Conv2d(32, 48, 1)
        self.eval()

    def forward(self, maps: list[torch.Tensor], fine: torch.Tensor) -> torch.Tensor:
        found = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        shapes = torch.tensor([x.shape[-2:] for x in found])
        sizes = shapes.prod(1)
        src = torch.cat([x.flatten(2).transpose(1, 2) for x in found], 1)
        reference = torch.linspace(0.1, 0.9, src.shape[1] * 6).view(1, -1, 3, 2)
        reference = reference.expand(len(src), -1, -1, -1)
        out = self.encoder(src, None, reference, shapes, sizes.cumsum(0) - sizes)
        last = out[:, -int(sizes[-1]) :].transpose(1, 2).unflatten(2, tuple(shapes[-1].tolist()))
        y = self.lateral(fine) + nn.functional.interpolate(last, fine.shape[-2:], mode="bilinear")
        return self.mask_features(self.grouped(self.smooth(y)))


class Normed(nn.Conv2d):
    """A convolution with its norm and activation inside."""

    def __init__(self, *sizes: int, **options: bool) -> None:
        super().__init__(*sizes, **options)
        self.norm, self.activation = nn.GroupNorm(4, sizes[1]), torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(super().forward(x)))


@pytest.mark.parametrize("n", (1, 2))
def test_projections_around_an_encoder(n: int) -> None:
    dense = PixelDecoder()
    model = copy.deepcopy(dense)
    report = otk.accelerate_heads(model)
    convs = {part.path for part in report.replaced if part.kind == "1x1 convolution"}
    assert convs == {*(f"input_proj.{i}.0" for i in range(3)), "lateral", "mask_features"}
    maps = [torch.randn(n, 24, 6, 5), torch.randn(n, 40, 3, 7), torch.randn(n, 8, 2, 3)]
    fine = torch.randn(n, 16, 12, 10)
    wide = torch.randn(n, 16, 12 * 10 + 16)[..., :120].unflatten(2, (12, 10))  # planes apart
    with torch.no_grad():
        for image in (fine, fine.contiguous(memory_format=torch.channels_last), wide):
            found, rough = model(maps, image), dense(maps, image)
            double = copy.deepcopy(dense).double()
            exact = double([x.double() for x in maps], image.double())
            assert (found - exact).abs().max() <= 2 * (rough - exact).abs().max() + 1e-6
        assert model.mask_features(fine.repeat(1, 2, 1, 1)).is_contiguous(
            memory_format=torch.channels_last
        )
    torch.testing.assert_close(model(maps, fine), dense(maps, fine))  # gradients on
