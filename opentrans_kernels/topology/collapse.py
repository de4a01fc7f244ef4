"""What a mask cuts off: layers without a weight, residual branches and networks without input.

An all-zero layer is legal and runs fast, but a network whose image no longer reaches its output
answers the same for every image. The graph of live channels decides it: a channel depends on the
input if some nonzero weight reads a channel that does. Norms and activations are taken to pass
everything on, so what is called cut off is cut off for certain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from opentrans_kernels.topology.nodes import Trunk

__all__ = ["Collapse", "collapse_of", "find_collapse"]

_SHOWN = 8


@dataclass(frozen=True)
class Collapse:
    """What no longer depends on the input.

    zero: convolutions whose weights are all zero. branches: residual blocks whose branch adds
    constants only. cut: the convolution or block behind which nothing depends on the image; None
    if something does, or the order of layers is not known. layers: convolutions looked at.
    """

    zero: tuple[str, ...]
    branches: tuple[str, ...]
    cut: str | None
    layers: int

    def notes(self) -> list[str]:
        """Sentences for people; none where nothing is cut off."""
        lines = []
        if self.zero:
            count = len(self.zero)
            lines.append(
                f"{count} of {self.layers} layers {'is' if count == 1 else 'are'} entirely zero "
                f"({_listed(self.zero)}): each gives the same output for every input"
            )
        if self.cut is not None:
            lines.append(
                "the trunk's output no longer depends on the input: nothing of the image passes "
                f"{self.cut}, so every image gives the same answer"
            )
        elif self.branches:
            lines.append(
                f"{len(self.branches)} residual branches ({_listed(self.branches)}) add only "
                "constants: those blocks pass on their shortcut, and the output still depends on "
                "the input"
            )
        return lines


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


#: A part of a network in order: (name, convolutions of the main path, of the shortcut).
#: Without a main path it is one that nothing is known of.
Part = tuple[str, Sequence[str], str | None]


def find_collapse(
    stem: Sequence[str], blocks: Sequence[Part], nonzero: Mapping[str, torch.Tensor]
) -> Collapse:
    """Collapse of a trunk.

    Args:
        stem: its convolutions, in order; empty where no order is known.
        blocks: residual blocks behind it, in order.
        nonzero: convolution name -> bool weight [cout, cin, kh, kw], of all convolutions.
    """
    zero = tuple(name for name, weight in nonzero.items() if not bool(weight.any()))
    branches: list[str] = []
    live: torch.Tensor | None = None  # channels that depend on the image; None: unknown, so all
    cut: str | None = None
    for name in stem:
        live = _through(nonzero.get(name), live)
        if cut is None and live is not None and not bool(live.any()):
            cut = name
    for name, path, down in blocks:
        if not path:
            live = live if live is not None and not bool(live.any()) else None
            continue
        branch = live
        for conv in path:
            branch = _through(nonzero.get(conv), branch)
        shortcut = live if down is None else _through(nonzero.get(down), live)
        if branch is not None and not bool(branch.any()):
            branches.append(name)
        if branch is not None and shortcut is not None:
            live = branch | shortcut
            if cut is None and not bool(live.any()):
                cut = name
        else:
            live = None
    return Collapse(zero, tuple(branches), cut, len(nonzero))


def _through(weight: torch.Tensor | None, live: torch.Tensor | None) -> torch.Tensor | None:
    """bool [cout]: outputs with a nonzero weight on a live input."""
    if weight is None:
        return None if live is None or bool(live.any()) else live
    # A maximum of bytes: ``any`` along a dimension is many times slower on the CPU.
    reads = weight.flatten(2).view(torch.uint8).amax(2).view(torch.bool)
    return (reads if live is None else reads & live).any(1)


def collapse_of(trunk: Trunk, nonzero: Callable[[str], torch.Tensor]) -> Collapse:
    """:func:`find_collapse` of a recognised trunk; ``nonzero`` gives the bool weight of a name."""
    weights = {node.name: nonzero(node.name) for node in trunk.convs()}
    known = {block.name: block for block in trunk.blocks}
    parts: list[Part] = []
    for path in trunk.stages:
        stage = trunk.model.get_submodule(path)
        for key, _ in stage.named_children():
            block = known.get(f"{path}.{key}")
            if block is None:
                parts.append((f"{path}.{key}", (), None))
            else:
                down = None if block.downsample is None else block.downsample.name
                parts.append((block.name, [c.name for c in block.convs], down))
    stem = [node.name for node in trunk.stem.convs] if trunk.stem is not None else []
    return find_collapse(stem, parts, weights)
