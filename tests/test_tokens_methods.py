"""The mathematics of token reduction, by itself: clusters, merging, keeping, hashing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from opentrans_kernels.tokens import TokenPlan
from opentrans_kernels.tokens.cluster import Clusters, Pool, bands, candidates, homes, pooled
from opentrans_kernels.tokens.hashing import clustered_attention, query_clusters
from opentrans_kernels.tokens.merge import Composed, keep_attended, kept_count, match, merge, take

SIZE, GRID = (7, 9), (3, 4)  # neither square nor divisible


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plan(**options: object) -> TokenPlan:
    return TokenPlan(**{"alpha": 1, "grid": GRID, "temperature": 0.3, **options})  # type: ignore


def by_hand(x: torch.Tensor, given: TokenPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres and weights of one image [n, C], token by token, as the paper says it."""
    (hh, ww), (h, w), reach = SIZE, GRID, (given.window - 1) // 2
    c = F.adaptive_avg_pool2d(x.T.reshape(1, -1, hh, ww), GRID)[0].flatten(1).T
    for _ in range(given.iters):
        sums, mass = torch.zeros_like(c), torch.zeros(len(c), dtype=x.dtype)
        for i in range(hh * ww):
            row, column = (i // ww) * h // hh, (i % ww) * w // ww
            near = [
                a * w + b
                for a, b in itertools.product(range(h), range(w))
                if abs(a - row) <= reach and abs(b - column) <= reach
            ]
            d = (x[i] - c[near]).square().sum(-1)
            share = torch.softmax(-given.temperature * d, 0)
            for j, s in zip(near, share, strict=True):
                sums[j] += s * x[i]
                mass[j] += s
        c = sums / mass[:, None]
    weights = torch.zeros(len(x), len(c), dtype=x.dtype)
    for i in range(len(x)):
        d = (x[i] - c).square().sum(-1)
        nearest = d.argsort()[: given.k]
        raw = torch.exp(-given.temperature * d[nearest])
        weights[i, nearest] = raw / (raw.sum() if given.norm == "l1" else raw.norm())
    return c, weights


@pytest.mark.parametrize("window, iters, k, norm", [
    (1, 2, 20, "l1"), (3, 5, 4, "l1"), (5, 2, 20, "l2"), (3, 0, 1, "l1"), (9, 1, 5, "l2")
])  # fmt: skip
def test_clusters_are_those_of_the_definition(window, iters, k, norm):
    given = plan(window=window, iters=iters, k=k, norm=norm)
    x = tokens(2, 63, 5)
    found = Clusters(x, SIZE, given)
    centres, weights = by_hand(x[1], given)
    torch.testing.assert_close(found.centres[1], centres)
    torch.testing.assert_close(found.weights[1], weights)
    y = tokens(2, 12, 3, seed=5)
    torch.testing.assert_close(found.expand(y), found.weights @ y)


@pytest.mark.parametrize("size, grid, window", [
    ((7, 9), (3, 4), 5), ((8, 8), (8, 8), 3), ((5, 4), (1, 3), 1), ((6, 5), (4, 2), 9),
    ((40, 40), (28, 28), 5),
])  # fmt: skip
def test_bands_hold_every_pair_that_may_join_once(size, grid, window):
    near = candidates(size, grid, window)
    count = torch.zeros(near.shape, dtype=torch.int64)
    for band in bands(size, grid, window):
        count[band.tokens, band.centres] += ~band.excluded
        rows = band.tokens.stop - band.tokens.start
        assert band.excluded.shape == (rows, band.centres.stop - band.centres.start)
    assert torch.equal(count, near.long())
    assert [b.tokens.start for b in bands(size, grid, window)][1:] == [
        b.tokens.stop for b in bands(size, grid, window)
    ][:-1], "all tokens, in order"


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("temperature", ["auto", 0.3, 1e6])
def test_bands_give_what_all_distances_give(window, temperature):
    """With a gradient all distances are taken at once."""
    given = plan(window=window, temperature=temperature)
    x = tokens(3, 63, 5)
    with torch.no_grad():
        by_bands = Clusters(x, SIZE, given)
    at_once = Clusters(x.clone().requires_grad_(), SIZE, given)
    assert at_once.centres.requires_grad and not by_bands.centres.requires_grad
    torch.testing.assert_close(by_bands.centres, at_once.centres.detach())
    torch.testing.assert_close(by_bands.weights, at_once.weights.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, grid", [((7, 9), (3, 4)), ((4, 6), (4, 1)), ((40, 40), (28, 28))])
def test_pooling_is_that_of_torch(size, grid, dtype):
    x = tokens(2, size[0] * size[1], 5).to(dtype)
    maps = x.double().mT.reshape(2, 5, *size)
    right = F.adaptive_avg_pool2d(maps, grid).flatten(2).mT.to(dtype)
    torch.testing.assert_close(pooled(x, size, grid), right)
    with torch.autocast("cpu"):
        torch.testing.assert_close(pooled(x, size, grid), right)


def test_homes_are_whole_numbers_as_nearest_upsampling_gives_them():
    for count, cells in ((40, 28), (48, 32), (30, 20), (300, 257), (7, 7), (9, 4)):
        index = torch.arange(cells, dtype=torch.float64).view(1, 1, cells, 1)
        nearest = F.interpolate(index, (count, 1), mode="nearest").flatten().long()
        assert homes(count, cells).dtype == torch.int64
        assert torch.equal(homes(count, cells), nearest)
    # In bfloat16, which holds whole numbers to 256 only, they would differ.
    assert homes(300, 257)[299] == 256
    assert candidates((4, 4), (4, 4), 1).equal(torch.eye(16, dtype=torch.bool))
    assert candidates((40, 40), (28, 28), 5).sum(1).max() == 25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_clusters_like_float32(dtype):
    x = tokens(1, 63, 8).to(dtype)
    half, full = Clusters(x, SIZE, plan()), Clusters(x.float(), SIZE, plan())
    assert half.centres.dtype == dtype
    torch.testing.assert_close(half.centres, full.centres.to(dtype), rtol=0, atol=0)
    assert torch.equal(half.weights, full.weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Clusters(x.float(), SIZE, plan()).centres, full.centres)


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e3, 1e8, 1e30, "auto"])
def test_no_row_vanishes_at_any_temperature(temperature):
    x = 50 * tokens(2, 63, 6, dtype=torch.float32)
    found = Clusters(x, SIZE, plan(temperature=temperature))
    assert torch.isfinite(found.centres).all()
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 63))
    if temperature in (1e8, 1e30):  # the nearest centre alone
        nearest = torch.cdist(x.double(), found.centres.double()).argmin(-1)
        assert torch.equal(found.weights.argmax(-1), nearest)


def test_l2_rows_sum_to_more_than_one():
    weights = Clusters(
        tokens(1, 63, 6), SIZE, plan(norm="l2", temperature=1e-9, k=4, iters=0)
    ).weights
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(1, 63, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(-1), torch.full((1, 63), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("temperature", ["auto", 0.02, 1e6])
def test_equal_tokens_and_a_constant_map(offset, temperature):
    x = torch.full((2, 63, 4), offset, dtype=torch.float32) + torch.arange(4.0)
    found = Clusters(x, SIZE, plan(temperature=temperature))
    torch.testing.assert_close(found.centres, x[:, :12])
    torch.testing.assert_close(found.expand(found.centres), x)


def test_far_from_the_origin_distances_keep_their_digits():
    x = tokens(1, 63, 6, dtype=torch.float32)
    near = Clusters(x, SIZE, plan())
    far = Clusters(x.double() + 4096, SIZE, plan())
    single = Clusters((x + 4096), SIZE, plan())
    torch.testing.assert_close(far.weights.float(), near.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.weights, near.weights, rtol=5e-2, atol=5e-3)


def test_auto_temperature_does_not_depend_on_scale_or_on_other_images():
    x = tokens(2, 63, 6)
    given = plan(temperature="auto")
    found = Clusters(x, SIZE, given)
    torch.testing.assert_close(Clusters(37 * x, SIZE, given).weights, found.weights)
    other = torch.cat([x[:1], 100 * x[1:]])
    torch.testing.assert_close(Clusters(other, SIZE, given).weights[0], found.weights[0])


def test_images_of_a_batch_are_independent():
    x = tokens(3, 63, 6)
    whole = Clusters(x, SIZE, plan())
    order = torch.tensor([2, 0, 1])
    moved = Clusters(x[order], SIZE, plan())
    torch.testing.assert_close(moved.centres, whole.centres[order])
    torch.testing.assert_close(moved.weights, whole.weights[order])
    torch.testing.assert_close(Clusters(x[1:2], SIZE, plan()).weights, whole.weights[1:2])


def test_a_centre_without_tokens_stays():
    x = torch.zeros(1, 4, 1, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([0.0, 0.0, 10.0, 10.0])
    found = Clusters(x, (2, 2), TokenPlan(alpha=0, grid=(1, 2), temperature=1e9, window=5))
    # Both centres start at 5; the tokens all go to the first of two equal ones, half each.
    assert torch.isfinite(found.centres).all()
    torch.testing.assert_close(found.centres.flatten(), torch.tensor([5.0, 5.0]).double())
    x = torch.tensor([0.0, 0.0, 6.0, 30.0]).double().view(1, 4, 1)
    found = Clusters(x, (1, 4), TokenPlan(alpha=0, grid=(1, 4 - 1), temperature=1e9, window=5))
    assert torch.isfinite(found.centres).all() and found.centres.max() > 20


def test_what_is_kept_between_calls_serves_any_later_call():
    size, grid = (11, 13), (4, 5)  # of no other test
    given, x = plan(grid=grid), tokens(1, 143, 4)
    with torch.inference_mode(), torch.device("meta"):
        Clusters(x, size, given)
    leaf = x.clone().requires_grad_()
    Clusters(leaf, size, given).centres.square().sum().backward()
    assert leaf.grad.abs().min() > 0


def test_gradients_through_clusters_and_weights():
    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = Clusters(x, (4, 5), TokenPlan(alpha=0, grid=(2, 3), temperature=0.4, iters=2, k=3))
        return found.centres, found.expand(y)

    x, y = tokens(1, 20, 2).requires_grad_(), tokens(1, 6, 2, seed=1).requires_grad_()
    assert gradcheck(run, (x, y))


def test_pooling_is_an_average_and_comes_back_bilinearly():
    x = tokens(2, 63, 3)
    found = Pool(x, SIZE, TokenPlan("pool", alpha=0, grid=GRID))
    maps = x.mT.reshape(2, 3, *SIZE)
    torch.testing.assert_close(
        found.centres, F.adaptive_avg_pool2d(maps, GRID).flatten(2).mT
    )  # fmt: skip
    torch.testing.assert_close(found.expand(torch.ones(2, 12, 1)), torch.ones(2, 63, 1))
    assert gradcheck(
        lambda x: Pool(x, (4, 5), TokenPlan("pool", alpha=0, grid=(2, 3))).expand(
            pooled(x, (4, 5), (2, 3)) ** 2
        ),
        (tokens(1, 20, 2).requires_grad_(),),
    )


def test_matching_pairs_the_most_similar():
    metric = torch.tensor([[1.0, 0], [0, 1], [0.2, 0.9], [1, 0.1], [-1, 0]]).double()[None]
    stay, gone, partner = match(metric, 1)
    # Even tokens 0, 2, 4; odd ones 1, 3. 0 and 3 point nearly the same way.
    assert (stay.tolist(), gone.tolist(), partner.tolist()) == ([[1, 2]], [[0]], [[1]])


@pytest.mark.parametrize("n, r", [(8, 3), (9, 2), (9, 4), (8, 4)])
def test_merging_is_a_weighted_mean_and_says_where_tokens_went(n, r):
    x, metric = tokens(2, n, 3), tokens(2, n, 4, seed=1)
    sizes = torch.randint(1, 4, (2, n, 1), generator=torch.Generator().manual_seed(2)).double()
    merged, total, where = merge(x, sizes, metric, r)
    assert merged.shape == (2, n - r, 3)
    for image in range(2):
        for j in range(n - r):
            own = where[image] == j
            weight = sizes[image, own]
            torch.testing.assert_close(total[image, j], weight.sum(0))
            torch.testing.assert_close(
                merged[image, j], (x[image, own] * weight).sum(0) / weight.sum()
            )
    assert total.sum(1).equal(sizes.sum(1))


def test_merging_takes_half_at_most_and_nothing_on_request():
    x = tokens(1, 5, 2)
    assert merge(x, torch.ones(1, 5, 1).double(), x, 99)[0].shape[1] == 3
    one = x[:, :1]
    for given, r in ((x, 0), (one, 4)):
        same, _, where = merge(given, torch.ones_like(given[..., :1]), given, r)
        assert torch.equal(same.sort(1).values, given.sort(1).values)
        torch.testing.assert_close(take(same, where), given)


def test_unmerging_composes_all_steps():
    x = tokens(2, 12, 3)
    way, sizes, marks = Composed(), torch.ones(2, 12, 1).double(), x
    for step in range(3):
        marks, sizes, where = merge(marks, sizes, tokens(2, marks.shape[1], 4, seed=step), 2)
        way.then(lambda where=where: where, marks.shape[1])
    back = way.expand(marks)
    assert way.count == 6 and back.shape == x.shape
    torch.testing.assert_close(
        take(sizes, way.index).reciprocal().sum(1), torch.full((2, 1), 6.0).double()
    )
    assert way.expand(marks).equal(back), "asked twice"


def test_gradients_through_merging():
    metric = tokens(2, 9, 4, seed=1)

    def run(x: torch.Tensor) -> torch.Tensor:
        sizes = torch.ones(2, 9, 1).double()
        y, sizes, where = merge(x, sizes, metric, 3)
        return take(y**2, where)

    assert gradcheck(run, (tokens(2, 9, 3).requires_grad_(),))


def test_what_is_attended_stays_for_every_image_of_a_batch():
    x = tokens(3, 6, 2)
    attention = torch.tensor([[5, 1, 4, 0, 3, 2], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]]) / 20.0
    y, where = keep_attended(x, attention.double(), 0.5)
    assert y.shape == (3, 4, 2)
    kept = [[0, 2, 4], [3, 4, 5], [0, 1, 2]]
    for image, rows in enumerate(kept):
        rest = [i for i in range(6) if i not in rows]
        assert torch.equal(y[image, :3], x[image, rows])
        fused = (attention[image, rest, None] * x[image, rest]).sum(0)
        torch.testing.assert_close(y[image, 3], fused)
        index = where()[image]
        assert index[rows].tolist() == [0, 1, 2]
        nearest = torch.cdist(x[image, rest], x[image, rows]).argmin(-1)
        assert torch.equal(index[rest], nearest)
        single, _ = keep_attended(x[image : image + 1], attention[image : image + 1].double(), 0.5)
        torch.testing.assert_close(single[0], y[image])
    same, where = keep_attended(x, attention.double(), 1.0)
    assert same is x and torch.equal(where(), torch.arange(6).expand(3, 6))


def test_the_share_kept_is_rounded_up_but_not_by_rounding():
    assert kept_count(1600, 0.9) == 1440 and kept_count(10, 0.7) == 7 and kept_count(10, 0.71) == 8
    assert all(kept_count(n, 1.0) == n for n in (1, 7, 1601))
    assert math.ceil(0.07 * 100) == 8 and kept_count(100, 0.07) == 7


def test_hashed_queries_are_those_of_equal_codes():
    q = tokens(2, 3, 20, 4)
    q[:, :, 5] = q[:, :, 2]
    number, counts = query_clusters(q, projections=2, cell=2.0, seed=7)
    again, _ = query_clusters(q, projections=2, cell=2.0, seed=7)
    assert torch.equal(number, again), "drawn from the seed"
    random = torch.Generator().manual_seed(7)
    directions = torch.randn(3, 4, 2, generator=random, dtype=torch.float64)
    offsets = 2.0 * torch.rand(3, 1, 2, generator=random, dtype=torch.float64)
    for b, h in itertools.product(range(2), range(3)):
        codes = ((q[b, h] @ directions[h] + offsets[h]) / 2.0).floor()
        same = (codes[:, None] == codes[None]).all(-1)
        assert torch.equal(number[b, h][:, None] == number[b, h][None], same)
        assert counts[b, h] == number[b, h].max() + 1 == len(codes.unique(dim=0))
        alone, _ = query_clusters(q[b : b + 1], projections=2, cell=2.0, seed=7)
        assert torch.equal(alone[0, h], number[b, h])
    assert not torch.equal(number, query_clusters(q, projections=2, cell=2.0, seed=8)[0])


def test_attention_from_clusters_is_attention_of_their_means():
    q, k, v = tokens(2, 3, 9, 4), tokens(2, 3, 9, 4, seed=1), tokens(2, 3, 9, 4, seed=2)
    options = {"projections": 1, "cell": 3.0, "seed": 0}
    number, counts = query_clusters(q[:, :, 1:], **options)
    assert counts.min() < 8, "nothing is shared, so the test proves nothing"
    found = clustered_attention(q, k, v, prefix=1, scale=0.5, **options)
    for b, h in itertools.product(range(2), range(3)):
        for i in range(8):
            own = q[b, h, 1:][number[b, h] == number[b, h, i]].mean(0)
            right = (0.5 * own @ k[b, h].T).softmax(0) @ v[b, h]
            torch.testing.assert_close(found[b, h, 1 + i], right)
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(found[:, :, 0], dense[:, :, 0])
    fine = clustered_attention(q, k, v, prefix=1, scale=0.5, projections=8, cell=1e-6, seed=0)
    torch.testing.assert_close(fine, dense)
