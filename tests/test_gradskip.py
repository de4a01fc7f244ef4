"""Gradient skipping on whole networks: the same gradients, less memory, drop-in modules."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import trunk_models
from gradskip_nets import (
    SETS,
    baseline,
    conv_names,
    freeze_set,
    gradients,
    saved_bytes,
    small_trunk,
)
from torch import nn

from opentrans import freeze_plan
from opentrans.gradskip import restore_skipped, skip_frozen
from opentrans_kernels.errors import OpenTransError, PlanError, UnsupportedModelError

SIZE = (64, 64)
KEEP = {"frozen": False, "affine": True, "train": True}


def plain_twin(model: nn.Module, names: list[str], policy: str) -> nn.Module:
    """The model in plain PyTorch, with the flags and modes the policy asks for."""
    twin = copy.deepcopy(model)
    twin.train(policy == "train")
    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d) and name in names:
            module.requires_grad_(False)
        if isinstance(module, nn.BatchNorm2d):
            head, _, key = name.rpartition(".")
            conv = f"{head}.{'0' if key == '1' else key.replace('bn', 'conv')}"
            module.requires_grad_(KEEP[policy] and conv not in names)
    return twin


def compare(ours: dict, plain: dict, exact: dict | None = None, tolerance: float = 1e-9) -> None:
    assert set(ours) == set(plain)
    for name, want in plain.items():
        scale = want.abs().max().clamp_min(1e-12)
        error = (ours[name] - want).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
@pytest.mark.parametrize("kind", SETS)
def test_gradients_of_the_whole_network(kind: str, policy: str) -> None:
    model = small_trunk().double()
    names = freeze_set(model, kind)
    twin = plain_twin(model, names, policy)
    report = skip_frozen(model, names, bn=policy)
    model.train()
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    g = torch.randn_like(twin(x))
    twin = plain_twin(twin, names, policy)  # running statistics have moved under "train"
    model.load_state_dict(twin.state_dict())
    compare(gradients(model, x, g), gradients(twin, x, g))
    assert set(report.frozen) == set(names) and report.replaced
    if policy == "train":
        compare(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", ["odd", "middle"])
def test_float32_error_is_at_most_twice_pytorchs_own(kind: str) -> None:
    model = small_trunk()
    names = freeze_set(model, kind)
    own = plain_twin(model, names, "frozen")
    exact = copy.deepcopy(own).double()
    skip_frozen(model, names)
    x = torch.randn(2, 3, *SIZE)
    g = torch.randn_like(own(x))
    found, yardstick = gradients(model, x, g), gradients(own, x, g)
    for name, want in gradients(exact, x.double(), g.double()).items():
        scale = want.norm().clamp_min(1e-12)
        errors = [float((t[name].double() - want).norm() / scale) for t in (found, yardstick)]
        assert errors[0] <= max(2 * errors[1], 2e-6), f"{name}: {errors}"


def test_channels_last_stays_channels_last() -> None:
    model = small_trunk().double()
    names = freeze_set(model, "odd")
    twin = plain_twin(model, names, "frozen")
    skip_frozen(model, names)
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    g = torch.randn_like(y)
    compare(gradients(model, x, g), gradients(twin, x, g))


@pytest.mark.parametrize(
    "maker", [trunk_models.OpenAITower, trunk_models.small], ids=lambda maker: maker.__name__
)
@pytest.mark.parametrize("kind", ["odd", "even", "first"])
def test_other_families(maker, kind: str) -> None:
    torch.manual_seed(0)
    model = trunk_models.randomise(maker()).double()
    names = freeze_set(model, kind)
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm2d) or name in names:
            module.requires_grad_(False)
    report = skip_frozen(model, names)
    assert not report.untouched
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    g = torch.randn_like(twin(x))
    compare(gradients(model, x, g), gradients(twin, x, g), tolerance=1e-7)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_explain_counts_what_autograd_keeps(kind: str, policy: str, layout) -> None:
    model = small_trunk().train()
    report = skip_frozen(model, freeze_set(model, kind), bn=policy)
    x = torch.randn(2, 3, *SIZE).contiguous(memory_format=layout)
    last = layout is torch.channels_last
    told = report.explain(SIZE, batch=2, channels_last=last)
    assert told.total == saved_bytes(model, lambda: model(x)), str(told)
    assert sum(row.nbytes for row in told.rows) == told.total
    assert all(row.why for row in told.rows)


def test_never_more_than_the_baseline_for_any_set() -> None:
    model = small_trunk()
    names = conv_names(model)
    draw = random.Random(0)
    x = torch.randn(1, 3, *SIZE)
    shares = []
    for trial in range(60):
        share = draw.choice((0.1, 0.5, 0.9))
        chosen = [n for n in names if draw.random() < share]
        twin = copy.deepcopy(model)
        report = skip_frozen(twin, chosen)
        told = report.explain(SIZE)
        assert told.total <= told.baseline, (chosen, str(told))
        if trial % 6 == 0:  # the numbers themselves, against a run
            kept = saved_bytes(twin, lambda twin=twin: twin(x))
            plain = baseline(model, chosen)
            kept_plain = saved_bytes(plain, lambda plain=plain: plain(x))
            assert kept == told.total and kept <= kept_plain
            assert told.baseline <= kept_plain, "the baseline is not made to look worse"
            shares.append(kept / max(1, kept_plain))
    assert min(shares) < 0.6, "a planner that saves nothing would pass otherwise"


def test_an_outside_reader_keeps_the_activation_instead_of_bits() -> None:
    model = small_trunk()
    names = freeze_set(model, "even")
    inside = skip_frozen(model, names).explain(SIZE)
    report = skip_frozen(model, names, outputs=["visual.layer2", "visual.layer4"])
    rows = {r.tensor: r for r in report.explain(SIZE).rows}
    bits = {r.tensor for r in inside.rows if r.form == "bits"}
    ends = {report.graph.ends["visual.layer2"], report.graph.ends["visual.layer4"]}
    assert ends & bits
    for end in ends:
        assert rows[end].form == "whole" and "visual.layer" in rows[end].why


def test_modules_are_a_drop_in_and_can_be_restored() -> None:
    model = small_trunk()
    before = dict(model.named_modules())
    keys = list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    parameters = [n for n, _ in model.named_parameters()]
    skip_frozen(model, freeze_set(model, "odd"))
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == parameters
    assert list(dict(model.named_modules())) == list(before)
    assert isinstance(model.visual.layer1[0].conv1, nn.Conv2d)
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, *SIZE)
    assert torch.equal(twin(x), model(x))
    twin.visual.conv1.weight.data.mul_(2.0)
    assert not torch.equal(twin(x), model(x)), "a copy has its own weights"
    restore_skipped(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in before.items()}
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(PlanError, match="never called"):
        restore_skipped(model)


def test_other_weights_may_be_loaded_at_any_time() -> None:
    model, other = small_trunk(0), small_trunk(5)
    skip_frozen(model, freeze_set(model, "odd"))
    x = torch.randn(1, 3, *SIZE)
    model(x).sum().backward()
    model.load_state_dict(other.state_dict())
    assert torch.allclose(model(x), other(x), rtol=1e-3, atol=1e-3 * float(other(x).abs().max()))


def test_training_leaves_frozen_weights_bit_equal() -> None:
    model = small_trunk()
    names = freeze_set(model, "odd")
    report = skip_frozen(model, names)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    x = torch.randn(1, 3, *SIZE)
    losses = []
    for _ in range(20):
        optimizer.zero_grad(set_to_none=True)
        loss = model.train()(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = model.state_dict()
    for name in report.frozen:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    moved = [
        n for n in report.trains if not torch.equal(before[f"{n}.weight"], after[f"{n}.weight"])
    ]
    assert moved == list(report.trains)
    norms = [k for k in before if "running" in k or "bn" in k]
    assert all(torch.equal(before[k], after[k]) for k in norms), "the norms are frozen"


def test_a_later_call_replaces_the_plan_and_never_unfreezes() -> None:
    model = small_trunk()
    first, second = freeze_set(model, "odd"), freeze_set(model, "first")
    skip_frozen(model, first)
    modules = list(dict(model.named_modules()))
    report = skip_frozen(model, second)
    assert set(report.frozen) == {*first, *second}
    assert list(dict(model.named_modules())) == modules
    restore_skipped(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("opentrans_original" in vars(m) for m in model.modules())


def test_a_freeze_plan_is_applied_with_its_batch_norms() -> None:
    model = small_trunk()
    names = freeze_set(model, "odd")
    plan = freeze_plan(model, rule="list", layers=names)
    report = skip_frozen(model, plan, bn="affine")
    assert set(report.frozen) == set(names)
    own = dict(model.named_parameters())
    assert not any(own[name].requires_grad for name in plan.parameters)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ((["visual.layer9"],), "named_modules"),
        ((["visual.layer1.0.conv9"],), "visual.layer1.0.conv"),
        (("visual.layer1",), r"Pass \['visual.layer1'\]"),
        ((["visual.layer1.0.act1"],), "Name the convolution"),
        (([], "frozn"), "Use 'frozen'"),
        (([], "frozen", ["visual.attnpool"]), "Name stages, blocks"),
    ],
)
def test_bad_arguments_change_nothing(arguments: tuple, fix: str) -> None:
    model = small_trunk()
    before = {n: id(m) for n, m in model.named_modules()}
    keywords = dict(zip(("bn", "outputs"), arguments[1:], strict=False))
    with pytest.raises(PlanError, match=fix):
        skip_frozen(model, arguments[0], **keywords)
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    skip_frozen(model, freeze_set(model, "odd"))
    skipped = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(PlanError, match=fix):
        skip_frozen(model, arguments[0], **keywords)
    assert {n: id(m) for n, m in model.named_modules()} == skipped


def test_everything_and_nothing_frozen_are_said() -> None:
    model = small_trunk()
    assert any("nothing is frozen" in note for note in skip_frozen(model, []).notes)
    report = skip_frozen(model, conv_names(model)[1:])
    assert not any("nothing in the trunk" in note for note in report.notes)
    report = skip_frozen(model, ["visual"])
    assert any("nothing in the trunk trains" in note for note in report.notes)
    assert not model(torch.randn(1, 3, *SIZE)).requires_grad
    assert report.explain(SIZE).total == 0


def test_norms_without_running_statistics_are_refused_unless_they_train() -> None:
    model = small_trunk()
    model.visual.layer1[0].bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(UnsupportedModelError, match="bn='train'"):
        skip_frozen(model, freeze_set(model, "odd"))
    report = skip_frozen(model, freeze_set(model, "odd"), bn="train")
    assert report.replaced


def test_modules_with_hooks_are_left_alone_with_the_reason() -> None:
    model = small_trunk().double()
    calls = []
    model.visual.layer2[0].conv2.register_forward_hook(lambda *_: calls.append(1))
    names = freeze_set(model, "odd")
    twin = plain_twin(model, names, "frozen")
    report = skip_frozen(model, names)
    assert "hooks" in report.untouched["visual.layer2.0"]
    x = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    g = torch.randn_like(twin(x))
    calls.clear()
    compare(gradients(model.eval(), x, g), gradients(twin, x, g))
    assert len(calls) == 2
    assert "visual.layer2.0" in str(report.explain(SIZE))


def test_an_accelerated_model_is_refused() -> None:
    import opentrans_kernels as otk

    model = small_trunk().requires_grad_(False)
    otk.accelerate(model, measure=False, input_size=SIZE)
    if any("opentrans_original" in vars(m) for m in model.modules()):
        with pytest.raises(OpenTransError, match="restore"):
            skip_frozen(model, [])


def test_a_loose_frozen_convolution_keeps_no_input() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_trunk()
            self.head = nn.Sequential(
                nn.Conv2d(256, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = Head().double().eval()
    twin = copy.deepcopy(model)
    twin.head[0].requires_grad_(False), twin.head[1].requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    skip_frozen(model, ["head.0"])
    x = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    g = torch.randn_like(twin(x))
    compare(gradients(model, x, g), gradients(twin, x, g))
