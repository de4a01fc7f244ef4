"""Gradient skipping with pruned weights on the sparse kernels, in all three passes."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from accel_nets import random_masks
from gradskip_nets import freeze_set, gradients, saved_bytes, small_trunk

from opentrans import MaskedOptimizer, restore_skipped, skip_frozen
from opentrans_kernels import MaskSet, make_plan, native
from opentrans_kernels.errors import MaskError, PlanError
from opentrans_kernels.ops.folded_conv2d import sparse as packed
from opentrans_kernels.ops.folded_conv2d.fold import Norm
from opentrans_kernels.ops.folded_conv2d.sparse import sparse_folded_conv2d
from opentrans_kernels.pack import SparseWeight

SIZE = (64, 64)


@pytest.mark.parametrize(
    ("kernel", "stride", "trains"), list(product((1, 3), (1, 2), ("", "weight", "affine")))
)
@pytest.mark.parametrize("residual", [False, True])
def test_the_op_against_float64(kernel, stride, trains, residual) -> None:
    gen = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen)

    mask = (torch.rand((7, 5, kernel, kernel), generator=gen) < 0.3).float()
    mask[2] = 0  # a row without live weights
    tensors = {
        "x": rand(2, 5, 9, 7).requires_grad_(),
        "weight": (rand(7, 5, kernel, kernel) * mask).requires_grad_(bool(trains)),
        "gamma": rand(7).requires_grad_(trains == "affine"),
        "beta": rand(7).requires_grad_(trains == "affine"),
        "mean": rand(7),
        "var": rand(7).abs() + 0.5,
    }
    padding = kernel // 2
    structure = SparseWeight.from_dense(mask, None, stride, padding).structure
    shape = F.conv2d(tensors["x"], tensors["weight"], None, stride, padding).shape
    tensors["residual"] = rand(*shape).requires_grad_() if residual else None
    g = rand(*shape)

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        t = {k: None if v is None else v.detach().to(dtype).requires_grad_(v.requires_grad)
             for k, v in tensors.items()}  # fmt: skip
        z = F.conv2d(t["x"], t["weight"] * mask.to(dtype), None, stride, padding)
        z = F.batch_norm(z, t["mean"], t["var"], t["gamma"], t["beta"], False, 0.0, 1e-3)
        y = (z if t["residual"] is None else z + t["residual"]).relu()
        inputs = [v for v in t.values() if v is not None and v.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, inputs, g.to(dtype))]

    exact, own = plain(torch.float64), plain(torch.float32)
    norm = Norm(*(None, *(tensors[k] for k in ("gamma", "beta", "mean", "var"))), 1e-3)
    inputs = [v for v in tensors.values() if v is not None and v.requires_grad]
    for bits, sparse_wgrad in product((True, False), (True, False)):
        y = sparse_folded_conv2d(
            tensors["x"], tensors["weight"], structure, norm, tensors["residual"], stride=stride,
            padding=padding, relu=True, bits=bits, sparse_wgrad=sparse_wgrad,
        )  # fmt: skip
        found = [y.detach(), *torch.autograd.grad(y, inputs, g)]
        for mine, yardstick, want in zip(found, own, exact, strict=True):
            scale = want.abs().max().clamp_min(1e-30)
            errors = [float((t.double() - want).abs().max() / scale) for t in (mine, yardstick)]
            assert errors[0] <= max(2 * errors[1], 1e-6), errors


@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
@pytest.mark.parametrize("kind", ["odd", "first", "middle", "none"])
def test_gradients_of_the_whole_network(kind: str, policy: str, extension: None) -> None:
    model = small_trunk()
    masks = random_masks(model, 0.15)
    masks.apply_(model)
    names = freeze_set(model, kind)
    dense = copy.deepcopy(model)
    report = skip_frozen(model, names, bn=policy, masks=masks)
    skip_frozen(dense, names, bn=policy)
    assert len(report.sparse) > 10
    exact = copy.deepcopy(dense).double()
    x, g = torch.randn(2, 3, *SIZE), torch.randn(2, 256, 2, 2)
    found, own = gradients(model, x, g), gradients(dense, x, g)
    for name, want in gradients(exact, x.double(), g.double()).items():
        key = name.removesuffix(".weight")
        live = masks.masks.get(key, torch.ones_like(want, dtype=torch.bool))
        if key in report.sparse:
            assert not found[name][~live].any(), f"{name}: a dead weight has a gradient"
        scale = want[live].norm().clamp_min(1e-12)
        errors = [float((t[name].double() - want)[live].norm() / scale) for t in (found, own)]
        assert errors[0] <= max(2 * errors[1], 1e-5), f"{name}: {errors}"


def test_explain_knows_the_padded_planes(extension: None) -> None:
    for kind in ("odd", "even", "first"):
        model = small_trunk()
        masks = random_masks(model, 0.15)
        masks.apply_(model)
        report = skip_frozen(model, freeze_set(model, kind), masks=masks)
        x = torch.randn(2, 3, *SIZE)
        told = report.explain(SIZE, batch=2)
        patterns = [one.structure for one in report.sparse.values()]
        kept = saved_bytes(model, lambda model=model, x=x: model(x), patterns)
        assert told.total == kept, str(told)
        assert report.copies_nbytes > sum(t.numel() * 4 for t in patterns)


def test_values_are_refreshed_once_per_step(monkeypatch, extension: None) -> None:
    model = small_trunk()
    masks = random_masks(model, 0.15)
    masks.apply_(model)
    report = skip_frozen(model, freeze_set(model, "odd"), masks=masks)
    made = []
    real = packed._Packed
    monkeypatch.setattr(packed, "_Packed", lambda *a: made.append(1) or real(*a))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    x = torch.randn(1, 3, *SIZE)
    counts, outputs = [], []
    for _ in range(3):
        made.clear()
        optimizer.zero_grad(set_to_none=True)
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        counts.append(len(made))
        outputs.append(y.detach())
    trained = [name for name in report.sparse if name in report.trains]
    assert counts == [len(report.sparse), len(trained), len(trained)]
    assert not torch.equal(outputs[0], outputs[2])
    for name, mask in masks.masks.items():
        if name in trained:
            assert not model.get_submodule(name).weight[~mask].any(), "dead weights stay zero"


def test_a_plan_decides_what_runs_sparsely(extension: None) -> None:
    model = small_trunk()
    masks = random_masks(model, 0.15)
    masks.apply_(model)
    plan = make_plan(model.requires_grad_(False).eval(), masks, input_size=SIZE, measure=False)
    model.requires_grad_(True)
    report = skip_frozen(model, freeze_set(model, "odd"), masks=masks, plan=plan)
    planned = {row.name for row in plan.rows if row.kind == "sparse"}
    assert planned and set(report.sparse) == planned


def test_bad_masks_change_nothing() -> None:
    model = small_trunk()
    masks = random_masks(model, 0.15)
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(MaskError, match=r"masks.apply_\(model\)"):
        skip_frozen(model, [], masks=masks)
    other = MaskSet.from_tensors({"layer9.conv": torch.ones(2, 2, 1, 1, dtype=torch.bool)})
    with pytest.raises(MaskError):
        skip_frozen(model, [], masks=other)
    plan = make_plan(copy.deepcopy(model).requires_grad_(False), None, input_size=SIZE,
                     measure=False)  # fmt: skip
    with pytest.raises(PlanError, match="masks="):
        skip_frozen(model, [], plan=plan)
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_without_the_extension_masked_layers_run_densely(monkeypatch) -> None:
    model = small_trunk()
    masks = random_masks(model, 0.15)
    masks.apply_(model)
    monkeypatch.setattr(native, "load", lambda: False)
    report = skip_frozen(model, [], masks=masks)
    assert not report.sparse and any("run densely" in note for note in report.notes)


def test_autocast_hands_the_sparse_kernels_float32(extension: None) -> None:
    model = small_trunk()
    masks = random_masks(model, 0.15)
    masks.apply_(model)
    report = skip_frozen(model, freeze_set(model, "odd"), masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(1, 3, *SIZE))
        y.float().sum().backward()
    assert torch.isfinite(y).all()
    name = next(n for n in report.sparse if n in report.trains)
    assert model.get_submodule(name).weight.grad.dtype == torch.float32


def test_the_prefix_runs_the_inference_kernels_and_follows_its_weights(extension: None) -> None:
    model, other = small_trunk(0), small_trunk(4)
    masks = random_masks(model, 0.15)
    masks.apply_(model), masks.apply_(other)
    names = [n for n in freeze_set(model, "all") if ".layer4" not in n]
    slow = copy.deepcopy(model)
    report = skip_frozen(model, names, masks=masks)
    assert report.accelerated == tuple(f"visual.layer{i}.0" for i in (1, 2, 3))
    assert not skip_frozen(slow, names, masks=masks, accelerate_prefix=False).accelerated
    x, g = torch.randn(2, 3, *SIZE), torch.randn(2, 256, 2, 2)
    for state in (model.state_dict(), other.state_dict(), model.state_dict()):
        state = {key: value.clone() for key, value in state.items()}
        for subject in (model, slow):
            subject.load_state_dict(state)
            subject.train().zero_grad(set_to_none=True)
            subject(x).backward(g)
        for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    image = x.clone().requires_grad_(True)
    model(image).sum().backward()
    assert image.grad is not None, "a gradient of the image is still possible"


def test_flop_counters_see_live_weights(extension: None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = small_trunk()
    masks = random_masks(model, 0.15)
    masks.apply_(model)
    dense = copy.deepcopy(model)
    skip_frozen(model, [], masks=masks)
    skip_frozen(dense, [])
    counts = []
    for subject in (dense, model):
        with FlopCounterMode(display=False) as counter:
            subject(torch.randn(1, 3, *SIZE)).sum().backward()
        counts.append(counter.get_total_flops())
    assert 0 < counts[1] < 0.5 * counts[0]


def test_a_masked_optimizer_trains_a_sparse_model_and_what_restore_puts_back(
    extension: None,
) -> None:
    model = small_trunk()
    masks = random_masks(model, 0.1)
    masks.apply_(model)
    twin = copy.deepcopy(model).eval()
    names = freeze_set(model, "odd")
    start = copy.deepcopy(model.state_dict())
    report = skip_frozen(model, names, masks=masks)
    assert len(report.sparse) > 10
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    x = torch.randn(2, 3, *SIZE)

    def check(frozen: set[str]) -> None:
        optimizers[0].check()  # raises if a pruned weight moved
        for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
            if name in frozen:
                assert torch.equal(one, start[name]), name

    optimizers = [MaskedOptimizer(torch.optim.SGD, m, masks, lr=1e-3) for m in (model, twin)]
    for phase in ("skipped", "restored"):
        for subject, optimizer in zip((model, twin), optimizers, strict=True):
            for _ in range(2):
                optimizer.zero_grad()
                subject(x).square().mean().backward()
                optimizer.step()
        check({f"{name}.weight" for name in names} if phase == "skipped" else set())
        if phase == "skipped":
            before = optimizers[0].state_bytes().index
            restore_skipped(model)
            model.eval(), twin.requires_grad_(True)
    assert optimizers[0].state_bytes().index > before, "layers that train again are indexed"
    moved = [n for n in names if not torch.equal(model.get_parameter(f"{n}.weight"),
                                                 start[f"{n}.weight"])]  # fmt: skip
    assert moved


def test_a_compiled_sparse_model_is_one_graph_and_sees_new_weights(extension: None) -> None:
    torch._dynamo.reset()
    model = small_trunk()
    masks = random_masks(model, 0.1)
    masks.apply_(model)
    # With a prefix, whose fused blocks run one by one in a compiled graph.
    report = skip_frozen(model, freeze_set(model, "middle"), masks=masks)
    assert report.sparse and report.prefix
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = MaskedOptimizer(torch.optim.SGD, model, masks, lr=1e-2)
    x, g = torch.randn(2, 3, *SIZE), torch.randn(2, 256, 2, 2)
    for _ in range(2):
        want = gradients(model, x, g)
        model.zero_grad(set_to_none=True)
        compiled(x).backward(g)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found and set(found) <= set(want)
        for name, grad in found.items():
            assert torch.allclose(grad, want[name], rtol=1e-4, atol=1e-5), name
        optimizer.step()
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
