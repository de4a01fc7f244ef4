"""The fit in Triton: all spectra in three launches, no synchronisation with the host.

1. ``starts_kernel``, a program per spectrum: logarithms, their reversed cumulative sums and so the
   exponent of every start, in closed form.
2. ``distances_kernel``, a program per block of starts of a window: streams the tail, keeps the
   largest gap of each start, and writes the best start of its block.
3. ``best_kernel``, a program per spectrum: the best block; of equal distances the smallest index.

Float64 throughout, deterministic (no atomics). Every start is scanned in full: bound by ``exp``,
so the pruning of the compiled CPU kernel is not needed. Nothing is read back: ``offsets``,
``first`` and ``last`` may be results of earlier kernels, and the grid is an upper bound of theirs.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS

__all__ = ["best_kernel", "distances_kernel", "powerlaw_fit", "starts_kernel"]

_STARTS = 16  # per program of distances_kernel
_VALUES = 64  # of the tail, at a time
_CHUNK = 256


@triton.jit
def starts_kernel(
    x,  # float64 [total]
    offsets,  # int64 [L + 1]
    logs,  # float64 [total]
    slopes,  # float64 [total]: 1 - alpha of each start; -inf for ties
    CHUNK: tl.constexpr,
):
    spectrum = tl.program_id(0)
    begin = tl.load(offsets + spectrum)
    count = (tl.load(offsets + spectrum + 1) - begin).to(tl.int32)
    if count > 0:
        lane = tl.arange(0, CHUNK)
        low = tl.log(tl.load(x + begin))
        high = tl.log(tl.load(x + begin + count - 1))
        largest = tl.maximum(tl.abs(low), tl.abs(high))
        carry = low - low  # sum over the starts behind this chunk; zero, and NaN stays NaN
        for chunk in range(0, count, CHUNK):
            # From the top of the spectrum down: lane 0 is the lowest of the chunk.
            i = count - chunk - CHUNK + lane
            inside = i >= 0
            log = tl.log(tl.load(x + begin + i, mask=inside, other=1.0))
            above = inside & (i + 1 < count)
            after = tl.log(tl.load(x + begin + i + 1, mask=above, other=1.0))
            # Non-negative terms from the top: sum_j (l_j - l_i) without cancellation.
            terms = tl.where(above, (after - log) * (count - 1 - i).to(tl.float64), 0.0)
            sums = tl.cumsum(terms, axis=0, reverse=True) + carry
            carry += tl.sum(terms)
            remaining = (count - i).to(tl.float64)
            tie = sums <= 4 * 2.220446049250313e-16 * remaining * largest
            alpha = 1.0 + remaining / tl.where(tie, 1.0, sums)
            tl.store(logs + begin + i, log, mask=inside)
            tl.store(slopes + begin + i, tl.where(tie, -float("inf"), 1.0 - alpha), mask=inside)


@triton.jit(do_not_specialize=["spectra"])
def distances_kernel(
    logs,
    slopes,
    offsets,
    first,  # int64 [L]
    last,  # int64 [L]
    ends,  # int64 [L]: blocks of starts of this and all spectra before it
    spectra,  # L
    best,  # float64 [blocks]: smallest distance of a block
    best_start,  # int64 [blocks]
    STARTS: tl.constexpr,
    VALUES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    block = tl.program_id(0)
    # The spectrum of a block is the number of spectra that end before it.
    spectrum = 0
    for chunk in range(0, spectra, SEARCH):
        s = chunk + tl.arange(0, SEARCH)
        end = tl.load(ends + s, mask=s < spectra, other=9223372036854775807)
        spectrum += tl.sum((end <= block).to(tl.int32))
    if spectrum < spectra:
        begin = tl.load(offsets + spectrum)
        count = (tl.load(offsets + spectrum + 1) - begin).to(tl.int32)
        start = tl.load(first + spectrum)
        stop = tl.load(last + spectrum)
        before = tl.load(ends + spectrum) - (stop - start + STARTS - 1) // STARTS
        lowest = (start + (block - before) * STARTS).to(tl.int32)
        i = lowest + tl.arange(0, STARTS)
        inside = i < stop
        remaining = (count - i).to(tl.float64)
        own = tl.load(logs + begin + i, mask=inside, other=0.0)
        slope = tl.load(slopes + begin + i, mask=inside, other=0.0)
        tie = slope == -float("inf")
        finite = tl.where(tie, 0.0, slope)
        gaps = tl.zeros([STARTS, VALUES], tl.float64)
        for chunk in range(lowest, count, VALUES):
            j = chunk + tl.arange(0, VALUES)
            log = tl.load(logs + begin + j, mask=j < count, other=0.0)
            model = 1.0 - tl.exp(finite[:, None] * (log[None, :] - own[:, None]))
            offset = j[None, :] - i[:, None]
            gap = tl.abs(model - offset.to(tl.float64) / remaining[:, None])
            counts = (offset >= 0) & (j < count)[None, :]
            gaps = tl.maximum(gaps, tl.where(counts, gap, 0.0))
        distance = tl.where(tie, (remaining - 1.0) / remaining, tl.max(gaps, axis=1))
        distance = tl.where(inside, distance, float("inf"))
        smallest = tl.min(distance, axis=0)
        index = tl.min(tl.where(distance == smallest, i, 2147483647), axis=0)
        tl.store(best + block, smallest)
        tl.store(best_start + block, index.to(tl.int64))


@triton.jit
def best_kernel(
    slopes,
    offsets,
    first,
    last,
    ends,
    best,
    best_start,
    out,  # float64 [L, 3]
    STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    spectrum = tl.program_id(0)
    start = tl.load(first + spectrum)
    stop = tl.load(last + spectrum)
    index = tl.full([], -1, tl.int64)
    alpha = tl.full([], float("nan"), tl.float64)
    smallest = tl.full([], 1.0, tl.float64)
    if start < stop:
        blocks = ((stop - start + STARTS - 1) // STARTS).to(tl.int32)
        base = tl.load(ends + spectrum) - blocks
        distances = tl.full([CHUNK], float("inf"), tl.float64)
        starts = tl.full([CHUNK], 9223372036854775807, tl.int64)
        for chunk in range(0, blocks, CHUNK):
            b = chunk + tl.arange(0, CHUNK)
            found = tl.load(best + base + b, mask=b < blocks, other=float("inf"))
            where = tl.load(best_start + base + b, mask=b < blocks, other=9223372036854775807)
            # Blocks come in rising order of starts, so a later one must be smaller.
            better = found < distances
            distances = tl.where(better, found, distances)
            starts = tl.where(better, where, starts)
        smallest = tl.min(distances, axis=0)
        index = tl.min(tl.where(distances == smallest, starts, 9223372036854775807), axis=0)
        alpha = 1.0 - tl.load(slopes + tl.load(offsets + spectrum) + index)
    tl.store(out + 3 * spectrum, index.to(tl.float64))
    tl.store(out + 3 * spectrum + 1, alpha)
    tl.store(out + 3 * spectrum + 2, smallest)


def powerlaw_fit(
    x: torch.Tensor,
    offsets: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    samples: int = 16,
    block: int = 16,
) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.powerlaw_fit`. ``samples``, ``block``: unused.

    Spectra with an empty window may hold any values, zeros and NaN included.
    """
    spectra = offsets.numel() - 1
    out = x.new_empty((spectra, 3))
    if spectra == 0:
        return out
    x = x.contiguous()
    offsets, first, last = (
        t.to(device=x.device, dtype=torch.int64).contiguous() for t in (offsets, first, last)
    )
    # No window holds more starts than values; the host does not know the sums.
    blocks = -(-x.numel() // _STARTS) + spectra
    ends = ((last - first).clamp_min(0) + (_STARTS - 1)).div(_STARTS, rounding_mode="floor")
    ends = ends.cumsum(0)
    logs, slopes = torch.empty_like(x), torch.empty_like(x)
    best = x.new_empty(blocks)
    best_start = torch.empty(blocks, dtype=torch.int64, device=x.device)
    on_its_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_its_device:  # triton launches on the current device
        starts_kernel[(spectra,)](x, offsets, logs, slopes, CHUNK=_CHUNK, num_warps=4, **OPTIONS)
        distances_kernel[(blocks,)](
            logs, slopes, offsets, first, last, ends, spectra, best, best_start,
            STARTS=_STARTS, VALUES=_VALUES, SEARCH=128, num_warps=4, **OPTIONS,
        )  # fmt: skip
        best_kernel[(spectra,)](
            slopes, offsets, first, last, ends, best, best_start, out,
            STARTS=_STARTS, CHUNK=_CHUNK, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out
