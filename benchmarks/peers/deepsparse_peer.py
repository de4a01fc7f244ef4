"""DeepSparse 1.8.0 against our trunk on the same masked weights and the same image.

Two steps, both from the repository root::

    python benchmarks/peers/deepsparse_peer.py setup --venv /somewhere/deepsparse
    python benchmarks/peers/deepsparse_peer.py run --venv /somewhere/deepsparse \\
        --mask global:0.90 --size 224 --isa avx2 --json deepsparse.json

DeepSparse needs old versions of its dependencies, so it lives in an environment of its own (Python
3.8 to 3.11) and in a process of its own. The two processes take turns: one runs while the other
waits for its next command, both pinned to the same CPUs. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentrans_kernels.bench.environment import environment_block, isa_environment
from opentrans_kernels.bench.timing import Timing, TimingTable, pin
from opentrans_kernels.cli.bench import chosen_cpus
from opentrans_kernels.cli.options import (
    add_json,
    add_model,
    add_size,
    add_threads,
    input_size,
    positive,
    subject_of,
)
from opentrans_kernels.cli.render import Output
from opentrans_kernels.errors import OpenTransError

HERE = Path(__file__).resolve().parent
REQUIREMENT = "deepsparse==1.8.0"
OURS, PEER = "opentrans", "deepsparse"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    setup = steps.add_parser("setup", help="make DeepSparse's environment")
    setup.add_argument("--venv", required=True, type=Path, metavar="DIR")
    setup.add_argument("--python", default=sys.executable, help="a Python 3.8 to 3.11")
    measure = steps.add_parser("run", help="time both, interleaved by process")
    measure.add_argument("--venv", required=True, type=Path, metavar="DIR")
    measure.add_argument("--mask", default="global:0.90", metavar="MASK")
    add_model(measure)
    add_size(measure)
    add_threads(measure)
    measure.add_argument("--batch", type=positive, default=1, metavar="N")
    measure.add_argument("--isa", choices=("native", "avx2", "avx512"), default="native")
    measure.add_argument("--rounds", type=positive, default=15, metavar="N")
    add_json(measure)
    options = parser.parse_args(argv)
    try:
        return make_environment(options) if options.step == "setup" else run(options)
    except OpenTransError as error:
        sys.stderr.write(f"deepsparse_peer: {error}\n")
        return 2


def make_environment(options: argparse.Namespace) -> int:
    """Create the venv and install DeepSparse; an existing environment is completed."""
    python = options.venv / "bin" / "python"
    if not python.exists():
        _call([options.python, "-m", "venv", str(options.venv)], "making the environment")
    _call([str(python), "-m", "pip", "install", REQUIREMENT], "installing DeepSparse")
    return 0


def _call(command: list[str], what: str) -> None:
    if subprocess.run(command).returncode != 0:
        raise OpenTransError(
            f"{what} failed (see above): {' '.join(command)}. DeepSparse 1.8.0 needs Linux and "
            "Python 3.8 to 3.11; name one with --python."
        )


class Worker:
    """A process that times one callable on command (see ``protocol.py``)."""

    def __init__(self, name: str, command: list[str], environ: dict[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        try:
            self.description = self._read()
        except OpenTransError:
            self.close()
            raise

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise OpenTransError(
                f"the {self.name} process ended with code {self.process.wait()}; its messages are "
                "above. Run the setup step again if its environment is incomplete."
            )
        try:
            return json.loads(line)
        except ValueError as error:
            raise OpenTransError(
                f"the {self.name} process answered {line.strip()[:80]!r}, which is not JSON: "
                "something in its environment prints on stdout. Run the setup step in a fresh "
                "directory."
            ) from error

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def run(options: argparse.Namespace) -> int:
    """Time both engines and write the result."""
    import numpy as np
    import torch
    from graph import write_graph

    from opentrans_kernels.bench.variants import TrunkModule, relative_error

    out = Output(options.json)
    peer_python = options.venv / "bin" / "python"
    if not peer_python.exists():
        raise OpenTransError(
            f"{peer_python} does not exist. Make it first: python {sys.argv[0]} setup --venv "
            f"{options.venv}"
        )
    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)  # both workers inherit it
    subject = subject_of(options, out)
    image = torch.randn(
        options.batch, 3, *input_size(options), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        reference = TrunkModule(subject.masked_copy().double())(image.double())
    table = TimingTable({name: Timing(name, 1) for name in (OURS, PEER)}, options.rounds, 0.0)
    errors, workers = {}, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_graph(subject, image, folder)
        # Files, not a seed: synthetic weights made under another instruction set differ slightly.
        torch.save(subject.model.state_dict(), folder / "tower.pt")
        subject.masks.save(folder / "masks.safetensors")
        try:
            workers = start_workers(options, folder, peer_python)
            for worker in workers:
                worker.ask(f"output {folder / worker.name}.npy")
                found = torch.from_numpy(np.load(folder / f"{worker.name}.npy"))
                errors[worker.name] = relative_error(found, reference)
                worker.ask("sample 3 3")
            for index in range(options.rounds):
                for worker in workers if index % 2 else reversed(workers):
                    answer = worker.ask("sample 1 2")
                    table[worker.name].wall_ms.append(answer["wall_ms"])
                    table[worker.name].cpu_ms.append(answer["cpu_ms"])
        finally:
            for worker in workers:
                worker.close()
    ratio = table.ratio(PEER, OURS)
    rows = [
        [name, f"{table[name].wall.median:.2f}", f"{table[name].cpu.median:.2f}", f"{error:.1e}"]
        for name, error in errors.items()
    ]
    out.heading(f"{subject.arch} trunk, {subject.mask}, {options.size} px, batch {options.batch}")
    out.table(None, ("engine", "wall ms", "CPU ms", "error"), rows)
    out.text(f"{ratio.median:.2f}x DeepSparse (quartiles {ratio.q1:.2f}-{ratio.q3:.2f})")
    out.finish(
        {
            "subject": subject.describe(),
            "input": list(image.shape),
            "isa": options.isa,
            "pinned_cpus": cpus,
            "speedup": ratio.median,
            "speedup_spread": ratio.to_dict(),
            "speedup_cpu_time": table.ratio(PEER, OURS, "cpu").median,
            "engines": {
                worker.name: {
                    **worker.description,
                    **table[worker.name].to_dict(),
                    "max_rel_err": errors[worker.name],
                }
                for worker in workers
            },
            **environment_block(),
            "threads": options.threads,
        }
    )
    return 0


def start_workers(options: argparse.Namespace, folder: Path, peer_python: Path) -> list[Worker]:
    """Both processes, limited to the same instruction set and thread count."""
    threads = str(options.threads)
    limits = isa_environment(options.isa, options.threads)
    root = str(HERE.parents[1])
    ours = {**os.environ, **limits, "PYTHONPATH": root}
    peer = {**os.environ, **limits, "NM_DISABLE_ANALYTICS": "1"}
    if options.isa != "native":
        peer["NM_ARCH"] = options.isa
    script = str(HERE / "trunk_worker.py")
    command = [sys.executable, script, str(folder), threads, options.arch]
    workers = [Worker(OURS, command, ours)]
    try:
        script = str(HERE / "deepsparse_worker.py")
        workers.append(Worker(PEER, [str(peer_python), script, str(folder), threads], peer))
    except OpenTransError:
        workers[0].close()
        raise
    return workers


if __name__ == "__main__":
    sys.exit(main())
