"""Weights, inputs and oracles that the kernel tests share. Also run in child processes, where the
instruction set is forced or memory is guarded, so it needs neither pytest nor fixtures."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from opentrans_kernels import ops
from opentrans_kernels.pack import SparseWeight

EPSILON = 2.0**-23
CHANNELS = (1, 3, 7, 64, 65)
DENSITIES = (0.0, 0.01, 0.1, 0.5, 1.0)
# (kernel, stride, padding)
GEOMETRIES = tuple((k, s, p) for k in (1, 3, 7) for s in (1, 2) for p in (0, 1, 3))


def masked_weight(
    cout: int, cin: int, kernel: int, density: float, seed: int = 0, holes: bool = True
) -> torch.Tensor:
    """Float32 ``[cout, cin, k, k]``; with ``holes``, one output row and one input are empty."""
    made = torch.Generator().manual_seed(seed)
    shape = (cout, cin, kernel, kernel)
    weight = torch.randn(shape, generator=made) / (cin * kernel * kernel) ** 0.5
    weight[torch.rand(shape, generator=made) >= density] = 0
    if holes and density < 1:
        if cout >= 3:
            weight[cout // 2] = 0
        if cin >= 3:
            weight[:, cin // 2] = 0
    return weight


def dense_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int = 1,
    padding: int = 0,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The masked dense network's answer, in float64 unless told otherwise."""
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(x.to(dtype), weight.to(dtype), bias, stride, padding)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.relu() if relu else y


def assert_as_exact_as_dense(out: torch.Tensor, x, weight, bias, *rest, what: object = "") -> None:
    """``out`` may be off by twice the error of dense float32, and by four ulp of the maximum."""
    exact = dense_conv(x, weight, bias, *rest)
    assert out.shape == exact.shape, (what, out.shape, exact.shape)
    dense = dense_conv(x, weight, bias, *rest, dtype=torch.float32)
    # A wide window's sums are long enough to show that dense libraries sum in another order.
    assert_within(out, exact, dense, what, ulp=max(4, 4 * weight.shape[2] ** 2 // 9))


def assert_within(out, exact, dense, what: object = "", ulp: int = 4) -> None:
    assert not out.isnan().any(), f"{what}: NaN in the result"
    if not exact.numel():
        return
    error = (out.double() - exact).abs().max().item()
    own = (dense.double() - exact).abs().max().item()
    allowed = 2 * own + ulp * EPSILON * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, dense float32 has {own:.3g}"


def bottleneck_exact(
    x, convs, pool: int, down_pool: int, dtype=torch.float64, stride: int = 1
) -> torch.Tensor:
    """``convs``: (weight, bias) of conv1, conv2, conv3 and the downsample or None."""
    (w1, b1), (w2, b2), (w3, b3) = ((w.to(dtype), b.to(dtype)) for w, b in convs[:3])
    x = x.to(dtype)
    y = F.conv2d(F.conv2d(x, w1, b1).relu(), w2, b2, stride, padding=1).relu()
    y = F.conv2d(F.avg_pool2d(y, pool) if pool > 1 else y, w3, b3)
    shortcut = F.avg_pool2d(x, down_pool) if down_pool > 1 else x
    if convs[3] is not None:
        shortcut = F.conv2d(shortcut, convs[3][0].to(dtype), convs[3][1].to(dtype), stride)
    return (y + shortcut).relu()


def bottleneck_parts(
    cin: int, width: int, cout: int, density: float, down: bool, seed: int = 0, stride: int = 1
):
    """Returns ((weight, bias) x 4, SparseWeight x 4); the last of both is None without ``down``.

    stride: of conv2 and of the downsample.
    """
    made = torch.Generator().manual_seed(seed)
    shapes = [(width, cin, 1), (width, width, 3), (cout, width, 1)]
    shapes += [(cout, cin, 1)] if down else []
    convs, packs = [], []
    for i, (o, c, k) in enumerate(shapes):
        weight = 2 * masked_weight(o, c, k, density, seed + i)
        convs.append((weight, torch.randn(o, generator=made)))
        packs.append(SparseWeight.from_dense(*convs[-1], stride if i in (1, 3) else 1, k // 2))
    missing = [] if down else [None]
    return convs + missing, packs + missing


def unchecked(packed: SparseWeight, **changes: object) -> SparseWeight:
    """``packed`` with other attributes, past the checks of its constructor."""
    made = object.__new__(SparseWeight)
    made.__dict__.update(vars(packed) | changes)
    return made


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same ``[N, C, H, W]`` through other strides."""
    n, c, h, w = x.shape
    yield "contiguous", x.clone()
    yield "channels_last", x.to(memory_format=torch.channels_last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "batch and channels swapped", x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((n, c + 2, h + 3, w + 5), float("nan"))
    wide[:, 1 : c + 1, 2 : h + 2, 3 : w + 3] = x
    yield "sliced", wide[:, 1 : c + 1, 2 : h + 2, 3 : w + 3]
    steps = torch.full((n, c, 2 * h, 3 * w), float("nan"))
    steps[:, :, ::2, ::3] = x
    yield "every other pixel", steps[:, :, ::2, ::3]
    yield "padded planes", padded_planes(x, float("nan"))
    yield "offset by one float", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def padded_planes(x: torch.Tensor, filler: float) -> torch.Tensor:
    """``x`` with its planes 48 floats further apart than needed, ``filler`` in between."""
    n, c, h, w = x.shape
    plane = (h * w + 15) // 16 * 16 + 48
    store = torch.full((n * c * plane + 16,), filler)
    view = store.as_strided((n, c, h, w), (c * plane, plane, w, 1))
    return view.copy_(x)


_PAGE = mmap.PAGESIZE
_guarded: list[mmap.mmap] = []  # mappings live until the process ends


def at_end_of_page(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` whose last element is the last float before an unreadable page."""
    bytes_ = x.numel() * 4
    pages = -(-bytes_ // _PAGE)
    area = mmap.mmap(-1, (pages + 1) * _PAGE)
    _guarded.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(start + pages * _PAGE, _PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    # frombuffer's storage covers the offset too; what counts is where it ends.
    flat = torch.frombuffer(
        area, dtype=torch.float32, count=x.numel(), offset=pages * _PAGE - bytes_
    )
    return flat.view(x.shape).copy_(x)


def guarded_inputs() -> int:
    """Run every op on inputs, residuals and gradients that end at an unreadable page."""
    runs = 0
    for kernel, stride, padding in ((1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0)):
        weight = masked_weight(17, 5, kernel, 0.5)
        packed = SparseWeight.from_dense(weight, torch.randn(17), stride, padding)
        for h, w in ((3, 3), (5, 7), (1, 13), (16, 16), (17, 9), (4, 4)):
            if min(h, w) + 2 * padding < kernel:
                continue
            x = torch.randn(2, 5, h, w)
            free = ops.sparse_conv2d(x, packed)
            residual = torch.randn(free.shape)
            free = ops.sparse_conv2d(x, packed, residual)
            x, residual = at_end_of_page(x), at_end_of_page(residual)
            assert torch.equal(ops.sparse_conv2d(x, packed, residual), free), (kernel, h, w)
            grad = at_end_of_page(torch.randn(free.shape))
            native = torch.ops.opentrans_kernels
            native.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values)
            native.sparse_conv2d_dgrad(
                grad, packed.structure, packed.values, 5, h, w, stride, padding
            )
            runs += 1
    for pool, down, stride in ((1, False, 1), (1, True, 1), (2, True, 1), (1, True, 2)):
        convs, packs = bottleneck_parts(6, 5, 6, 0.5, down, 0, stride)
        for h, w in ((3, 3), (7, 5), (1, 13), (8, 8), (13, 13)):
            if h < pool:
                continue
            x = torch.randn(2, 6, h, w)
            free = ops.sparse_bottleneck(x, *packs, pool, pool)
            held = at_end_of_page(x)
            assert torch.equal(ops.sparse_bottleneck(held, *packs, pool, pool), free), (pool, h, w)
            assert torch.equal(ops.avg_pool2d(held, pool), ops.avg_pool2d(x, pool))
            for windows in (ops.max_pool2d, ops.window_avg_pool2d):
                assert torch.equal(windows(held, 3, 2, 1), windows(x, 3, 2, 1))
            runs += 1
    return runs


def sweep() -> int:
    """A short contract for one instruction set; returns the number of checked results."""
    runs = 0
    for index, (kernel, stride, padding) in enumerate(GEOMETRIES):
        for cin, cout, density in ((7, 65, 0.1), (65, 7, 0.5), (3, 64, 1.0), (64, 3, 0.01)):
            weight = masked_weight(cout, cin, kernel, density, index)
            bias = torch.randn(cout)
            packed = SparseWeight.from_dense(weight, bias, stride, padding)
            for h, w in ((7, 7), (5, 17), (16, 11), (13, 1)):
                if min(h, w) + 2 * padding < kernel:
                    continue
                x = torch.randn(2, cin, h, w)
                residual = torch.randn_like(dense_conv(x, weight, bias, stride, padding)).float()
                out = ops.sparse_conv2d(x, packed, residual, True)
                what = (kernel, stride, padding, cin, cout, density, h, w)
                rest = (stride, padding, residual, True)
                assert_as_exact_as_dense(out, x, weight, bias, *rest, what=what)
                runs += 1
    for pool, down, stride in (
        (1, False, 1), (1, True, 1), (2, True, 1), (3, True, 1), (1, True, 2),
    ):  # fmt: skip
        convs, packs = bottleneck_parts(13, 9, 13, 0.3, down, 0, stride)
        for h, w in ((3, 3), (7, 5), (14, 14), (17, 4), (45, 20)):
            x = torch.randn(2, 13, h, w)
            out = ops.sparse_bottleneck(x, *packs, pool, pool)
            exact = bottleneck_exact(x, convs, pool, pool, stride=stride)
            dense = bottleneck_exact(x, convs, pool, pool, torch.float32, stride)
            assert_within(out, exact, dense, ("bottleneck", pool, stride, h, w))
            runs += 1
    for geometry in ((3, 2, 1), (3, 1, 1), (5, 3, 2), (2, 2, 0), ((1, 4), (2, 1), (0, 2))):
        for h, w in ((7, 5), (14, 14), (16, 33), (3, 70)):
            x = torch.randn(2, 3, h, w)
            x[x.abs() < 0.2] = 0
            x[x > 1.5] = float("nan")
            found = ops.max_pool2d(x, *geometry)
            assert torch.equal(
                found.view(torch.int32), F.max_pool2d(x, *geometry).view(torch.int32)
            )
            x = x.nan_to_num(2)
            exact, dense = F.avg_pool2d(x.double(), *geometry), F.avg_pool2d(x, *geometry)
            assert_within(ops.window_avg_pool2d(x, *geometry), exact, dense, ("mean", geometry, h))
            runs += 1
    runs += _sweep_gradients()
    return runs


def _sweep_gradients() -> int:
    native = torch.ops.opentrans_kernels
    runs = 0
    for kernel, stride, padding in ((1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0)):
        weight = masked_weight(17, 6, kernel, 0.4)
        packed = SparseWeight.from_dense(weight, None, stride, padding)
        x = torch.randn(3, 6, 9, 7)
        grad = torch.randn_like(dense_conv(x, weight, None, stride, padding)).float()
        found = native.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values)
        results = []
        for dtype in (torch.float64, torch.float32):
            leaf = weight.to(dtype).requires_grad_()
            y = F.conv2d(x.to(dtype), leaf, None, stride, padding)
            (dense,) = torch.autograd.grad(y, leaf, grad.to(dtype))
            results.append(dense.flatten()[packed.indices()])
        assert_within(found, *results, what=("wgrad", kernel, stride))
        runs += 1
    return runs
