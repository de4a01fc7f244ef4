"""The accelerated stage: residual blocks of an ``nn.Sequential`` that run as one op.

Its children stay where they are and can be called one by one. Together, neighbours that are fused
blocks run as one :func:`~opentrans_kernels.ops.sparse_stage`, to the same bits: what a block writes
is read by the next one while it is in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .nn import AcceleratedBlock, Replacement
from .watch import hooked

__all__ = ["AcceleratedStage", "fused_runs"]


class AcceleratedStage(Replacement, nn.Sequential):
    """Stands in for an ``nn.Sequential`` of residual blocks; float32 ``[N, cin, H, W]``.

    A block with hooks on or inside it, one that is not fused, and all of them where gradients are
    needed, run on their own.
    """

    OPERATORS = {"opentrans_operator": "sparse_stage"}

    def __init__(self, original: nn.Sequential) -> None:
        super().__init__(original)
        # The very same dict: blocks swapped in the original are swapped here.
        self.__dict__["_modules"] = original._modules
        self._resolve()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for run in fused_runs(self):
            # Asked again at every run: a trainable child may stand before it.
            if len(run) == 1 or (torch.is_grad_enabled() and x.requires_grad):
                for block in run:
                    x = block(x)
            else:
                x = self._fused(x, run)
        return x

    def _fused(self, x: torch.Tensor, blocks: list[AcceleratedBlock]) -> torch.Tensor:
        x = blocks[0]._checked(x)
        for block in blocks[1:]:
            block._require_ready()
        weights: list[torch.Tensor] = []
        cout, pool, down, stride = [], [], [], []
        for block in blocks:
            engines = block.opentrans_engines._modules
            for role in ("conv1", "conv2", "conv3", "downsample"):
                engine = engines.get(role)
                if engine is not None:
                    held = engine._buffers  # not by attribute, which a module looks up slowly
                    weights += (held["structure"], held["values"], held["bias"])
            cout.append(engines["conv3"].cout)
            pool.append(block.opentrans_pool)
            stride.append(engines["conv2"].stride)
            down.append(int("downsample" in engines))
        return self.opentrans_operator(x, weights, cout, pool, down, stride)

    def extra_repr(self) -> str:
        fused = [str(len(run)) for run in fused_runs(self) if len(run) > 1]
        return f"{' and '.join(fused)} blocks at a time" if fused else "blocks run one by one"


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
