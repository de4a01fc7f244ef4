"""What stands around convolutions, without torch in its process: linear layers of tokens, depthwise
convolutions, activations and pools; plain PyTorch in float64 is the oracle. See test_csrc_ops.py.
"""

from __future__ import annotations

import itertools

import linear_cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from csrc_process import Kernels, Pack
from test_csrc import Output, random_conv
from test_csrc_ops import THREADS, ints, numbers, off_by, unwritten

from opentrans_kernels.activations import Activation, Kind
from opentrans_kernels.pack.winograd import transform_weight


def packed_layer(cin: int, cout: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Pack]:
    weight, bias, packed = linear_cases.layer(cin, cout, 0.4, seed)
    return weight, bias, Pack(packed.structure.numpy(), packed.values.numpy(), bias.numpy())


@pytest.mark.parametrize("act", linear_cases.ACTIVATIONS, ids=str)
def test_linear_layers_and_mlps_of_tokens(library: Kernels, act) -> None:
    for cin, wide, count in ((1, 3, 1), (7, 19, 5), (33, 65, 16), (20, 41, 37)):
        weight, bias, one = packed_layer(cin, wide, 0)
        weight2, bias2, two = packed_layer(wide, cin, 1)
        x, extra = numbers(count, cin), numbers(count, wide, seed=1)
        tokens = torch.from_numpy(x)
        exact = linear_cases.dense_linear(tokens, weight, bias, torch.from_numpy(extra), act)
        hidden = linear_cases.dense_linear(tokens, weight, bias, None, act)
        exact_mlp = linear_cases.dense_linear(hidden, weight2, bias2, tokens)
        found = []
        for threads in THREADS:
            out, fused = unwritten(count, wide), unwritten(count, cin)
            code = (int(act.kind), float(act.slope), threads)
            assert not library.linear(one, x, extra, out, count, *code)
            assert off_by(out, exact) <= 16, (cin, wide, count)
            assert not library.mlp([one, two], x, x, fused, count, *code)
            assert off_by(fused, exact_mlp) <= 16, (cin, wide, count)
            middle, after = unwritten(count, wide), unwritten(count, cin)
            assert not library.linear(one, x, None, middle, count, *code)
            assert not library.linear(two, middle, x, after, count, 0, 0.0, threads)
            assert np.array_equal(fused, after), "one op is two"
            found.append((out, fused))
        assert all(map(np.array_equal, *found)), "threads change no bit"


def activated(y: torch.Tensor, kind: Kind) -> torch.Tensor:
    return Activation(kind, 0.25).apply_(y.clone())


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 4])
def test_depthwise_convolution(library: Kernels, kernel: int) -> None:
    sizes = ((1, 1, 1), (2, 7, 9), (1, 16, 33), (1, 40, 21))
    steps = itertools.product((1, 2, 3), (0, kernel // 2, kernel), sizes)
    for index, (stride, padding, (n, h, w)) in enumerate(steps):
        if min(h, w) + 2 * padding < kernel:
            continue
        kind = Kind(index % len(Kind))
        x, weight, bias = numbers(n, 3, h, w), numbers(3, 1, kernel, kernel, seed=1), numbers(3)
        exact = F.conv2d(
            *(torch.from_numpy(t).double() for t in (x, weight, bias)), stride, padding, groups=3
        )
        results = []
        for threads in THREADS:
            out = Output(library, *exact.shape)
            assert not library.depthwise(
                x, weight, bias if index % 4 else np.zeros(3, np.float32), out.data, n, 3, h, w,
                *exact.shape[2:], kernel, stride, padding, kind, 0.25, threads,
            )  # fmt: skip
            results.append(out.pixels())
        if index % 4 == 0:
            exact = exact - torch.from_numpy(bias).double().view(1, 3, 1, 1)
        assert off_by(results[0], activated(exact, kind)) <= 32, (stride, padding, h, w)
        assert np.array_equal(*results)


@pytest.mark.parametrize("channels", [(1, 1), (5, 17), (270, 9)], ids=str)
def test_dense_convolution_by_winograds_method(library: Kernels, channels) -> None:
    cin, cout = channels
    weight, bias = numbers(cout, cin, 3, 3), numbers(cout, seed=1)
    packed = transform_weight(torch.from_numpy(weight)).numpy()
    sizes = ((1, 3, 3), (2, 7, 9), (1, 16, 33), (1, 30, 100))
    for index, (padding, (n, h, w)) in enumerate(itertools.product((0, 1, 2), sizes)):
        x = numbers(n, cin, h, w)
        exact = F.conv2d(
            *(torch.from_numpy(t).double() for t in (x, weight, bias)), padding=padding
        )
        extra = numbers(*exact.shape, seed=2) if index % 2 else None
        if extra is not None:
            exact = exact + torch.from_numpy(extra).double()
        kind = Kind.RELU if index % 3 else Kind.SILU
        results = []
        for threads in THREADS:
            out = Output(library, *exact.shape)
            assert not library.winograd(
                x, packed, bias, extra, out.data, n, cin, cout, h, w, padding, kind, threads
            )
            results.append(out.pixels())
        assert off_by(results[0], activated(exact, kind)) <= 32, (padding, h, w)
        assert np.array_equal(*results)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_every_activation_behind_a_convolution(library: Kernels, kind: Kind) -> None:
    for kernel, (n, h, w) in itertools.product((1, 3), ((1, 5, 7), (2, 16, 16), (1, 3, 29))):
        dense, bias, structure, values = random_conv(
            np.random.default_rng(kernel), 7, 6, kernel, 1, kernel // 2
        )
        x, residual = 2 * numbers(n, 6, h, w), numbers(n, 7, h, w, seed=3)
        exact = F.conv2d(*(torch.from_numpy(t).double() for t in (x, dense, bias)), 1, kernel // 2)
        for extra in (None, residual):
            out = Output(library, *exact.shape)
            assert not library.conv(
                Pack(structure, values, bias), x, extra, out.data, n, h, w, h, w, kind, 0.25, 1
            )
            y = exact if extra is None else exact + torch.from_numpy(extra)
            assert off_by(out.pixels(), activated(y, kind)) <= 32, (kernel, h, w)


@pytest.mark.parametrize("geometry", [(3, 3, 2, 2, 1, 1), (2, 5, 1, 3, 1, 2), (4, 1, 5, 2, 0, 0)])
def test_maxima_and_means_of_windows(library: Kernels, geometry: tuple[int, ...]) -> None:
    steps = geometry[:2], geometry[2:4], geometry[4:]
    for n, c, h, w in ((1, 1, 4, 5), (2, 3, 7, 11), (1, 2, 16, 10), (2, 2, 17, 35)):
        x = numbers(n, c, h, w)
        x[np.abs(x) < 0.3] = 0
        x[0, 0, 1] = -0.0
        tensor = torch.from_numpy(x)
        spoilt = tensor.clone()
        spoilt[0, 0, 2, 1], spoilt[0, 0, 3, 2] = float("nan"), float("-inf")
        want = torch.nn.functional.max_pool2d(spoilt, *steps).numpy()
        for threads in THREADS:
            out = Output(library, *want.shape)
            rest = (n, c, h, w, *want.shape[2:], ints(*geometry))
            assert not library.windows(spoilt.numpy(), out.data, *rest, 0, -1, threads)
            assert np.array_equal(out.pixels().view(np.int32), want.view(np.int32))
            for with_padding, divisor in ((0, 0), (1, 0), (1, 3)):
                exact = torch.nn.functional.avg_pool2d(
                    tensor.double(), *steps, False, bool(with_padding), divisor or None
                )
                out = Output(library, *want.shape)
                assert not library.windows(x, out.data, *rest, with_padding, divisor, threads)
                assert off_by(out.pixels(), exact) <= 8
