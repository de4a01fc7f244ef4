"""The accelerated stage: residual blocks of an ``nn.Sequential`` that run as one op.

Its children stay where they are and can be called one by one. Together, neighbours that are fused
blocks run as one :func:`~opentrans_kernels.ops.sparse_stage`, to the same bits: what a block writes
is read by the next one while it is in cache, and Python is asked once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .freshness import Freshness
from .nn import AcceleratedBlock, Replacement
from .watch import Untouched, hooked

__all__ = ["AcceleratedStage", "fused_runs"]


class AcceleratedStage(Replacement, nn.Sequential):
    """Stands in for an ``nn.Sequential`` of residual blocks; float32 ``[N, cin, H, W]``.

    A block with hooks on or inside it, one that is not fused, and all of them where gradients are
    needed, run on their own. in_turn: see :func:`~opentrans_kernels.ops.sparse_stage`.
    """

    OPERATORS = {"opentrans_operator": "sparse_stage"}

    opentrans_in_turn = False
    #: All its blocks, if they were found to run as one op; None: to be looked at one by one.
    opentrans_whole: _Whole | None = None

    def __init__(self, original: nn.Sequential, in_turn: bool = False) -> None:
        super().__init__(original)
        # The very same dict: blocks swapped in the original are swapped here.
        self.__dict__["_modules"] = original._modules
        self.opentrans_in_turn = in_turn
        self._resolve()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "opentrans_whole": None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self._by_runs(x)
        whole = self.opentrans_whole
        if whole is None or not whole.untouched() or (torch.is_grad_enabled() and x.requires_grad):
            return self._by_runs(x)
        if whole.freshness.changed() is not None:
            # Converted weights may be the same to the blocks, which followed every step of it.
            self.opentrans_whole = None
            return self._by_runs(x)
        return self._run(self._taken(x), whole.packs)

    def _by_runs(self, x: torch.Tensor) -> torch.Tensor:
        for run in fused_runs(self):
            # Asked again at every run: a trainable child may stand before it.
            if len(run) == 1 or (torch.is_grad_enabled() and x.requires_grad):
                for block in run:
                    x = block(x)
                continue
            for block in run:
                block._require_ready()
            x = self._run(self._taken(x), _Packs(run))
            if len(run) == len(self._modules) and not torch.compiler.is_compiling():
                self.opentrans_whole = _Whole.of(run, self._modules, self.opentrans_whole)
        return x

    def _run(self, x: torch.Tensor, packs: _Packs) -> torch.Tensor:
        return self.opentrans_operator(
            x, packs.tensors(), packs.cout, packs.pool, packs.down, packs.stride,
            self.opentrans_in_turn,
        )  # fmt: skip

    def extra_repr(self) -> str:
        fused = [str(len(run)) for run in fused_runs(self) if len(run) > 1]
        if not fused:
            return "blocks run one by one"
        return f"{' and '.join(fused)} blocks at a time" + ", in turn" * self.opentrans_in_turn


class _Packs:
    """Where the packed tensors of blocks are, and what else the op takes."""

    def __init__(self, blocks: list[AcceleratedBlock]) -> None:
        self._held: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self.cout: list[int] = []
        self.pool: list[int] = []
        self.down: list[int] = []
        self.stride: list[int] = []
        for block in blocks:
            engines = block.opentrans_engines._modules
            for role in ("conv1", "conv2", "conv3", "downsample"):
                if role in engines:
                    self._held += [engines[role]._buffers] * 3
                    self._keys += ["structure", "values", "bias"]
            self.cout.append(engines["conv3"].cout)
            self.pool.append(block.opentrans_pool)
            self.down.append(int("downsample" in engines))
            self.stride.append(engines["conv2"].stride)

    def tensors(self) -> list[torch.Tensor]:
        """Looked up anew: moving a module puts others into the same dicts."""
        return list(map(dict.__getitem__, self._held, self._keys))


class _Whole:
    """All blocks of a stage, which run as one op, and what one question for all of them needs."""

    def __init__(
        self, blocks: list[AcceleratedBlock], held: dict[str, Any], freshness: Freshness
    ) -> None:
        self.blocks, self.freshness, self.packs = blocks, freshness, _Packs(blocks)
        self._of = [block.opentrans_freshness for block in blocks]
        self._untouched = Untouched([block.opentrans_watch for block in blocks], held)

    @classmethod
    def of(
        cls, blocks: list[AcceleratedBlock], held: dict[str, Any], old: _Whole | None
    ) -> _Whole | None:
        """None where a block does not know what it was packed from."""
        parts = [block.opentrans_freshness for block in blocks]
        if old is not None and old._of == parts:
            return cls(blocks, held, old.freshness)
        known = [part for part in parts if part is not None]
        return cls(blocks, held, Freshness.joined(known)) if len(known) == len(parts) else None

    def untouched(self) -> bool:
        """Whether the blocks still stand there, for inference, and nothing was added to them."""
        return self._untouched.same() and not any([block.training for block in self.blocks])


def fused_runs(stage: nn.Sequential) -> Iterator[list[nn.Module]]:
    """The children of a stage, in order: fused blocks that follow each other together."""
    run: list[nn.Module] = []
    for block in stage._modules.values():
        if (
            type(block) is AcceleratedBlock
            and block.opentrans_unfused is None
            and not hooked(block)
            and block.opentrans_watch.changed() is None
        ):
            run.append(block)
            continue
        if run:
            yield run
        run = []
        if block is not None:
            yield [block]
    if run:
        yield run
