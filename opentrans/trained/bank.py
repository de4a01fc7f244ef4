"""Crops of photographs with the dense network's answers, computed once for every run of a study."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError, PlanError
from opentrans_kernels.masks import atomic_write

from .objective import Objective

__all__ = ["Bank", "Source"]

FORMAT = "opentrans_bank"


class Source(Protocol):
    """Batches of crops, uint8 [B, 3, S, S] RGB, the same for the same step."""

    def batch(self, step: int) -> torch.Tensor: ...


class Bank:
    """Images uint8 [N, 3, S, S] and the dense network's outputs of each, in half precision.

    Training takes its batches from here, so the dense network runs once per crop and not once per
    step.
    """

    def __init__(self, images: torch.Tensor, targets: list[torch.Tensor], seed: int = 0) -> None:
        if len(images) == 0 or any(len(t) != len(images) for t in targets):
            raise OpenTransError(
                f"a bank needs as many targets as images, got {len(images)} images and "
                f"{[len(t) for t in targets]} targets. Build it with Bank.build."
            )
        self.images, self.targets, self.seed = images, targets, seed
        self._order: tuple[tuple[int, int], torch.Tensor] = ((0, -1), torch.empty(0))

    @classmethod
    def build(
        cls,
        model: nn.Module,
        objective: Objective,
        source: Source,
        count: int,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        *,
        path: str | os.PathLike[str] | None = None,
        again: bool = True,
        on_crop: Callable[[int, int], None] | None = None,
    ) -> Bank:
        """``count`` crops of ``source`` and what ``model`` makes of them.

        prepare: uint8 images -> network input. path: kept there, and read again if it was made by
        the same weights from the same crops. again: one of others is made again, else refused,
        because a run beside it was trained on those.

        Raises CheckpointError if it cannot be read or written, PlanError if it is refused.
        """
        images: list[torch.Tensor] = []
        while len(images) < count:
            images += list(source.batch(len(images)))
        crops = torch.stack(images[:count])
        key = _key(model, objective, crops)
        if path is not None and Path(path).exists():
            if (found := _read(Path(path), key)) is not None:
                return cls(crops, found)
            if not again:
                raise PlanError(
                    f"{path} holds answers for other crops, or of other weights, and the run "
                    "beside it was trained on those. Continue with the same network, photographs, "
                    "seed and number of crops, or name another folder."
                )
        outputs: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for i, image in enumerate(crops):
                outputs.append([t.half() for t in objective.outputs(model, prepare(image[None]))])
                if on_crop is not None:
                    on_crop(i + 1, count)
        targets = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        if path is not None:
            _write(Path(path), key, targets)
        return cls(crops, targets)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Images and targets number ``step``; every crop comes once per pass, in another order."""
        picked = []
        for i in range(step * size, (step + 1) * size):
            turn, place = divmod(i, len(self))
            if self._order[0] != (self.seed, turn):  # a run may set another seed
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
                order = torch.randperm(len(self), generator=generator)
                self._order = (self.seed, turn), order
            picked.append(int(self._order[1][place]))
        return self.images[picked], [t[picked] for t in self.targets]


def _key(model: nn.Module, objective: Objective, crops: torch.Tensor) -> str:
    """Of what is asked for, the weights and the crops, so that a stored bank of others is not taken
    for this one."""
    digest = hashlib.sha256(type(objective).__qualname__.encode())
    digest.update(crops.numpy().tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> list[torch.Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(FORMAT) != key:
                return None  # of other weights or crops: made again
            return [file.get_tensor(name) for name in sorted(file.keys())]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Remove it; it is made again."
        ) from error


def _write(path: Path, key: str, targets: list[torch.Tensor]) -> None:
    from safetensors.torch import save

    named = {f"{i:03d}": tensor.contiguous() for i, tensor in enumerate(targets)}
    atomic_write(path, save(named, metadata={FORMAT: key}))
