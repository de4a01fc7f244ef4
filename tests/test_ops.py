"""The contract of every row of the dispatch table: values, layout and purity of the results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    CHANNELS,
    DENSITIES,
    GEOMETRIES,
    assert_as_exact_as_dense,
    assert_within,
    bottleneck_exact,
    bottleneck_parts,
    layouts,
    masked_weight,
)

from opentrans_kernels import dispatch, native, ops
from opentrans_kernels.errors import PlanError
from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.pack import SparseWeight


def rows(op: str) -> pytest.MarkDecorator:
    """Run the test once per row of ``op``, that row's backend forced."""
    found = [row for row in dispatch.TABLE if row.op == op and row.device in ("any", "cpu")]
    return pytest.mark.parametrize("row", found, ids=lambda row: row.backend)


@pytest.fixture(autouse=True)
def _forced(request: pytest.FixtureRequest, set_env: Callable) -> None:
    if "row" not in request.fixturenames:
        return
    row = request.getfixturevalue("row")
    if row.needs == "extension" and not native.load():
        pytest.skip(str(native.reason()))
    set_env(OPENTRANS_BACKEND=row.backend)
    assert dispatch.resolve(row.op).row is row


def sizes(kernel: int, padding: int) -> list[tuple[int, int]]:
    """All H, W in 1..17 on which the window fits."""
    fits = range(max(1, kernel - 2 * padding), 18)
    return list(product(fits, fits))


@rows("sparse_conv2d")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_size_and_channel_count(row: dispatch.Row, geometry: tuple[int, int, int]) -> None:
    kernel, stride, padding = geometry
    kinds = list(product(CHANNELS, CHANNELS, DENSITIES))
    packs = {}
    # 289 sizes against 125 kinds of weight: co-prime steps meet every size and every kind.
    for index, (h, w) in enumerate(sizes(kernel, padding)):
        cin, cout, density = kinds[index * 7 % len(kinds)]
        key = (cin, cout, density)
        if key not in packs:
            weight, bias = masked_weight(cout, cin, kernel, density, index), torch.randn(cout)
            packs[key] = weight, bias, SparseWeight.from_dense(weight, bias, stride, padding)
        weight, bias, packed = packs[key]
        x = torch.randn(1 + index % 2, cin, h, w)
        out = ops.sparse_conv2d(x, packed)
        assert_as_exact_as_dense(out, x, weight, bias, stride, padding, what=(key, h, w))


@rows("sparse_conv2d")
@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("kernel", (1, 3))
def test_every_channel_count_and_density(row: dispatch.Row, kernel: int, relu: bool) -> None:
    for cin, cout, density in product(CHANNELS, CHANNELS, DENSITIES):
        weight, bias = masked_weight(cout, cin, kernel, density, cin), torch.randn(cout)
        packed = SparseWeight.from_dense(weight, bias, 1, kernel // 2)
        x, residual = torch.randn(2, cin, 6, 7), torch.randn(2, cout, 6, 7)
        out = ops.sparse_conv2d(x, packed, residual, relu)
        rest = (1, kernel // 2, residual, relu)
        assert_as_exact_as_dense(out, x, weight, bias, *rest, what=(cin, cout, density))


@rows("sparse_conv2d")
@pytest.mark.parametrize("row_block", (1, 5, 10_000))
@pytest.mark.parametrize("chunk", (1, 3, 64, 1000))
def test_every_blocking(row: dispatch.Row, chunk: int, row_block: int) -> None:
    for (kernel, stride, padding), (cin, cout) in product(
        ((1, 1, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3)), ((65, 7), (7, 65), (130, 33))
    ):
        weight, bias = masked_weight(cout, cin, kernel, 0.2, chunk), torch.randn(cout)
        size = min(chunk, 300 if kernel > 3 else chunk)  # a 7x7 chunk of 1000 has too many codes
        packed = SparseWeight.from_dense(
            weight, bias, stride, padding, chunk=size, row_block=row_block
        )
        x = torch.randn(1, cin, 11, 13)
        out = ops.sparse_conv2d(x, packed)
        assert_as_exact_as_dense(out, x, weight, bias, stride, padding, what=(kernel, cin))


@rows("sparse_conv2d")
@pytest.mark.parametrize(
    ("size", "cin", "cout", "kernel", "stride"),
    [(56, 64, 256, 1, 1), (56, 64, 64, 3, 1), (29, 130, 64, 3, 1), (57, 66, 70, 3, 2),
     (14, 1024, 256, 1, 1), (7, 512, 2048, 1, 1), (7, 512, 512, 3, 1), (113, 3, 32, 3, 2)],
)  # fmt: skip
def test_layers_of_a_real_network(row: dispatch.Row, size, cin, cout, kernel, stride) -> None:
    weight, bias = masked_weight(cout, cin, kernel, 0.1), torch.randn(cout)
    packed = SparseWeight.from_dense(weight, bias, stride, kernel // 2)
    x = torch.randn(1, cin, size, size)
    out = ops.sparse_conv2d(x, packed, relu=True)
    assert_as_exact_as_dense(out, x, weight, bias, stride, kernel // 2, None, True)


@rows("sparse_conv2d")
@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0)], ids=str)
def test_input_and_residual_layouts(row: dispatch.Row, geometry: tuple[int, int, int]) -> None:
    kernel, stride, padding = geometry
    weight, bias = masked_weight(9, 7, kernel, 0.4), torch.randn(9)
    packed = SparseWeight.from_dense(weight, bias, stride, padding)
    for n, h, w in ((3, 5, 7), (2, 8, 8), (1, 13, 1), (2, 1, 9), (2, 1, 1)):
        x = torch.randn(n, 7, h, w)
        plain = ops.sparse_conv2d(x, packed)
        residual = torch.randn(plain.shape)
        added = ops.sparse_conv2d(x, packed, residual, True)
        assert_as_exact_as_dense(added, x, weight, bias, stride, padding, residual, True)
        exact = row.backend != "reference"  # oneDNN may take another algorithm by layout
        for name, other in layouts(x):
            assert torch.equal(other, x), name
            found = ops.sparse_conv2d(other, packed)
            assert_as_exact_as_dense(found, x, weight, bias, stride, padding, what=name)
            assert not exact or torch.equal(found, plain), (name, geometry, h, w)
        for name, other in layouts(residual):
            found = ops.sparse_conv2d(x, packed, other, True)
            torch.testing.assert_close(found, added, rtol=1e-5, atol=1e-5, msg=f"residual {name}")
            assert not exact or torch.equal(found, added), ("residual", name, geometry, h, w)


@rows("sparse_conv2d")
@pytest.mark.parametrize("kernel", (1, 3))
def test_expanded_inputs_are_read_through_stride_zero(row: dispatch.Row, kernel: int) -> None:
    weight, bias = masked_weight(9, 7, kernel, 0.4), torch.randn(9)
    packed = SparseWeight.from_dense(weight, bias, 1, kernel // 2)
    for shape in ((1, 7, 5, 6), (3, 1, 5, 6), (3, 7, 1, 6), (3, 7, 5, 1), (1, 1, 1, 1)):
        x = torch.randn(shape).expand(3, 7, 5, 6)
        residual = torch.randn(shape[0], 1, *shape[2:]).expand(3, 9, 5, 6)
        out = ops.sparse_conv2d(x, packed, residual)
        rest = (1, kernel // 2, residual)
        assert_as_exact_as_dense(out, x, weight, bias, *rest, what=shape)


@rows("sparse_conv2d")
@pytest.mark.parametrize("kernel", (1, 3))
def test_the_residual_may_be_the_input(row: dispatch.Row, kernel: int) -> None:
    weight, bias = masked_weight(7, 7, kernel, 0.4), torch.randn(7)
    packed = SparseWeight.from_dense(weight, bias, 1, kernel // 2)
    for name, x in layouts(torch.randn(2, 7, 9, 5)):
        before = x.clone()
        out = ops.sparse_conv2d(x, packed, x, True)
        assert torch.equal(x, before), name
        assert_as_exact_as_dense(out, x, weight, bias, 1, kernel // 2, before, True, what=name)


@rows("sparse_conv2d")
def test_inputs_stay_unmodified(row: dispatch.Row) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    tensors = (torch.randn(2, 7, 9, 5), torch.randn(2, 9, 9, 5))
    tensors += (packed.structure, packed.values, packed.bias)
    before = [t.clone() for t in tensors]
    ops.sparse_conv2d(tensors[0], packed, tensors[1], True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@rows("sparse_conv2d")
def test_an_empty_layer_is_its_bias(row: dispatch.Row) -> None:
    bias = torch.randn(9)
    for cin, kernel, stride in product((1, 7, 130), (1, 3), (1, 2)):
        packed = SparseWeight.from_dense(torch.zeros(9, cin, kernel, kernel), bias, stride)
        x = torch.full((2, cin, 5, 6), float("nan"))  # a dropped product spreads nothing
        if row.backend == "reference":
            x = torch.randn_like(x)
        out = ops.sparse_conv2d(x, packed)
        assert torch.equal(out, bias.view(1, 9, 1, 1).expand(out.shape))


@rows("sparse_conv2d")
def test_without_input_channels_the_bias_is_left_or_it_is_refused(
    row: dispatch.Row, poison: None
) -> None:
    bias = torch.randn(9)
    for kernel in (1, 3):
        try:
            packed = SparseWeight.from_dense(torch.zeros(9, 0, kernel, kernel), bias)
        except PlanError:  # dense torch has no answer for it either
            continue
        out = ops.sparse_conv2d(torch.zeros(2, 0, 5, 6), packed)
        assert out.shape[:2] == (2, 9)
        assert torch.equal(out, bias.view(1, 9, 1, 1).expand(out.shape))


@rows("sparse_conv2d")
@pytest.mark.parametrize("kernel", (1, 3))
def test_relu_keeps_nan_and_infinities(row: dispatch.Row, kernel: int) -> None:
    weight = torch.zeros(5, 5, kernel, kernel)
    weight[range(5), range(5), kernel // 2, kernel // 2] = torch.tensor([1.0, -1, 1, -1, 1])
    packed = SparseWeight.from_dense(weight, None, 1, kernel // 2)
    special = [float("nan"), float("inf"), -float("inf"), -1.0, 2.0, -0.0]
    x = torch.tensor(special).repeat(5, 7).view(1, 5, 7, 6).contiguous()
    if row.backend == "reference":  # dense arithmetic: 0 * inf would be NaN
        x = x.nan_to_num(posinf=1.0, neginf=-1.0)
    out = ops.sparse_conv2d(x, packed, relu=True)
    expected = (x * torch.tensor([1.0, -1, 1, -1, 1]).view(1, 5, 1, 1)).relu()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    residual = torch.zeros(1, 5, 7, 6)
    residual[:, :, ::2] = float("nan")
    zeros = torch.zeros(1, 5, 7, 6)
    out = ops.sparse_conv2d(zeros, packed, residual, True)
    assert torch.equal(out.isnan(), residual.isnan())


@rows("sparse_conv2d")
def test_batch_zero(row: dispatch.Row) -> None:
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        weight = masked_weight(9, 7, kernel, 0.4)
        packed = SparseWeight.from_dense(weight, torch.randn(9), stride, kernel // 2)
        out = ops.sparse_conv2d(torch.zeros(0, 7, 5, 6), packed)
        expected = F.conv2d(torch.zeros(0, 7, 5, 6), weight, None, stride, kernel // 2)
        assert out.shape == expected.shape and out.dtype == torch.float32
        assert ops.avg_pool2d(torch.zeros(0, 7, 6, 6), 2).shape == (0, 7, 3, 3)
    _, packs = bottleneck_parts(6, 5, 6, 0.5, True)
    assert ops.sparse_bottleneck(torch.zeros(0, 6, 4, 4), *packs, 2, 2).shape == (0, 6, 2, 2)


@rows("sparse_conv2d")
def test_results_have_dense_rows_and_padded_planes(row: dispatch.Row) -> None:
    _, packs = bottleneck_parts(6, 5, 6, 0.5, False)
    for h, w in ((1, 1), (3, 5), (4, 4), (7, 7), (16, 16), (17, 15), (56, 56)):
        x = torch.randn(2, 6, h, w)
        packed = SparseWeight.from_dense(masked_weight(9, 6, 3, 0.4), None, 1, 1)
        results = (ops.sparse_conv2d(x, packed), ops.sparse_conv2d(x, packed, relu=True))
        results += (ops.avg_pool2d(x, 1), ops.sparse_bottleneck(x, *packs))
        for out in results:
            plane = plane_stride(h * w)
            assert plane >= h * w and plane % 32 == 16
            assert out.stride() == (out.shape[1] * plane, plane, w, 1)
            assert out.flatten(2).data_ptr() == out.data_ptr(), "flatten(2) copied"


@rows("sparse_bottleneck")
@pytest.mark.parametrize(
    ("pool", "down", "stride"),
    [(1, False, 1), (1, True, 1), (2, True, 1), (3, True, 1), (1, True, 2)],
)
def test_bottleneck(row: dispatch.Row, pool: int, down: bool, stride: int) -> None:
    kinds = [(1, 1, 1), (3, 7, 3), (64, 7, 64), (65, 64, 65), (7, 65, 7)]
    if down:
        kinds += [(3, 7, 64), (64, 3, 7)]
    for index, (cin, width, cout) in enumerate(kinds):
        density = DENSITIES[index % len(DENSITIES)]
        convs, packs = bottleneck_parts(cin, width, cout, density, down, index, stride)
        for h, w in ((1, 1), (3, 5), (7, 7), (8, 6), (13, 17), (16, 16), (29, 31), (64, 40)):
            if min(h, w) < pool:
                continue
            x = torch.randn(1 + index % 3, cin, h, w)
            out = ops.sparse_bottleneck(x, *packs, pool, pool)
            exact = bottleneck_exact(x, convs, pool, pool, stride=stride)
            dense = bottleneck_exact(x, convs, pool, pool, torch.float32, stride)
            assert_within(out, exact, dense, (cin, width, cout, density, h, w))


@rows("sparse_bottleneck")
@pytest.mark.parametrize("pool", (1, 2))
def test_bottleneck_input_layouts_and_purity(row: dispatch.Row, pool: int) -> None:
    convs, packs = bottleneck_parts(6, 5, 6, 0.5, pool == 2)
    x = torch.randn(3, 6, 7, 9)
    plain = ops.sparse_bottleneck(x, *packs, pool, pool)
    dense = bottleneck_exact(x, convs, pool, pool, torch.float32)
    for name, other in layouts(x):
        before = other.clone()
        out = ops.sparse_bottleneck(other, *packs, pool, pool)
        assert torch.equal(other, before), name
        assert_within(out, bottleneck_exact(x, convs, pool, pool), dense, name)
        assert row.backend == "reference" or torch.equal(out, plain), name


@rows("avg_pool2d")
@pytest.mark.parametrize("k", (1, 2, 3, 7))
def test_average_pooling(row: dispatch.Row, k: int) -> None:
    for h, w in sizes(k, 0)[::5]:
        x = torch.randn(2, 5, h, w)
        exact, dense = F.avg_pool2d(x.double(), k), F.avg_pool2d(x, k)
        for name, other in layouts(x):
            assert_within(ops.avg_pool2d(other, k), exact, dense, (name, h, w))


@rows("avg_pool2d")
def test_pooling_an_image_smaller_than_the_window_is_refused_or_empty(row: dispatch.Row) -> None:
    shapes = []
    try:
        shapes.append(ops.avg_pool2d(torch.zeros(1, 2, 3, 5), 4).shape)
    except RuntimeError as error:
        assert "small" in str(error)
    assert shapes in ([], [(1, 2, 0, 1)])
