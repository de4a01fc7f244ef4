"""Operators are called below autograd where gradients are off, and nowhere else."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opentrans_kernels import SparseConv2d
from opentrans_kernels.ops.library import past_autograd


def below_autograd() -> bool:
    excluded = torch._C._dispatch_tls_local_exclude_set()
    return excluded.has(torch._C.DispatchKey.AutogradFunctionality)


@pytest.fixture
def conv(extension: None) -> SparseConv2d:
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False).eval()
    return SparseConv2d.from_conv(dense, torch.rand_like(dense.weight) < 0.5)


def test_the_formula_is_called_with_gradients_only(conv: SparseConv2d) -> None:
    x = torch.randn(1, 4, 9, 9)
    op = torch.ops.opentrans_kernels.sparse_conv2d.default
    calls = []

    def counted(*args):
        calls.append(below_autograd())
        return op(*args)

    run = past_autograd(counted)
    engine = conv.opentrans_engine
    arguments = (engine.structure, engine.values, engine.bias, None, 6, 3, 1, 1, 0)
    expected = run(x, *arguments)
    with torch.no_grad():
        assert torch.equal(run(x, *arguments), expected)
    with torch.inference_mode():
        assert torch.equal(run(x, *arguments), expected)
    assert calls == [False, True, True]
    leaf = x.clone().requires_grad_()
    run(leaf, *arguments).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_accelerated_modules_do_not_call_the_formula(conv: SparseConv2d) -> None:
    called = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_name == "autograd_impl":
            called.append(torch.is_grad_enabled())

    x = torch.randn(1, 4, 9, 9)
    sys.setprofile(note)
    try:
        conv(x)
        with torch.no_grad():
            conv(x)
    finally:
        sys.setprofile(None)
    assert called == [True]


def test_modes_autocast_and_compilers_see_the_operator(conv: SparseConv2d) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        expected = conv(x)
        with Mode():
            assert torch.equal(conv(x), expected)
        assert "opentrans_kernels.sparse_conv2d.default" in seen
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(conv(x), expected)
            assert conv(x.bfloat16()).dtype == torch.float32
        found = torch.compile(conv, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(found, expected)
        batched = torch.func.vmap(conv)(x[None].repeat(2, 1, 1, 1, 1))
        torch.testing.assert_close(batched, expected[None].repeat(2, 1, 1, 1, 1))


def test_nothing_is_left_excluded_after_an_error(conv: SparseConv2d) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        conv(torch.randn(1, 5, 9, 9))
    assert not below_autograd()
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
