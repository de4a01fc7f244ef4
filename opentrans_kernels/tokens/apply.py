"""``reduce_tokens(model, plan)`` and its undoing."""

from __future__ import annotations

from torch import nn

from ..errors import PlanError, UnsupportedModelError
from ..plan.models import require_module
from ..topology.cover import give_back, put_over, states
from .blocks import ReducedBlock, SeenPatches
from .find import check_blocks, find_trunk, prove
from .plan import TokenPlan
from .state import TokenState

__all__ = ["reduce_tokens", "restore_tokens", "token_state"]


def reduce_tokens(model: nn.Module, plan: TokenPlan) -> TokenState:
    """Reduce the tokens of the vision transformer in ``model``, in place, without training.

    Parameters, names and ``state_dict`` stay; :func:`restore_tokens` gives everything back. Any
    image size works whose token map holds the plan's grid. Works in eval and training mode, in any
    dtype and on any device; gradients pass through clustering, merging and pooling. This is an
    *approximation* of the model, unlike everything else in this package.

    Args:
        model: timm, open_clip or transformers ViT, or a model that holds one. Recognised by
            structure; every reduced block is run on noise first.
        plan: what to do.

    Returns:
        The state, whose ``expand(x)`` brings features or logits of the last forward back to the
        full map. Of forwards in several threads each thread sees its own.

    Raises:
        UnsupportedModelError: no vision transformer, or one whose blocks cannot be reduced (tied,
            hooked, quantised, with positions in attention, no class token for "evit"); nothing was
            changed.
        PlanError: no plan, or one that names blocks the model does not have.
    """
    require_module(model)
    if not isinstance(plan, TokenPlan):
        raise PlanError(
            f"reduce_tokens: plan must be a TokenPlan, got {type(plan).__name__}. Pass for "
            "instance TokenPlan(alpha=10, grid=(28, 28))."
        )
    trunk = find_trunk(model)
    depth = len(trunk.blocks)
    numbers = plan.blocks(depth)
    check_blocks(model, trunk, numbers, plan.method)
    found = {i: prove(*trunk.blocks[i], plan.method) for i in numbers}
    state = TokenState(plan, trunk.prefix, depth, trunk.length_first)
    put_over(trunk.patches[1], SeenPatches, (state,))
    for i in numbers:
        put_over(trunk.blocks[i][1], ReducedBlock, (state, i, found[i]))
    return state


def restore_tokens(model: nn.Module) -> None:
    """Let all tokens through again; nothing to do if they are not reduced."""
    require_module(model)
    for module in list(model.modules()):
        give_back(module)


def token_state(model: nn.Module) -> TokenState | None:
    """The state of :func:`reduce_tokens` in ``model``; None if its tokens are not reduced.

    Raises UnsupportedModelError if several transformers in it are reduced.
    """
    require_module(model)
    found = states(model)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{len(found)} transformers in this model are reduced. Pass the part that holds one."
        )
    return next(iter(found), None)
