"""Torch-Pruning: ``torch_pruning_worker.py FOLDER THREADS ARCH ISA``.

Removes whole channels of the dense trunk, by magnitude, until it needs no more multiply-adds than
the masked one, and times what is left as the best dense PyTorch runs it. The result is another
network: it has fewer output channels, and would have to be trained again.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from protocol import serve, take_stdout
from torch import nn

from opentrans_kernels.bench.environment import SIMD_BITS
from opentrans_kernels.bench.part import TrunkModule
from opentrans_kernels.bench.subject import Subject, load_subject
from opentrans_kernels.bench.variants import build_variants
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.topology import linear_modules

STEPS = 100
VARIANTS = ("folded_channels_last", "compile_folded_channels_last")


def check_mask(subject: Subject) -> None:
    """Raise OpenTransError if the mask prunes more than convolutions, whose work is matched."""
    linear = set(linear_modules(subject.model)) & set(subject.masks.masks)
    if linear:
        raise OpenTransError(
            f"this mask prunes {len(linear)} linear layers, and channels are removed here until "
            "the convolutions need no more multiply-adds than masked. Leave this peer out."
        )


def macs_of(module: nn.Module, image: torch.Tensor) -> int:
    """Multiply-adds of all convolutions for one call."""
    total = 0

    def count(conv: nn.Conv2d, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += conv.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3]

    convs = [one for one in module.modules() if isinstance(one, nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    with torch.no_grad():
        module(image)
    for hook in hooks:
        hook.remove()
    return total


def main(arguments: list[str]) -> None:
    """Remove channels, compile and serve."""
    answers = take_stdout()
    folder, threads, arch = Path(arguments[0]), arguments[1], arguments[2]
    torch.set_num_threads(int(threads))
    subject = load_subject(
        str(folder / "masks.safetensors"), arch=arch, checkpoint=folder / "tower.pt"
    )
    check_mask(subject)
    image = torch.from_numpy(np.load(folder / "input.npy"))
    size = (image.shape[-2], image.shape[-1])
    trunk = TrunkModule(subject.model).eval()
    before = macs_of(trunk, image)
    target = before * subject.densities(size)["flops"]
    trunk.requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        trunk,
        image[:1],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.95,
        iterative_steps=STEPS,
        round_to=8,  # whole vectors: what is left runs at a dense kernel's full rate
    )
    after = before
    for _ in range(STEPS):
        pruner.step()
        after = macs_of(trunk, image)
        if after <= target:
            break
    trunk.requires_grad_(False)
    bits = SIMD_BITS[arguments[3]]
    built = [
        one
        for one in build_variants(subject.model, image, VARIANTS, simd_bits=bits)
        if one.run is not None
    ]
    timed = {one.name: min(_seconds(one.run) for _ in range(3)) for one in built}
    best = next(one for one in built if one.name == min(timed, key=lambda name: timed[name]))
    out = best.run()
    described = {
        "engine": "torch-pruning",
        "version": version("torch-pruning"),
        "torch": torch.__version__,
        "variant": best.name,
        "macs": after,
        "macs_share": after / before,
        "note": f"another network: {after / before:.3f} of the multiply-adds, outputs "
        f"{list(out.shape)}, must be trained again; run as {best.name}",
    }
    serve(answers, best.run, described, lambda path: np.save(path, out.contiguous().numpy()))


def _seconds(run) -> float:
    import time

    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
