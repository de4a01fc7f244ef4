"""What batch norms expect of their input, measured on crops.

Pruning takes weights away and leaves the running mean and variance of every batch norm as they
were, so a network with frozen statistics is far off before it is trained at all. Measured again on
a few crops, without a label and without a gradient, each channel has the mean and variance that the
layers behind it were trained for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from opentrans_kernels.errors import OpenTransError

from .bank import Bank
from .load import Prepare

__all__ = ["batch_norms", "bank_inputs", "centre", "recalibrate"]

BATCH = 16  # crops at once; each batch is normalised by its own statistics
LEAST = 1e-12  # variance of a channel that never changes


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """By name, those that keep statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats
    }


def bank_inputs(bank: Bank, prepare: Prepare, crops: int) -> Iterator[torch.Tensor]:
    """The first ``crops`` images of the bank as network inputs [B, 3, S, S]."""
    for start in range(0, min(crops, len(bank)), BATCH):
        yield prepare(bank.images[start : min(start + BATCH, crops)])


def centre(model: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    """Give batch norms the statistics of their inputs and leave what the model computes as it is.

    In place: running mean and variance become those of the dense network on ``inputs``, and scale
    and shift change so that the outputs are the same to rounding. For networks whose files hold
    scales that the variance was multiplied into: there is nothing to recalibrate before this, and
    Adam's steps of one size are far too large for some scales and too small for others.
    """
    norms = batch_norms(model)
    sums = {name: torch.zeros(2, n.num_features, dtype=torch.float64) for name, n in norms.items()}
    counts = dict.fromkeys(norms, 0)

    def note(name: str):
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].double()
            sums[name] += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
            counts[name] += x.numel() // x.shape[1]

        return hook

    hooks = [norm.register_forward_pre_hook(note(name)) for name, norm in norms.items()]
    try:
        with torch.no_grad():
            for x in inputs:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for name, norm in norms.items():
            if counts[name] == 0:
                raise _unseen(name)
            mean, square = sums[name] / counts[name]
            variance = (square - mean.square()).clamp_min(LEAST)
            slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            norm.bias += (slope * (mean - norm.running_mean.double())).float()
            norm.weight.copy_(slope * (variance + norm.eps).sqrt())
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def recalibrate(model: nn.Module, plain: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    """Measure the running mean and variance of every batch norm again, in place.

    Args:
        model: whose buffers change; nothing else does.
        plain: the same network out of ordinary modules, for ``model`` may run other kernels that
            normalise by what is stored. It takes over the weights and the new statistics.
        inputs: network inputs, several images each: averages of their statistics are stored.

    Raises OpenTransError if there is no input, or a batch norm that is never called.
    """
    plain.load_state_dict(model.state_dict())
    norms = batch_norms(plain)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        with torch.no_grad():
            for x in inputs:
                plain(x)
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            norm.eval()
    for name, norm in norms.items():
        if not int(norm.num_batches_tracked):
            raise _unseen(name)
        own = model.get_submodule(name)
        own.running_mean.copy_(norm.running_mean)
        own.running_var.copy_(norm.running_var)


def _unseen(name: str) -> OpenTransError:
    return OpenTransError(
        f"batch norm {name} saw no image, so its statistics cannot be measured. Give at least one "
        "batch of images, to a network that uses it."
    )
