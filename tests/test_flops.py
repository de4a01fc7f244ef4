"""The three counts agree with brute force and with torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import flops
from opentrans_kernels.errors import OpenTransError

LIBRARY = torch.library.Library("opentrans_flops_test", "DEF")
LIBRARY.define("sparse_conv2d(Tensor x, Tensor values, Tensor index, int cout, int k) -> Tensor")


def sparse(x, values, index, cout, k):
    weight = values.new_zeros(cout * x.shape[1] * k * k)
    weight[index] = values
    return F.conv2d(x, weight.view(cout, -1, k, k), padding=k // 2)


LIBRARY.impl("sparse_conv2d", sparse, "CompositeExplicitAutograd")
OP = torch.ops.opentrans_flops_test.sparse_conv2d


def layer(k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    index = torch.randperm(6 * 4 * k * k, generator=gen)[:17]
    return torch.randn(17, generator=gen), index


@pytest.mark.parametrize("k, stride, size", [(1, 1, (5, 7)), (3, 1, (6, 5)), (3, 2, (7, 8))])
def test_nominal_is_what_torch_counts(k, stride, size):
    conv = torch.nn.Conv2d(4, 6, k, stride, k // 2, bias=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = conv(torch.zeros(2, 4, *size))
    macs = flops.nominal_macs(tuple(conv.weight.shape), *out.shape[2:], batch=2)
    assert counter.get_total_flops() == 2 * macs


def test_nominal_checks_groups():
    assert flops.nominal_macs((8, 2, 3, 3), 5, 5, groups=4) == 8 * 2 * 9 * 25
    with pytest.raises(OpenTransError, match="6 output channels.*4 groups"):
        flops.nominal_macs((6, 2, 3, 3), 5, 5, groups=4)


def test_effective_counts_every_use_of_a_nonzero():
    values, index = layer()
    x = torch.zeros(3, 4, 5, 6)
    out = OP(x, values, index, 6, 3)
    brute = sum(1 for _ in range(values.numel() * out.shape[0] * out[0, 0].numel()))
    assert flops.effective_macs(values.numel(), 5, 6, 3) == brute == 17 * 3 * 30
    dense = flops.nominal_macs((6, 4, 3, 3), 5, 6, 3)
    assert flops.effective_macs(6 * 4 * 9, 5, 6, 3) == dense


@pytest.mark.parametrize("h, w, kernel, lanes, pixels", [
    (7, 7, 1, 8, 56), (7, 7, 3, 8, 56), (14, 14, 3, 8, 216), (14, 14, 1, 16, 208), (4, 2, 1, 4, 8)
])  # fmt: skip
def test_executed_rounds_up_to_vectors(h, w, kernel, lanes, pixels):
    assert flops.executed_macs(10, h, w, 2, kernel, lanes) == 20 * pixels
    assert pixels >= h * w


def test_torch_counter_sees_the_operator():
    values, index = layer()
    x = torch.zeros(2, 4, 5, 6)
    with FlopCounterMode(display=False) as counter:
        OP(x, values, index, 6, 3)
    uncounted = counter.get_total_flops()
    flops.register(OP)
    flops.register(OP.default)
    with FlopCounterMode(display=False) as counter:
        OP(x, values, index, 6, 3)
        OP(x, values=values, index=index, cout=6, k=3)
    expected = 2 * flops.effective_macs(17, 5, 6, 2)
    assert counter.get_total_flops() == 2 * expected
    assert uncounted != expected


def test_fvcore_handle_reads_a_traced_graph():
    values, index = layer()
    x = torch.zeros(2, 4, 5, 6)
    graph = torch.jit.trace(lambda a, b, c: OP(a, b, c, 6, 3), (x, values, index)).graph
    ((name, handle),) = flops.fvcore_handle(OP).items()
    (node,) = [n for n in graph.nodes() if n.kind() == name]
    assert name == "opentrans_flops_test::sparse_conv2d"
    assert handle(list(node.inputs()), list(node.outputs())) == flops.effective_macs(17, 5, 6, 2)


def test_other_formulas_get_arguments_by_name():
    seen = {}

    def formula(arguments, out_shape):
        seen.update(arguments)
        return 7

    op = torch.ops.aten.relu
    (handle,) = flops.fvcore_handle(op, formula).values()
    graph = torch.jit.trace(torch.relu, torch.zeros(2, 3)).graph
    (node,) = [n for n in graph.nodes() if n.kind() == "aten::relu"]
    assert handle(list(node.inputs()), list(node.outputs())) == 7
    assert seen == {"self": (2, 3)}


@pytest.mark.parametrize("basic", [False, True])
@pytest.mark.parametrize("pool, stride", [(1, 1), (2, 1), (1, 2)])
def test_block_counts_what_its_convolutions_count(basic, pool, stride):
    if basic and pool > 1:
        return
    h, w, cin, mid, cout = 9, 7, 4, 3, 8
    x = torch.zeros(2, cin, h, w)
    kernels = [3, 3] if basic else [1, 3, 1]
    widths = [cin, mid, cout] if basic else [cin, mid, mid, cout]
    nnz = {}
    with FlopCounterMode(display=False) as counter:
        y = x
        for i, k in enumerate(kernels):
            weight = torch.zeros(widths[i + 1], widths[i], k, k)
            nnz[f"conv{i + 1}"] = weight.numel()
            step = stride if i == (0 if basic else 1) else 1
            y = F.conv2d(y, weight, stride=step, padding=k // 2)
            if i == 1 and pool > 1:
                y = F.avg_pool2d(y, pool)
        weight = torch.zeros(cout, cin, 1, 1)
        nnz["downsample"] = weight.numel()
        shortcut = F.conv2d(F.avg_pool2d(x, pool) if pool > 1 else x, weight, stride=stride)
    assert shortcut.shape == y.shape
    macs = flops.block_macs(nnz, (h, w), pool=pool, stride=stride, basic=basic, batch=2)
    assert counter.get_total_flops() == 2 * macs
    with pytest.raises(OpenTransError, match="does not know conv9"):
        flops.block_macs({"conv9": 1}, (h, w))


def test_operators_of_the_package_are_known():
    """Argument names in the formulas are those of the schemas."""
    ops = pytest.importorskip("opentrans_kernels.ops")
    assert ops is not None
    for name, shapes, out in (
        ("sparse_conv2d", {"values": (17,)}, (2, 6, 5, 6)),
        ("sparse_conv2d_dgrad", {"values": (17,), "grad": (2, 6, 5, 6)}, (2, 4, 10, 12)),
        ("sparse_conv2d_wgrad", {"values": (17,), "grad_out": (2, 6, 5, 6)}, (17,)),
    ):
        op = getattr(torch.ops.opentrans_kernels, name)
        schema = {argument.name for argument in op.default._schema.arguments}
        assert set(shapes) <= schema
        assert flops.FORMULAS[name](shapes, out) == 17 * 2 * 30
        flops.register(op)
    block = {
        a.name for a in torch.ops.opentrans_kernels.sparse_bottleneck.default._schema.arguments
    }
    shapes = {"x": (2, 4, 8, 6), "v1": (3,), "v2": (5,), "v3": (7,), "vd": None}
    shapes |= {"pool": 2, "stride": 1}
    assert set(shapes) <= block
    assert flops.bottleneck_macs(shapes, (2, 8, 4, 3)) == 2 * (3 * 48 + 5 * 48 + 7 * 12)
    shapes["vd"] = (11,)
    assert flops.bottleneck_macs(shapes, (2, 8, 4, 3)) == 2 * (3 * 48 + 5 * 48 + 18 * 12)
    shapes |= {"pool": 1, "stride": 2}
    assert flops.bottleneck_macs(shapes, (2, 8, 4, 3)) == 2 * (3 * 48 + 23 * 12)


def test_unknown_operator_is_named():
    with pytest.raises(OpenTransError, match=r"no formula for the operator relu.*Pass one"):
        flops.register(torch.ops.aten.relu)
