"""``opentrans bench peers``: the other engines, whether they can run here, and ``--setup``, which
makes the environment of each, with pinned versions, in a directory of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import add_json
from .render import Output

SUMMARY = "list the peers, or make their environments"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench peers``."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="peers (default: all)")
    parser.add_argument("--setup", action="store_true", help="make or complete the environments")
    parser.add_argument("--peer-envs", metavar="DIR", help="where they are (a cache directory)")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of new environments (default: this)"
    )
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Set up if asked, then list; 1 if a setup failed (the others are still made)."""
    from opentrans_kernels.bench.peers.environments import absent, default_home, setup
    from opentrans_kernels.bench.peers.registry import PEERS
    from opentrans_kernels.errors import OpenTransError

    home = Path(options.peer_envs) if options.peer_envs else default_home()
    names = options.names or list(PEERS)
    failed = []
    for name in names:
        if name not in PEERS:
            raise OpenTransError(f"peer {name!r} is not known. Choose among {', '.join(PEERS)}.")
    for name in names if options.setup else ():
        out.text(f"setting up {name} in {home / name}")
        try:
            setup(name, home, python=options.python)
        except OpenTransError as error:
            failed.append(f"{name}: {error}")
    rows, records = [], []
    for name in names:
        peer, why = PEERS[name], absent(name, home)
        state = "ready" if why is None else why
        rows.append([name, ", ".join(peer.requirements), peer.about, state])
        records.append({"name": name, "requirements": list(peer.requirements), "state": state})
    out.table(None, ("peer", "pinned", "what it is", "here"), rows, right=())
    for line in failed:
        out.warn(line)
    out.finish({"home": str(home), "peers": records, "failed": failed})
    return 1 if failed else 0
