"""Gradient skipping trains on the weights as they are, whatever wrote to them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accel_nets import random_masks
from gradskip_nets import baseline, freeze_set, gradients, small_trunk
from torch import nn

from opentrans import skip_frozen
from opentrans_kernels.ops import contents

SIZE = (64, 64)


def pair(kind: str, sparse: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ...]:
    """A network with frozen layers skipped, and the same one in plain PyTorch."""
    model = small_trunk().to(dtype)
    masks = random_masks(model, 0.3) if sparse else None
    if masks is not None:
        masks.apply_(model)
    frozen = freeze_set(model, kind)
    plain = baseline(model, frozen)
    report = skip_frozen(model, frozen, masks=masks)
    assert not sparse or report.sparse
    assert kind != "first" or not sparse or report.accelerated, "no fused block to show anything"
    return model, plain


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in want.items():
        if name in found:
            value = value.detach()
            scale = value.abs().max().clamp_min(1e-12)
            error = float((found[name].detach() - value).abs().max() / scale)
            assert error <= tolerance, f"{name}: {error:.1e}"


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains in both networks."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "bn" not in n}


def check(model: nn.Module, plain: nn.Module, sparse: bool) -> None:
    dtype = next(model.parameters()).dtype
    x, g = torch.randn(1, 3, *SIZE, dtype=dtype), torch.randn(1, 256, 2, 2, dtype=dtype)
    found, want = gradients(model, x, g), gradients(plain, x, g)
    if sparse:  # plain PyTorch gives dead weights a gradient as well
        for name, parameter in trained(model).items():
            want[name] = want[name] * (parameter != 0)
            found[name] = found[name] * (parameter != 0)
    same(found, want, 2e-4 if dtype == torch.float32 else 1e-9)


def images(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, 3, *SIZE, dtype=dtype)


def sign_step(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    weight.data.add_(gradient.sign(), alpha=-1e-3)


def plain_step(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    weight.data.add_(gradient / gradient.abs().max().clamp_min(1e-12), alpha=-1e-2)


@pytest.mark.parametrize(
    ("sparse", "step"), [(False, sign_step), (False, plain_step), (True, plain_step)]
)
@pytest.mark.parametrize("kind", ["odd", "first", "none"])
def test_steps_through_data_are_those_of_the_plain_network(
    kind: str, sparse: bool, step: Callable
) -> None:
    dtype = torch.float32 if sparse else torch.float64  # where rounding flips no sign
    model, plain = pair(kind, sparse, dtype)
    for _ in range(3):
        x, target = images(dtype), torch.randn(1, 256, 2, 2, dtype=dtype)
        for network in (model, plain):
            network.zero_grad(set_to_none=True)
            (network(x) - target).square().mean().backward()
            for weight in trained(network).values():
                step(weight, weight.grad * (weight != 0) if sparse else weight.grad)
    same(dict(model.named_parameters()), trained(plain), 1e-4 if sparse else 1e-9)
    check(model, plain, sparse)


def by_scale(t: torch.Tensor) -> None:
    t.data.mul_(0.5)


def by_swap(t: torch.Tensor) -> None:
    average = t.detach() * 0.5
    t.data, average.data = average.data, t.data


def by_numpy(t: torch.Tensor) -> None:
    t.detach().numpy()[...] *= 0.5


def by_foreach(t: torch.Tensor) -> None:
    torch._foreach_mul_([t.data], 0.5)


def one_element(t: torch.Tensor) -> None:
    t.data.view(-1)[t.detach().view(-1).abs().argmax()] *= 2


@pytest.mark.parametrize(("kind", "sparse"), [("odd", False), ("odd", True), ("first", True)])
@pytest.mark.parametrize("write", [by_scale, by_swap, by_numpy, by_foreach, one_element])
def test_frozen_layers_are_folded_again_after_a_write(
    kind: str, sparse: bool, write: Callable
) -> None:
    model, plain = pair(kind, sparse)
    check(model, plain, sparse)
    for name in ("conv2.weight", "bn3.bias", "layer1.0.conv2.weight", "layer1.0.bn1.running_var"):
        for network in (model, plain):
            tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            write(tensors[f"visual.{name}"])
        check(model, plain, sparse)
    check(model, plain, sparse)
    check(copy.deepcopy(model), plain, sparse)


@pytest.mark.parametrize("sparse", [False, True])
def test_parameters_of_functional_call_are_honoured(sparse: bool) -> None:
    model, plain = pair("first", sparse)
    x = images(torch.float32)
    other = {n: p.detach() * 0.5 for n, p in trained(small_trunk()).items() if "conv" in n}
    other = {n: t * (dict(model.named_parameters())[n] != 0) for n, t in other.items()}
    with torch.no_grad():
        before = model(x)
        found = torch.func.functional_call(model, other, (x,))
        want = torch.func.functional_call(plain, other, (x,))
        same({"y": found}, {"y": want}, 1e-4)
        assert torch.equal(model(x), before)


def test_a_compiled_step_sees_writes_through_data() -> None:
    torch._dynamo.reset()
    model, plain = pair("odd", False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    x = images(torch.float32)
    compiled(x).sum().backward()
    for network in (model, plain):
        network.zero_grad(set_to_none=True)
        by_scale(network.visual.conv2.weight)
        by_scale(network.visual.layer2[0].conv1.weight)
    found, want = compiled(x), plain(x)
    same({"y": found.detach()}, {"y": want.detach()}, 1e-4)
    found.sum().backward(), want.sum().backward()
    gradients_of = [{n: p.grad for n, p in trained(m).items()} for m in (model, plain)]
    same(*gradients_of, 2e-4)


def test_unchanged_weights_are_folded_once_and_training_ones_are_not_summed_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = pair("odd", True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    made = []
    real = contents.Contents.__init__

    def counted(self: contents.Contents, tensors: list[torch.Tensor]) -> None:
        made.append(len(tensors))
        real(self, tensors)

    monkeypatch.setattr(contents.Contents, "__init__", counted)
    for step in range(4):
        made.clear()
        optimizer.zero_grad(set_to_none=True)
        model(images(torch.float32)).square().mean().backward()
        optimizer.step()
        assert bool(made) == (step == 0)
    for expected in (False, True, False):  # evaluated: gathered, found to rest, and kept from then
        made.clear()
        with torch.no_grad():
            model(images(torch.float32))
        assert bool(made) == expected


def test_the_checksum_is_the_same_with_and_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, extension: None
) -> None:
    tensors = [
        torch.randn(3, 700),
        torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(9, 9)[::2, 1:8:3],
        torch.arange(300, dtype=torch.int16)[1:],
        torch.randn(257, dtype=torch.bfloat16)[3:],
        torch.tensor(float("nan")),
        torch.empty(0),
        torch.tensor([True, False, True]),
        torch.randn(40, dtype=torch.complex64),
        torch.randn(1030, dtype=torch.float64),
    ]
    native = contents.Contents(tensors)
    monkeypatch.setattr("opentrans_kernels.native.load", lambda: False)
    plain = contents.Contents(tensors)
    assert torch.equal(native._sums, plain._sums) and len(set(native._sums.tolist())) > 10
    assert native.first_change(tensors) == plain.first_change(tensors) == -1


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_what_a_checksum_tells_apart(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr("opentrans_kernels.native.load", lambda: False)
    x = torch.randn(64, 33)
    x[3] = 0.0
    found = contents.Contents([x])
    others = {
        "negated": -x,
        "zeros negated": torch.where(x == 0, -x, x),
        "rows swapped": x.flip(0),
        "two elements swapped": x.view(-1)[[1, 0, *range(2, x.numel())]].view_as(x),
        "two signs": x * torch.ones(33).index_fill(0, torch.tensor([1, 3]), -1),
        "one bit": (x.view(torch.int32) ^ torch.zeros(64, 33, dtype=torch.int32).index_fill(
            1, torch.tensor([7]), 1)).view(torch.float32),
        "a NaN of another kind": torch.where(x == x[0, 0], float("nan"), x),
        "another shape": x.view(33, 64),
        "another dtype": x.view(torch.int32),
    }  # fmt: skip
    for name, other in others.items():
        assert found.first_change([other.contiguous()]) == 0, name
    assert found.first_change([x.clone()]) == -1
