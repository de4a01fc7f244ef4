"""Other programs (pip, apt-get, dpkg-deb), run without input, their messages in English."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from opentrans_kernels.errors import OpenTransError

__all__ = ["run_tool"]

LONGEST_S = 1800.0


def run_tool(command: Sequence[str], what: str, folder: Path) -> tuple[int, str]:
    """Exit code of ``command``, run in ``folder``, and all that it wrote.

    what: it works on, for the message. Raises OpenTransError if it takes longer than half an hour.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LONGEST_S,
        )
    except subprocess.TimeoutExpired as error:
        raise OpenTransError(f"{what} took more than {LONGEST_S:.0f} s. Try again.") from error
    return done.returncode, done.stdout
