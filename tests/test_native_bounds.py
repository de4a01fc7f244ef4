"""What a caller can hand to the compiled ops: damaged packs, sizes beyond 32 bits, odd strides.

Each is refused with its reason or computed rightly, and none ends the process.
"""

from __future__ import annotations

import copy
import dataclasses
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import bottleneck_parts, masked_weight, unchecked

from opentrans_kernels import ops
from opentrans_kernels.errors import OpenTransError, PlanError
from opentrans_kernels.ops.folded_conv2d.fold import Norm
from opentrans_kernels.ops.folded_conv2d.sparse import sparse_folded_conv2d
from opentrans_kernels.pack import SparseWeight, checked_header, packed_indices, read_header
from opentrans_kernels.pack import transposed_structure as transposed

ROOT = Path(__file__).resolve().parents[1]
OPS = torch.ops.opentrans_kernels
HEADER = 13
FIELDS = ("cin", "cout", "kernel", "stride", "padding", "chunk", "row_block", "chunks",
          "row blocks", "nnz", "entries")  # fmt: skip


@pytest.fixture
def packed() -> SparseWeight:
    """Three chunks of channels, three blocks of rows."""
    weight = masked_weight(9, 7, 3, 0.5)
    return SparseWeight.from_dense(weight, torch.randn(9), 1, 1, chunk=3, row_block=4)


def changed(packed: SparseWeight, position: int, word: int) -> torch.Tensor:
    structure = packed.structure.clone()
    structure[position] = word
    return structure


def parts(packed: SparseWeight) -> tuple[int, int]:
    """Words at which entries and codes begin."""
    header = read_header(packed.structure.numpy())
    entries = HEADER + 2 * (header.n_chunks * header.n_row_blocks + 1)
    return entries, entries + header.n_entries


def conv(packed: SparseWeight, structure: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return OPS.sparse_conv2d(
        x, structure, packed.values, packed.bias, None,
        packed.cout, packed.kernel, packed.stride, packed.padding, False,
    )  # fmt: skip


def every_op(packed: SparseWeight, structure: torch.Tensor) -> list[Callable[[], object]]:
    """Calls of each op that reads the structure of a 3x3 from 7 to 9 channels."""
    x, grad = torch.randn(1, 7, 5, 6), torch.randn(1, 9, 5, 6)
    block = bottleneck_parts(4, 7, 4, 0.5, False)[1]
    last = SparseWeight.from_dense(masked_weight(4, 9, 1, 0.5))
    tensors = [t for w in (block[0], packed, last) for t in (w.structure, w.values, w.bias)]
    tensors[3] = structure
    image = torch.randn(1, 4, 5, 6)
    return [
        lambda: conv(packed, structure, x),
        lambda: OPS.sparse_conv2d_wgrad(x, grad, structure, packed.values),
        lambda: OPS.sparse_conv2d_dgrad(grad, structure, packed.values, 7, 5, 6, 1, 1),
        lambda: OPS.sparse_bottleneck(image, *tensors, None, None, None, 4, 1, 1),
        lambda: OPS.sparse_stage(image, tensors, [4], [1], [0]),
    ]


def test_the_calls_are_those_of_a_valid_pack(packed: SparseWeight) -> None:
    for call in every_op(packed, packed.structure):
        assert call().isfinite().all()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("field", range(len(FIELDS)), ids=FIELDS)
def test_a_damaged_header_is_refused_by_every_op(packed: SparseWeight, field: int) -> None:
    now = int(packed.structure[2 + field])
    for word in (-1, 0, now - 1, now + 1, 2**15, 2**30, 2**31 - 1, -(2**31)):
        if word == now:
            continue
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for call in every_op(packed, changed(packed, 2 + field, word)):
                with pytest.raises((RuntimeError, PlanError)):
                    call()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "change",
    ["a row beyond the block", "more nonzeros", "fewer nonzeros", "a code beyond the chunk"],
)
def test_damaged_entries_and_codes_are_refused_by_every_op(
    packed: SparseWeight, change: str
) -> None:
    entries, codes = parts(packed)
    last = codes - 1  # of the last block, which has one row and one channel only
    word = int(packed.structure[entries])
    structure = {
        "a row beyond the block": lambda: changed(packed, last, int(packed.structure[last]) + 1),
        "more nonzeros": lambda: changed(packed, entries, word + (1 << 16)),
        "fewer nonzeros": lambda: changed(packed, entries, word - (1 << 16)),
        "a code beyond the chunk": lambda: changed(packed, codes, 27),
    }[change]()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for call in every_op(packed, structure):
            with pytest.raises((RuntimeError, PlanError), match="pack the weight\\s+again"):
                call()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("flag", [30, 31], ids=["first", "last"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_rows_that_are_not_begun_or_finished_are_refused(flag: int, chunk: int | None) -> None:
    """With one chunk there are no partial sums that such an entry could read or write."""
    weight = masked_weight(9, 7, 1, 0.5)
    packed = SparseWeight.from_dense(weight, torch.randn(9), chunk=chunk)
    entries, codes = parts(packed)
    for position in (entries, codes - 1):
        word = int(packed.structure[position]) ^ -(1 << 31) if flag == 31 else (
            int(packed.structure[position]) ^ (1 << 30))  # fmt: skip
        with pytest.raises(RuntimeError, match="out of its block; pack the weight again"):
            conv(packed, changed(packed, position, word), torch.randn(1, 7, 5, 6))


@pytest.mark.usefixtures("extension")
def test_writes_past_the_version_counter_are_met_by_the_kernels(packed: SparseWeight) -> None:
    x = torch.randn(1, 7, 5, 6)
    ops.sparse_conv2d(x, packed)
    _, codes = parts(packed)
    version = packed.structure._version
    packed.structure.data[codes] = -1
    assert packed.structure._version == version
    with pytest.raises(RuntimeError, match="out of its block"):
        ops.sparse_conv2d(x, packed)


def test_the_reference_and_training_refuse_damage_too(packed: SparseWeight, set_env) -> None:
    _, codes = parts(packed)
    x, weight = torch.randn(1, 7, 5, 6), torch.randn(9, 7, 3, 3)
    norm = Norm(None, None, None, None, None, 1e-5)
    set_env(OPENTRANS_BACKEND="reference")
    for structure in (changed(packed, codes, -1), changed(packed, 11, 3)):
        broken = unchecked(packed, structure=structure)
        for call, arguments in (
            (SparseWeight.to_dense, (broken,)),
            (SparseWeight.indices, (broken,)),
            (packed_indices, (structure,)),
            (transposed, (structure,)),
            (sparse_folded_conv2d, (x, weight, structure, norm)),
        ):
            with pytest.raises(PlanError, match="pack the weight again"):
                call(*arguments)
        with pytest.raises(RuntimeError, match="pack the weight again"):
            ops.sparse_conv2d(x, broken)


def test_a_trained_weight_of_another_shape_is_refused(packed: SparseWeight) -> None:
    norm = Norm(None, None, None, None, None, 1e-5)
    with pytest.raises(PlanError, match=r"is \[8, 7, 3, 3\], but the structure"):
        sparse_folded_conv2d(
            torch.randn(1, 7, 5, 6), torch.randn(8, 7, 3, 3), packed.structure, norm, padding=1
        )


def test_a_structure_written_to_is_read_again(packed: SparseWeight) -> None:
    """Neither the check nor the mirrored pattern outlives what it was made from."""
    grad = torch.randn(1, 9, 5, 6)
    arguments = (packed.values, 7, 5, 6, 1, 1)
    OPS.sparse_conv2d_dgrad(grad, packed.structure, *arguments)
    other = SparseWeight.from_dense(
        packed.to_dense().flip(1), None, 1, 1, chunk=3, row_block=4
    )  # as many nonzeros, but not as many words where chunks differ
    structure = packed.structure.clone()
    assert checked_header(structure).nnz == packed.nnz
    if len(other.structure) == len(structure):
        structure.copy_(other.structure)
        assert torch.equal(packed_indices(structure), packed_indices(other.structure))
    structure[2] = 2**31 - 1
    with pytest.raises(PlanError):
        checked_header(structure)
    with pytest.raises(RuntimeError):
        OPS.sparse_conv2d_dgrad(grad, structure, *arguments)


def test_packs_are_checked_where_they_enter(packed: SparseWeight) -> None:
    _, codes = parts(packed)
    bad = changed(packed, codes, -1)
    with pytest.raises(PlanError, match="a code lies outside"):
        SparseWeight(bad, packed.values, packed.bias, 7, 9, 3, 1, 1)
    with pytest.raises(PlanError, match="a code lies outside"):
        dataclasses.replace(packed, structure=bad)
    for field, wrong in (("values", packed.values[1:]), ("bias", None), ("structure", None),
                         ("structure", packed.structure[::2]), ("cin", 8)):  # fmt: skip
        with pytest.raises(PlanError, match="again"):
            dataclasses.replace(packed, **{field: wrong})
    damaged = unchecked(packed, structure=bad)
    with pytest.raises(PlanError, match="a code lies outside"):
        pickle.loads(pickle.dumps(damaged))
    for duplicate in (copy.deepcopy, copy.copy):
        with pytest.raises(PlanError, match="a code lies outside"):
            duplicate(damaged)
    with pytest.raises(PlanError, match="its state must be a dict of bias, cin"):
        object.__new__(SparseWeight).__setstate__({"values": packed.values})


def test_valid_packs_survive_copies(packed: SparseWeight) -> None:
    x = torch.randn(1, 7, 5, 6)
    out = ops.sparse_conv2d(x, packed)
    for other in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), copy.copy(packed)):
        assert torch.equal(ops.sparse_conv2d(x, other), out)
        assert other.validate() is other


def test_impossible_steps_are_refused_when_packing() -> None:
    for stride, padding in ((2**15 + 1, 0), (1, 2**15 + 1), (2**40, 2**40)):
        with pytest.raises(PlanError, match="at most 32768"):
            SparseWeight.from_dense(torch.ones(1, 1, 1, 1), None, stride, padding)


BIG = (2**31, 2**31 + 3, 2**32 + 3, 2**40)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("size", BIG)
def test_sizes_of_more_than_32_bits_are_refused(dimension: int, size: int) -> None:
    """They were cut to 32 bits: a result of another shape."""
    packed = SparseWeight.from_dense(masked_weight(4, 3, 1, 0.5), torch.randn(4))
    _, block = bottleneck_parts(3, 2, 3, 0.5, False)
    sizes = [1, 3, 4, 4]
    sizes[dimension] = size
    x = torch.zeros(1, 1, 1, 1).expand(sizes)
    grad = torch.zeros(1, 1, 1, 1).expand([sizes[0], 4, *sizes[2:]])
    for call in (
        lambda: ops.sparse_conv2d(x, packed),
        lambda: OPS.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values),
        lambda: ops.sparse_bottleneck(x, *block),
        lambda: ops.sparse_stage(x, [tuple(block)], [1]),
        lambda: ops.avg_pool2d(x, 1),
        lambda: ops.max_pool2d(x, 1),
        lambda: ops.window_avg_pool2d(x, 1),
        lambda: OPS.relu_bits(x, None, None, None, True, False),
    ):
        with pytest.raises(RuntimeError, match=f"has size {size} in dimension {dimension}"):
            call()


@pytest.mark.usefixtures("extension")
def test_results_larger_than_memory_are_refused() -> None:
    packed = SparseWeight.from_dense(masked_weight(4, 1, 1, 1.0), torch.randn(4))
    x = torch.zeros(1, 1, 1, 1).expand(2**28, 1, 2**14, 2**14)
    with pytest.raises(RuntimeError, match="larger than memory can be; split"):
        ops.sparse_conv2d(x, packed)
    with pytest.raises(RuntimeError, match="out of memory; pass a smaller"):
        ops.sparse_conv2d(x[: 2**20], packed)


@pytest.mark.usefixtures("extension")
def test_images_too_large_are_refused_before_they_are_copied() -> None:
    """Every convolution of a block must reach its channels, the shortcut's too."""
    wide = torch.zeros(2, 1100, 1, 1)
    wide[:, ::100] = 1
    c1 = SparseWeight.from_dense(wide, chunk=1)
    c2 = SparseWeight.from_dense(torch.ones(2, 2, 3, 3), None, 1, 1)
    c3 = SparseWeight.from_dense(torch.ones(2, 2, 1, 1))
    down = SparseWeight.from_dense(wide, chunk=1100)
    x = torch.zeros(1, 1, 1, 1).expand(1, 1100, 1000, 1000)
    before = ops.scratch_bytes()
    for call in (
        lambda: ops.sparse_bottleneck(x, c1, c2, c3, down),
        lambda: ops.sparse_stage(x, [(c1, c2, c3, down)], [1]),
        lambda: ops.sparse_conv2d(x, down),
    ):
        with pytest.raises(RuntimeError, match="an image of 1000x1000 is too large; split it"):
            call()
    assert ops.scratch_bytes() == before


def apart(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a view whose planes are 2**28 floats apart; only pages with pixels exist."""
    n, c, h, w = x.shape
    no_reserve = 0x4000  # of Linux; Python has no name for it before 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    store = torch.frombuffer(mmap.mmap(-1, n * c * 2**30, flags), dtype=torch.float32)
    return store.as_strided((n, c, h, w), (c * 2**28, 2**28, w, 1)).copy_(x)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_planes_far_apart_are_repacked_by_both_passes(kernel: int, stride: int) -> None:
    weight = masked_weight(5, 4, kernel, 0.5)
    packed = SparseWeight.from_dense(weight, None, stride, kernel // 2)
    x = torch.randn(1, 4, 6, 5)
    y = ops.sparse_conv2d(x, packed)
    grad = torch.randn_like(y)
    near = OPS.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values)
    far = apart(x)
    assert torch.equal(ops.sparse_conv2d(far, packed), y)
    assert torch.equal(OPS.sparse_conv2d_wgrad(far, grad, packed.structure, packed.values), near)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dimension", range(4))
def test_a_dimension_of_one_element_may_have_any_stride(dimension: int) -> None:
    sizes = [2, 3, 5, 6]
    sizes[dimension] = 1
    x = torch.randn(sizes)
    strides = list(x.stride())
    strides[dimension] = 2**61
    odd = x.as_strided(sizes, strides)
    for kernel in (1, 3):
        weight = masked_weight(4, sizes[1], kernel, 0.7)
        packed = SparseWeight.from_dense(weight, None, 1, kernel // 2)
        y = ops.sparse_conv2d(odd, packed)
        torch.testing.assert_close(y, F.conv2d(x, weight, None, 1, kernel // 2))
        grad = torch.randn_like(y)
        found = OPS.sparse_conv2d_wgrad(odd, grad, packed.structure, packed.values)
        near = OPS.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values)
        assert torch.equal(found, near)
    assert torch.equal(ops.avg_pool2d(odd, 1), x)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0, 1e-300, 1e300])
def test_spectra_that_no_fit_can_order_are_refused(bad: float) -> None:
    """The search found no start among them and read in front of its arrays."""
    x = torch.rand(50, dtype=torch.float64).sort().values + 1
    x[25] = bad
    window = torch.tensor([0]), torch.tensor([50])
    for samples in (0, 16):
        with pytest.raises(RuntimeError, match="positive, finite and ascending"):
            OPS.powerlaw_fit(x, torch.tensor([0, 50]), *window, samples, 16)
    empty = OPS.powerlaw_fit(x, torch.tensor([0, 50]), window[0], window[0])
    assert empty[0, 0] == -1, "an empty window looks at no value"


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("rows", BIG)
def test_matrices_whose_triangle_no_size_holds_are_refused(rows: int) -> None:
    matrix = torch.zeros(1, 1, 1).expand(1, rows, 2)
    with pytest.raises((RuntimeError, OpenTransError), match=f"have {rows} rows"):
        ops.gram_eigenvalues(matrix)


@pytest.mark.usefixtures("extension")
def test_the_fuzz_of_packs_and_arguments_finds_nothing() -> None:
    """In processes of its own: a crash is a failure here and not the end of the tests."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz_ops.py"), "--seed", "7"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("OPENTRANS_CPU_CAPABILITY", "OPENTRANS_BACKEND"):
        environ.pop(name, None)
    done = subprocess.run(
        [*command, "--cases", "150"], capture_output=True, text=True, env=environ, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "generic: 150 cases" in done.stdout
