"""What every measured row says beside its times: is its answer right, and what repeats it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def matched(error: float, bound: float) -> dict[str, Any]:
    """Whether an answer is the dense one: ``equal`` if ``error`` (largest or relative difference
    from the reference, in the unit of ``bound``) is at most ``bound``; NaN is not."""
    return {"equal": bool(error <= bound), "error": float(error), "bound": float(bound)}


def subject_words(options: Any) -> dict[str, Any]:
    """The options of ``command_words`` that say what was measured, and how it was limited."""
    names = (
        "mask", "arch", "checkpoint", "seed", "size", "size_w", "batch", "threads", "isa"
    )  # fmt: skip
    return {name: getattr(options, name) for name in names}


def command_words(start: Iterable[object], **options: Any) -> list[str]:
    """``start`` and its options as words: ``size_w=96`` is ``--size-w 96``, True the bare option,
    None and False nothing, a list the option once for every value."""
    words = [str(word) for word in start]
    for key, value in options.items():
        option = "--" + key.replace("_", "-")
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is True:
                words.append(option)
            elif one is not None and one is not False:
                words += [option, str(one)]
    return words
