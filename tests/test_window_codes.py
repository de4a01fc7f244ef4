"""Where the codes of a window lie: computed for most kernels, from a table for the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_within

from opentrans_kernels import ops
from opentrans_kernels.pack import SparseWeight


@pytest.mark.parametrize("kernel", [2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 23, 31])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("channels", [3, 50])
def test_every_code_of_every_kernel(
    extension: None, kernel: int, stride: int, dilation: int, channels: int
) -> None:
    generator = torch.Generator().manual_seed(kernel)
    span = (kernel - 1) * dilation + 1
    weight = torch.randn(3, channels, kernel, kernel, generator=generator) / kernel
    bias = torch.randn(3, generator=generator)
    packed = SparseWeight.from_dense(weight, bias, stride, span // 2, dilation)
    for h, w in ((span + 2, 9), (6, span + 21)):  # pieces of rows, and whole vectors
        x = torch.randn(1, channels, h, w, generator=generator)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, span // 2, dilation)
        rough = F.conv2d(x, weight, bias, stride, span // 2, dilation)
        assert_within(ops.sparse_conv2d(x, packed), exact, rough, (h, w))
