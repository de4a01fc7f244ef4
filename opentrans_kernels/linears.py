"""Accelerated linear layers, MLPs that run as one op, and attention; see ``nn`` for what all
replacements do.

Tokens ``[..., channels]`` go in and come out as they lie; nothing is transposed around the kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .activations import NONE, Activation
from .engines import Engine, SparseEngine
from .nn import Replacement
from .pack import SparseWeight
from .watch import Watch

__all__ = [
    "AcceleratedAttention",
    "AcceleratedLinear",
    "AcceleratedMlp",
    "DenseLinear",
    "SelfAttention",
    "SparseLinear",
    "SteppedEncoderLayer",
    "stepped_layers",
]

_log = logging.getLogger(__name__)


class SparseLinear(SparseEngine):
    """A packed linear layer on the sparse kernels."""

    OPERATORS = {"operator": "sparse_linear"}

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> SparseLinear:
        """weight: ``[out, in]``; its exact zeros are dropped."""
        return cls(SparseWeight.from_dense(weight.detach()[:, :, None, None], bias))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        return self.operator(
            x, self.structure, self.values, self.bias, residual, self.cout,
            activation.kind, activation.slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.cin}, {self.cout}, nnz={self.nnz}"


class DenseLinear(Engine):
    """A linear layer with its mask in the weight, run densely by PyTorch."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._hold(weight=weight)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.nnz = int(torch.count_nonzero(weight))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Activation = NONE,
    ) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return activation.apply_(y if residual is None else y + residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, masked"


class AcceleratedLinear(Replacement):
    """A linear layer on an engine: float32 ``[..., in]`` -> ``[..., out]``."""

    PREPARED = "its weight is packed"

    def __init__(self, original: nn.Linear, engine: Engine) -> None:
        super().__init__(original)
        self.opentrans_engine = engine

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as nn.Linear does
        return self.opentrans_engine.forward(self._checked(input))


class AcceleratedMlp(Replacement):
    """Two linear layers with an activation between them: float32 ``[..., in]`` -> ``[..., out]``.

    With sparse engines it is one op, which never holds the wide tensor between the layers as a
    whole; where gradients are needed the layers run one by one. masks, name: see
    :class:`~opentrans_kernels.watch.Watch`.
    """

    OPERATORS = {"opentrans_operator": "sparse_mlp"}
    PREPARED = "its weights are packed"

    def __init__(
        self,
        original: nn.Module,
        engines: Mapping[str, Engine],
        activation: Activation,
        masks: Mapping[str, torch.Tensor],
        name: str,
    ) -> None:
        """engines: "first" and "second"."""
        super().__init__(original)
        self.opentrans_watch = Watch.inside(original, name, self._modules, masks)
        self.opentrans_engines = nn.ModuleDict(engines)
        self.opentrans_activation = activation
        self.opentrans_fused = all(isinstance(e, SparseEngine) for e in engines.values())
        self._resolve()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._checked(x)
        if (why := self.opentrans_watch.changed()) is not None:
            return self.opentrans_watch.dense(self.opentrans_original, x, why)
        one, two = self.opentrans_engines["first"], self.opentrans_engines["second"]
        act = self.opentrans_activation
        if not self.opentrans_fused or (torch.is_grad_enabled() and x.requires_grad):
            return two.forward(one.forward(x, None, act))
        return self.opentrans_operator(
            x, one.structure, one.values, one.bias, two.structure, two.values, two.bias, None,
            two.cout, act.kind, act.slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.opentrans_activation}, {'one op' if self.opentrans_fused else 'masked'}"


class AcceleratedAttention(Replacement):
    """``nn.MultiheadAttention`` whose projections are packed, where it is self-attention.

    That is: query, key and value are one tensor, and no weights are asked for; masks of attention
    and padding are applied as they are there. Any other call runs the original, with the pruning
    masks, which is said once, as after a hook was put on it.
    """

    PREPARED = "its weights are packed"

    def __init__(
        self, original: nn.MultiheadAttention, into: Engine, out: Engine, name: str,
        masks: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        """masks, name: see :class:`~opentrans_kernels.watch.Watch`."""
        super().__init__(original)
        self.opentrans_watch = Watch.inside(original, name, self._modules, masks)
        self.opentrans_into, self.opentrans_out = into, out
        self.opentrans_name = name
        self.__dict__["opentrans_told"] = False
        # nn.TransformerEncoderLayer asks before it computes everything from the dense weights.
        self.__dict__["_qkv_same_embed_dim"] = False

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
        attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        x = self._checked(query)
        if (why := self.opentrans_watch.changed()) is None:
            why = self._why_not(query, key, value, key_padding_mask, need_weights, attn_mask)
            why = "is_causal without attn_mask" if is_causal and attn_mask is None else why
        if why is not None:
            if not self.opentrans_told:
                self.__dict__["opentrans_told"] = True
                _log.warning("%s: %s; this attention runs as it was", self.opentrans_name, why)
            return self.opentrans_watch.masked(
                self.opentrans_original, query, key, value, key_padding_mask, need_weights,
                attn_mask, average_attn_weights, is_causal,
            )  # fmt: skip
        heads, width = self.num_heads, self.embed_dim
        qkv = self.opentrans_into.forward(x)
        one, two = x.shape[:2]
        order = (2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)
        q, k, v = qkv.view(one, two, 3, heads, width // heads).permute(order)
        causal = is_causal and key_padding_mask is None  # the mask is then not looked at
        bias = None if causal else self._bias(x, key_padding_mask, attn_mask)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        y = y.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).reshape(x.shape)
        return self.opentrans_out.forward(y), None

    def projected(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of ``[..., width]`` in one: ``[..., 3 width]``."""
        return self.opentrans_into.forward(self._checked(x))

    def joined(self, y: torch.Tensor) -> torch.Tensor:
        """What heads gave, side by side, through the output projection."""
        return self.opentrans_out.forward(self._checked(y))

    def _why_not(
        self, query: Any, key: Any, value: Any, padding: Any, weights: bool, mask: Any
    ) -> str | None:
        if key is not query or value is not query:
            return "query, key and value are not one tensor"
        if weights:
            return "the weights of attention were asked for"
        if query.dim() != 3:
            return "the input has no batch"
        batch, tokens = self._sizes(query)
        whole = (batch * self.num_heads, tokens, tokens)
        if mask is not None and tuple(mask.shape) not in (whole[1:], whole):
            return f"attn_mask has shape {tuple(mask.shape)}"
        if padding is not None and tuple(padding.shape) != (batch, tokens):
            return f"key_padding_mask has shape {tuple(padding.shape)}"
        return None

    def _sizes(self, x: torch.Tensor) -> tuple[int, int]:
        """(batch, tokens)."""
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _bias(
        self, x: torch.Tensor, padding: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is added to the logits, [batch or 1, heads or 1, tokens or 1, tokens]."""
        bias = None
        if mask is not None:
            shape = (1, 1) if mask.dim() == 2 else (-1, self.num_heads)
            bias = _added(mask, x.dtype).view(*shape, *mask.shape[-2:])
        if padding is not None:
            keys = _added(padding, x.dtype)[:, None, None]
            bias = keys if bias is None else bias + keys
        return bias


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers to add: minus infinity where a bool one is true."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


class SteppedEncoderLayer(Replacement):
    """``nn.TransformerEncoderLayer`` part by part, so that the parts replaced in it are called.

    Without gradients PyTorch computes such a layer as one op from the dense weights. Takes and
    returns what the original does, nested tensors (which ``nn.TransformerEncoder`` makes of padded
    ones) included.
    """

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__(original)
        # The very same dicts: children swapped in the original are swapped here, and its hooks run.
        for key, value in vars(original).items():
            if key == "_modules" or key.startswith(("_forward_", "_backward_", "_is_full_")):
                self.__dict__[key] = value

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # nothing is packed here

    def forward(
        self, src: torch.Tensor, src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None, is_causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if src.is_nested:
            return self._nested(src)
        steps = nn.TransformerEncoderLayer

        def attended(x: torch.Tensor) -> torch.Tensor:
            return steps._sa_block(self, x, src_mask, src_key_padding_mask, is_causal)

        if self.norm_first:
            x = src + attended(self.norm1(src))
            return x + steps._ff_block(self, self.norm2(x))
        x = self.norm1(src + attended(src))
        return self.norm2(x + steps._ff_block(self, x))

    def _nested(self, src: torch.Tensor) -> torch.Tensor:
        """Images of several lengths in one nested tensor, through a padded one."""
        lengths = [len(part) for part in src.unbind()]
        x = src.to_padded_tensor(0.0)
        place = torch.arange(x.shape[1], device=x.device)
        hidden = place >= torch.tensor(lengths, device=x.device)[:, None]
        y = self.forward(x, src_key_padding_mask=hidden)
        parts = [rows[:length] for rows, length in zip(y, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts)


def stepped_layers(
    model: nn.Module, replaced: Mapping[str, nn.Module]
) -> dict[str, SteppedEncoderLayer]:
    """Path -> what stands in for each ``nn.TransformerEncoderLayer`` that holds one of the paths
    ``replaced``."""
    own = nn.TransformerEncoderLayer
    found = {}
    for path, module in model.named_modules():
        plain = isinstance(module, own) and all(
            getattr(type(module), name) is getattr(own, name)
            for name in ("forward", "_sa_block", "_ff_block")
        )
        inside = any(name.startswith(f"{path}.") for name in replaced)
        if path and plain and inside and "forward" not in vars(module):
            found[path] = SteppedEncoderLayer(module)
    return found


class SelfAttention(nn.Module):
    """Calls an attention module with one tensor ``[batch, tokens, channels]``."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.training = attention.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=False)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)
