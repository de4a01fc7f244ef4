"""Packages that import their public names at first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) of ``package``.

    exports: public name -> module of the package that defines it. A name that is also a submodule
    stays the object it exports, whoever imports that submodule first.
    """
    module = sys.modules[package]

    def get(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{exports[name]}"), name)
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *exports})

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # The import system binds every submodule to its package under its own name.
            if isinstance(value, ModuleType) and exports.get(name) == name:
                value = getattr(value, name)
            super().__setattr__(name, value)

    if any(name == target for name, target in exports.items()):
        module.__class__ = Package
    return get, names
