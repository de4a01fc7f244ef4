"""Counts what is left to multiply once inner channels are ordered; needs no GPU.

Prints two tables for the 3x3 of one block per stage: the share of slices of a Triton tile that have
a nonzero, and the parts of the 2:4 prototype relative to a weight without zeros.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]

import torch  # noqa: E402
from prototype.pack import pack  # noqa: E402
from tower import build_tower  # noqa: E402

from opentrans_kernels.ops.implicit_gemm_conv2d import live_slices, pack_weight  # noqa: E402
from opentrans_kernels.synthetic import synthetic_masks  # noqa: E402

LAYERS = ("layer2.1.conv2", "layer3.0.conv2", "layer3.2.conv2", "layer4.0.conv2", "layer4.1.conv2")
TILES = ((64, 32), (64, 64), (128, 64))  # output channels x input channels


def ordered(weight: torch.Tensor) -> torch.Tensor:
    """Rows and columns by falling nonzeros, as ``gpu.network`` orders inner channels."""
    live = weight != 0
    rows, columns = live.sum((1, 2, 3)), live.sum((0, 2, 3))
    weight = weight[rows.argsort(descending=True, stable=True)]
    return weight[:, columns.argsort(descending=True, stable=True)]


def share(weight: torch.Tensor, tile: tuple[int, int]) -> float:
    """Of the slices of one tile that have a nonzero."""
    packed = pack_weight(weight)
    steps = live_slices(packed, (0, *tile))[1].numel() - 1
    return steps * tile[0] * tile[1] / packed.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--masks", nargs="+", default=["global:0.90", "uniform:0.90", "global:0.95"]
    )
    options = parser.parse_args()
    heads = [f"{a}x{b}" for a, b in TILES]
    print("| mask | layer | density | natural, " + heads[0] + " | " + " | ".join(heads), end="")
    print(" | 2:4 parts, natural | sorted | searched |")
    print("|---" * (7 + len(TILES)) + "|")
    for mask in options.masks:
        net = build_tower()
        synthetic_masks(net, mask).apply_(net)
        for name in LAYERS:
            weight = net.get_submodule(name).weight.detach()
            values = [
                f"{float((weight != 0).float().mean()):.3f}",
                f"{share(weight, TILES[0]):.2f}",
            ]
            values += [f"{share(ordered(weight), tile):.2f}" for tile in TILES]
            for swaps in (None, 0, 20000):
                packed = pack(weight, swaps)
                values.append(f"{packed.slices / packed.dense:.2f}")
            print(f"| {mask} | {name} | " + " | ".join(values) + " |", flush=True)


if __name__ == "__main__":
    main()
