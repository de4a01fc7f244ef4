"""The convolutions a run prunes, in the order that decides between equal magnitudes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import make_permanent
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.synthetic import maskable_convs


def prunable_convs(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Conv2d]:
    """Name -> Conv2d to prune, in the model's order.

    names: as in ``model.named_modules()``; None: all but the first conv and none of an attention
    pool. Raises MaskError for a name that is no Conv2d, an empty scope, or a computed weight.
    """
    if names is None:
        found = maskable_convs(model)
        if not found:
            raise MaskError(
                f"{type(model).__name__} has no Conv2d module to prune. Pass the network that "
                "holds the convolutions."
            )
    else:
        wanted, convs = set(names), conv_modules(model)
        if unknown := sorted(wanted - set(convs)):
            raise MaskError(
                f"{unknown[0]!r} of the scope is no Conv2d of the model, which has for instance "
                f"{', '.join(list(convs)[:3])}. Pass names as in model.named_modules()."
            )
        if not wanted:
            raise MaskError("the scope is empty, so nothing can be pruned. Pass names of Conv2d.")
        found = {name: conv for name, conv in convs.items() if name in wanted}
    for name, conv in found.items():
        if "weight" not in dict(conv.named_parameters(recurse=False)):
            raise MaskError(
                f"the weight of conv {name!r} is computed (pruned or parametrized), so zeros "
                f"written to it would not last. Make it permanent first: {make_permanent(conv)}."
            )
    return found
