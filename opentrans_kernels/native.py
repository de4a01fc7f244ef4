"""Loading of the compiled extension ``opentrans_kernels._C``, and what is known about its build.

Importing this module loads nothing. The first op calls :func:`load`, which never raises: where
the extension is absent or unusable everything runs on the reference kernels and :func:`reason`
says why. The operator schemas live in Python (:mod:`opentrans_kernels.ops`); only that of
``cpu_capability`` is defined here, because it is asked for without any op.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import threading
from pathlib import Path
from typing import Any

from . import settings
from .errors import BuildMismatch, KernelUnavailable

__all__ = ["available", "build_info", "cpu_capability", "load", "reason", "require"]

MODULE = "opentrans_kernels._C"
TORCH_FLOOR = (2, 11)
REBUILD = "pip install --no-build-isolation --no-deps -e ."

_lock = threading.Lock()
_loaded: bool | None = None  # None: not tried yet
_reason: str | None = None
_mismatch = False  # the file exists but this torch or Python cannot load it
_library: Any = None  # keeps the schema definition alive


def load() -> bool:
    """Load the extension once; return whether it is usable. Never raises for a missing one."""
    global _loaded, _reason, _mismatch
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _reason, _mismatch = _try_load()
                _loaded = _reason is None
    return _loaded


def available() -> bool:
    """Alias of :func:`load`, for conditions."""
    return load()


def reason() -> str | None:
    """Why the extension is not usable, with the fix; ``None`` if it is loaded."""
    load()
    return _reason


def require(what: str = "this operation") -> None:
    """Raise unless the extension is loaded.

    Raises:
        BuildMismatch: it exists, but not for this torch or Python.
        KernelUnavailable: it was not built.
    """
    if not load():
        error = BuildMismatch if _mismatch else KernelUnavailable
        raise error(f"{what} needs the compiled CPU kernels. {_reason}")


def build_info() -> dict[str, Any]:
    """Return what the build recorded in ``_build.json``; ``{}`` if the package was not built.

    Keys: ``version``, ``torch``, ``torch_target``, ``python``, ``platform``, ``compiler``,
    ``flags``, ``built`` (list of extension names), ``not_built`` (name -> reason).

    Raises:
        BuildMismatch: the record exists but is not readable.
    """
    path = Path(__file__).with_name("_build.json")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        record = json.loads(text)
    except ValueError as error:
        raise BuildMismatch(
            f"{path.name} beside the package is damaged ({error}). Build again: {REBUILD}"
        ) from error
    if not isinstance(record, dict):
        raise BuildMismatch(
            f"{path.name} beside the package holds a {type(record).__name__}, not an object. "
            f"Build again: {REBUILD}"
        )
    return record


def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels: "avx512", "avx2", "neon" or "generic".

    ``None`` if the extension is not loaded and none was forced. The extension chooses once per
    process; ``OPENTRANS_CPU_CAPABILITY`` forces the choice.

    Raises:
        KernelUnavailable: the forced capability is not supported by this CPU, or there is no
            extension that could use it.
        OpenTransError: ``OPENTRANS_CPU_CAPABILITY`` has an unknown value.
    """
    forced = settings.get().cpu_capability
    variable = f"OPENTRANS_CPU_CAPABILITY={forced}"
    if not load():
        if forced == "auto":
            return None
        raise KernelUnavailable(f"{variable} has no effect without compiled kernels. {_reason}")
    import torch

    try:
        chosen = str(torch.ops.opentrans_kernels.cpu_capability())
    except RuntimeError as error:
        if forced == "auto":
            raise
        raise KernelUnavailable(
            f"{variable}, but this CPU does not support it, or the extension was built without "
            "it. Unset OPENTRANS_CPU_CAPABILITY to use the best one, or set it to generic, which "
            f"runs everywhere. The extension said: {_first_line(error)}"
        ) from error
    if forced not in ("auto", chosen):
        # Silently running another instruction set would let a benchmark lie.
        raise KernelUnavailable(
            f"{variable}, but the extension runs {chosen!r}: it chose before the variable was "
            "set. Set the variable before starting Python."
        )
    return chosen


def _try_load() -> tuple[str | None, bool]:
    """Return (why not, whether a built extension was refused); (None, False) on success."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        return (
            f"The compiled kernels need torch >= {floor}; this is torch {torch.__version__}. "
            f"Upgrade with: pip install 'torch>={floor}'",
            True,
        )
    # Only this folder: the finder of an editable install would offer another checkout's file.
    folder = str(Path(__file__).parent)
    if importlib.machinery.PathFinder.find_spec(MODULE, [folder]) is None:
        return _not_built(), False
    _define_capability_schema(torch)
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        record = _record_or_empty()
        return (
            f"The extension was built with torch {record.get('torch', 'of unknown version')} and "
            f"cannot be loaded with torch {torch.__version__}: {_first_line(error)}. "
            f"Build it again: {REBUILD}",
            True,
        )
    return None, False


def _define_capability_schema(torch: Any) -> None:
    """Define the one schema that is needed before any op was imported."""
    global _library
    if not hasattr(torch.ops.opentrans_kernels, "cpu_capability"):
        _library = torch.library.Library("opentrans_kernels", "FRAGMENT")
        _library.define("cpu_capability() -> str")


def _not_built() -> str:
    record = _record_or_empty()
    why = record.get("not_built", {}).get("_C")
    if why is None:
        why = "the package was never built" if not record else "its file is missing"
    return (
        f"The compiled CPU kernels are not installed: {why}. Everything works on the slower "
        f"reference kernels. To build them, with a C++20 compiler present: {REBUILD}"
    )


def _record_or_empty() -> dict[str, Any]:
    try:
        return build_info()
    except BuildMismatch:
        return {}  # only a detail of a message; build_info() itself reports the damage


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
