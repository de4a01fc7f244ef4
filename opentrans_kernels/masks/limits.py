"""Bounds on what a file may ask of its reader, checked before the work they bound."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

JSON_BYTES = 100 << 20
PICKLE_BYTES = 64 << 20  # without the tensors' values; a network's takes some 100 KB
DEEPEST = 64
MOST_ENTRIES = 4_000_000  # of nested dicts and lists, one that is referred to twice counted twice


class Malformed(ValueError):
    """What is wrong inside a file, in words. Its reader makes the error that names the file."""


class Refused(Malformed):
    """A pickle asks for something that is not data; ``name`` says for what."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}, which is not a tensor")
        self.name = name


def check_dtype(dtype: Any) -> None:
    """Raise Refused for a dtype that PyTorch can store and not compare: bits, and several in one
    byte."""
    name = str(dtype)
    if re.fullmatch(r"torch\.(bits.*|float4.*|u?int[1-7])", name):
        raise Refused(name)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for text of unknown origin. Raises Malformed and nothing else."""
    if len(text) > JSON_BYTES:
        raise Malformed(f"{len(text)} bytes of JSON are more than the {JSON_BYTES} allowed")
    try:
        content = json.loads(text)
    except RecursionError:
        raise Malformed(f"its JSON nests more than {DEEPEST} levels") from None
    except ValueError as error:
        raise Malformed(f"it is not JSON ({brief(error)})") from error
    check_nesting(content)
    return content


def inner(node: Any) -> Iterable[Any] | None:
    """What a dict, list, tuple or set holds; None for anything else."""
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, list | tuple | set | frozenset) else None


def check_nesting(
    content: Any,
    inside: Callable[[Any], Iterable[Any] | None] = inner,
    most: int = MOST_ENTRIES,
) -> None:
    """Whether plain recursion over ``content`` ends, and soon.

    inside: what a node holds, None for a leaf. most: entries, as recursion would meet them. Every
    object is visited once, by identity. Raises Malformed if it refers to itself, nests too deeply,
    or unfolds to too many entries.
    """
    unfolded: dict[int, int] = {}
    around: set[int] = set()
    entered: list[tuple[Any, list[Any], int]] = []  # node, what is left of it, entries so far

    def enter(node: Any, held: Iterable[Any]) -> None:
        if len(entered) >= DEEPEST:
            raise Malformed(f"its entries nest more than {DEEPEST} levels")
        around.add(id(node))
        items = list(held)
        entered.append((node, items, len(items)))

    if (held := inside(content)) is not None:
        enter(content, held)
    while entered:
        node, left, count = entered.pop()
        while left:
            item = left[-1]
            if (held := inside(item)) is None:
                left.pop()
            elif id(item) in around:
                raise Malformed("one of its entries holds itself")
            elif id(item) in unfolded:
                left.pop()
                count += unfolded[id(item)]
            else:
                entered.append((node, left, count))
                enter(item, held)
                break
        else:
            if count > most:
                raise Malformed(f"its entries unfold to more than {most}")
            around.discard(id(node))
            unfolded[id(node)] = count


def brief(value: object) -> str:
    """A value in a message, cut to a length that stays readable."""
    return str(value)[:200] if isinstance(value, Exception) else reprlib.repr(value)
