"""Inputs of ``mask_scores`` and its oracle; also run in child processes, without pytest."""

from __future__ import annotations

import ctypes
import mmap

import torch

from opentrans_kernels import ops
from opentrans_kernels.ops.mask_scores import reference as plain

#: (height, width) of masks, then size, crop and resize.
STEPS = (
    ((5, 7), None, None, None),
    ((1, 1), (4, 9), None, None),
    ((6, 5), (24, 20), None, None),
    ((9, 31), (36, 124), (35, 101), None),
    ((16, 16), (64, 64), (61, 64), (50, 80)),
    ((16, 12), (64, 48), (40, 48), (97, 33)),
    ((33, 20), (33, 40), None, None),  # one axis keeps its size
    ((8, 40), (8, 40), (8, 39), (8, 39)),
    ((50, 70), (7, 9), None, None),  # smaller
    ((3, 90), (40, 9), (39, 2), (3, 130)),
    ((12, 12), None, (11, 5), None),
    ((12, 12), None, (7, 11), (28, 45)),
    ((2, 300), (5, 1100), None, None),  # several tiles
)


def make(shape, *, n=1, q=5, k=3, seed=0, dtype=torch.float32):
    """Mask logits and class probabilities, none of them a tie."""
    made = torch.Generator().manual_seed(seed)
    masks = 4 * torch.randn(n, q, *shape, generator=made, dtype=torch.float64)
    classes = torch.randn(n, q, k + 1, generator=made, dtype=torch.float64).softmax(-1)[..., :-1]
    return masks.to(dtype), classes.to(dtype)


def as_lists(*steps) -> list[list[int]]:
    return [list(step) if step else [] for step in steps]


def assert_as_exact(out, masks, classes, *steps) -> None:
    """``out`` may be off by twice the error of dense float32 and two ulp of the largest score."""
    lists = as_lists(*steps)
    exact = plain.mask_scores(masks.double(), classes.double(), *lists)
    dense = plain.mask_scores(masks.float(), classes.float(), *lists)
    assert out.shape == exact.shape
    if out.numel():
        error, allowed = ((t.double() - exact).abs().max() for t in (out, dense))
        bound = 2 * allowed + 2 * 2.0**-23 * exact.abs().max()
        assert error <= bound, (float(error), float(allowed), float(exact.abs().max()))


def sweep() -> int:
    """Every form against its oracle; returns how many results were compared."""
    count = 0
    sizes = ((1, 1, 1), (5, 3, 2), (17, 7, 1), (100, 19, 1), (300, 26, 1), (3, 2, 0))
    for shape, *steps in STEPS:
        for q, k, n in sizes:
            masks, classes = make(shape, n=n, q=q, k=k)
            given = dict(zip(("size", "crop", "resize"), steps, strict=True))
            assert_as_exact(ops.mask_scores(masks, classes, **given), masks, classes, *steps)
            count += 1
    for k in range(30):
        masks, classes = make((6, 7), q=9, k=k)
        out = ops.mask_scores(masks, classes, size=(24, 25))
        assert_as_exact(out, masks, classes, (24, 25), None, None)
        count += 1
    return count


def odd_numbers() -> None:
    """NaN stays NaN where dense has it; infinite logits are 0 and 1 where dense has those."""
    masks, classes = make((6, 9), q=4, k=3)
    masks[0, 0, 1, 2] = float("inf")
    masks[0, 1, 2, 3] = -float("inf")
    masks[0, 2, 3, 4] = float("nan")
    masks[0, 3] = torch.linspace(-120, 120, 54).view(6, 9)
    for steps in (
        (None, None, None),
        ((24, 36), None, None),
        ((6, 9), None, None),
        ((12, 9), (11, 9), (11, 27)),
    ):
        given = dict(zip(("size", "crop", "resize"), steps, strict=True))
        out = ops.mask_scores(masks, classes, **given)
        right = plain.mask_scores(masks, classes, *as_lists(*steps))
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert bool(right.isnan().any()) and not bool(right.isnan().all())
    one = torch.tensor([[[[float("inf"), -float("inf"), float("nan"), 0.0]]]])
    found = ops.mask_scores(one, torch.ones(1, 1, 1)).flatten().tolist()
    assert found[0] == 1.0 and found[1] == 0.0 and found[2] != found[2] and found[3] == 0.5


def guarded() -> int:
    """Every input ends where a page begins that may not be read."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    keep: list = []

    def at_the_end(t: torch.Tensor) -> torch.Tensor:
        size = -(-t.numel() * 4 // page) * page
        area = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mprotect(ctypes.c_void_p(start + size), page, 0) == 0
        keep.append(area)
        flat = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=size - t.numel() * 4)
        return flat.view(t.shape).copy_(t)

    for shape, *steps in STEPS:
        given = dict(zip(("size", "crop", "resize"), steps, strict=True))
        masks, classes = make(shape, q=7, k=5)
        found = ops.mask_scores(at_the_end(masks), at_the_end(classes), **given)
        assert torch.equal(found, ops.mask_scores(masks, classes, **given))
    return len(keep)


def same_bits() -> None:
    """Threads, batch and where the result lies change nothing."""
    masks, classes = make((21, 30), n=3, q=40, k=11)
    steps = {"size": (84, 120), "crop": (80, 117), "resize": (123, 200)}
    torch.set_num_threads(1)
    for given in (steps, {"size": (84, 120)}):
        once = ops.mask_scores(masks, classes, **given)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.mask_scores(masks, classes, **given), once), threads
            alone = [ops.mask_scores(m, c, **given) for m, c in zip(masks, classes, strict=True)]
            assert torch.equal(torch.stack(alone), once)
        if "crop" not in given:
            part = ops.mask_scores(masks, classes, **given, crop=(50, 77))
            assert torch.equal(part, once[..., :50, :77])
    torch.set_num_threads(1)
