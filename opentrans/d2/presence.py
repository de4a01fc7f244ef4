"""Whether detectron2 is there and new enough; the one error where it is not."""

from __future__ import annotations

import importlib
from types import ModuleType

from opentrans_kernels.errors import OpenTransError

__all__ = ["OLDEST", "DetectronMissing", "require_detectron2"]

OLDEST = (0, 6)
_FIX = (
    "detectron2 is in no package index. Put the root of a checkout of github.com/facebookresearch/"
    "detectron2 (the folder that holds detectron2/ and projects/) on PYTHONPATH and install its "
    "Python dependencies (docs/detectron2.md), or install it with: pip install "
    "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2'"
)


class DetectronMissing(OpenTransError, ImportError):
    """detectron2, or something it needs, cannot be imported, or is too old."""


def require_detectron2() -> ModuleType:
    """The detectron2 package. Raises DetectronMissing with what to do."""
    try:
        package = importlib.import_module("detectron2")
        loop = importlib.import_module("detectron2.engine.train_loop")
        importlib.import_module("detectron2.modeling")
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "detectron2"):
            raise DetectronMissing(f"detectron2 cannot be imported ({error}). {_FIX}.") from error
        raise DetectronMissing(
            f"detectron2 is there, but it needs {missing}, which cannot be imported ({error}). "
            f"Install what docs/detectron2.md lists: pip install {missing}"
        ) from error
    version = getattr(package, "__version__", "0")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        raise DetectronMissing(
            f"detectron2 {version} is too old: {'.'.join(map(str, OLDEST))} or later is needed. "
            f"{_FIX}."
        )
    # Early checkouts call themselves 0.6 but do not save the state of hooks.
    if not hasattr(loop.HookBase, "state_dict"):
        raise DetectronMissing(
            f"this checkout of detectron2 {version} does not save the state of hooks (HookBase has "
            f"no state_dict), so training could not be resumed. Take a later one. {_FIX}."
        )
    return package
