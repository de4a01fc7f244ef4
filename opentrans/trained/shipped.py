"""Files inside this package: a pruned network, and the dense one's answer to show beside it."""

from __future__ import annotations

from pathlib import Path

from opentrans_kernels.errors import CheckpointError, OpenTransError

__all__ = ["FILES", "shipped"]

FOLDER = Path(__file__).with_name("data")

#: Name -> file. "hed-090": the edge detector with 90 % zeros, a sparse checkpoint that
#: ``load_accelerated`` takes as it is. "coffee-dense": what the dense one sees in the photograph
#: of ``edges.photograph``, probability times 255.
FILES = {"hed-090": "hed-090.safetensors", "coffee-dense": "coffee-dense.png"}


def shipped(name: str) -> Path:
    """Where the file of this name lies: ``load_accelerated(shipped("hed-090"))``.

    Raises OpenTransError for a name of none, CheckpointError if this installation lacks the file.
    """
    if name not in FILES:
        raise OpenTransError(
            f"no file {name!r} comes with this package. There are {', '.join(FILES)}."
        )
    path = FOLDER / FILES[name]
    if not path.is_file():
        raise CheckpointError(
            f"{FILES[name]} is not in this installation ({FOLDER}): it was made from a source tree "
            "without its data files. Install from a complete checkout or a wheel."
        )
    return path
