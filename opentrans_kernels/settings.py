"""Every environment variable of OpenTrans, in one frozen dataclass.

:func:`get` reads the environment once, at first use (never while importing), and checks it: an
unknown value raises :class:`~opentrans_kernels.errors.OpenTransError`. An empty value counts as
unset. :func:`table` is what ``opentrans info`` shows.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OpenTransError

__all__ = ["Settings", "SettingRow", "get", "reload", "table"]

_LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}


def _variable(name: str, default: str | bool, choices: tuple[str, ...], doc: str) -> Any:
    metadata = {"name": name, "choices": choices, "doc": doc}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The run-time settings. Build one with :meth:`from_env`; tests may construct it directly."""

    backend: str = _variable(
        "OPENTRANS_BACKEND",
        "auto",
        ("auto", "reference", "cpu", "triton"),
        "Which kernels to use: the fastest available, plain PyTorch, the compiled CPU kernels or "
        "the Triton kernels for CUDA (an error where they are missing).",
    )
    strict: bool = _variable(
        "OPENTRANS_STRICT",
        False,
        ("0", "1"),
        "1: a fallback to a slower kernel is an error instead of a logged warning, and every call "
        "of an accelerated module compares all bits of its weights.",
    )
    cpu_capability: str = _variable(
        "OPENTRANS_CPU_CAPABILITY",
        "auto",
        ("auto", "avx512", "avx2", "neon", "generic"),
        "Forces the instruction set of the compiled CPU kernels; an error if the CPU lacks it.",
    )
    log: str = _variable(
        "OPENTRANS_LOG",
        "auto",
        ("auto", *_LOG_LEVELS),
        "Writes log lines of this level and above to stderr. auto: leave logging to the "
        "application; Python then shows warnings only.",
    )
    cache: str = _variable(
        "OPENTRANS_CACHE",
        "~/.cache/opentrans/trained",
        (),
        "The folder of fetched trained weights and photographs.",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check the variables in ``environ``.

        Raises:
            OpenTransError: a variable has a value that is not among its choices.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name, choices = field.metadata["name"], field.metadata["choices"]
            given = environ.get(name, "").strip()
            text = given.lower() if choices else given
            if not text:
                continue
            if choices and text not in choices:
                raise OpenTransError(
                    f"{name}={environ[name]!r} is not a known value. "
                    f"Use one of {', '.join(choices)}, or unset {name}."
                )
            values[field.name] = text == "1" if isinstance(field.default, bool) else text
        return cls(**values)


@dataclass(frozen=True)
class SettingRow:
    """One line of the table shown by ``opentrans info``."""

    name: str
    value: str  #: the value in force
    default: str
    origin: str  #: "default" or "environment"
    when: str  #: "run" or "build"
    choices: str
    doc: str


# Read by setup.py when the package is built; listed so that one table shows every variable.
_BUILD_VARIABLES = (
    (
        "OPENTRANS_CPU",
        "auto",
        "auto, 0, 1",
        "Compile the CPU kernels: if a C++20 compiler is found, never, or fail without one.",
    ),
    (
        "OPENTRANS_CUDA",
        "auto",
        "auto, 0, 1",
        "Compile the CUDA kernels: if a CUDA toolkit and a CUDA build of torch are found, never, "
        "or fail without them.",
    ),
)

_current: Settings | None = None


def get() -> Settings:
    """Return the settings, reading the environment at the first call.

    Raises:
        OpenTransError: a variable has an unknown value (again at every call until it is fixed).
    """
    return _current if _current is not None else reload()


def reload() -> Settings:
    """Read the environment again, and return the new settings.

    Already packed layers keep the kernel they were packed for, and the compiled extension keeps
    the CPU capability it chose at its first call.
    """
    global _current
    settings = Settings.from_env(os.environ)
    _configure_logging(settings.log)
    _current = settings
    return settings


def table(environ: Mapping[str, str] | None = None) -> list[SettingRow]:
    """List every variable with its value, origin, choices and meaning.

    Args:
        environ: the environment to read, ``os.environ`` by default.

    Raises:
        OpenTransError: a run-time variable has an unknown value.
    """
    environ = os.environ if environ is None else environ
    settings = Settings.from_env(environ)
    rows = []
    for field in dataclasses.fields(Settings):
        name, choices = field.metadata["name"], ", ".join(field.metadata["choices"]) or "a path"
        value, default = _text(getattr(settings, field.name)), _text(field.default)
        doc = field.metadata["doc"]
        rows.append(SettingRow(name, value, default, _origin(name, environ), "run", choices, doc))
    for name, default, choices, doc in _BUILD_VARIABLES:
        value = environ.get(name, "").strip() or default
        rows.append(SettingRow(name, value, default, _origin(name, environ), "build", choices, doc))
    return rows


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _origin(name: str, environ: Mapping[str, str]) -> str:
    return "environment" if environ.get(name, "").strip() else "default"


_handler: logging.Handler | None = None


def _configure_logging(level: str) -> None:
    """Attach one stderr handler while a level is forced; otherwise leave logging alone."""
    global _handler
    logger = logging.getLogger("opentrans_kernels")
    if _handler is not None:
        logger.removeHandler(_handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate, _handler = True, None
    if level == "auto":
        return
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(_LOG_LEVELS[level])
    logger.propagate = False  # an application's own handler would print every line twice
