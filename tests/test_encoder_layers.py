"""``nn.TransformerEncoderLayer`` with replaced parts: they run.

PyTorch would compute the whole layer as one op from the dense weights.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.linears import AcceleratedLinear, SteppedEncoderLayer

WIDTH, TOKENS = 32, 16
FEED = ("linear1", "linear2")
ALL = ("self_attn.in_proj", "self_attn.out_proj", *FEED)


class Encoder(nn.Module):
    """Patches, then two encoder layers; ``extra``: further arguments of the encoder."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not layer.norm_first)
        self.extra: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.patches(x).flatten(2).transpose(1, 2), **self.extra)


def encoder(**options: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**options).eval()


def masks_of(model: nn.Module, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for number in range(2):
        for part in parts:
            name = f"encoder.layers.{number}.{part}"
            path = f"{name}_weight" if part.endswith("in_proj") else f"{name}.weight"
            shape = model.get_parameter(path).shape
            found[name] = torch.rand(shape, generator=generator) < 0.15
    return found


def masked_double(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            path = f"{name}_weight" if name.endswith("in_proj") else f"{name}.weight"
            dense.get_parameter(path).mul_(mask)
    return dense.double()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found.double() - wanted).detach().abs().max()) < 2e-6 * float(
        wanted.detach().abs().max()
    )


@pytest.mark.parametrize("parts", [FEED, ALL], ids=["feed-forward", "all"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=["post", "pre", "gelu"]
)
def test_replaced_parts_are_what_runs(parts: tuple[str, ...], options: dict[str, object]) -> None:
    model = encoder(**options)
    masks = masks_of(model, parts)
    exact = masked_double(model, masks)
    otk.accelerate(model, masks, input_size=(16, 16), measure=False)
    calls = []
    layer = model.encoder.layers[1]
    assert isinstance(layer.linear1, AcceleratedLinear)
    run = layer.linear1.opentrans_engine.forward
    layer.linear1.opentrans_engine.forward = lambda *args: calls.append(1) or run(*args)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert close(model(images()), exact(images().double()))
    assert calls == [1, 1]


@pytest.mark.parametrize("parts", [FEED, ALL], ids=["feed-forward", "all"])
def test_zeros_in_the_weights_run_sparsely_too(parts: tuple[str, ...]) -> None:
    model = encoder()
    exact = masked_double(model, masks_of(model, parts))
    model.load_state_dict(exact.float().state_dict())
    otk.accelerate(model, input_size=(16, 16), measure=False)
    assert isinstance(model.encoder.layers[0], SteppedEncoderLayer)
    with torch.no_grad():
        assert close(model(images()), exact.double()(images().double()))


def test_padding_that_becomes_a_nested_tensor() -> None:
    model = encoder()
    masks = masks_of(model, ALL)
    exact = masked_double(model, masks)
    otk.accelerate(model, masks, input_size=(16, 16), measure=False)
    padding = torch.arange(TOKENS) >= torch.tensor([16, 9, 3])[:, None]
    model.extra = exact.extra = {"src_key_padding_mask": padding}
    with torch.no_grad():
        found, wanted = model(images()), exact(images().double())
    assert found.shape == wanted.shape
    assert close(found, wanted)  # zeros behind the tokens in both
    with torch.enable_grad():  # no nested tensor there
        assert close(model(images())[~padding], wanted[~padding])


def test_hooks_of_the_layer_run_and_may_go_again() -> None:
    model = encoder()
    masks = masks_of(model, FEED)
    exact = masked_double(model, masks)
    seen = []
    handle = model.encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    otk.accelerate(model, masks, input_size=(16, 16), measure=False)
    seen.clear()
    with torch.no_grad():
        assert close(model(images()), exact(images().double()))
        assert seen == [1]
        handle.remove()
        assert close(model(images()), exact(images().double()))
    assert seen == [1]


def test_restore_copies_and_checkpoints(tmp_path) -> None:
    model = encoder()
    masks = masks_of(model, ALL)
    layers, keys = list(model.encoder.layers), list(model.state_dict())
    exact = masked_double(model, masks)
    otk.accelerate(model, masks, input_size=(16, 16), measure=False)
    assert list(model.state_dict()) == keys
    otk.save_accelerated(tmp_path / "encoder.safetensors", model)
    loaded = encoder()
    otk.load_accelerated(tmp_path / "encoder.safetensors", loaded)
    with torch.no_grad():
        wanted = exact(images().double())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert close(other(images()), wanted)
            otk.restore(other)
            assert type(other.encoder.layers[0]) is nn.TransformerEncoderLayer
    otk.restore(model)
    assert all(a is b for a, b in zip(model.encoder.layers, layers, strict=True))
    assert type(layers[0].linear1) is nn.Linear
    assert type(layers[0].self_attn) is nn.MultiheadAttention


def test_other_norms_may_be_loaded() -> None:
    model = encoder()
    otk.accelerate(model, masks_of(model, FEED), input_size=(16, 16), measure=False)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["encoder.layers.0.norm1.weight"] += 1
    model.load_state_dict(state)
    assert torch.equal(model.encoder.layers[0].norm1.weight, state["encoder.layers.0.norm1.weight"])
