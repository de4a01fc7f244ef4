"""``opentrans bench all``: every benchmark, one after the other, each in a process of its own that
writes its result as soon as it is finished. A benchmark that fails or crashes is recorded, and the
next one runs; an interrupt keeps what was written."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bench_session import INTERRUPTED
from .options import AGAIN, add_json, arch_packages
from .render import Output, check_writable, make_folder

SUMMARY = "the whole suite for this machine: under 30 minutes, --quick under 3"
TRAINING_SETS = ("odd", "first27")  # each takes two minutes
MASKS = ("global:0.90", "global:0.80", "global:0.95", "uniform:0.90")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench all``."""
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR",
        help="directory of results; a folder named after the machine is made in it",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a first look, under 3 minutes")
    parser.add_argument("--peer-envs", metavar="DIR", help="where the peers' environments are")
    add_json(parser)
    parser.set_defaults(packages=arch_packages)


def commands(quick: bool, cpus: int) -> Iterator[tuple[str, list[str]]]:
    """(name of the result file, words behind ``opentrans bench``) in the order of running."""

    def trunk(mask: str, *words: str) -> list[str]:
        return ["trunk", "--mask", mask, *words]

    if quick:
        yield "g90-224-t1-native", trunk(MASKS[0], "--peers", "all", "--quick", "--no-layers")
        yield "op-224-t1-native", ["op", "--quick"]
        yield "training-224-b2-t1", ["training", "--quick", "--sets", "odd"]
        return
    limited = ("--isa", "avx2")
    yield "g90-224-t1-avx2", trunk(MASKS[0], *limited, "--peers", "all")
    for mask in MASKS[1:]:
        yield f"{mask[0]}{mask[-2:]}-224-t1-avx2", trunk(mask, *limited, "--quick")
    yield "g90-224-t1-native", trunk(MASKS[0], "--quick", "--peers", "all")
    yield "g90-512-t1-avx2", trunk(MASKS[0], "--size", "512", *limited, "--quick")
    if cpus > 1:
        yield "g90-224-t2-avx2", trunk(MASKS[0], "--threads", "2", *limited, "--quick")
    yield "op-224-t1-avx2", ["op", *limited]
    yield "model-g90-native", ["model"]
    yield "alpha-t1", ["alpha"]
    yield "training-224-b4-t1", ["training", "--sets", *TRAINING_SETS]


def run(options: argparse.Namespace, out: Output) -> int:
    """Run everything; 1 if a benchmark failed a check or crashed, 130 if interrupted."""
    from opentrans_kernels.bench.environment import machine
    from opentrans_kernels.bench.machines import machine_slug
    from opentrans_kernels.bench.timing import available_cpus

    folder = check_writable(options.output, directory=True) / machine_slug(machine())
    make_folder(folder)
    root = str(Path(__file__).resolve().parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(
        filter(None, [root, os.environ.get("PYTHONPATH")]))}  # fmt: skip
    records: list[dict[str, Any]] = []
    interrupted = False
    for name, words in commands(options.quick, len(available_cpus() or [0])):
        target = folder / f"{name}.json"
        if options.peer_envs and words[0] in ("trunk", "alpha"):
            words = [*words, "--peer-envs", options.peer_envs]
        out.heading(f"opentrans bench {' '.join(words)}")
        out.stdout.flush()
        target.unlink(missing_ok=True)  # a crash must not leave an older run's numbers
        start = time.monotonic()
        command = [sys.executable, *AGAIN, "bench", *words]
        child = subprocess.Popen(
            [*command, "--json", str(target)],
            env=environ,
            stdout=subprocess.DEVNULL if out.quiet else None,
        )
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.wait()  # the terminal sent the interrupt to the child as well
            interrupted, code = True, INTERRUPTED
        seconds = time.monotonic() - start
        records.append({"name": name, "command": words, "exit_code": code, "seconds": seconds})
        if interrupted:
            out.warn(f"interrupted in {name}: the suite stops; what was written was kept")
            break
        if code:
            what = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            out.warn(f"{name} {what}; the suite goes on")
    out.heading(f"results in {folder}")
    out.table(
        None,
        ("result", "exit code", "seconds"),
        [[one["name"], one["exit_code"], f"{one['seconds']:.0f}"] for one in records],
    )
    out.text(f"a page of them: opentrans report {folder} -o report.html", whole=True)
    out.finish({"folder": folder.name, "complete": not interrupted, "runs": records})
    if interrupted:
        return INTERRUPTED
    return 1 if any(one["exit_code"] for one in records) else 0
