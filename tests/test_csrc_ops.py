"""The native ops beside convolutions, without torch in their process: plain PyTorch in float64 is
the oracle. Each runs here and, emulated, on 64-bit Arm with its NEON and its portable loops.
"""

from __future__ import annotations

import math

import deform_cases
import mask_score_cases
import numpy as np
import pytest
import torch
from csrc_process import Kernels
from test_csrc import Output
from test_powerlaw_fit import batch, many

from opentrans_kernels.ops.avg_pool2d import reference as plain_pool
from opentrans_kernels.ops.contents import BLOCK_BYTES, _sums_of
from opentrans_kernels.ops.gram_eigenvalues import reference as plain_gram
from opentrans_kernels.ops.mask_scores import reference as plain_scores
from opentrans_kernels.ops.ms_deform_attn import reference as plain_attention
from opentrans_kernels.ops.powerlaw_fit import reference as plain_fit
from opentrans_kernels.ops.relu_bits import reference as plain_relu

THREADS = (1, 3)
EPS = 2.0**-23


def unwritten(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def off_by(found: np.ndarray, exact: torch.Tensor) -> float:
    """The largest error in units of the largest number; NaN must be where it is expected."""
    right = exact.double().numpy()
    assert found.shape == right.shape and np.array_equal(np.isnan(found), np.isnan(right))
    if not right.size:
        return 0.0
    return float(np.nanmax(np.abs(found - right)) / (EPS * max(np.nanmax(np.abs(right)), 1e-30)))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_average_pooling_and_its_gradient(library: Kernels, k: int) -> None:
    for n, c, h, w in ((1, 1, k, k), (2, 3, 7, 11), (1, 2, 16, 10), (2, 2, 17, 5)):
        x = numbers(n, c, h, w)
        exact = plain_pool.avg_pool2d(torch.from_numpy(x).double(), k)
        grad = numbers(*exact.shape, seed=1)
        spread = plain_pool.spread(torch.from_numpy(grad).double(), x.shape, k)
        for threads in THREADS:
            out = Output(library, *exact.shape)
            assert not library.average(x, out.data, n, c, h, w, k, threads)
            assert off_by(out.pixels(), exact) <= 4
            for padding in (0, 7):
                back = unwritten(n, c, h * w + padding)
                assert not library.spread(grad, back, n, c, h, w, k, padding, threads)
                assert off_by(back[..., : h * w].reshape(x.shape), spread) <= 1
                assert not back[..., h * w :].any()


def as_rows(t: torch.Tensor, last: bool) -> np.ndarray:
    """Planes, or images with their channels last, as the kernels get them."""
    return (t.permute(0, 2, 3, 1) if last else t).contiguous().numpy()


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
@pytest.mark.parametrize(
    ("scaled", "shifted", "added"), [(0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1)]
)
def test_relu_with_bits_and_its_gradient(
    library: Kernels, last: bool, scaled: int, shifted: int, added: int
) -> None:
    for n, c, h, w in ((2, 3, 1, 1), (1, 8, 3, 5), (2, 5, 7, 9), (1, 16, 4, 4), (1, 3, 200, 180)):
        # Sums of quarters are exact, so that zero is zero, fused or not.
        made = torch.Generator().manual_seed(c)
        z, residual, grad = (
            torch.randint(-8, 9, (n, c, h, w), generator=made) / 4 for _ in range(3)
        )
        z.view(-1)[:: max(1, z.numel() // 3)] = math.nan
        grad.view(-1)[:: max(1, z.numel() // 5)] = math.inf
        scale = torch.randint(-4, 5, (c,), generator=made) / 2 if scaled else None
        shift = torch.randint(-4, 5, (c,), generator=made) / 4 if shifted else None
        y = z.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        bits = plain_relu.relu_bits(y, scale, shift, residual if added else None, True, last)
        outer, inner, length = (n, 1, h * w * c) if last else (n, c, h * w)
        maps = [None if t is None else t.numpy() for t in (scale, shift)]
        factors = np.arange(1, c + 1, dtype=np.float32)
        plain, product = torch.empty(n, c, h, w), torch.empty(n, c, h, w)
        plain_relu.relu_bits_backward(
            grad, bits, None, torch.from_numpy(factors), plain, product, last
        )
        for threads in THREADS:
            found = as_rows(z, last).copy()
            extra = as_rows(residual, last) if added else None
            packed = np.full((outer * inner, -(-length // 8)), 255, np.uint8)
            sizes = (outer, inner, length)
            assert not library.relu(found, *maps, c, extra, packed, *sizes, 0, threads)
            assert np.array_equal(found, as_rows(y, last), equal_nan=True)
            assert np.array_equal(packed, bits.numpy())
            again = as_rows(z, last).copy()
            assert not library.relu(again, *maps, c, extra, None, *sizes, 0, threads)
            assert np.array_equal(again, found, equal_nan=True)
            for mask, output in ((packed, None), (None, found)):
                both = [unwritten(outer * inner, length + 5) for _ in range(2)]
                assert not library.relu_backward(
                    as_rows(grad, last), mask, output, factors, c, *both, *sizes, 5, threads
                )
                for one, right in zip(both, (plain, product), strict=True):
                    expected = as_rows(right, last).reshape(outer * inner, length)
                    assert np.array_equal(one[:, :length], expected)
                    assert not one[:, length:].any()


def test_power_law_fits(library: Kernels) -> None:
    windows = [(0, 0), (3, 3), (2, 9)]
    spectra = [*many(11, 90), *many(3, 40, seed=1)]
    spectra[-1] = np.sort(np.concatenate([spectra[-1], np.ones(9)]))
    given = batch(spectra, [(0, max(0, len(x) - 1)) for x in spectra[:-3]] + windows)
    exact = plain_fit.powerlaw_fit(*given).numpy()
    assert np.isnan(exact[-2]).any() and exact[-2][0] == -1 and np.isinf(exact[:, 1]).sum() < 9
    results = []
    for samples, block in ((0, 16), (16, 16), (3, 5)):
        for threads in THREADS:
            out = np.full(exact.shape, -7.0)
            assert not library.powerlaw(
                *(t.numpy() for t in given), len(spectra), samples, block, out, threads
            )
            np.testing.assert_allclose(out[:, 1:], exact[:, 1:], rtol=1e-9, equal_nan=True)
            results.append(out)
    assert all(np.array_equal(results[0], other, equal_nan=True) for other in results)


def gram(library: Kernels, a: np.ndarray, *, transposed=False, relative=1e-7, threads=1):
    """values and redone; ``a`` [count, rows, columns], handed over transposed if asked for."""
    count, rows, columns = a.shape
    strides = (rows * columns, columns, 1)
    if transposed:
        a, strides = np.ascontiguousarray(a.transpose(0, 2, 1)), (rows * columns, 1, rows)
    values, redone = np.full((count, rows), np.nan), ints(*[-7] * count)
    assert not library.eigenvalues(
        a, int(a.dtype == np.float64), count, rows, columns, ints(*strides), 0.5, 1e-5, relative,
        values, redone, threads,
    )  # fmt: skip
    return values, redone


def test_gram_eigenvalues(library: Kernels) -> None:
    for rows, columns in ((1, 1), (1, 9), (2, 3), (31, 40), (32, 32), (33, 5), (65, 70), (97, 98)):
        for kind in (np.float32, np.float64):
            a = np.random.default_rng(rows).standard_normal((2, rows, columns)).astype(kind)
            exact = plain_gram.gram_eigenvalues(torch.from_numpy(a), 0.5)[0].numpy()
            limit = (20 + 4 * rows) * np.finfo(np.float64).eps * exact[:, -1].max()
            first, _ = gram(library, a)
            assert np.abs(first - exact).max() <= limit, (rows, columns)
            for transposed, threads in ((True, 1), (False, 3)):
                again, _ = gram(library, a, transposed=transposed, threads=threads)
                assert np.array_equal(first, again)


def test_gram_eigenvalues_keep_small_digits_and_stay_not_finite(library: Kernels) -> None:
    spectrum = np.concatenate([np.logspace(-5.5, -2.5, 8), np.linspace(0.5, 2, 50), [1e6]])
    made = np.random.default_rng(0)
    left = np.linalg.qr(made.standard_normal((59, 59)))[0]
    right = np.linalg.qr(made.standard_normal((64, 59)))[0].T
    a = (left * np.sqrt(spectrum)) @ right
    squares = 0.5 * np.linalg.svd(a, compute_uv=False)[::-1] ** 2
    batch_ = np.stack([a, np.full_like(a, np.nan), np.zeros_like(a)])
    values, redone = gram(library, batch_)
    counts = squares > 1e-5
    np.testing.assert_allclose(values[0][counts], squares[counts], rtol=1e-8)
    assert redone[0] > 0 and redone[1] == redone[2] == 0
    assert np.isnan(values[1]).all() and not values[2].any()
    assert gram(library, np.zeros((2, 0, 4)))[0].size == 0
    assert not gram(library, np.zeros((1, 3, 0)))[0].any()


def attention(library: Kernels, arguments, reference=None, threads=1) -> np.ndarray:
    value, shapes, locations, weights = (t.numpy() for t in arguments)
    n, s, m, d = value.shape
    q, p = locations.shape[1], locations.shape[4]
    size = 0 if reference is None else reference.shape[-1]
    sizes = ints(n, s, m, d, q, len(shapes), p, size)
    out = unwritten(n, q, m * d)
    given = None if reference is None else reference.numpy()
    assert not library.attend(sizes, shapes, value, locations, weights, given, out, threads)
    return out


def attention_backward(library: Kernels, grad, arguments, threads: int) -> list[np.ndarray]:
    value, shapes, locations, weights = (t.numpy() for t in arguments)
    n, s, m, d = value.shape
    sizes = ints(n, s, m, d, locations.shape[1], len(shapes), locations.shape[4], 0)
    found = [unwritten(*t.shape) for t in (value, locations, weights)]
    assert not library.attend_backward(
        sizes, shapes, value, locations, weights, grad, *found, threads
    )
    return found


@pytest.mark.parametrize("levels", deform_cases.LEVELS, ids=str)
def test_deformable_attention_and_its_gradient(library: Kernels, levels) -> None:
    for d, q, p in ((1, 7, 4), (4, 1, 1), (5, 9, 3), (8, 4, 4), (32, 5, 2), (72, 2, 4)):
        arguments = deform_cases.make(levels, d=d, q=q, p=p)
        exact = deform_cases.as_double(*arguments)
        grad = numbers(2, q, 3 * d)
        backward = plain_attention.ms_deform_attn_backward(torch.from_numpy(grad).double(), *exact)
        for threads in THREADS:
            out = attention(library, arguments, threads=threads)
            deform_cases.assert_as_exact(torch.from_numpy(out), *arguments)
            found = attention_backward(library, grad, arguments, threads)
            for one, right in zip(found, backward, strict=True):
                assert off_by(one, right) <= 64


@pytest.mark.parametrize("size", [2, 4])
def test_deformable_attention_around_references(library: Kernels, size: int) -> None:
    for p, q, m in ((1, 3, 3), (4, 19, 2), (5, 2, 1)):
        value, shapes, locations, logits = deform_cases.make(p=p, q=q, m=m, d=9)
        reference, offsets = deform_cases.boxes_and_offsets(locations, shapes, size)
        arguments = (value, shapes, offsets, 5 * logits)
        exact = plain_attention.ms_deform_attn(
            *deform_cases.as_double(*arguments), reference.double()
        )
        for threads in THREADS:
            assert off_by(attention(library, arguments, reference, threads), exact) <= 128


def test_deformable_attention_of_nothing_and_of_no_numbers(library: Kernels) -> None:
    for q, n, m in ((0, 1, 2), (3, 0, 1)):
        arguments = deform_cases.make(q=q, n=n, m=m)
        assert attention(library, arguments).size == 0
    value, shapes, locations, weights = deform_cases.make(q=5, spread=0.3)
    locations.view(-1)[::7], locations.view(-1)[3::11] = math.nan, -math.inf
    bad = ~locations.isfinite().all(-1)
    weights[bad] = math.inf  # adds nothing: it is outside
    arguments = (value, shapes, locations, weights)
    exact = plain_attention.ms_deform_attn(*deform_cases.as_double(*arguments))
    assert bad.any() and off_by(attention(library, arguments), exact) <= 64
    grads = attention_backward(library, numbers(2, 5, 15), arguments, 1)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not grads[1][bad.numpy()].any() and not grads[2][bad.numpy()].any()
    # Logits without a number, and far apart ones.
    value, shapes, locations, logits = deform_cases.make(q=4, d=4)
    reference, offsets = deform_cases.boxes_and_offsets(locations, shapes, 2)
    logits = logits * 80
    logits[0, 1, 1, 0, 2] = math.nan
    arguments = (value, shapes, offsets, logits)
    exact = plain_attention.ms_deform_attn(*deform_cases.as_double(*arguments), reference.double())
    assert exact.isnan().any() and off_by(attention(library, arguments, reference), exact) <= 512


def scores(library: Kernels, masks, classes, *steps, threads: int = 1) -> torch.Tensor:
    first, crop, second = steps
    size = first or tuple(masks.shape[2:])
    cut = crop or size
    end = second or cut
    n, q, h, w = masks.shape
    sizes = ints(n, q, classes.shape[2], h, w, bool(first), bool(second), *size, *cut, *end)
    out = unwritten(n, classes.shape[2], *end)
    assert not library.scores(sizes, masks.numpy(), classes.numpy(), out, threads)
    return torch.from_numpy(out)


@pytest.mark.parametrize("case", mask_score_cases.STEPS[:-1], ids=str)
def test_mask_scores(library: Kernels, case) -> None:
    shape, *steps = case
    for q, k, n in ((1, 1, 1), (5, 3, 2), (70, 14, 1), (3, 2, 0), (0, 2, 1)):
        masks, classes = mask_score_cases.make(shape, n=n, q=q, k=k)
        for threads in THREADS:
            out = scores(library, masks, classes.contiguous(), *steps, threads=threads)
            mask_score_cases.assert_as_exact(out, masks, classes, *steps)


def test_mask_scores_of_every_number_of_classes_and_of_no_numbers(library: Kernels) -> None:
    for k in range(27):
        masks, classes = mask_score_cases.make((3, 5), q=9, k=k)
        out = scores(library, masks, classes.contiguous(), (6, 9), None, None)
        mask_score_cases.assert_as_exact(out, masks, classes, (6, 9), None, None)
    masks, classes = mask_score_cases.make((6, 9), q=4, k=3)
    classes = classes.contiguous()
    masks[0, 0, 1, 2], masks[0, 1, 2, 3], masks[0, 2, 3, 4] = math.inf, -math.inf, math.nan
    masks[0, 3] = torch.linspace(-120, 120, 54).view(6, 9)
    for steps in ((None, None, None), ((24, 36), None, None), ((12, 9), (11, 9), (11, 27))):
        lists = mask_score_cases.as_lists(*steps)
        # In float32, as the kernel: where a weight rounds to zero decides what infinity spoils.
        right = plain_scores.mask_scores(masks, classes, *lists)
        assert right.isnan().any() and not right.isnan().all()
        assert off_by(scores(library, masks, classes, *steps).numpy(), right) <= 16


def test_block_sums(library: Kernels) -> None:
    for size in (0, 1, 7, 8, 511, 512, 513, 4 * BLOCK_BYTES, 300 * BLOCK_BYTES + 3):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        exact = _sums_of(torch.from_numpy(data)).numpy() if size else ints()
        for threads in THREADS:
            found = np.zeros_like(exact)
            assert not library.sums(data, size, found, threads)
            assert np.array_equal(found, exact), size
            for turns in (1, 3):
                for turn in range(turns):
                    assert library.differ(data, size, found, turn, turns, threads) == 0
        if not size:
            continue
        data[-1] ^= 128
        assert library.differ(data, size, exact, 0, 1, 1) == 1
        seen = [library.differ(data, size, exact, turn, 4, 1) for turn in range(4)]
        blocks = len(exact)
        last = [turn % blocks == blocks - 1 if blocks < 4 else turn == 3 for turn in range(4)]
        assert seen == last, size
