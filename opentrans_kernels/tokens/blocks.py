"""What reduced blocks and the patch convolution of a model compute, as classes put over theirs.

A module keeps its identity, parameters, children and name; only its class becomes one made from its
own and a class here (``topology.cover``). So ``state_dict``, hooks, copies and what other tools
replace inside a block stay as they are, and giving the old class back undoes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UnsupportedModelError
from ..topology.behaviour import added_behaviour
from ..topology.cover import LINK, Cover
from .anatomy import Anatomy, attention_of
from .cluster import Clusters, Pool
from .hashing import clustered_attention
from .merge import Composed, keep_attended, kept_count, merge
from .state import TokenState

__all__ = ["ReducedBlock", "SeenPatches"]

#: Arguments that, if true, want another attention than that of all tokens to all.
_ASKING = ("is_causal", "output_attentions", "return_attention", "need_weights")


class SeenPatches(Cover):
    """The patch convolution, whose output has the size of the token map."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = super().forward(*args, **kwargs)
        vars(self)[LINK][0].begin(tuple(out.shape[-2:]))
        return out


class ReducedBlock(Cover):
    """A block from the first reduced one on: [B, n, C] or [n, B, C] -> fewer tokens, or all."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        state, index, anatomy = vars(self)[LINK]
        if state.paused:
            return super().forward(x, *args, **kwargs)
        _refuse_extras(args, kwargs)
        x, turned = self._reduced_input(state, index, x)
        run, plan = state.run, state.plan
        if anatomy is None:
            given = x.transpose(0, 1) if turned else x
            out = super().forward(given, *args, **kwargs)
            tupled = isinstance(out, tuple)
            y = out[0] if tupled else out
            y = y.transpose(0, 1) if turned else y
        else:
            out, tupled = None, False
            y = _between(self, state, index, anatomy, x)
        if index == state.depth - 1 and plan.expand or index in plan.taps:
            whole = state.whole(y, state.prefix)
            # The next block gets the same tensor again, and goes on with the reduced one.
            y, reduced = whole.transpose(0, 1) if turned else whole, y
            run.tapped = (y, reduced) if index < state.depth - 1 else None
        elif turned:
            y = y.transpose(0, 1)
        return (y, *out[1:]) if tupled else y

    def _reduced_input(
        self, state: TokenState, index: int, x: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        """[B, n, C] with the tokens this block works on, and whether x was length-first."""
        run, plan, p = state.run, state.plan, state.prefix
        first = plan.blocks(state.depth)[0]
        tapped, run.tapped = run.tapped, None
        if tapped is not None and x is tapped[0]:
            return tapped[1], state.length_first
        x = x.transpose(0, 1) if state.length_first else x
        expected = p + (run.size[0] * run.size[1] if index == first else state.tokens)
        if x.dim() != 3 or x.shape[1] != expected:
            raise UnsupportedModelError(
                f"block {index} got {tuple(x.shape)} (batch first), expected {expected} tokens: "
                f"{p} prefix tokens and {expected - p} of the {run.size[0]}x{run.size[1]} map. "
                "Something between the patch convolution and this block adds or drops tokens, such "
                "as patch dropout in training; turn it off, or call restore_tokens(model)."
            )
        if index == first:
            run.batch, run.reduction, run.sizes = x.shape[0], None, None
            if plan.method in ("cluster", "pool") and run.size != plan.grid:
                kind = Clusters if plan.method == "cluster" else Pool
                run.reduction = kind(x[:, p:], run.size, plan)
                x = torch.cat([x[:, :p], run.reduction.centres], 1)
        return x, state.length_first


def _between(
    block: nn.Module, state: TokenState, index: int, anatomy: Anatomy, x: torch.Tensor
) -> torch.Tensor:
    """A block of "tome", "evit" or "act": x [B, p + n, C] -> [B, p + n', C]."""
    attention = attention_of(block)
    if attention is not None and (why := added_behaviour(attention)):
        raise UnsupportedModelError(
            f"block {index}: its attention {why}, but is not called: the {state.plan.method} "
            "reduction computes attention itself. Remove it, or call restore_tokens(model)."
        )
    plan, p, run = state.plan, state.prefix, state.run
    q, k, v = anatomy.queries(block, x)
    drop = anatomy.dropout(block)
    if plan.method == "act":
        y = clustered_attention(
            q, k, v, prefix=p, scale=anatomy.scale, dropout=drop,
            projections=plan.projections, cell=plan.cell, seed=plan.seed,
        )  # fmt: skip
        return anatomy.fed(block, anatomy.attended(block, x, y))
    bias = None
    if run.sizes is not None:  # a token that stands for s is attended to s times as much
        bias = F.pad(run.sizes.to(q.dtype).log().mT.unsqueeze(1), (p, 0))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=anatomy.scale)
    x = anatomy.attended(block, x, y)
    rest = x[:, p:]
    if plan.method == "tome":
        sizes = torch.ones_like(rest[..., :1]) if run.sizes is None else run.sizes
        metric = k[:, :, p:].mean(1)
        rest, run.sizes, where = merge(rest, sizes, metric, plan.r or 0)
        _then(run, lambda: where, rest.shape[1])
        x = torch.cat([x[:, :p], rest], 1)
    elif index in plan.stages(state.depth):
        keep = plan.keep or 1.0
        if kept_count(rest.shape[1], keep) < rest.shape[1]:
            seen = (q[:, :, :1] * anatomy.scale) @ k.mT
            wide = torch.promote_types(seen.dtype, torch.float32)
            attention = seen.softmax(-1, dtype=wide).mean(1)[:, 0, p:].to(x.dtype)
            rest, step = keep_attended(rest, attention, keep)
            _then(run, step, rest.shape[1])
            x = torch.cat([x[:, :p], rest], 1)
    return anatomy.fed(block, x)


def _then(run: Any, step: Any, count: int) -> None:
    if run.reduction is None:
        run.reduction = Composed()
    run.reduction.then(step, count)


def _refuse_extras(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Masks and position tables are made for all tokens."""
    named = [*((f"argument {i + 2}", value) for i, value in enumerate(args)), *kwargs.items()]
    for name, value in named:
        if isinstance(value, torch.Tensor) or value is True and name in _ASKING:
            raise UnsupportedModelError(
                f"a reduced block was called with {name}, which is made for the full token map (an "
                "attention mask, a position table) or asks for attention weights. Leave it out, or "
                "call restore_tokens(model)."
            )
