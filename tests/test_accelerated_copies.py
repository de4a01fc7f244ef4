"""Accelerated models saved whole, copied, sent to a process, and made in inference mode."""

from __future__ import annotations

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import accel_nets as nets
import fresh_process
import pytest
import torch
from torch import nn

from opentrans_kernels import (
    PlanError,
    SparseConv2d,
    UnsupportedModelError,
    accelerate,
    restore,
    save_accelerated,
)
from opentrans_kernels.nn import SparseEngine
from opentrans_kernels.stage import AcceleratedStage

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def deep_tower() -> nn.Module:
    """Two blocks per stage, so that stages run as one op."""
    net = nets.clip_resnet.ModifiedResNet((2, 1, 1, 1), 64, 4, image_size=64, width=8)
    return nets.randomise(net)


def to_a_process(model: nn.Module) -> nn.Module:
    """As ``spawn`` sends it to a worker: tensors through shared memory."""
    return pickle.loads(ForkingPickler.dumps(model))


COPIES = {
    "spawn": to_a_process,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "deepcopy of a pickle": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_bit_equal_and_can_be_restored(how: str, tmp_path: Path) -> None:
    model = deep_tower()
    masks = nets.random_masks(model)
    dense = copy.deepcopy(model)
    accelerate(model, masks, measure=False)
    assert isinstance(model.layer1, AcceleratedStage)
    expected = model(X)
    twin = COPIES[how](model)
    assert isinstance(twin.layer1, AcceleratedStage)
    assert torch.equal(twin(X), expected)
    assert twin.conv1.weight is twin.conv1.opentrans_original.weight
    seen: list[int] = []
    handle = twin.layer1[1].conv2.register_forward_hook(lambda *_: seen.append(1))
    twin(X)
    assert seen and torch.equal(model(X), expected)
    handle.remove()
    assert torch.equal(twin(X), expected)
    save_accelerated(tmp_path / "packed.safetensors", twin)
    restore(twin)
    assert type(twin.conv1) is nn.Conv2d
    assert torch.equal(twin(X), dense(X)) and torch.equal(model(X), expected)


def test_a_damaged_pack_is_refused_when_it_comes_back() -> None:
    conv = nn.Conv2d(8, 8, 3).eval()
    sparse = SparseConv2d.from_conv(conv)
    sparse.opentrans_engine.structure[-1] += 60_000
    data = pickle.dumps(sparse)
    with pytest.raises(PlanError):
        pickle.loads(data)


LOADED = """
import pickle, sys, torch
torch.set_num_threads(1)  # the attention pool is PyTorch's, and rounds by their number
model, x, y = pickle.load(open(sys.argv[1], "rb"))
print(torch.equal(model(x), y))
"""


def test_another_process_loads_it(tmp_path: Path) -> None:
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    torch.save(model, io.BytesIO())  # the same pickle, in torch's own container
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, X, model(X))))
    done = fresh_process.run(LOADED, tmp_path / "model.pkl")
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_copies_resolve_their_kernels_where_they_are(set_env) -> None:  # type: ignore[no-untyped-def]
    model = nets.tower()
    accelerate(model, nets.random_masks(model), measure=False)
    expected, data = model(X), pickle.dumps(model)
    set_env(OPENTRANS_BACKEND="reference")
    twin = pickle.loads(data)
    torch.testing.assert_close(twin(X), expected, rtol=1e-4, atol=1e-5)
    engines = [part for part in twin.modules() if isinstance(part, SparseEngine)]
    assert engines and all(callable(part.operator) for part in engines)


def test_made_in_inference_mode_it_still_gives_gradients() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    dense = nets.masked(model, masks)
    conv = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
    with torch.inference_mode():
        accelerate(model, masks, measure=False)
        sparse = SparseConv2d.from_conv(conv)
        model(X)
    for fast, slow in ((model, dense), (sparse, conv)):
        grads = []
        for net in (fast, slow):
            x = X.clone().requires_grad_()
            net(x).square().sum().backward()
            grads.append(x.grad)
        scale = float(grads[1].abs().max())
        torch.testing.assert_close(grads[0] / scale, grads[1] / scale, rtol=1e-3, atol=1e-4)


def test_derivatives_the_kernels_lack_are_refused_not_zero() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    dense = nets.masked(model, masks)
    accelerate(model, masks, measure=False)
    block = model.layer1
    x = torch.randn(1, 8, 16, 16)
    with pytest.raises(UnsupportedModelError, match="forward-mode"):
        torch.func.jvp(block, (x,), (x,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(UnsupportedModelError, match="forward-mode"),
    ):
        block(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(UnsupportedModelError, match=r"torch\.func"):
        torch.func.grad(lambda y: block(y).sum())(x)
    several = torch.randn(3, 1, 8, 16, 16)
    found = torch.func.vmap(block)(several)
    expected = torch.stack([dense.layer1(one) for one in several])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
