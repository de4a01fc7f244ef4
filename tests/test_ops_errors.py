"""Bad input is refused by every row of the dispatch table, with what, why and how to fix it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from kernel_cases import bottleneck_parts, masked_weight, unchecked

from opentrans_kernels import dispatch, native, ops
from opentrans_kernels.errors import KernelUnavailable, OpenTransError, PlanError
from opentrans_kernels.pack import SparseWeight

# The package attribute of this name is the function.
reference = importlib.import_module("opentrans_kernels.ops.sparse_conv2d.reference")
REFUSED = (OpenTransError, RuntimeError)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, set_env: Callable) -> str:
    if request.param == "cpu" and not native.load():
        pytest.skip(str(native.reason()))
    set_env(OPENTRANS_BACKEND=request.param)
    return request.param


@pytest.fixture
def packed() -> SparseWeight:
    return SparseWeight.from_dense(masked_weight(9, 7, 3, 0.5), torch.randn(9), 1, 1)


@pytest.mark.parametrize("channels", (1, 6, 8, 14))
def test_wrong_channels(backend: str, packed: SparseWeight, channels: int) -> None:
    with pytest.raises(REFUSED) as caught:
        ops.sparse_conv2d(torch.randn(2, channels, 5, 5), packed)
    assert str(channels) in str(caught.value) and "7" in str(caught.value)


@pytest.mark.parametrize("shape", [(7, 5, 5), (5,), (1, 1, 7, 5, 5)])
def test_wrong_number_of_dimensions(backend: str, packed: SparseWeight, shape) -> None:
    with pytest.raises(REFUSED):
        ops.sparse_conv2d(torch.randn(shape), packed)


@pytest.mark.parametrize("shape", [(3, 9, 5, 5), (1, 9, 5, 5), (2, 1, 5, 5), (2, 9, 1, 1),
                                   (2, 9, 5, 1), (2, 8, 5, 5), (9, 5, 5), ()], ids=str)  # fmt: skip
def test_a_residual_of_another_shape(backend: str, packed: SparseWeight, shape) -> None:
    with pytest.raises(REFUSED):
        ops.sparse_conv2d(torch.randn(2, 7, 5, 5), packed, torch.randn(shape))


def test_a_residual_of_another_dtype(backend: str, packed: SparseWeight) -> None:
    with pytest.raises(REFUSED, match="float"):
        ops.sparse_conv2d(
            torch.randn(2, 7, 5, 5), packed, torch.randn(2, 9, 5, 5, dtype=torch.float64)
        )


def test_an_input_smaller_than_the_window(backend: str) -> None:
    packed = SparseWeight.from_dense(masked_weight(4, 3, 7, 0.5), None, 1, 1)
    for h, w in ((4, 9), (9, 4), (1, 1)):
        with pytest.raises(REFUSED, match=r"(?i)kernel"):
            ops.sparse_conv2d(torch.randn(1, 3, h, w), packed)


@pytest.mark.parametrize("length", ("one", "none", "short", "long"))
def test_values_of_another_length(backend: str, packed: SparseWeight, length: str) -> None:
    sizes = {"one": 1, "none": 0, "short": packed.nnz - 1, "long": packed.nnz + 1}
    wrong = unchecked(packed, values=torch.ones(sizes[length]))
    with pytest.raises(REFUSED, match=str(packed.nnz)):
        ops.sparse_conv2d(torch.randn(2, 7, 5, 5), wrong)


@pytest.mark.parametrize("length", (1, 8, 10))
def test_a_bias_of_another_length(backend: str, packed: SparseWeight, length: int) -> None:
    wrong = unchecked(packed, bias=torch.ones(length))
    with pytest.raises(REFUSED, match="9"):
        ops.sparse_conv2d(torch.randn(2, 7, 5, 5), wrong)


@pytest.mark.parametrize("cut", (1, 2, 30))
def test_a_truncated_structure(backend: str, packed: SparseWeight, cut: int) -> None:
    wrong = unchecked(packed, structure=packed.structure[:-cut].clone())
    with pytest.raises(REFUSED, match="pack the weight again"):
        ops.sparse_conv2d(torch.randn(2, 7, 5, 5), wrong)


@pytest.mark.parametrize("word", (0, 1))
def test_a_foreign_structure(backend: str, packed: SparseWeight, word: int) -> None:
    words = packed.structure.clone()
    words[word] += 1
    with pytest.raises(REFUSED, match="pack the weight again"):
        ops.sparse_conv2d(torch.randn(2, 7, 5, 5), unchecked(packed, structure=words))


@pytest.mark.parametrize("field", ("cout", "kernel", "stride", "padding"))
def test_attributes_that_contradict_the_structure(
    backend: str, packed: SparseWeight, field: str
) -> None:
    wrong = unchecked(packed, **{field: getattr(packed, field) + 1})
    with pytest.raises(REFUSED):
        ops.sparse_conv2d(torch.randn(2, 7, 5, 5), wrong)


def test_a_structure_of_another_layer(backend: str, packed: SparseWeight) -> None:
    other = SparseWeight.from_dense(masked_weight(9, 5, 3, 0.5), None, 1, 1)
    for wrong in (
        unchecked(packed, structure=other.structure),
        unchecked(packed, structure=other.structure, values=other.values),
    ):
        with pytest.raises(REFUSED):
            ops.sparse_conv2d(torch.randn(2, 7, 5, 5), wrong)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_refused_with_the_fix(
    backend: str, packed: SparseWeight, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 7, 5, 5, dtype=dtype)
    _, block = bottleneck_parts(7, 3, 7, 0.5, False)
    for call in (
        lambda: ops.sparse_conv2d(x, packed),
        lambda: ops.avg_pool2d(x, 2),
        lambda: ops.sparse_bottleneck(x, *block),
    ):
        with pytest.raises(KernelUnavailable) as caught:
            call()
        message = str(caught.value)
        assert f"no kernel for cpu {str(dtype).removeprefix('torch.')}" in message
        assert ".float()" in message and "torch.autocast('cpu')" in message


def test_the_reference_itself_refuses_half_precision(packed: SparseWeight) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(RuntimeError, match=r"convert it to float32 with \.float\(\)"):
            reference.sparse_conv2d(
                torch.ones(2, 7, 5, 5, dtype=dtype), packed.structure, packed.values, None, None,
                9, 3, 1, 1, False,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.int32, torch.bool, torch.complex64), ids=str)
def test_other_dtypes_are_refused(packed: SparseWeight, dtype: torch.dtype) -> None:
    for call in (
        lambda x: ops.sparse_conv2d(x, packed),
        lambda x: ops.avg_pool2d(x, 2),
        lambda x: ops.sparse_bottleneck(x, *bottleneck_parts(7, 3, 7, 0.5, False)[1]),
    ):
        with pytest.raises(KernelUnavailable, match="no kernel for cpu"):
            call(torch.ones(2, 7, 5, 5).to(dtype))


def test_the_compiled_ops_refuse_other_dtypes(extension: None, packed: SparseWeight) -> None:
    native_op = torch.ops.opentrans_kernels.sparse_conv2d
    values, bias = packed.values, packed.bias
    for x, v, b in (
        (torch.randn(1, 7, 5, 5).double(), values, bias),
        (torch.randn(1, 7, 5, 5).bfloat16(), values, bias),
        (torch.randn(1, 7, 5, 5), values.double(), bias),
        (torch.randn(1, 7, 5, 5), values, bias.double()),
    ):
        with pytest.raises(RuntimeError, match="float32"):
            native_op(x, packed.structure, v, b, None, 9, 3, 1, 1, False)
    x = torch.randn(1, 7, 5, 5)
    with pytest.raises(RuntimeError, match="int32"):
        native_op(x, packed.structure.long(), values, bias, None, 9, 3, 1, 1, False)


def test_float64_runs_on_the_reference_in_float64(packed: SparseWeight) -> None:
    x = torch.randn(2, 7, 5, 5, dtype=torch.float64)
    assert dispatch.resolve("sparse_conv2d", "cpu", "float64").row.backend == "reference"
    out = ops.sparse_conv2d(x, packed)
    weight, bias = packed.to_dense().double(), packed.bias.double()
    exact = torch.nn.functional.conv2d(x, weight, bias, 1, 1)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, exact, rtol=1e-14, atol=1e-14)


def test_gradients_of_wrong_shapes(extension: None, packed: SparseWeight) -> None:
    wgrad = torch.ops.opentrans_kernels.sparse_conv2d_wgrad
    x = torch.randn(2, 7, 5, 5)
    for shape in ((2, 9, 5, 4), (1, 9, 5, 5), (2, 8, 5, 5)):
        with pytest.raises(RuntimeError, match="do not fit"):
            wgrad(x, torch.randn(shape), packed.structure, packed.values)


def test_convolutions_that_form_no_bottleneck(backend: str) -> None:
    _, (c1, c2, c3, down) = bottleneck_parts(6, 5, 6, 0.5, True)
    x = torch.randn(1, 6, 8, 8)
    strided = unchecked(c2, stride=2)
    unpadded = unchecked(c2, padding=0)
    for parts, word in (
        ((c2, c2, c3, down), "conv1"),
        ((c1, c1, c3, down), "conv2"),
        ((c1, c2, c2, down), "conv3"),
        ((c1, c2, c3, c2), "downsample"),
        ((c1, strided, c3, down), "stride 2"),
        ((c1, unpadded, c3, down), "padding 0"),
    ):
        with pytest.raises(PlanError, match=word):
            ops.sparse_bottleneck(x, *parts)


def test_bottleneck_channels_that_do_not_chain(backend: str) -> None:
    _, (c1, c2, c3, down) = bottleneck_parts(6, 5, 9, 0.5, True)
    _, (d1, _, d3, other) = bottleneck_parts(7, 4, 8, 0.5, True)
    x = torch.randn(1, 6, 8, 8)
    for parts in (
        (d1, c2, c3, down),
        (c1, c2, d3, down),
        (c1, c2, c3, other),
        (c1, c2, c3, None),  # 6 channels in, 9 out, and no shortcut to match them
    ):
        with pytest.raises(REFUSED):
            ops.sparse_bottleneck(x, *parts)
    with pytest.raises(REFUSED):
        ops.sparse_bottleneck(torch.randn(1, 7, 8, 8), c1, c2, c3, down)


@pytest.mark.parametrize(("pool", "down_pool", "down"), [(2, 1, True), (1, 2, True), (2, 1, False),
                                                         (0, 0, True), (-1, -1, True)])  # fmt: skip
def test_bottleneck_pools_that_do_not_match(backend: str, pool, down_pool, down) -> None:
    _, packs = bottleneck_parts(6, 5, 6, 0.5, down)
    with pytest.raises(REFUSED):
        ops.sparse_bottleneck(torch.randn(1, 6, 8, 8), *packs, pool, down_pool)


@pytest.mark.parametrize("size", [(3, 8), (8, 3), (1, 1)])
def test_images_smaller_than_the_pool(backend: str, size: tuple[int, int]) -> None:
    _, packs = bottleneck_parts(6, 5, 6, 0.5, True)
    x = torch.randn(1, 6, *size)
    for call in (lambda: ops.avg_pool2d(x, 4), lambda: ops.sparse_bottleneck(x, *packs, 4, 4)):
        with pytest.raises(RuntimeError, match=r"too small for a 4x4 pooling window") as caught:
            call()
        assert isinstance(caught.value, PlanError) and f"{size[0]}x{size[1]}" in str(caught.value)


def test_both_backends_raise_runtime_errors(backend: str, packed: SparseWeight) -> None:
    """A caller needs one except clause, whichever kernel runs."""
    for call in (
        lambda: ops.sparse_conv2d(torch.randn(2, 6, 5, 5), packed),
        lambda: ops.sparse_conv2d(torch.randn(7, 5, 5), packed),
        lambda: ops.sparse_conv2d(torch.randn(2, 7, 5, 5), packed, torch.randn(1, 9, 5, 5)),
        lambda: ops.sparse_bottleneck(
            torch.randn(1, 7, 8, 8), *bottleneck_parts(6, 5, 6, 0.5, True)[1]
        ),
        lambda: ops.avg_pool2d(torch.randn(2, 5, 5), 2),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_gradients_that_do_not_fit_the_reference(set_env, packed: SparseWeight) -> None:
    wgrad = reference.sparse_conv2d_wgrad
    x = torch.randn(2, 7, 5, 5)
    for shape in ((2, 9, 5, 4), (1, 9, 5, 5), (2, 8, 5, 5), (9, 5, 5)):
        with pytest.raises(RuntimeError, match="do not fit|four dimensions"):
            wgrad(x, torch.randn(shape), packed.structure, packed.values)
    dgrad = torch.ops.opentrans_kernels.sparse_conv2d_dgrad
    grad = torch.randn(2, 9, 5, 5)
    for size in ((6, 5, 5), (7, 4, 5), (7, 5, 6)):
        with pytest.raises(RuntimeError, match="do not fit"):
            dgrad(grad, packed.structure, packed.values, *size, 1, 1)


@pytest.mark.parametrize("k", (0, -2))
def test_impossible_pooling_windows(backend: str, k: int) -> None:
    with pytest.raises(REFUSED):
        ops.avg_pool2d(torch.randn(1, 2, 4, 4), k)
