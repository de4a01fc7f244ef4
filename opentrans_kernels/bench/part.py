"""Which part of a network is measured, and what titles call it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..topology import block_linears, find_trunk
from ..topology.find import walk_modules
from ..topology.nodes import original
from ..topology.tracing import ShapesOnly, meta_copy

__all__ = ["NETWORK", "TRUNK", "TrunkModule", "WholeModule", "title"]

TRUNK, NETWORK = "trunk", "network"
#: Of the image that shows which module is given it; nothing is computed.
_SIDE = 224
_SEVERAL = (dict, list, tuple)  # torch.compile cannot follow a union


class TrunkModule(nn.Module):
    """What computes a network's features: float [N, C, H, W] in, a float tensor out.

    Uses the tower's own modules by reference, attribute by attribute, as users of CLIP towers do:
    accelerating the tower accelerates this module.

    part: ``TRUNK``, stem to layer4 of a recognised ResNet, without its head; or the path of the
        innermost module that holds every convolution and is given the image as it is, such as
        "features"; or ``NETWORK``, all of it. A vision transformer is measured as a whole.

    Raises UnsupportedModelError if there is no convolution.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        trunk = find_trunk(tower)
        self.tower = tower
        #: (name, paths of modules that run one after the other)
        self.pieces: list[tuple[str, list[str]]] = []
        if trunk.stem is not None and trunk.blocks:
            self.part = TRUNK
            self.pieces = [("stem", list(trunk.stem.steps)), *((p, [p]) for p in trunk.stages)]
            self.paths = [*trunk.stem.steps, *trunk.stages]
        else:
            path = "" if block_linears(tower) else _innermost(tower)
            self.part = path or NETWORK
            self.pieces = _pieces(tower, path, self.part)
            self.paths = [path]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for path in self.paths:
            x = self.tower.get_submodule(path)(x)
        return _answer(x)


class WholeModule(nn.Module):
    """A tower with its head, as the variants may run it in the place of its trunk."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _answer(self.tower(x))


def title(subject: Mapping[str, Any]) -> str:
    """A network and what was measured of it, from the ``subject`` of a result."""
    return f"{subject['arch']} {subject.get('part', TRUNK)}"


def _answer(found: Any) -> Any:
    """What a network returns as one tensor, so that all of it is compared."""
    if not isinstance(found, _SEVERAL):
        return found
    leaves = torch.utils._pytree.tree_leaves(found)
    floats = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not floats:
        raise UnsupportedModelError(
            "the network returns no floating tensor for an image, so it cannot be compared or "
            "timed. Pass the tower that returns feature maps."
        )
    return floats[0] if len(floats) == 1 else torch.cat([t.flatten() for t in floats])


class _Given(Exception):
    """Ends a forward at the module that was asked about; ``same``: it was given the image."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.same = same


def _innermost(model: nn.Module) -> str:
    """Path of the innermost module that holds every convolution and is given the image; "": all."""
    path, module = "", original(model)
    while True:
        inside = [
            (key, original(child))
            for key, child in module.named_children()
            if any(isinstance(part, nn.Conv2d) for _, part in walk_modules(original(child)))
        ]
        if len(inside) != 1 or isinstance(inside[0][1], nn.Conv2d):
            return path
        key, module = inside[0]
        deeper = f"{path}.{key}".lstrip(".")
        if not _is_given_the_image(model, deeper):
            return path
        path = deeper


def _is_given_the_image(model: nn.Module, path: str) -> bool:
    twin = meta_copy(model)
    first = next(part for part in twin.modules() if isinstance(part, nn.Conv2d))
    image = torch.empty(1, first.in_channels, _SIDE, _SIDE, dtype=first.weight.dtype, device="meta")

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Given(len(args) == 1 and args[0] is image and not kwargs)

    twin.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), ShapesOnly():
            twin(image)
    except _Given as given:
        return given.same
    except Exception:  # the model's own code, which then runs as a whole or not at all
        return False
    return False  # the module is never called, such as a ModuleList


def _pieces(model: nn.Module, path: str, name: str) -> list[tuple[str, list[str]]]:
    """A chain of modules, cut behind what changes the size of its maps by pooling, and around
    modules that hold several convolutions; everything else in one piece.
    """
    chain = original(model.get_submodule(path))
    if type(chain) is not nn.Sequential:
        return [(name, [path])]
    return [(paths[0], paths) for paths in _runs(path, chain)]


def _runs(path: str, chain: nn.Sequential) -> Iterator[list[str]]:
    run: list[str] = []
    for key, child in chain.named_children():
        child = original(child)
        alone = any(True for _ in child.children())
        if alone and run:
            yield run
            run = []
        run.append(f"{path}.{key}".lstrip("."))
        if alone or isinstance(child, nn.MaxPool2d | nn.AvgPool2d):
            yield run
            run = []
    if run:
        yield run
