"""Imports at first use: the public names of our packages, and packages that may be absent."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from .errors import OpenTransError

__all__ = ["lazy_exports", "optional_module", "require_packages"]

#: Every optional package by the name it is imported under -> what pip installs.
PIP_NAMES = {
    "PIL": "pillow",
    "h5py": "h5py",
    "imgviz": "imgviz",
    "onnx": "onnx",
    "open_clip": "open_clip_torch",
    "ray": "'ray[data]'",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "'transformers>=5'",
}


def optional_module(name: str, use: str) -> ModuleType:
    """Import module ``name`` of an optional package.

    use: what it is for, the beginning of the message: "the CLIP tower is built from open_clip".
    Raises OpenTransError with the command that installs the package if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing({name.partition(".")[0]: use}, f" ({error})") from error


def require_packages(needs: Mapping[str, str]) -> None:
    """Look whether packages are installed, without importing them: before any work that takes time.

    needs: import name -> what it is for, as in :func:`optional_module`. Raises OpenTransError that
    names all that are missing.
    """
    absent = {name: use for name, use in needs.items() if not _installed(name)}
    if absent:
        raise _missing(absent, "")


def _installed(name: str) -> bool:
    if name in sys.modules:  # also where a test or a program put something else there
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def _missing(needs: Mapping[str, str], why: str) -> OpenTransError:
    packages = " ".join(PIP_NAMES[name] for name in needs)
    return OpenTransError(
        f"{'; '.join(needs.values())}, which cannot be imported{why}. Install "
        f"{'it' if len(needs) == 1 else 'them'} with: pip install {packages}"
    )


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
