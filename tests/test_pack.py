"""Packing: dense weight -> SparseWeight -> the same dense weight, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import CHANNELS, DENSITIES, masked_weight

from opentrans_kernels.errors import PlanError
from opentrans_kernels.pack import (
    SparseWeight,
    dense_weight,
    read_header,
    transposed_structure,
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.eq(a, b).all())


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kernel", (1, 3, 7))
def test_round_trip_is_exact(kernel: int, density: float) -> None:
    for cin in CHANNELS:
        for cout in CHANNELS:
            weight = masked_weight(cout, cin, kernel, density, cin + cout)
            packed = SparseWeight.from_dense(weight, torch.randn(cout), 2, 1)
            assert same_bits(packed.to_dense(), weight)
            assert packed.nnz == int((weight != 0).sum())
            assert packed.density == pytest.approx(packed.nnz / weight.numel())
            assert same_bits(packed.values, weight.flatten()[packed.indices()])
            assert (packed.cin, packed.cout, packed.kernel) == (cin, cout, kernel)
            assert (packed.stride, packed.padding) == (2, 1)


@pytest.mark.parametrize("row_block", (1, 2, 63, 64, 10_000, None))
@pytest.mark.parametrize("chunk", (1, 2, 7, 64, 200, None))
def test_round_trip_under_every_blocking(chunk: int | None, row_block: int | None) -> None:
    for cout, cin, kernel in ((65, 65, 3), (3, 130, 1), (130, 3, 1)):
        weight = masked_weight(cout, cin, kernel, 0.1)
        packed = SparseWeight.from_dense(weight, chunk=chunk, row_block=row_block)
        assert same_bits(packed.to_dense(), weight)
        assert sorted(packed.indices().tolist()) == weight.flatten().nonzero().flatten().tolist()


def test_the_smallest_and_largest_floats_survive() -> None:
    weight = torch.zeros(4, 3, 1, 1)
    weight[0, 0], weight[1, 1], weight[2, 2] = 1e-45, 3.4e38, -1.2e-38
    assert same_bits(SparseWeight.from_dense(weight).to_dense(), weight)


def test_negative_zeros_are_dropped() -> None:
    weight = torch.tensor([-0.0, 1.0]).view(1, 2, 1, 1)
    assert SparseWeight.from_dense(weight).nnz == 1


def test_float64_is_rounded_once() -> None:
    weight = torch.rand(5, 4, 3, 3, dtype=torch.float64)
    packed = SparseWeight.from_dense(weight, torch.rand(5, dtype=torch.float64))
    assert same_bits(packed.to_dense(), weight.float())
    assert packed.bias.dtype == torch.float32


def test_the_pack_is_a_copy() -> None:
    weight, bias = masked_weight(5, 4, 3, 0.5), torch.randn(5)
    kept, kept_bias = weight.clone(), bias.clone()
    packed = SparseWeight.from_dense(weight, bias)
    weight.fill_(9)
    bias.fill_(9)
    assert same_bits(packed.to_dense(), kept) and same_bits(packed.bias, kept_bias)


def test_any_strides_and_parameters_pack_alike() -> None:
    weight = masked_weight(6, 5, 3, 0.5)
    packed = SparseWeight.from_dense(weight)
    strided = weight.to(memory_format=torch.channels_last)
    for other in (strided, torch.nn.Parameter(weight), weight.flip(0).flip(0)):
        found = SparseWeight.from_dense(other)
        assert same_bits(found.structure, packed.structure)
        assert same_bits(found.values, packed.values)
        assert not found.values.requires_grad


def test_no_bias_means_zeros() -> None:
    assert same_bits(SparseWeight.from_dense(torch.ones(3, 2, 1, 1)).bias, torch.zeros(3))


def test_packing_is_deterministic_and_frozen() -> None:
    weight = masked_weight(65, 64, 3, 0.1)
    first, second = SparseWeight.from_dense(weight), SparseWeight.from_dense(weight)
    assert same_bits(first.structure, second.structure)
    assert same_bits(first.values, second.values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.cin = 3  # type: ignore[misc]


# (cout, cin, kernel) of one block of each stage of an RN50.
STAGES = (
    [(64, 256, 1), (64, 64, 3), (256, 64, 1)],
    [(128, 512, 1), (128, 128, 3), (512, 128, 1)],
    [(256, 1024, 1), (256, 256, 3), (1024, 256, 1)],
    [(512, 2048, 1), (512, 512, 3), (2048, 512, 1)],
)


@pytest.mark.parametrize("density", (0.05, 0.1, 0.2, 0.5))
@pytest.mark.parametrize("stage", range(4))
def test_at_most_eight_and_a_half_bytes_per_nonzero(stage: int, density: float) -> None:
    used = nonzeros = 0
    for cout, cin, kernel in STAGES[stage]:
        weight = masked_weight(cout, cin, kernel, density)
        packed = SparseWeight.from_dense(weight, torch.zeros(cout))
        parts = (packed.structure, packed.values, packed.bias)
        assert packed.nbytes == sum(t.numel() * t.element_size() for t in parts)
        used, nonzeros = used + packed.nbytes, nonzeros + packed.nnz
    assert used <= 8.5 * nonzeros, used / nonzeros


@pytest.mark.parametrize("padding", (0, 1, 2))
@pytest.mark.parametrize(("cout", "cin", "kernel"), [(7, 3, 3), (65, 64, 1), (3, 130, 3)])
def test_the_transposed_structure_swaps_channels_and_mirrors_taps(
    cout: int, cin: int, kernel: int, padding: int
) -> None:
    weight = masked_weight(cout, cin, kernel, 0.2)
    packed = SparseWeight.from_dense(weight, None, 1, padding)
    structure, order = transposed_structure(packed.structure)
    mirrored = dense_weight(structure, packed.values[order], cout, cin, kernel)
    assert same_bits(mirrored, weight.flip(2, 3).transpose(0, 1).contiguous())
    assert sorted(order.tolist()) == list(range(packed.nnz))


def test_to_dense_takes_other_values_and_is_differentiable() -> None:
    packed = SparseWeight.from_dense(masked_weight(5, 7, 3, 0.3))
    values = torch.randn(packed.nnz, dtype=torch.float64, requires_grad=True)
    dense = packed.to_dense(values)
    assert dense.dtype == torch.float64
    weights = torch.randn(dense.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((dense * weights).sum(), values)
    assert same_bits(grad, weights.flatten()[packed.indices()])


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = masked_weight(4, 3, 3, 0.5)
    weight[1, 2, 0, 1] = bad
    with pytest.raises(PlanError, match="NaN or Inf.*Repair the checkpoint"):
        SparseWeight.from_dense(weight)


def test_a_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(PlanError, match="in float32"):
        SparseWeight.from_dense(torch.full((1, 1, 1, 1), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3, 1), (3, 4, 3), (1, 2, 3, 3, 3)])
def test_other_shapes_are_refused_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError) as caught:
        SparseWeight.from_dense(torch.ones(shape))
    assert str(shape) in str(caught.value) and "stay dense" in str(caught.value)


@pytest.mark.parametrize(("stride", "padding"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_strides_and_paddings_are_refused(stride: int, padding: int) -> None:
    with pytest.raises(PlanError, match=f"stride {stride} must be >= 1 and padding {padding}"):
        SparseWeight.from_dense(torch.ones(1, 1, 1, 1), None, stride, padding)


def test_a_bias_of_another_length_is_refused() -> None:
    for bias in (torch.zeros(4), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(PlanError, match=r"expected \(3,\)"):
            SparseWeight.from_dense(torch.ones(3, 1, 1, 1), bias)


def test_a_chunk_with_too_many_codes_is_refused_with_the_fix() -> None:
    with pytest.raises(PlanError, match="use a smaller chunk"):
        SparseWeight.from_dense(torch.ones(1, 400, 7, 7), chunk=400)


@pytest.mark.parametrize("change", ["magic", "version", "short"])
def test_a_foreign_structure_is_refused(change: str) -> None:
    packed = SparseWeight.from_dense(masked_weight(4, 3, 3, 0.5))
    words = packed.structure.clone()
    if change == "short":
        words = words[:5]
    else:
        words[0 if change == "magic" else 1] += 1
    with pytest.raises(PlanError, match="pack the weight again"):
        dataclasses.replace(packed, structure=words).to_dense()


@pytest.mark.parametrize("cut", (1, 3, 40))
def test_a_truncated_structure_is_refused(cut: int) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.5))
    with pytest.raises(PlanError, match="pack the weight again"):
        dataclasses.replace(packed, structure=packed.structure[:-cut].clone()).to_dense()


@pytest.mark.parametrize("length", (0, 1, -1))
def test_values_of_another_length_are_refused(length: int) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.5))
    values = torch.ones(length if length >= 0 else packed.nnz + 1)
    with pytest.raises((PlanError, RuntimeError), match=f"{packed.nnz}"):
        packed.to_dense(values)


@pytest.mark.parametrize("shape", [(0, 5, 1, 1), (0, 5, 3, 3), (5, 0, 3, 3), (5, 5, 0, 0)])
def test_a_weight_without_channels_is_refused_with_the_fix(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="keep one channel") as caught:
        SparseWeight.from_dense(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("kernel", "density", "chunk"),
    [(1, 0.02, 128), (1, 0.1, 128), (1, 0.15, 64), (1, 0.5, 64), (2, 0.1, 64), (3, 0.01, 48),
     (3, 0.04, 24), (3, 0.1, 16), (5, 0.1, 23), (7, 0.02, 11), (25, 0.1, 1)],
)  # fmt: skip
def test_chunks_hold_at_most_as_many_codes_as_a_3x3s(
    kernel: int, density: float, chunk: int
) -> None:
    weight = masked_weight(16, 200, kernel, density, holes=False)
    header = read_header(SparseWeight.from_dense(weight).structure.numpy())
    assert header.chunk == chunk
    assert chunk == 1 or chunk * kernel**2 <= 576
    assert header[:2] == (200, 16) and header.n_chunks == -(-200 // chunk)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kernel", (1, 3, 7))
def test_every_pack_is_valid(kernel: int, density: float) -> None:
    for cin in CHANNELS:
        for cout in CHANNELS:
            weight = masked_weight(cout, cin, kernel, density, cin + cout)
            for chunk, row_block in ((None, None), (2, 3)):
                packed = SparseWeight.from_dense(weight, chunk=chunk, row_block=row_block)
                assert packed.validate() is packed
                structure, order = transposed_structure(packed.structure)
                mirrored = dataclasses.replace(
                    packed, structure=structure, values=packed.values[order],
                    bias=torch.zeros(cin), cin=cout, cout=cin, padding=kernel - 1,
                )  # fmt: skip
                mirrored.validate()


def damage(packed: SparseWeight, position: int, change: int) -> SparseWeight:
    words = packed.structure.clone()
    words[position] += change
    return dataclasses.replace(packed, structure=words)


def test_every_damaged_word_is_found() -> None:
    """Whatever word a file got wrong, it is an error and not a crash."""
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.5), None, 1, 1, chunk=3, row_block=4)
    header = read_header(packed.structure.numpy())
    first_code = packed.structure.numel() - (packed.nnz + 1) // 2
    for position in range(first_code):
        for change in (1, -1, 1 << 16, -(1 << 16), 1 << 30, -(1 << 31)):
            with pytest.raises(PlanError, match="pack the weight again"):
                damage(packed, position, change).validate()
    for position in range(first_code, packed.structure.numel()):
        with pytest.raises(PlanError, match="a code lies outside"):
            damage(packed, position, 3 * 9).validate()
    assert header.n_entries > 9 and header.n_row_blocks == 3


def test_swapped_codes_and_rows_are_found() -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 1, 1.0), chunk=7)
    words = packed.structure.clone()
    codes = words[-(packed.nnz + 1) // 2 :].view(torch.int16)
    codes[0], codes[1] = codes[1].item(), codes[0].item()
    with pytest.raises(PlanError, match="do not ascend"):
        dataclasses.replace(packed, structure=words).validate()


@pytest.mark.parametrize("field", ("cin", "cout", "kernel", "stride", "padding"))
def test_attributes_that_contradict_the_structure_are_found(field: str) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.5), None, 1, 1)
    with pytest.raises(PlanError, match="the attributes say"):
        dataclasses.replace(packed, **{field: getattr(packed, field) + 1}).validate()


def test_values_and_biases_that_do_not_fit_are_found() -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.5), None, 1, 1)
    for field in ("values", "bias"):
        tensor = getattr(packed, field)
        for wrong in (tensor[1:], tensor[None], tensor.double()):
            with pytest.raises(PlanError, match=f"{field} must be float32 "):
                dataclasses.replace(packed, **{field: wrong}).validate()
