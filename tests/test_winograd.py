"""Dense 3x3 convolutions by Winograd's method: the op in every row, and where it is chosen."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_within, layouts
from test_activations import KINDS, QUICK, torch_own
from test_ops import _forced, rows  # noqa: F401  (a fixture: the row's backend is in force)
from torch import nn

import opentrans_kernels as otk
from opentrans.imp.cost import layer_costs
from opentrans_kernels import dispatch, ops
from opentrans_kernels.activations import NONE, RELU, Activation
from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.nn import WinogradEngine
from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.ops.winograd_conv2d import reference
from opentrans_kernels.pack.winograd import (
    ROWS,
    plain_gradient,
    plain_weight,
    transform_weight,
)

NATIVE = torch.ops.opentrans_kernels
#: Of the input; of one vector of tiles, of several, with odd ends, and lower than a tile.
SIZES = ((3, 3), (5, 9), (7, 7), (14, 14), (16, 33), (2, 65), (40, 8), (31, 70))


def test_weights_are_transformed_by_the_formula() -> None:
    header = (Path(__file__).parents[1] / "csrc" / "otk.h").read_text(encoding="utf-8")
    assert re.search(rf"kWinogradRows = {ROWS};", header)
    weight = torch.randn(11, 5, 3, 3, dtype=torch.float64)
    packed = transform_weight(weight, torch.float64)
    assert packed.shape == (16, 2, 5, 8) and packed.is_contiguous()
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
    for row, channel in ((0, 0), (7, 4), (10, 2)):
        own = (g @ weight[row, channel] @ g.T).flatten()
        torch.testing.assert_close(packed[:, row // 8, channel, row % 8], own, rtol=0, atol=0)
    assert not packed[:, 1, :, 3:].any()
    torch.testing.assert_close(plain_weight(packed, 11), weight)
    single = plain_weight(transform_weight(weight.float()), 11)
    torch.testing.assert_close(single, weight.float(), rtol=0, atol=1e-6)
    found = plain_gradient(torch.ones(11, 5, 3, 3))
    assert found.shape == packed.shape
    with pytest.raises(ValueError, match=r"\[cout, cin, 3, 3\], got \[4, 4, 1, 1\]"):
        transform_weight(torch.zeros(4, 4, 1, 1))
    assert transform_weight(torch.zeros(0, 4, 3, 3)).shape == (16, 0, 4, 8)


@rows("winograd_conv2d")
@pytest.mark.parametrize("channels", [(1, 1), (7, 9), (64, 40), (300, 17), (5, 150)], ids=str)
def test_equals_the_convolution(row: dispatch.Row, channels: tuple[int, int]) -> None:
    cin, cout = channels
    weight, bias = torch.randn(cout, cin, 3, 3), torch.randn(cout)
    packed = transform_weight(weight)
    for index, (padding, (h, w)) in enumerate(product((0, 1, 3), SIZES)):
        if min(h, w) + 2 * padding < 3:
            continue
        act = KINDS[index % len(KINDS)]
        x, own = torch.randn(2, cin, h, w), bias if index % 3 else None
        exact = F.conv2d(
            x.double(), weight.double(), None if own is None else own.double(), 1, padding
        )
        plain = F.conv2d(x, weight, own, 1, padding)
        extra = torch.randn(plain.shape) if index % 2 else None
        if extra is not None:
            exact, plain = exact + extra, plain + extra
        out = ops.winograd_conv2d(x, packed, own, extra, cout=cout, padding=padding)
        assert_within(out, exact, plain, (padding, h, w))
        # A result that is cut off would hide how dense arithmetic rounds large sums.
        active = ops.winograd_conv2d(
            x, packed, own, extra, cout=cout, padding=padding, activation=act
        )
        torch.testing.assert_close(active, torch_own(act, out), rtol=1e-5, atol=1e-5)
        plane = plane_stride(exact.shape[2] * exact.shape[3])
        assert out.stride() == (cout * plane, plane, exact.shape[3], 1)


@rows("winograd_conv2d")
def test_layouts_threads_and_purity(row: dispatch.Row) -> None:
    # 170 rows are three groups, which threads share where an image has few panels.
    packed, bias = transform_weight(torch.randn(170, 6, 3, 3)), torch.randn(170)
    compiled = row.backend != "reference"
    for h, w in ((7, 9), (16, 16), (30, 71)):
        x, extra = torch.randn(3, 6, h, w), torch.randn(3, 170, h, w)

        def run(x: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            return ops.winograd_conv2d(x, packed, bias, extra, cout=170, activation=RELU)

        plain = run(x, extra)
        for (name, other), (_, more) in zip(layouts(x), layouts(extra), strict=True):
            before = other.clone()
            found = run(other, more)
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
            assert torch.equal(other, before) and (not compiled or torch.equal(found, plain)), name
        one = run(x[1:2], extra[1:2])
        assert not compiled or torch.equal(one, plain[1:2]), "depends on the batch"
        try:
            torch.set_num_threads(3)
            both = run(x, extra), run(x[1:2], extra[1:2])
        finally:
            torch.set_num_threads(1)
        assert not compiled or (torch.equal(both[0], plain) and torch.equal(both[1], one))
    assert ops.winograd_conv2d(torch.zeros(0, 6, 5, 5), packed, cout=170).shape == (0, 170, 5, 5)
    if compiled:  # PyTorch has no convolution to no channels
        nothing = ops.winograd_conv2d(x, transform_weight(torch.zeros(0, 6, 3, 3)), cout=0)
        assert nothing.shape == (3, 0, 30, 71)
        bare = ops.winograd_conv2d(
            x[:, :0], transform_weight(torch.zeros(170, 0, 3, 3)), bias, cout=170
        )
        assert torch.equal(bare, bias.view(1, 170, 1, 1).expand_as(bare))


def test_where_numbers_that_are_none_go(extension: None) -> None:
    packed = transform_weight(torch.randn(4, 3, 3, 3))
    x = torch.randn(1, 3, 12, 40)
    x[0, 1, 5, 17] = float("inf")
    plain = ops.winograd_conv2d(x.nan_to_num(0, 0, 0), packed, cout=4)
    found = ops.winograd_conv2d(x, packed, cout=4)
    bad = ~found.isfinite()
    assert bad[:, :, 4:7, 16:19].all(), "the windows that hold it"
    assert not bad[:, :, :4].any() and not bad[:, :, 8:].any()
    assert not bad[..., :16].any() and not bad[..., 20:].any(), "and no tile beyond"
    assert torch.equal(found[~bad], plain[~bad])


def test_gradients(extension: None) -> None:
    leaves = [torch.randn(2, 3, 5, 6), transform_weight(torch.randn(9, 3, 3, 3), torch.float64)]
    leaves += [torch.randn(9), torch.randn(2, 9, 5, 6)]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    for act in (NONE, RELU, KINDS[4]):

        def oracle(*given: torch.Tensor, act: Activation = act) -> torch.Tensor:
            return reference.winograd_conv2d(*given, 9, 1, act.kind, act.slope)

        assert torch.autograd.gradcheck(oracle, exact)
        single = [leaf.float().requires_grad_() for leaf in leaves]
        out = NATIVE.winograd_conv2d(*single, 9, 1, act.kind, act.slope)
        grad = torch.randn(out.shape)
        want = torch.autograd.grad(oracle(*exact), exact, grad.double())
        for got, right in zip(torch.autograd.grad(out, single, grad), want, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="ordinary backward only"):
        torch.func.grad(lambda x: ops.winograd_conv2d(x, leaves[1].float(), cout=9).sum())(
            leaves[0]
        )


def test_registered_as_an_op_and_captured(extension: None) -> None:
    packed = transform_weight(torch.randn(9, 3, 3, 3))
    x, extra = torch.randn(2, 3, 7, 6, requires_grad=True), torch.randn(2, 9, 7, 6)
    for more in ((x, packed, torch.randn(9), extra, 9, 1, 4), (x, packed, None, None, 9, 0)):
        torch.library.opcheck(NATIVE.winograd_conv2d.default, more, test_utils=QUICK)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return ops.winograd_conv2d(x, packed, cout=9, activation=RELU) * 2

    captured = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(captured(x.detach()), twice(x.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.winograd_conv2d(x.detach().bfloat16(), packed, cout=9).shape == (2, 9, 7, 6)


@rows("winograd_conv2d")
def test_what_is_refused(row: dispatch.Row) -> None:
    x, packed = torch.randn(1, 4, 5, 5), transform_weight(torch.randn(9, 4, 3, 3))

    def run(x=x, weight=packed, bias=None, residual=None, cout=9, padding=1):  # type: ignore[no-untyped-def]
        return ops.winograd_conv2d(x, weight, bias, residual, cout=cout, padding=padding)

    for call, words in (
        (lambda: run(x[0]), "four dim|N, C, H, W"),
        (lambda: run(x[:, :3]), r"weight must be|\[16, 2, 3, 8\]"),
        (lambda: run(cout=17), r"\[16, 3, 4, 8\]"),
        (lambda: run(weight=packed[:9]), r"\[16, 2, 4, 8\]"),
        (lambda: run(weight=packed.view(-1)), r"\[16, 2, 4, 8\]"),
        (lambda: run(bias=torch.randn(8)), "9 elements"),
        (lambda: run(residual=torch.randn(1, 9, 5, 4)), "the output's shape"),
        (lambda: run(padding=-1), "padding"),
        (lambda: run(padding=1 << 20), "padding"),
        (lambda: run(cout=-1), "cout"),
        (lambda: run(x[..., :2], padding=0), "smaller"),
        (lambda: NATIVE.winograd_conv2d(x, packed, None, None, 9, 1, 99), "is no activation"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


# --- chosen ------------------------------------------------------------------------------------


def network(density: float = 0.6, act: type[nn.Module] = nn.ReLU):  # type: ignore[no-untyped-def]
    """Two 3x3 convolutions, a strided one and a 1x1; a norm and ``act`` behind the first. Masks."""
    made = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), act(),
        nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 8, 3, 2), nn.Conv2d(8, 5, 1),
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=made) * 0.3
    masks = {f"{i}": torch.rand(model[i].weight.shape, generator=made) < density for i in (0, 3, 4)}
    return model, masks


def planned(model: nn.Module, masks: dict[str, torch.Tensor], kinds: dict[str, str]) -> otk.Plan:
    plan = otk.make_plan(model, masks, input_size=(20, 23), measure=False)
    return plan.changed({name: (kind, "given") for name, kind in kinds.items()})


def test_a_plan_can_ask_for_it_and_a_file_keeps_it(tmp_path: Path) -> None:
    model, masks = network()
    x = torch.randn(2, 3, 20, 23)
    dense = copy.deepcopy(model)
    otk.MaskSet.from_tensors(masks).apply_(dense)
    exact, plain = dense.double()(x.double()), dense.float()(x)
    before = dict(model.named_modules())
    plan = planned(model, masks, {"0": "winograd", "3": "winograd"})
    again = otk.Plan.from_dict(plan.to_dict())
    assert again == plan and "2 winograd" in str(again)
    report = otk.accelerate(model, masks, input_size=(20, 23), plan=again, measure=False)
    assert isinstance(model[0].opentrans_engine, WinogradEngine), report
    assert isinstance(model[3].opentrans_engine, WinogradEngine)
    assert_within(model(x), exact, plain, "accelerated")
    file = tmp_path / "model.safetensors"
    otk.save_accelerated(file, model)
    loaded = network()[0]
    otk.load_accelerated(file, loaded)
    assert isinstance(loaded[0].opentrans_engine, WinogradEngine)
    assert torch.equal(loaded(x), model(x))
    model[0].weight.data.mul_(2)
    with pytest.raises(UnsupportedModelError, match="weight"):
        for _ in range(300):
            model(x)
    otk.restore(model)
    assert all(dict(model.named_modules())[name] is module for name, module in before.items())


def test_a_plan_cannot_ask_for_it_elsewhere() -> None:
    model, masks = network()
    for name, other in (("4", "stride 2"), ("5", "a 1x1")):
        plan = planned(model, masks, {name: "winograd"})
        with pytest.raises(PlanError, match=f"{name}: planned as winograd"):
            otk.accelerate(model, masks, input_size=(20, 23), plan=plan, measure=False)
        assert type(model[int(name)]) is nn.Conv2d, other


def test_where_it_is_tried_and_predicted() -> None:
    model, masks = network()
    plan = otk.make_plan(model, masks, input_size=(40, 40), measure=False)
    kinds = {unit.name: unit.kind for unit in plan.units}
    assert kinds["3"] == "winograd", "denser than pays for sparse"
    row = next(row for row in plan.rows if row.name == "3")
    assert row.executed_macs == row.nominal_macs * 4 // 9
    small = otk.make_plan(model, masks, input_size=(12, 12), measure=False)
    assert "winograd" not in {unit.kind for unit in small.units}
    sparse = network(0.05)
    kinds = {u.name: u.kind for u in otk.make_plan(*sparse, (40, 40), measure=False).units}
    assert kinds["3"] == "sparse"
    cut = otk.make_plan(*network(act=nn.ReLU6), (40, 40), measure=False)
    assert cut.kind("0") != "winograd", "its error is that of the sums before they are cut"
    timed = {u.name: u.winograd_ms for u in otk.make_plan(model, masks, (24, 24)).units}
    assert timed["0"] and timed["3"] and timed["4"] is None and timed["5"] is None


def test_a_layer_costs_no_more_than_by_it() -> None:
    model, masks = network()
    plan = otk.make_plan(model, masks, (24, 24))
    units = tuple(
        replace(unit, dense_ms=6.0, sparse_ms=5.0, winograd_ms=3.0 if unit.name == "3" else None)
        for unit in plan.units
    )
    costs = layer_costs(model, ["3", "4"], (24, 24), replace(plan, units=units))
    assert costs["3"].ms(costs["3"].numel) == 3.0 and costs["4"].ms(costs["4"].numel) <= 6.0
    assert costs["3"].ms(0.01 * costs["3"].numel) < 3.0
    assert costs["3"].unskipped == 2.0 and costs["4"].unskipped == 1.0
