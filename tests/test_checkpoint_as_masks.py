"""A sparse checkpoint is a mask file and a checkpoint like any other: nothing of it is dropped."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opentrans.cli import main
from opentrans.trained import shipped
from opentrans_kernels import accelerate, load_masks
from opentrans_kernels.checkpoint import save_accelerated
from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.half import round_to_half
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.masks.readers.state import read_state_dict

pytestmark = pytest.mark.usefixtures("extension")


class Attending(nn.Module):
    """A convolution, an attention with a packed projection, and a module that is called in_proj."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 1)
        self.attn = nn.MultiheadAttention(32, 2, bias=bias, batch_first=True)
        self.mixer = nn.ModuleDict({"in_proj": nn.Linear(32, 32)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return self.mixer["in_proj"](tokens)


def pruned(bias: bool) -> tuple[nn.Module, MaskSet]:
    torch.manual_seed(0)
    model = Attending(bias).eval().requires_grad_(False)
    weights = {
        "conv": model.conv.weight, "attn.in_proj": model.attn.in_proj_weight,
        "attn.out_proj": model.attn.out_proj.weight,
        "mixer.in_proj": model.mixer["in_proj"].weight,
    }  # fmt: skip
    masks = MaskSet.from_tensors({n: torch.rand(w.shape) < 0.2 for n, w in weights.items()})
    masks.apply_(model)
    return model, masks


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_masks_and_weights_come_back(bias: bool, half: bool, tmp_path: Path) -> None:
    model, masks = pruned(bias)
    if half:
        round_to_half(model)
    dense = copy.deepcopy(model)
    accelerate(model, masks, input_size=(8, 8))
    more = {"values": torch.float16, "plan": False} if half else {}
    path = tmp_path / "sparse.safetensors"
    save_accelerated(path, model, **more)
    found = load_masks(path)
    assert found.content_hash() == masks.content_hash()
    assert found.source.kind == "accelerated"
    state, wanted = read_state_dict(path), dense.state_dict()
    assert set(state) == set(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert all(value.dtype == torch.float32 for value in state.values())


def test_a_kept_weight_of_zero_stays_kept(tmp_path: Path) -> None:
    """Bits decide, not values: rounding may make a weight zero that the mask keeps."""
    model, masks = pruned(True)
    first = masks.masks["conv"].nonzero()[0]
    model.conv.weight[tuple(first)] = 0
    accelerate(model, masks, input_size=(8, 8))
    save_accelerated(tmp_path / "a.safetensors", model)
    assert load_masks(tmp_path / "a.safetensors").masks["conv"][tuple(first)]


def test_the_shipped_network_is_a_mask_file(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(shipped("hed-090"))
    masks = load_masks(path)
    assert len(masks.masks) == 12 and masks.density() == pytest.approx(0.1, abs=0.001)
    assert main(["inspect", path, "--arch", "HED", "--checkpoint", path]) == 0
    said = capsys.readouterr()
    assert "(10.0" in said.out and "SYNTHETIC" not in said.err


def test_a_damaged_one_is_neither(tmp_path: Path) -> None:
    with safe_open(shipped("hed-090"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = next(key for key in tensors if key.startswith("mask/"))
    tensors[name] = tensors[name] ^ 1
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata)
    for read in (load_masks, read_state_dict):
        with pytest.raises(CheckpointError, match="changed or damaged"):
            read(path)
