"""Convolutions without torch in their process, over windows, widths and densities; float64 as the
oracle. Also that the NEON loops and the portable ones agree.
"""

from __future__ import annotations

import csrc_process
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from csrc_process import NO_PACK, Kernels, Pack
from deform_cases import boxes_and_offsets
from deform_cases import make as deform_inputs
from mask_score_cases import make as mask_inputs
from test_csrc import Output, close
from test_csrc_ops import attention, attention_backward, gram, scores

from opentrans_kernels.pack import SparseWeight

WINDOWS = (  # kernel, stride, padding
    (1, 1, 0), (1, 2, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (3, 3, 0), (4, 1, 3), (5, 1, 2),
    (5, 2, 1), (7, 2, 3), (9, 1, 4),
)  # fmt: skip
SIZES = ((2, 9, 10), (1, 8, 70), (1, 61, 12))


class Conv:
    """A random sparse convolution and its oracle."""

    def __init__(self, cout: int, cin: int, window=(1, 1, 0), density=0.3, seed=0, **pack) -> None:
        made = torch.Generator().manual_seed(seed)
        kernel, self.stride, self.padding = window
        weight = torch.randn(cout, cin, kernel, kernel, generator=made)
        weight[torch.rand(weight.shape, generator=made) >= density] = 0
        self.weight, self.bias = weight, torch.randn(cout, generator=made)
        self.packed = SparseWeight.from_dense(weight, self.bias, self.stride, self.padding, **pack)
        values = self.packed.values.numpy()
        self.pack = Pack(self.packed.structure.numpy(), values, self.bias.numpy())

    def exact(self, x: torch.Tensor, bias: bool = True) -> torch.Tensor:
        return F.conv2d(
            x.double(), self.weight.double(), self.bias.double() if bias else None,
            self.stride, self.padding,
        )  # fmt: skip

    def run(self, library: Kernels, x, residual=None, relu=0, threads=1, pack=None) -> np.ndarray:
        shape = self.exact(x).shape
        out = Output(library, *shape)
        extra = None if residual is None else residual.numpy()
        assert not library.conv(
            pack or self.pack, x.numpy(), extra, out.data, x.shape[0], *x.shape[2:],
            *shape[2:], relu, 0.0, threads,
        )  # fmt: skip
        return out.pixels()

    def check(self, library: Kernels, x: torch.Tensor) -> None:
        exact = self.exact(x)
        residual = torch.randn(exact.shape)
        added = (exact + residual).clamp_min(0).numpy()
        plain, whole = self.run(library, x), self.run(library, x, residual, 1)
        assert close(plain, exact.numpy()) and close(whole, added), tuple(x.shape)
        assert np.array_equal(self.run(library, x, threads=3), plain)
        assert np.array_equal(self.run(library, x, residual, 1, 3), whole)

    def gradient(self, library: Kernels, x, grad, threads=1) -> np.ndarray:
        found = np.full(self.packed.nnz, np.nan, np.float32)
        assert not library.wgrad(
            self.pack, x.numpy(), grad.numpy(), found, x.shape[0], *x.shape[2:],
            *grad.shape[2:], threads,
        )  # fmt: skip
        return found


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_window(library: Kernels, window: tuple[int, int, int]) -> None:
    cout, cin = (17, 11) if window[0] < 4 else (7, 3)  # emulated, so no larger than need be
    convs = [
        Conv(cout, cin, window, chunk=4, row_block=5),
        Conv(2 * cout, cin, window, density=0.7),
        Conv(cout, cin, window, density=0.05),
    ]
    for n, h, w in SIZES:
        for conv in convs:
            x = torch.randn(n, cin, h, w)
            conv.check(library, x)
            grad = torch.randn(conv.exact(x).shape)
            right, norm = (
                torch.nn.grad.conv2d_weight(
                    x.double() ** power, conv.weight.shape, grad.double() ** power,
                    conv.stride, conv.padding,
                ).flatten()[conv.packed.indices()].numpy()
                for power in (1, 2)
            )  # fmt: skip
            # Thousands of products that cancel: their norm says what rounding may cost.
            found = conv.gradient(library, x, grad)
            assert (np.abs(found - right) <= 1e-6 * np.sqrt(norm)).all(), (n, h, w)
            assert np.array_equal(conv.gradient(library, x, grad, 3), found)


@pytest.mark.parametrize("window", [(1, 1, 0), (3, 1, 1)], ids=str)
def test_every_width(library: Kernels, window: tuple[int, int, int]) -> None:
    """Every rest of a vector and every number of vectors of a tile."""
    few = Conv(5, 4, window, chunk=2, row_block=3)
    many = Conv(24, 4, window, density=0.6)
    for width in range(1, 62):
        for conv in (few, many):
            conv.check(library, torch.randn(1, 4, 3, width))
    for height in range(1, 40):
        few.check(library, torch.randn(1, 4, height, 5))


def test_rows_weights_and_batches_of_nothing(library: Kernels) -> None:
    for window in ((1, 1, 0), (3, 1, 1)):
        x = torch.randn(2, 7, 6, 9)
        conv = Conv(9, 7, window, chunk=3, row_block=4)
        plain = conv.pack._replace(bias=None)
        assert close(conv.run(library, x, pack=plain), conv.exact(x, bias=False).numpy())
        empty = conv.run(library, x[:0])
        assert empty.size == 0
        for density in (0.0, 0.02):
            sparse = Conv(9, 7, window, density=density, chunk=3, row_block=4)
            sparse.check(library, x)
        # Pruned weights are not multiplied, and ReLU keeps NaN.
        x[0, 3], x[1, 2, 3, 4] = torch.inf, torch.nan
        conv = Conv(9, 7, window, density=0.3)
        found = conv.run(library, x, relu=1)
        touched = (conv.weight != 0).double()
        spoilt = F.conv2d((~x.isfinite()).double(), touched, None, 1, window[2]).numpy() > 0
        right = conv.exact(torch.where(x.isfinite(), x, 0.0)).clamp_min(0).numpy()
        assert spoilt.any() and not spoilt.all()
        assert np.isfinite(found[~spoilt]).all() and close(found[~spoilt], right[~spoilt])
        reads_nan = F.conv2d(x.isnan().double(), touched, None, 1, window[2]).numpy() > 0
        assert np.isnan(found[reads_nan]).all()


def test_a_stage_equals_its_blocks_one_by_one(library: Kernels) -> None:
    def block(cin: int, middle: int, cout: int, seed: int, down: bool) -> list[Conv]:
        return [
            Conv(middle, cin, seed=seed), Conv(middle, middle, (3, 1, 1), seed=seed + 1),
            Conv(cout, middle, seed=seed + 2),
            *([Conv(cout, cin, seed=seed + 3)] if down else []),
        ]  # fmt: skip

    for pool in (1, 2):
        blocks = [block(8, 5, 12, 0, True), block(12, 6, 12, 4, False), block(12, 4, 12, 8, False)]
        packs = [[c.pack for c in b] + [NO_PACK] * (4 - len(b)) for b in blocks]
        for n, h, w in ((1, 6, 5), (2, 40, 9), (1, 71, 34)):
            source = Output(library, n, 8, h, w)
            source.data[:] = 0
            source.pixels()[:] = torch.randn(n, 8, h, w).numpy()
            step, size, k = source, (h, w), pool
            for one, made in zip(packs, blocks, strict=True):
                out = Output(library, n, made[2].weight.shape[0], size[0] // k, size[1] // k)
                assert not library.bottleneck(one, step.data, out.data, n, *size, k, 1)
                step, size, k = out, out.shape[2:], 1
            for threads in (1, 3, 5):
                out = Output(library, *step.shape)
                pools = np.array([pool, 1, 1], np.int64)
                every = [pack for one in packs for pack in one]
                assert not library.stage(every, pools, 3, source.data, out.data, n, h, w, threads)
                assert np.array_equal(out.pixels(), step.pixels()), (n, h, w, threads)


def results(library: Kernels) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    found = {}
    for window in ((1, 1, 0), (3, 1, 1), (3, 2, 1)):
        conv = Conv(17, 11, window, chunk=4, row_block=5)
        x = torch.randn(2, 11, 19, 37)
        found[f"conv {window}"] = conv.run(library, x)
        grad = torch.randn(conv.exact(x).shape)
        found[f"wgrad {window}"] = conv.gradient(library, x, grad)
    arguments = deform_inputs(d=11)
    found["attention"] = attention(library, arguments)
    grad = np.random.default_rng(0).standard_normal((2, 7, 33)).astype(np.float32)
    for name, one in zip("vlw", attention_backward(library, grad, arguments, 1), strict=True):
        found[f"attention backward {name}"] = one
    reference, offsets = boxes_and_offsets(arguments[2], arguments[1], 4)
    around = (*arguments[:2], offsets, arguments[3])
    found["attention around boxes"] = attention(library, around, reference)
    masks, classes = mask_inputs((9, 31), q=70, k=14)
    steps = ((36, 124), (35, 101), (50, 80))
    found["scores"] = scores(library, masks, classes.contiguous(), *steps).numpy()
    found["eigenvalues"] = gram(library, torch.randn(2, 65, 80).numpy())[0]
    return found


def test_neon_and_the_portable_loops_agree() -> None:
    """On one processor family both add in the same order, and fuse where the compiler does."""
    both = []
    for capability in ("neon", "generic"):
        library = csrc_process.emulated(capability)
        name = np.zeros(16, np.uint8)
        assert library.isa(name) == 0 and name.tobytes().rstrip(b"\0").decode() == capability
        both.append(results(library))
        library.close()
    for name, found in both[0].items():
        other = both[1][name]
        assert found.shape == other.shape and np.isfinite(found).all()
        limit = 1e-6 if found.dtype == np.float32 else 1e-13
        assert np.abs(found - other).max() <= limit * np.abs(other).max(), name


def test_another_familys_instruction_set_is_refused() -> None:
    library = csrc_process.emulated("avx2")
    name = np.zeros(16, np.uint8)
    assert library.isa(name) == 1 and name.tobytes().startswith(b"it is unknown")
    library.close()


def test_what_is_missing_for_arm_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("OTK_TEST_PROGRAM", raising=False)
    assert csrc_process.why_not_emulated() == (
        "NEON is not run: no aarch64-linux-gnu-g++ and no qemu-aarch64; "
        "on Debian: apt install g++-aarch64-linux-gnu qemu-user"
    )
