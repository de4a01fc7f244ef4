"""Masks of the head in a published file's ``sem_seg_head`` take effect, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from d2_models import SIZE, MaskFormer, dead_are_zero  # noqa: E402

from opentrans.d2 import attach  # noqa: E402
from opentrans_kernels import MaskError, MaskSet  # noqa: E402
from opentrans_kernels.masks.names import conv_modules  # noqa: E402
from opentrans_kernels.synthetic import synthetic_masks  # noqa: E402

CONV, LINEAR = "input_proj.1", "encoder.layers.0.linear1"


def network() -> MaskFormer:
    torch.manual_seed(0)
    return MaskFormer().eval()


def half(shape: torch.Size) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


def both(model: nn.Module, *names: str) -> MaskSet:
    """Of the tower, and of layers beside it."""
    tower = synthetic_masks(model.backbone, "global:0.80").masks
    head = {name: half(model.get_submodule(name).weight.shape) for name in names}
    return MaskSet.from_tensors({**{f"backbone.{n}": m for n, m in tower.items()}, **head})


def test_masks_of_the_head_take_effect() -> None:
    model = network()
    masks = both(model, CONV, LINEAR)
    done = attach(model, masks, accelerate=True, measure=False, input_size=SIZE)
    assert done.masks is not None and dead_are_zero(model, done.masks)
    assert set(done.head_masks) == {CONV, LINEAR}
    for name in (CONV, LINEAR):
        weight = model.get_submodule(name).weight
        assert bool((weight[~masks.masks[name]] == 0).all())
        assert bool((weight[masks.masks[name]] != 0).all())
    assert "2 layers of the head are masked" in str(done)
    plain = network()
    attach(plain, masks)  # the same network, dense
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_published_file_with_a_head(tmp_path: Path) -> None:
    model = network()
    holder = nn.Module()
    holder.backbone, holder.sem_seg_head = model.backbone, nn.ModuleDict({"encoder": model.encoder})
    tower = synthetic_masks(model.backbone, "global:0.80").masks
    state = {}
    for name, conv in conv_modules(model.backbone).items():
        if name in tower:
            state |= {f"{name}.weight_orig": conv.weight, f"{name}.weight_mask": tower[name] * 1.0}
        else:
            state[f"{name}.weight"] = conv.weight
    linear = model.encoder.layers[0].linear1.weight
    mask = half(linear.shape)
    head = {f"{LINEAR}.weight_orig": linear, f"{LINEAR}.weight_mask": mask.float()}
    path = tmp_path / "mask.pth"
    torch.save({"first_conv": {}, "backbone": state, "sem_seg_head": head}, path)
    done = attach(holder.eval(), path)
    assert list(done.head_masks) == [f"sem_seg_head.{LINEAR}"]
    assert bool((linear[~mask] == 0).all()) and bool((linear[mask] != 0).all())


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("encoder.layers.9.linear1", (64, 32), "has no layer"),
        (LINEAR, (3, 5), "another head"),
        ("encoder.layers.0.norm1", (32, 32), "LayerNorm"),
    ],
)
def test_masks_without_a_place_are_refused_before_anything_changes(name, shape, words) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = dict(both(model).masks) | {name: half(torch.Size(shape))}
    with pytest.raises(MaskError, match=words):
        attach(model, MaskSet.from_tensors(tensors))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
