"""Deformable layers of a tree that imports the compiled module train in two gloo processes."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path

import pytest
import torch
from gloo_pair import run_pair
from head_nets import Attention, Encoder, Layer, encoder_inputs
from torch import nn

from opentrans_kernels import install_ms_deform_attn

pytestmark = pytest.mark.usefixtures("extension")
STEPS = 3


class _Function(torch.autograd.Function):
    """As the trees wrap the compiled functions."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, step):
        ctx.step = step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        library = importlib.import_module("MultiScaleDeformableAttention")
        return library.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

    @staticmethod
    def backward(ctx, grad):
        library = importlib.import_module("MultiScaleDeformableAttention")
        found = library.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), ctx.step)
        return found[0], None, None, found[1], found[2], None


class _Compiled(Attention):
    def forward(self, query, reference_points, flat, shapes, starts=None, padding=None):
        value = self.value_proj(flat).view(*flat.shape[:2], self.n_heads, -1)
        where, weights = self.points_of(query, reference_points, shapes)
        made = _Function.apply(value, shapes, starts, where.contiguous(), weights, self.im2col_step)
        return self.output_proj(made)


class _Layer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Compiled()


def _train(model: nn.Module, module: nn.Module, inputs, images: slice) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    src, pos, reference, *rest = inputs
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        out = model(src[images], pos[images], reference[images], *rest)
        out.square().mean(0).sum().mul(0.01).backward()
        optimizer.step()


def _worker(rank: int, store: str, done: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    install_ms_deform_attn()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = Encoder(2, _Layer)  # eval mode: no dropout, which would draw other numbers
    single, before = copy.deepcopy(model), copy.deepcopy(model)
    inputs = encoder_inputs(2)
    _train(DistributedDataParallel(model), model, inputs, slice(rank, rank + 1))
    _train(single, single, inputs, slice(0, 2))
    for (name, a), b, c in zip(
        model.named_parameters(), single.parameters(), before.parameters(), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name
        assert name.endswith("attention_weights.bias") or not torch.equal(a, c), name
    Path(done, f"done{rank}").touch()
    dist.barrier()
    os._exit(0)  # gloo may abort a process that ends while its threads run


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    run_pair(_worker, tmp_path)
