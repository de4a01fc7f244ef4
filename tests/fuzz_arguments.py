"""Arguments that no caller should pass, for ``fuzz_ops.py``: kinds of cases, each of which calls an
op with tensors of odd shapes, strides, dtypes and contents.

A case passes if the op refuses the arguments or gives what plain PyTorch gives.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from kernel_cases import layouts, masked_weight

from opentrans_kernels import ops  # noqa: F401  (defines the ops)
from opentrans_kernels.activations import Activation
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.ops.mask_scores import reference as mask_reference
from opentrans_kernels.ops.ms_deform_attn import reference as deform
from opentrans_kernels.ops.relu_bits import reference
from opentrans_kernels.pack import SparseWeight
from opentrans_kernels.pack.winograd import transform_weight

OPS = torch.ops.opentrans_kernels
REFUSED = (OpenTransError, RuntimeError)
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 5, 17, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 + 2, 2**62)
SIZES = (0, 1, 2, 3, 7, 8, 13, 16)
HUGE = (2**30 + 1, 2**31 - 1, 2**31, 2**31 + 3, 2**32 + 3, 2**40)


def tried(call):
    """The call's result, or None if it was refused."""
    try:
        return call()
    except REFUSED:
        return None


def odd_tensor(rng: random.Random, channels: int = 0) -> torch.Tensor:
    """Mostly float32 ``[N, C, H, W]`` of any layout; sometimes of no use at all."""
    sizes = [rng.choice(SIZES) for _ in range(4)]
    sizes[0] = rng.choice((0, 1, 2))
    if channels and rng.random() < 0.8:
        sizes[1] = channels
    what = rng.random()
    if what < 0.1:
        sizes[rng.randrange(4)] = rng.choice(HUGE)
        return torch.zeros(1, 1, 1, 1).expand(sizes)
    if what < 0.2:
        return torch.randn(1, *[s if rng.random() < 0.5 else 1 for s in sizes[1:]]).expand(sizes)
    if what < 0.25:
        return torch.randn(sizes[: rng.choice((0, 1, 3))])
    if what < 0.3:
        kind = rng.choice((torch.float64, torch.int32, torch.bfloat16, torch.bool))
        return torch.ones(sizes, dtype=kind)
    if what < 0.33:
        return torch.randn(sizes).to_sparse()
    if what < 0.4:  # a dimension of one element may have any stride
        sizes[rng.randrange(4)] = 1
        strides = [2**61 if s == 1 else t for s, t in zip(sizes, torch.empty(sizes).stride())]  # noqa: B905
        return torch.randn(max(1, torch.Size(sizes).numel())).as_strided(sizes, strides)
    x = torch.randn(sizes)
    return rng.choice(list(layouts(x)))[1] if x.numel() else x


def an_image(rng: random.Random) -> None:
    kernel = rng.choice((1, 1, 3, 5))
    weight = masked_weight(rng.randint(1, 9), rng.randint(1, 9), kernel, 0.5, rng.randrange(9))
    stride, padding = rng.choice((1, 2)), rng.choice((0, kernel // 2))
    packed = SparseWeight.from_dense(weight, None, stride, padding)
    x = odd_tensor(rng, packed.cin)
    residual = odd_tensor(rng, packed.cout) if rng.random() < 0.3 else None
    if residual is not None and x.dim() == 4 and rng.random() < 0.7:
        size = [(s + 2 * padding - kernel) // stride + 1 for s in x.shape[2:]]
        if 0 < min(size) and max(size) < 99 and x.shape[0] < 9:
            residual = torch.randn(1, packed.cout, 1, 1).expand(x.shape[0], packed.cout, *size)
    found = tried(lambda: OPS.sparse_conv2d(
        x, packed.structure, packed.values, packed.bias, residual,
        packed.cout, kernel, stride, padding, False))  # fmt: skip
    if found is not None and found.numel():
        exact = F.conv2d(x.double(), weight.double(), None, stride, padding)
        exact = exact if residual is None else exact + residual
        assert found.shape == exact.shape
        assert torch.allclose(found.double(), exact, atol=1e-4), "another result"
    grad = odd_tensor(rng, packed.cout) if found is None else torch.randn(found.shape)
    tried(lambda: OPS.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values))
    parts = [packed.structure, packed.values, packed.bias]
    spoilt = rng.randrange(3)
    parts[spoilt] = rng.choice((
        parts[spoilt].double(), parts[spoilt][None], parts[spoilt].repeat_interleave(2)[::2],
        parts[spoilt][:1].expand(len(parts[spoilt])), parts[spoilt][:0],
        parts[spoilt].new_zeros(1).expand(2**33),
    ))  # fmt: skip
    odd = (rng.random() < 0.5, rng.choice(NUMBERS), rng.choice((0.0, -1.5, math.nan, math.inf)))
    tried(lambda: OPS.sparse_conv2d(x, *parts, None, packed.cout, kernel, stride, padding, *odd))


def a_depthwise(rng: random.Random) -> None:
    channels, kernel = rng.randint(1, 9), rng.choice((1, 2, 3, 5, 7))
    x, weight = odd_tensor(rng, channels), torch.randn(channels, 1, kernel, kernel)
    bias = torch.randn(channels) if rng.random() < 0.5 else None
    stride, padding = rng.choice((1, 2, 3, 40)), rng.choice((0, kernel // 2, kernel, 50))
    kind, slope = rng.choice((0, 1, 2, 3, 4, 5)), rng.uniform(-1, 1)
    spoilt = rng.random()
    if spoilt < 0.2:
        weight = odd_tensor(rng)
    elif spoilt < 0.3:
        bias = odd_tensor(rng)
    elif spoilt < 0.5 and x.numel() < 100:
        stride, kind = rng.choice(NUMBERS), rng.choice(NUMBERS)
        padding = rng.choice((-1, -(2**63), 2**31, 2**62))
    found = tried(lambda: OPS.depthwise_conv2d(x, weight, bias, stride, padding, kind, slope))
    if found is None or not found.numel() or not x.numel():  # PyTorch takes no empty image
        return
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(),
                     stride, padding, groups=x.shape[1])  # fmt: skip
    exact = Activation(kind, slope).apply_(exact)
    assert torch.allclose(found.double(), exact, atol=1e-3), "another convolution"


def a_winograd(rng: random.Random) -> None:
    cin, cout = rng.choice((1, 3, 9, 40)), rng.choice((1, 7, 8, 17))
    x, weight = odd_tensor(rng, cin), torch.randn(cout, cin, 3, 3)
    packed, padding = transform_weight(weight), rng.choice((0, 1, 2, 5))
    bias = torch.randn(cout) if rng.random() < 0.5 else None
    residual, told = None, cout
    kind, slope = rng.choice((0, 1, 2, 3, 4, 5)), rng.uniform(-1, 1)
    spoilt = rng.random()
    if spoilt < 0.2:
        packed = odd_tensor(rng)
    elif spoilt < 0.3:
        bias = odd_tensor(rng)
    elif spoilt < 0.4:
        residual = odd_tensor(rng, cout)
    elif spoilt < 0.6 and x.numel() < 100:
        told, padding, kind = (rng.choice(NUMBERS) for _ in range(3))
    found = tried(
        lambda: OPS.winograd_conv2d(x, packed, bias, residual, told, padding, kind, slope)
    )
    if found is None or not found.numel() or not x.numel():
        return
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(),
                     padding=padding)  # fmt: skip
    exact = Activation(kind, slope).apply_(exact if residual is None else exact + residual)
    assert torch.allclose(found.double(), exact, atol=1e-3), "another convolution"


def a_pool(rng: random.Random) -> None:
    x, k = odd_tensor(rng), rng.choice(NUMBERS)
    found = tried(lambda: OPS.avg_pool2d(x, k))
    if found is not None and found.numel():
        assert torch.allclose(found, F.avg_pool2d(x, k), atol=1e-5), "another mean"
    grad, out = odd_tensor(rng), odd_tensor(rng)
    if rng.random() < 0.7 and 0 < k < 99:
        out = torch.empty(
            rng.randint(0, 2), rng.randint(0, 5), rng.randint(0, 20), rng.randint(0, 20)
        )
        grad = torch.randn(*out.shape[:2], out.shape[2] // k, out.shape[3] // k)
    tried(lambda: OPS.avg_pool2d_backward(grad, out.clone() if out.is_sparse else out, k))
    window, stride, padding = (
        [rng.choice(NUMBERS) if rng.random() < 0.1 else rng.choice(some) for _ in range(2)]
        for some in ((1, 2, 3, 5), (1, 2, 3, 4), (0, 0, 1, 2))
    )
    ceil_mode, divisor = rng.random() < 0.3, rng.choice((0, 0, 1, -3, 2**40))
    found = tried(lambda: OPS.max_pool2d(x, window, stride, padding, ceil_mode))
    if found is not None and found.numel():
        assert torch.equal(found, F.max_pool2d(x, window, stride, padding, 1, ceil_mode))
    rest = (window, stride, padding, ceil_mode, rng.random() < 0.5)
    found = tried(lambda: OPS.window_avg_pool2d(x, *rest, divisor))
    if found is not None and found.numel():
        assert torch.allclose(found, F.avg_pool2d(x, *rest, divisor or None), atol=1e-4)


def a_relu(rng: random.Random) -> None:
    last = rng.random() < 0.5
    shape = [rng.randint(0, 2), rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 9)]
    kind = torch.channels_last if last else torch.contiguous_format
    z = torch.randn(shape).contiguous(memory_format=kind)
    size = shape[1] + rng.choice((0, 0, 0, -1, 1))
    scale = torch.randn(max(size, 0)) if rng.random() < 0.5 else None
    shift = torch.randn(shape[1]) if rng.random() < 0.5 else None
    residual = torch.randn(shape).contiguous(memory_format=kind) if rng.random() < 0.5 else None
    if rng.random() < 0.2:
        residual = odd_tensor(rng)
    bits = rng.random() < 0.7
    mine, theirs = (z.clone(memory_format=torch.preserve_format) for _ in range(2))
    found = tried(lambda: OPS.relu_bits(mine, scale, shift, residual, bits, last))
    if found is not None and z.numel():
        exact = reference.relu_bits(theirs, scale, shift, residual, bits, last)
        assert torch.allclose(mine, theirs, atol=1e-5)
        assert not bits or found.shape == exact.shape
    grad = odd_tensor(rng) if rng.random() < 0.2 else torch.randn_like(z)
    mask = found if rng.random() < 0.5 else torch.zeros(
        rng.randint(0, 9), rng.randint(0, 9), dtype=torch.uint8)  # fmt: skip
    y = odd_tensor(rng) if rng.random() < 0.1 else None
    out = torch.empty_like(z) if rng.random() < 0.8 else odd_tensor(rng)
    scaled = None if scale is None else torch.empty_like(z)
    if not out.is_sparse and out.numel() < 10**6 and 0 not in out.stride():
        tried(lambda: OPS.relu_bits_backward(grad, mask, y, scale, out, scaled, last))


def a_spectrum(rng: random.Random) -> None:
    counts = [rng.choice((0, 1, 2, 9, 70)) for _ in range(rng.randint(0, 4))]
    x = torch.cat([torch.rand(c, dtype=torch.float64).sort().values for c in counts or [0]])
    if len(x) and rng.random() < 0.4:
        at = rng.randrange(len(x))
        x[at] = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 1e-320, 1e308, x[-1].item()))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    first, last = torch.zeros(len(counts), dtype=torch.int64), torch.tensor(counts).long()
    for t in (offsets, first, last):
        if len(t) and rng.random() < 0.2:
            t[rng.randrange(len(t))] += rng.choice((-(2**62), -1, 1, 2, 2**62))
    tried(lambda: OPS.powerlaw_fit(
        x, offsets, first, last, rng.choice(NUMBERS), rng.choice(NUMBERS)))  # fmt: skip
    found = tried(lambda: OPS.powerlaw_fit(x, offsets, first, last))
    if found is not None and len(counts):
        start = found[:, 0].long()
        assert (start >= -1).all() and (start < last.clamp_min(1)).all(), "a start outside"


def a_matrix(rng: random.Random) -> None:
    shape = [rng.randint(0, 3), rng.choice((0, 1, 2, 5, 31, 33, 65)), rng.choice((0, 1, 3, 40))]
    a = torch.randn(shape, dtype=rng.choice((torch.float32, torch.float64, torch.float64)))
    what = rng.random()
    if what < 0.2 and a.numel():
        a.view(-1)[rng.randrange(a.numel())] = rng.choice((float("nan"), float("inf"), 1e30, 1e-30))
    elif what < 0.3:
        a = a.transpose(1, 2)
    elif what < 0.4:
        a = torch.zeros(1, 1, 1, dtype=a.dtype).expand(1, rng.choice((3, *HUGE)), 2)
    elif what < 0.45:
        a = rng.choice((a[0] if shape[0] else a.sum(), a.long(), a.to_sparse()))
    numbers = [rng.choice((1.0, 0.0, -1.0, 1e-5, 1e300, float("nan"), float("inf"))) for _ in "abc"]
    tried(lambda: OPS.gram_eigenvalues(a, *numbers))
    found = tried(lambda: OPS.gram_eigenvalues(a))
    if found is not None and found[0].numel() and bool(a.isfinite().all()):
        exact = torch.linalg.eigvalsh(a.double() @ a.double().mT)
        largest = exact.abs().max() + 1e-30
        assert ((found[0] - exact).abs() <= 1e-9 * largest).all(), "other eigenvalues"


def some_masks(rng: random.Random) -> None:
    masks = odd_tensor(rng)
    sizes = list(masks.shape[:2]) if masks.dim() == 4 else [1, 2]
    if rng.random() < 0.1:
        sizes[rng.randrange(2)] = rng.choice((0, 1, 9, *HUGE))
    sizes.append(rng.choice((0, 1, 2, 7, 19)))
    kind = torch.float32 if rng.random() < 0.95 else torch.float64
    if math.prod(sizes) >= 2**63:
        return
    classes = torch.rand(1, 1, 1, dtype=kind).expand(sizes)
    if classes.numel() < 10**5:
        classes = torch.rand(sizes, dtype=kind)
    steps = []
    for _ in range(3):
        pair = [rng.choice((1, 2, 3, 8, 17, 40)) for _ in range(rng.choice((0, 2, 2, 2, 1, 3)))]
        if pair and rng.random() < 0.05:
            pair = [rng.choice(NUMBERS), 1]
        steps.append(pair)
    if rng.random() < 0.7 and masks.dim() == 4:  # a cut that fits
        steps[1] = [max(1, n - rng.choice((0, 1, 5))) for n in steps[0] or masks.shape[2:]]
    found = tried(lambda: OPS.mask_scores(masks, classes, *steps))
    if found is not None and found.numel() and masks.numel() < 10**6:
        exact = mask_reference.mask_scores(masks.double(), classes.double(), *steps)
        assert found.shape == exact.shape
        assert torch.allclose(found.double(), exact, atol=1e-4, equal_nan=True), "other scores"


def an_attention(rng: random.Random) -> None:
    levels = [(rng.choice(SIZES), rng.choice(SIZES)) for _ in range(rng.randint(0, 3))]
    n, m, q, p = rng.randint(0, 2), rng.randint(0, 3), rng.randint(0, 20), rng.choice((0, 1, 4, 5))
    d = rng.choice((0, 1, 5, 8, 32, 33))
    value = torch.randn(n, sum(h * w for h, w in levels), m, d)
    shapes = torch.tensor(levels, dtype=torch.int64).view(-1, 2)
    locations = 0.5 + rng.choice((0.3, 3.0)) * torch.randn(n, q, m, len(levels), p, 2)
    weights = torch.randn(locations.shape[:-1])
    reference = torch.rand(n, q, len(levels), rng.choice((2, 4))) if rng.random() < 0.5 else None
    for t in (locations, weights):
        if t.numel() and rng.random() < 0.3:
            odd = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45)
            t.view(-1)[rng.randrange(t.numel())] = rng.choice(odd)
    arguments = [value, shapes, locations, weights, reference]
    found = tried(lambda: OPS.ms_deform_attn(*arguments))
    exact = deform.ms_deform_attn(*(t if t is shapes or t is None else t.double()
                                    for t in arguments))  # fmt: skip
    assert found is not None and found.shape == exact.shape, "good arguments were refused"
    if bool(weights.isfinite().all()):
        known = exact.abs() < 1e30
        gap = (found - exact)[known].abs()
        assert not gap.numel() or gap.max() <= 1e-4 * (1 + exact[known].abs().max()), "another sum"
    grad = torch.randn(found.shape)
    assert tried(lambda: OPS.ms_deform_attn_backward(grad, *arguments[:4])) is not None
    spoilt = rng.randrange(5)
    good = arguments[spoilt]
    if spoilt == 1 and levels:
        shapes = shapes.clone()
        shapes.view(-1)[rng.randrange(shapes.numel())] = rng.choice(NUMBERS)
        arguments[1] = shapes
    elif good is not None:
        arguments[spoilt] = rng.choice((
            good.double(), good[None], good[..., :-1], good.long(), good.new_zeros(()),
            good.new_zeros([1] * good.dim()).expand([rng.choice(HUGE), *good.shape[1:]]),
            good.new_zeros([1] * good.dim()).expand([*good.shape[:-1], rng.choice(HUGE)]),
        ))  # fmt: skip
    tried(lambda: OPS.ms_deform_attn(*arguments))
    tried(lambda: OPS.ms_deform_attn_backward(
        grad if rng.random() < 0.7 else odd_tensor(rng), *arguments[:4]))  # fmt: skip


KINDS = (
    an_image,
    an_image,
    a_depthwise,
    a_winograd,
    a_pool,
    a_relu,
    a_spectrum,
    a_matrix,
    some_masks,
    an_attention,
)
