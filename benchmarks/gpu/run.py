"""Check and time everything the package has for a GPU, in one command: ``make gpu``.

Runs from the source tree, without network and without compiling anything beforehand, with
torch >= 2.11 and triton >= 3.6. Each section has a process of its own, so a crash or a hang of one
leaves the others alone. Results are written after every section. Exit code: 0 all sections passed,
1 at least one failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Modules of this folder that register sections.
MODULES = ("rows", "trunk", "two_four", "alpha", "deform")
#: The numbers that everything else waits for come first; sections not named here come last.
ORDER = (
    "rows",
    "trunk bfloat16",
    "compiled bfloat16",
    "trunk float32",
    "alpha",
    "deform",
    "two_four",
    "trunk float16",
    "trunk tf32",
    "ceilings",
    "fit",
    "gram",
    "own eigenvalues",
    "solvers",
)
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
NO_GPU = "gpu: torch sees no CUDA device, so nothing was run. See docs/gpu.md."
_MINUTES = 8.5
_MARGIN = 6.0  # seconds of a section for starting Python and for writing
_BEGIN = time.monotonic()  # before torch is imported, which may take longer than that
_RESERVE = 15.0  # seconds kept for each section that is still to come
_PACKAGES = ("torch", "triton", "numpy", "timm", "open_clip_torch")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; default: benchmarks/results/gpu")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="of all sections together")
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="tiny shapes on the CPU in Triton's interpreter: proves the script, measures nothing",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=1e9, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    for path in (str(ROOT / "benchmarks" / "gpu"), str(ROOT)):
        if path not in sys.path:
            sys.path.insert(0, path)
    import torch
    from sections import SECTIONS  # the package is imported by the sections that need it

    for module in MODULES:
        importlib.import_module(module)
    unknown = [name for name in options.only or () if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    ranks = {name: rank for rank, name in enumerate(ORDER)}
    names = options.only or sorted(SECTIONS, key=lambda name: ranks.get(name, len(ranks)))
    if options.list:
        print("\n".join(names))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    if options.worker:
        return work(options.worker, names[0], options.rehearse, options.limit)
    record = {"kind": "opentrans gpu run", "rehearsal": options.rehearse, "machine": machine()}
    path = options.json or RESULTS / f"{file_name(record['machine'])}.json"
    code = run_all(
        [(name, SECTIONS[name].seconds) for name in names],
        lambda name, limit: in_a_process(name, limit, options.rehearse),
        record,
        path,
        60 * options.minutes,
    )
    print(f"results: {path}")
    return code


def run_all(
    sections: Sequence[tuple[str, float]],
    run: Callable[[str, float], dict[str, Any]],
    record: dict[str, Any],
    path: Path,
    seconds: float,
) -> int:
    """Run sections one after another, record each outcome, write after each; 1 if any failed.

    A section gets its own limit, but leaves :data:`_RESERVE` to each one behind it.
    """
    end = time.monotonic() + seconds
    record["sections"] = results = {}
    failed = []
    for number, (name, limit) in enumerate(sections, 1):
        left = end - time.monotonic()
        shared = left - _RESERVE * (len(sections) - number)
        if left < 5:
            outcome: dict[str, Any] = {"ok": False, "error": "not run: the time was used up"}
        else:
            outcome = run(name, min(limit, max(shared, min(left, _RESERVE))))
        results[name] = outcome
        if not outcome["ok"]:
            failed.append(name)
        record["failed"] = failed
        write(path, record)
        state = "ok" if outcome["ok"] else "FAILED"
        print(f"[{state}] {name} ({outcome.get('seconds', 0):.1f} s)", flush=True)
        for line in outcome.get("notes", ()):
            print(f"    {line}", flush=True)
        if not outcome["ok"]:
            print("    " + outcome["error"].strip().replace("\n", "\n    "), flush=True)
    if failed:
        print(f"{len(failed)} of {len(sections)} sections failed: {', '.join(failed)}")
    return 1 if failed else 0


def in_a_process(name: str, limit: float, rehearse: bool) -> dict[str, Any]:
    """The outcome of one section, run by a fresh interpreter that may crash or hang."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(path)]
        command += ["--only", name, "--limit", str(limit), *(["--rehearse"] if rehearse else [])]
        output = Path(folder) / "output"
        # A file, not a pipe, and a session of its own: torch.compile starts processes that would
        # keep a pipe open, and the device busy, after the section has ended.
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit)
                ended = f"exit code {code}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {limit:.0f} s"
            finally:
                _kill_group(process)
        found = _partial(path)
        if "ok" not in found:
            text = output.read_bytes().decode(errors="replace")[-3000:]
            found |= {"ok": False, "error": f"{ended}\n{text}"}
    return found | {"seconds": round(time.monotonic() - begin, 2)}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a section and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing of it is left
    process.wait()


def _partial(path: Path) -> dict[str, Any]:
    """What a section has left behind: its outcome, results so far, or nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def work(path: str, name: str, rehearse: bool, limit: float) -> int:
    """Run one section in this process and leave its outcome in a file."""
    import torch
    from sections import SECTIONS, Context

    device = torch.device("cpu") if rehearse else torch.device("cuda", torch.cuda.current_device())
    context = Context(device, rehearse, deadline=_BEGIN + limit - _MARGIN)
    context.saver = lambda result: write(
        Path(path), {"result": result, "partial": True, "notes": context.notes}
    )
    try:
        found: dict[str, Any] = {"ok": True, "result": SECTIONS[name].run(context)}
    except Exception as error:
        trace = traceback.format_exc(limit=-4)
        found = {"ok": False, "error": f"{type(error).__name__}: {error}\n{trace}"}
        found = {k: v for k, v in _partial(Path(path)).items() if k == "result"} | found
    write(Path(path), found | {"notes": context.notes})
    return 0


def write(path: Path, record: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    # A value that JSON does not know must not cost the section: it is written as text.
    part.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def machine() -> dict[str, Any]:
    """GPU, driver, CPU count and versions; no host name."""
    import platform
    from importlib import metadata

    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"versions": versions, "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gb"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def file_name(found: dict[str, Any]) -> str:
    """A file name of lowercase words for a machine."""
    words = re.findall(r"[a-z0-9]+", found.get("gpu", "rehearsal").lower())
    return "-".join(words)


if __name__ == "__main__":
    sys.exit(main())
