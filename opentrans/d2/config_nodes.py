"""Options as frozen dataclasses, and the way from them to config nodes and back, checked.

One field of a dataclass, made with :func:`option`, is one key: name, default, type and meaning. A
field that is itself such a dataclass is a group of keys. Nothing here knows which options there
are, or imports detectron2.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from opentrans_kernels.errors import OpenTransError

__all__ = ["ConfigError", "option", "option_rows", "read_options", "to_node"]


class ConfigError(OpenTransError):
    """A config value that does not exist, has the wrong type or contradicts another one."""


def option(default: Any, meaning: str) -> Any:
    """A field of an options dataclass; a list default is copied for every instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"doc": meaning})
    return dataclasses.field(default=default, metadata={"doc": meaning})


def option_rows(kind: type, path: str) -> Iterator[tuple[str, Any, str]]:
    """(key, default, meaning) of every option of ``kind``, keys starting with ``path``."""
    sample = kind()
    for item in dataclasses.fields(kind):
        value = getattr(sample, item.name)
        if dataclasses.is_dataclass(value):
            yield from option_rows(type(value), f"{path}.{item.name}")
        else:
            yield f"{path}.{item.name}", value, item.metadata["doc"]


def to_node(values: Mapping[str, Any], kind: type) -> Any:
    """Nested values as a config node of class ``kind``, such as yacs' CfgNode."""
    node = kind()
    for key, value in values.items():
        node[key] = to_node(value, kind) if isinstance(value, Mapping) else value
    # An unknown key is let in here, so that it can be reported with the key that was meant.
    if hasattr(node, "set_new_allowed"):
        node.set_new_allowed(True)
    return node


def read_options(kind: type, node: Mapping[str, Any], path: str) -> Any:
    """An instance of the dataclass ``kind``; keys in any case, missing ones at their default.

    path: of the node in the config, for messages. Raises ConfigError for an unknown key or a wrong
    type.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}
    defaults = kind()
    values = {}
    for given, value in node.items():
        key = str(given).upper()
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"Did you mean {path}.{close[0]}?" if close else f"Keys: {', '.join(fields)}."
            raise ConfigError(f"{path}.{given} is not a key of OpenTrans. {hint}")
        default = getattr(defaults, key)
        where = f"{path}.{key}"
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where} is a group of keys, got {value!r}. Set for instance "
                    f"{where}.{dataclasses.fields(default)[0].name}."
                )
            values[key] = read_options(type(default), value, where)
        else:
            values[key] = _typed(value, default, where)
    return kind(**values)


def _typed(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, list):
        is_list = not isinstance(value, str) and hasattr(value, "__iter__")
        if not is_list:
            raise ConfigError(f"{where} must be a list, such as {default!r}, got {value!r}.")
        return list(value)
    kind: Any = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not bool and isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(
            f"{where} must be a {kind.__name__}, such as {default!r}, got {value!r} "
            f"({type(value).__name__})."
        )
    return value
