"""Feature map sizes of every convolution, and the trunk run step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.topology.find import find_trunk, walk_modules
from opentrans_kernels.topology.nodes import ConvShape, Trunk
from opentrans_kernels.topology.tracing import ShapesOnly, meta_copy

_MOST_PIXELS = 2**31 - 1


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_size(given: Any) -> tuple[int, int]:
    """(height, width) in pixels. Raises PlanError for anything else."""
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(map(is_count, given)):
        raise PlanError(
            f"input_size={given!r} must be (height, width) in pixels, such as (224, 224)."
        )
    if given[0] * given[1] > _MOST_PIXELS:
        raise PlanError(f"input_size={given!r} has more than {_MOST_PIXELS} pixels. Use a smaller.")
    return given[0], given[1]


def forward_trunk(trunk: Trunk, x: torch.Tensor) -> list[torch.Tensor]:
    """Run the stem and the stages of the model as it stands now, head left out.

    x: [N, Cin, H, W]. Returns [stem output, layer1 output, layer2 output, ...]. Modules are looked
    up by name at each call, so an accelerated model runs accelerated.

    Raises UnsupportedModelError if the trunk has no recognised stem.
    """
    if trunk.stem is None:
        raise UnsupportedModelError(
            f"this {trunk.family} model has no recognised stem, so its trunk cannot be run on its "
            f"own ({'; '.join(trunk.notes) or 'no residual stages'}). Call the model's own forward."
        )
    for step in trunk.stem.steps:
        x = trunk.model.get_submodule(step)(x)
    outputs = [x]
    for stage in trunk.stages:
        x = trunk.model.get_submodule(stage)(x)
        outputs.append(x)
    return outputs


class _AllKnown(Exception):
    """Ends a forward in which every convolution was seen."""


def conv_shapes(model: nn.Module | Trunk, input_size: tuple[int, int]) -> dict[str, ConvShape]:
    """Input and output size of every convolution that an image of ``input_size`` (H, W) reaches.

    Runs on the meta device: no arithmetic, no data. The head may reject the size (CLIP's attention
    pool takes one size only); that is no error as long as the trunk was passed. Convolutions
    outside the trunk's forward (another tower, a segmentation head) are absent. Names are those of
    ``model``.

    Raises UnsupportedModelError when the size is too small or the forward fails inside the trunk.
    """
    trunk = model if isinstance(model, Trunk) else find_trunk(model)
    height, width = input_size
    if height < 1 or width < 1:
        raise UnsupportedModelError(
            f"input size {height}x{width} has no pixels; give (height, width) in pixels, such as "
            "224, 224."
        )
    root = trunk.model.get_submodule(trunk.prefix.rstrip("."))
    twin = meta_copy(root)
    shapes: dict[str, ConvShape] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            shapes[name] = ConvShape(*args[0].shape[-2:], *out.shape[-2:])
            if trunk.stem is not None and len(shapes) == len(wanted):
                raise _AllKnown  # what follows is the head, whose shapes nobody asked for

        return hook

    wanted: list[str] = []
    first: nn.Conv2d | None = None
    for module in list(twin.modules()):
        for key, part in module.named_children():
            if type(part) in (nn.BatchNorm2d, nn.SyncBatchNorm):
                setattr(module, key, nn.Identity())  # keeps the shape, and much faster on meta
    for name, module in walk_modules(twin):
        if isinstance(module, nn.Conv2d):
            first = first or module
            wanted.append(trunk.prefix + name)
            module.register_forward_hook(record(trunk.prefix + name))
    if first is None:
        raise UnsupportedModelError(f"{type(root).__name__} has no Conv2d.")
    x = torch.empty(1, first.in_channels, height, width, dtype=first.weight.dtype, device="meta")
    failure: Exception | None = None
    try:
        with torch.no_grad(), ShapesOnly():
            twin(x)
    except _AllKnown:
        pass
    except Exception as error:  # judged below: only a failure before the last block matters
        failure = error
    known = {node.name for node in trunk.convs() if node not in trunk.loose}
    missing = [n for n in wanted if n not in shapes and (n in known or trunk.stem is None)]
    if missing and failure is not None:
        raise UnsupportedModelError(
            f"a {height}x{width} image does not pass through {type(root).__name__}: {missing[0]} "
            f"is not reached ({type(failure).__name__}: {failure}). Use a larger image, at least "
            "32x32 for a ResNet."
        ) from failure
    return shapes
