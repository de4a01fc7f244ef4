"""What may be folded into a convolution is proved from the graph of its network, and what is not
proved stays as it is.
"""

from __future__ import annotations

import copy

import accel_nets as nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.activations import Kind
from opentrans_kernels.bench.variants import fold_batch_norms_
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.nn import FoldedActivation, FoldedBatchNorm
from opentrans_kernels.pools import PlanarAvgPool2d, PlanarMaxPool2d
from opentrans_kernels.topology import find_trunk
from opentrans_kernels.topology.dataflow import dataflow


class Net(nn.Module):
    """A convolution, a norm, two activations and one more convolution; a forward of the test's."""

    def __init__(self, run, **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.other = nn.ReLU()
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        for name, part in parts.items():
            self.add_module(name, part)
        self.body = (run,)

    def forward(self, x: torch.Tensor, raw: bool = False) -> torch.Tensor:
        return self.body[0](self, x) if not raw else self.last(self.conv(x))


class Plain(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[0](self, x)


def chain(model: nn.Module, conv: str = "conv") -> tuple[str | None, str | None]:
    found = dataflow(model.eval()).chains.get(conv)
    return (None, None) if found is None else (found.bn, found.act)


def whole(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.act(m.bn(m.conv(x))))


def norm_read_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.bn(m.conv(x))
    return m.last(m.act(y) + y)


def written_to_and_read(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.last(m.act(y) + y)


def conv_read_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.last(m.act(m.bn(y)) + y)


def act_called_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.last(m.act(m.bn(m.conv(x)))))


def norm_called_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.last(m.act(m.bn(m.conv(x)))))


def all_called_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    return sum(m.act(m.bn(m.conv(part))) for part in (x, 2 * x))


def conv_called_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.act(m.bn(m.conv(x))) + m.conv(-x)


def activation_first(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.bn(m.act(m.conv(x))))


def functional(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.last(F.relu(m.bn(m.conv(x)), inplace=True))


def method(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.bn(m.conv(x)).relu_())


def viewed(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    mean = y.view(-1).mean()
    return m.act(m.bn(y)) + mean


def weight_read(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.act(m.bn(m.conv(x)))) + m.conv.weight.mean()


def nothing_behind(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (whole, ("bn", "act")), (norm_read_twice, ("bn", None)),
        (written_to_and_read, (None, None)),
        (conv_read_twice, (None, None)), (act_called_twice, ("bn", None)),
        (norm_called_twice, (None, None)), (all_called_twice, ("bn", "act")),
        (conv_called_twice, (None, None)), (activation_first, (None, "act")),
        (functional, ("bn", None)), (method, ("bn", None)), (viewed, (None, None)),
        (weight_read, ("bn", "act")), (nothing_behind, (None, None)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_only_what_is_certain_is_folded_and_the_result_is_exact(run, expected) -> None:
    model = nets.randomise(Plain(run))
    assert chain(model) == expected
    masks, x = nets.random_masks(model, 0.3), torch.randn(2, 3, 12, 12)
    dense, before = nets.masked(model, masks), nets.snapshot(model)
    if run is weight_read:  # the mask is not in the weight that is read
        with pytest.raises(UnsupportedModelError, match="the model's output changes"):
            otk.accelerate(model, masks, measure=False, input_size=(12, 12))
        masks.apply_(model)
        before = nets.snapshot(model)
    otk.accelerate(model, masks, measure=False, input_size=(12, 12))
    kinds = {name: type(model.get_submodule(name)) for name in ("bn", "act")}
    assert (kinds["bn"] is FoldedBatchNorm, kinds["act"] is FoldedActivation) == tuple(
        name is not None for name in expected
    )
    nets.check_exact(model, dense, x)
    otk.restore(model)
    nets.check_unchanged(model, before)


def test_a_flag_that_returns_what_is_otherwise_handed_on() -> None:
    assert chain(Net(whole)) == (None, None)
    assert chain(Plain(whole)) == ("bn", "act")


def test_what_stays_is_said_with_its_reason() -> None:
    for run, reason in (
        (functional, "is a function, not a module"), (act_called_twice, "is called elsewhere"),
        (conv_read_twice, "read at several places"),
    ):  # fmt: skip
        notes = find_trunk(Plain(run).eval()).notes
        assert any(reason in note and "conv" in note.split(":")[0] for note in notes), notes


def hooked(place: str, kind: str) -> nn.Module:
    model = nets.randomise(Plain(whole, bn=nn.Sequential(nn.BatchNorm2d(8))))
    getattr(model.get_submodule(place), f"register_forward_{kind}")(lambda *_: None)
    return model


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
@pytest.mark.parametrize(
    ("place", "expected"),
    [("bn", (None, None)), ("bn.0", (None, None)), ("act", ("bn.0", None)),
     ("last", ("bn.0", "act")), ("", ("bn.0", "act"))],
)  # fmt: skip
def test_hooks_see_the_values_that_they_saw(place: str, kind: str, expected) -> None:
    assert chain(hooked(place, kind)) == expected


@pytest.mark.parametrize("place", ["bn", "bn.0", "act", "conv"])
def test_a_hook_given_afterwards_sees_the_dense_values(place: str, caplog) -> None:
    model = nets.randomise(Plain(whole, bn=nn.Sequential(nn.BatchNorm2d(8))))
    masks = nets.random_masks(model, 0.3)
    dense, x = nets.masked(model, masks), torch.randn(2, 3, 12, 12)
    otk.accelerate(model, masks, measure=False, input_size=(12, 12))
    assert type(model.act) is FoldedActivation
    seen: dict[str, list[torch.Tensor]] = {"own": [], "dense": []}
    for which, net in (("own", model), ("dense", dense)):
        net.get_submodule(place).register_forward_hook(
            lambda _, args, out, to=seen[which]: to.append(out.clone())
        )
    nets.check_exact(model, dense, x)
    torch.testing.assert_close(seen["own"][-1], seen["dense"][-1], rtol=1e-4, atol=1e-4)
    assert "has hooks since acceleration" in caplog.text


def test_global_hooks_see_every_value() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        trunk = find_trunk(nets.randomise(Plain(whole)))
    finally:
        handle.remove()
    assert all(node.bn is None and node.act is None for node in trunk.loose)
    assert any("global module hooks" in note for note in trunk.notes)


class Branching(nn.Module):
    """Its own forward decides by its data; its parts do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_bn = nn.BatchNorm2d(8)
        self.part = Plain(whole, conv=nn.Conv2d(8, 8, 1))
        self.list = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(self.stem_bn(self.stem(x)))
        for layer in self.list:
            y = layer(y) if bool(x.mean() > -1e9) else y
        return y


def test_a_forward_that_decides_by_its_data_is_read_part_by_part() -> None:
    model = nets.randomise(Branching())
    trunk = find_trunk(model)
    found = {node.name: (node.bn_name, node.act_name) for node in trunk.loose}
    assert found == {
        "stem": (None, None), "part.conv": ("part.bn", "part.act"), "part.last": (None, None),
        "list.0.0": ("list.0.1", None),
    }  # fmt: skip
    assert any("Branching cannot be traced as a whole (TraceError" in n for n in trunk.notes)
    masks, x = nets.random_masks(model, 0.3), torch.randn(2, 3, 9, 9)
    dense = nets.masked(model, masks)
    report = otk.accelerate(model, masks, measure=False, input_size=(9, 9))
    assert any("cannot be traced" in note for note in report.notes + report.plan.notes)
    nets.check_exact(model, dense, x)


def test_a_norm_in_training_mode_stays() -> None:
    model = nets.randomise(Plain(whole))
    model.bn.train()
    masks = nets.random_masks(model, 0.3)
    twin = nets.masked(model, masks)
    report = otk.accelerate(model, masks, measure=False, input_size=(12, 12))
    assert any("the norm behind conv is in training mode" in note for note in report.plan.notes)
    assert type(model.bn) is nn.BatchNorm2d and type(model.act) is nn.ReLU
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)


def test_settings_of_a_folded_activation_are_watched() -> None:
    model = nets.randomise(Plain(whole, act=nn.LeakyReLU(0.2)))
    masks, x = nets.random_masks(model, 0.3), torch.randn(1, 3, 9, 9)
    dense = nets.masked(model, masks)
    otk.accelerate(model, masks, measure=False, input_size=(9, 9))
    nets.check_exact(model, dense, x)
    model.act.opentrans_original.negative_slope = 0.5
    with pytest.raises(UnsupportedModelError, match=r"was leaky ReLU\(0.2\).*restore"):
        model(x)
    otk.restore(model)
    assert model.act.negative_slope == 0.5


ACTS = [
    (nn.ReLU(), Kind.RELU), (nn.ReLU(True), Kind.RELU), (nn.ReLU6(), Kind.RELU6),
    (nn.Hardtanh(0, 6), Kind.RELU6), (nn.Hardtanh(), None), (nn.LeakyReLU(0.1), Kind.LEAKY_RELU),
    (nn.SiLU(), Kind.SILU), (nn.Hardswish(True), Kind.HARD_SWISH), (nn.GELU(), Kind.GELU),
    (nn.GELU("tanh"), Kind.GELU_TANH), (nn.Sigmoid(), None), (nn.Tanh(), None),
]  # fmt: skip


@pytest.mark.parametrize(("act", "kind"), ACTS, ids=lambda v: type(v).__name__)
def test_every_activation_behind_a_convolution_of_every_kind(act: nn.Module, kind) -> None:
    parts = {"act": copy.deepcopy(act), "other": copy.deepcopy(act)}
    model = nets.randomise(Plain(depthwise, last=nn.Conv2d(8, 8, 3, 2, 1, groups=8), **parts))
    nodes = {node.name: node for node in find_trunk(model).loose}
    for node in nodes.values():
        assert (node.activation.kind == kind) if kind is not None else not node.activation
    masks, x = nets.random_masks(model, 0.4), 2 * torch.randn(2, 3, 12, 12)
    dense = nets.masked(model, masks)
    otk.accelerate(model, masks, measure=False, input_size=(12, 12))
    assert (type(model.act) is FoldedActivation) == (kind is not None)
    nets.check_exact(model, dense, x)
    leaf = x.clone().requires_grad_()
    twin = x.clone().requires_grad_()
    model(leaf).square().mean().backward()
    dense(twin).square().mean().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-3, atol=1e-6)


def depthwise(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.other(m.last(m.act(m.bn(m.conv(x)))))


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_grouped_convolutions(groups: int, monkeypatch) -> None:
    last = nn.Conv2d(8, 24, 3, 2, 1, groups=groups)
    for largest, kind in ((1 << 24, "sparse"), (9, "compact")):
        monkeypatch.setattr("opentrans_kernels.plan.subject.LARGEST_GROUPED", largest)
        model = nets.randomise(Plain(whole, last=copy.deepcopy(last)))
        masks, x = nets.random_masks(model, 0.3), torch.randn(2, 3, 11, 12)
        dense, before = nets.masked(model, masks), nets.snapshot(model)
        report = otk.accelerate(model, masks, measure=False, input_size=(11, 12))
        assert report.plan.kind("last") == kind
        row = next(row for row in report.plan.rows if row.name == "last")
        assert row.nnz == int(masks.masks["last"].sum()) and row.numel == last.weight.numel()
        nets.check_exact(model, dense, x)
        otk.restore(model)
        nets.check_unchanged(model, before)


class NormAct(nn.BatchNorm2d):
    """A norm that applies an activation itself."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def norm_only(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.bn(m.conv(x)))


def test_a_norm_with_its_own_activation() -> None:
    for act, kind in ((nn.SiLU(), Kind.SILU), (nn.Identity(), Kind.NONE), (nn.Tanh(), None)):
        model = nets.randomise(Plain(norm_only, bn=NormAct(8, act)))
        (node, _) = find_trunk(model).loose
        assert (node.bn_name is None) == (kind is None)
        assert kind is None or node.activation.kind == kind
        assert (node.plain_bn is None) == (kind is not Kind.NONE)
        masks, x = nets.random_masks(model, 0.3), torch.randn(2, 3, 12, 12)
        dense, before = nets.masked(model, masks), nets.snapshot(model)
        folded = fold_batch_norms_(copy.deepcopy(dense))
        torch.testing.assert_close(folded(x), dense(x), rtol=1e-4, atol=1e-4)
        otk.accelerate(model, masks, measure=False, input_size=(12, 12))
        nets.check_exact(model, dense, x)
        if kind is not None:  # its activation is not called, so a hook of it must be noticed
            calls: list[int] = []
            model.bn.act.register_forward_hook(lambda *_, to=calls: to.append(1))
            nets.check_exact(model, dense, x)
            assert calls
        otk.restore(model)
        nets.check_unchanged(model, before)


def test_pools_between_convolutions() -> None:
    layers = [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    ]  # fmt: skip
    found = find_trunk(nn.Sequential(*layers).eval()).pools
    assert [(p.name, p.before, p.after) for p in found] == [
        ("3", ("0",), ("4",)), ("6", ("4",), ("7",))
    ]  # fmt: skip
    assert [p.name for p in find_trunk(nn.Sequential(*layers).eval()).pools_behind({"4", "7"})] == [
        "6"
    ]
    model = nets.randomise(nn.Sequential(*layers))
    masks, x = nets.random_masks(model, 0.3), torch.randn(2, 3, 33, 30)
    dense, before = nets.masked(model, masks), nets.snapshot(model)
    otk.accelerate(model, masks, measure=False, input_size=(33, 30))
    assert type(model[3]) is PlanarMaxPool2d and type(model[6]) is PlanarAvgPool2d
    nets.check_exact(model, dense, x)
    otk.restore(model)
    nets.check_unchanged(model, before)
    layers[3].register_forward_hook(lambda *_: None)
    assert [p.name for p in find_trunk(nn.Sequential(*layers).eval()).pools] == ["6"]
