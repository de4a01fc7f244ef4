"""Fewer tokens in the deep blocks of a vision transformer, and the full map back; no training.

``plan`` is the record, ``apply`` puts it into a model, ``find`` and ``anatomy`` know the models.
``cluster``, ``merge`` and ``hashing`` are the methods, ``blocks`` runs them, ``state`` is one
forward. Written from the papers named in them.
"""

from __future__ import annotations

from .apply import reduce_tokens, restore_tokens, token_state
from .plan import METHODS, TokenPlan
from .state import TokenState

__all__ = [
    "METHODS",
    "TokenPlan",
    "TokenState",
    "reduce_tokens",
    "restore_tokens",
    "token_state",
]
