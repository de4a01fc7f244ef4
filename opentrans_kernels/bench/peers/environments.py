"""The peers' environments: where they are, and the one command that makes them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from ...errors import OpenTransError
from .registry import PEERS, Peer


def default_home() -> Path:
    """``$XDG_CACHE_HOME/opentrans-kernels/peers``, usually below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "opentrans-kernels" / "peers"


def python_of(name: str, home: Path) -> Path:
    """The interpreter of a peer's environment, whether it exists or not."""
    return home / name / "bin" / "python"


def absent(name: str, home: Path) -> str | None:
    """Why a peer cannot run, with the command that helps; None if its environment is there."""
    if python_of(name, home).exists():
        return None
    return (  # results are stored with it, so it names no place of one machine
        f"no environment at {home.name}/{name}. Make it with: opentrans bench peers {name} --setup"
    )


def setup(name: str, home: Path, *, python: str = sys.executable) -> None:
    """Make or complete the environment of a peer; pip's messages go to stderr.

    Raises:
        OpenTransError: an unknown peer, or a step that failed.
    """
    if name not in PEERS:
        raise OpenTransError(f"peer {name!r} is not known. Choose among {', '.join(PEERS)}.")
    peer = PEERS[name]
    interpreter = python_of(name, home)
    if not interpreter.exists():
        home.mkdir(parents=True, exist_ok=True)
        _call([python, "-m", "venv", str(home / name)], f"making the environment of {name}", peer)
    if peer.shares_torch:
        _share(interpreter)
    extra = ["--no-deps"] if peer.shares_torch else []
    if peer.build:  # against the torch it shares, which an isolated build would not see
        tools = [str(interpreter), "-m", "pip", "install", "-q", *peer.build]
        _call(tools, f"installing {', '.join(peer.build)}", peer)
        extra += ["--no-build-isolation", "--no-binary", name]
    command = [str(interpreter), "-m", "pip", "install", "-q", *extra, *peer.requirements]
    _call(command, f"installing {', '.join(peer.requirements)}", peer)


def _share(interpreter: Path) -> None:
    """Let an environment see this one's packages, behind its own."""
    found = subprocess.run(
        [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    target = Path(found.stdout.strip()) / "opentrans_host_packages.pth"
    target.write_text("\n".join(sorted(own)) + "\n", encoding="utf-8")


def _call(command: list[str], what: str, peer: Peer) -> None:
    environ = dict(os.environ)
    if peer.build:  # its own tools first, and nothing for a GPU
        tools = str(Path(command[0]).parent)
        environ |= {"PATH": os.pathsep.join([tools, environ.get("PATH", "")]), "FORCE_CPU": "1"}
    if subprocess.run(command, stdout=sys.stderr, env=environ).returncode == 0:
        return
    need = " It is built here and needs a C++ compiler." if peer.build else ""
    if peer.python:
        need = f" It needs Python {' to '.join(peer.python)}; name one with --python."
    raise OpenTransError(f"{what} failed (see above): {' '.join(command)}.{need}")
