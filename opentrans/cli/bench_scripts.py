"""``opentrans bench alpha`` and ``bench training``: the checkout's scripts for spectra and training
steps, run between two looks at the machine, with a result of the common form."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .bench_session import INTERRUPTED, Session, chosen_cpus
from .options import add_json, add_threads, arch_packages, positive
from .render import Output

ALPHA_SUMMARY = "alpha of a network against WeightWatcher and the published estimator"
TRAINING_SUMMARY = "training step with frozen layers: memory kept and time"
QUICK_SETS = ("odd", "first27")
QUICK_LIMIT = 1.2


def add_alpha_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench alpha``."""
    add_threads(parser)
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds, default 5, quick 2")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--peer-envs", metavar="DIR", help="where WeightWatcher's environment is")
    add_json(parser)
    parser.set_defaults(packages=arch_packages)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench training``."""
    add_threads(parser)
    parser.add_argument("--sets", nargs="+", metavar="SET", help="freeze sets (default: all)")
    parser.add_argument("--mask", default="global:0.90", metavar="MASK", help="recipe, or none")
    parser.add_argument("--size", type=positive, default=224, metavar="PX", help="default 224")
    parser.add_argument("--batch", type=positive, metavar="N", help="default 4, quick 2")
    parser.add_argument("--rounds", type=positive, metavar="N", help="default 7, quick 3")
    parser.add_argument("--quick", action="store_true", help="two freeze sets, few rounds")
    add_json(parser)
    parser.set_defaults(packages=arch_packages)


def run_alpha(options: argparse.Namespace, out: Output) -> int:
    """The script's exit code; 130 if interrupted."""
    from opentrans_kernels.bench.peers.environments import absent, default_home

    home = Path(options.peer_envs) if options.peer_envs else default_home()
    why = absent("weightwatcher", home)
    words = [
        "--threads",
        options.threads,
        "--repeats",
        options.repeats or (2 if options.quick else 5),
    ]
    if why is None:
        words += ["--weightwatcher", home / "weightwatcher"]
    else:
        out.warn(f"weightwatcher is skipped: {why}")
    return _run("alpha", "bench_alpha.py", words, options, out)


def run_training(options: argparse.Namespace, out: Output) -> int:
    """The script's exit code; 130 if interrupted."""
    words = ["--threads", options.threads, "--mask", options.mask, "--size", options.size]
    words += ["--batch", options.batch or (2 if options.quick else 4)]
    words += ["--rounds", options.rounds or (3 if options.quick else 7)]
    if options.quick:  # three rounds of a small batch cannot tell the usual 3 %
        words += ["--fail-above", QUICK_LIMIT]
    sets = options.sets or (QUICK_SETS if options.quick else ())
    if sets:
        words += ["--sets", *sets]
    return _run("training", "bench_training.py", words, options, out)


def script_path(name: str) -> Path:
    """A script of ``benchmarks/`` in the source checkout.

    Raises:
        OpenTransError: the package does not run from a checkout.
    """
    from opentrans_kernels.errors import OpenTransError

    path = Path(__file__).resolve().parents[2] / "benchmarks" / name
    if not path.exists():
        raise OpenTransError(
            f"benchmarks/{name} is not installed with the package. Run this command in a source "
            "checkout, installed with: pip install --no-build-isolation -e ."
        )
    return path


def _run(kind: str, script: str, words: list[Any], options: argparse.Namespace, out: Output) -> int:
    from opentrans_kernels.errors import OpenTransError

    path = script_path(script)
    options.isa = "native"
    session = Session(kind, options, out, chosen_cpus(None, options.threads))
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "result.json"
        command = [sys.executable, str(path), *map(str, words), "--json", str(target)]
        interrupted = False
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL if out.quiet else None)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            interrupted = True
            code = child.wait()  # the terminal sent the interrupt to the script as well
        interrupted = interrupted or code in (INTERRUPTED, -signal.SIGINT)
        if not target.exists():
            if interrupted:
                raise KeyboardInterrupt
            raise OpenTransError(
                f"benchmarks/{script} ended with code {code} and left no result; its message is "
                "above. Correct the options it names."
            )
        found = json.loads(target.read_text(encoding="utf-8"))
    found.pop("environment", None)
    session.result |= {key: value for key, value in found.items() if key not in session.result}
    complete = not interrupted and found.get("complete", True)
    failed = list(found.get("failed_checks", ()))
    if code == 1 and not failed:
        failed.append(f"a check of benchmarks/{script} failed; what it printed says which")
    elif code not in (0, INTERRUPTED, -signal.SIGINT):
        failed.append(f"benchmarks/{script} failed with code {code}; see above")
    return session.finish(complete=complete, failed=failed)
