"""A small tower with the names of CLIP's ResNet, masks for it, and files of every kind."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize, prune

from opentrans_kernels.masks import MaskSet, sparse_file


class Block(nn.Module):
    """A bottleneck with the names of CLIP: the shortcut conv is named "0" but sits at index 1."""

    def __init__(self, cin: int, width: int, shortcut_index: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        parts = [("-1", nn.AvgPool2d(1)), ("0", nn.Conv2d(cin, 4 * width, 1, bias=False))]
        parts += [("1", nn.BatchNorm2d(4 * width))]
        self.downsample = nn.Sequential(OrderedDict(parts[1 - shortcut_index :]))


class Tower(nn.Module):
    def __init__(self, blocks: tuple[int, ...] = (2, 3), shortcut_index: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, bias=False)
        self.conv2 = nn.Conv2d(5, 8, 3, bias=False)
        cin, width = 8, 3
        for stage, count in enumerate(blocks, start=1):
            made = []
            for _ in range(count):
                made.append(Block(cin, width, shortcut_index))
                cin = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*made))
            width *= 2
        self.head = nn.Linear(cin, 7)


def wrapped(model: nn.Module, prefix: str) -> nn.Module:
    for name in reversed(prefix.split(".") if prefix else []):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    return model


def random_masks(model: nn.Module, density: float = 0.3, seed: int = 1) -> dict[str, torch.Tensor]:
    """Masks for all convs but the first, like the ones pruning leaves."""
    generator = torch.Generator().manual_seed(seed)
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return {
        name: torch.rand(conv.weight.shape, generator=generator) < density
        for name, conv in convs
        if name != "conv1"
    }


def masked_state(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    for name, mask in masks.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] * mask
    return state


def pruned_state(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch.nn.utils.prune itself leaves in the state dict."""
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    return dict(model.state_dict())


class Mask(nn.Module):
    """A parametrization that keeps its mask in the state dict."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def parametrized_state(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", Mask(mask))
    return dict(model.state_dict())


def nncf_state(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    for name, mask in masks.items():
        hook = f"__nncf_hooks.post_hooks.{name.replace('.', ':')}:weight__0.0.binary_mask"
        state[hook] = mask
    return state


def compressed_state(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return compressed(dict(model.state_dict()), masks)


def compressed(
    state: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Bit by bit, so that the packing is spelt out a second time."""
    for name, mask in masks.items():
        rows = mask.reshape(-1, mask.shape[-1]).tolist()
        whole = [row + [False] * (-len(row) % 8) for row in rows]
        packed = [
            [
                sum(bit << i for i, bit in enumerate(row[at : at + 8]))
                for at in range(0, len(row), 8)
            ]
            for row in whole
        ]
        bits = torch.tensor(packed, dtype=torch.uint8).reshape(*mask.shape[:-1], -1)
        counts = mask.sum(-1)
        state |= {
            f"{name}.compressed": state.pop(f"{name}.weight")[mask],
            f"{name}.bitmask": bits,
            f"{name}.shape": torch.tensor(mask.shape),
            f"{name}.row_offsets": counts.cumsum(0) - counts,
        }
    return state


def buffer_state(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(model.state_dict()) | {f"{n}._mask": mask.float() for n, mask in masks.items()}


STATES = {
    "parametrize": parametrized_state,
    "nncf": nncf_state,
    "compressed-tensors": compressed_state,
    "buffer": buffer_state,
}


def write_sparse(
    path: Path, state: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]
) -> None:
    """What ``save_accelerated`` writes of a network without a plan."""
    tensors = {}
    for name, mask in masks.items():
        bits = mask.flatten().tolist() + [False] * (-mask.numel() % 8)
        packed = [sum(bit << 7 - i for i, bit in enumerate(bits[at : at + 8]))
                  for at in range(0, len(bits), 8)]  # fmt: skip
        tensors[f"mask/{name}"] = torch.tensor(packed, dtype=torch.uint8)
        tensors[f"values/{name}"] = state.pop(f"{name}.weight")[mask]
    tensors |= {f"dense/{key}": tensor for key, tensor in state.items()}
    header = {
        "format_version": 3, "values": "float32", "plan": None, "arch": None, "masks_given": True,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
    }  # fmt: skip
    header["sha256"] = sparse_file.digest(tensors, header)
    save_file(tensors, path, {sparse_file.METADATA_KEY: json.dumps(header)})


def write_kind(kind: str, path: Path, model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    if kind == "opentrans":
        sections = {
            "first_conv": {"weight": model.conv1.weight.detach().clone()},
            "backbone": pruned_state(model, masks),
            "sem_seg_head": {"predictor.weight": torch.randn(3, 4)},
        }
        torch.save(sections, path)
    elif kind == "prune":
        torch.save({"epoch": 3, "state_dict": pruned_state(model, masks)}, path)
    elif kind in STATES:
        torch.save(STATES[kind](model, masks), path)
    elif kind == "plain":
        torch.save({name: mask.float() for name, mask in masks.items()}, path)
    elif kind == "accelerated":
        write_sparse(path, dict(model.state_dict()), masks)
    elif kind == "packed":
        MaskSet(masks).save(path)
    elif kind == "dense":
        state = masked_state(model, masks)
        torch.save({k: v for k, v in state.items() if k != "conv1.weight"}, path)
    else:
        raise AssertionError(f"no fixture for reader {kind!r}")
