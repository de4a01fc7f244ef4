"""Deformable attention on the CPU: ours, PyTorch's ``grid_sample``, and the peer's kernel.

Example::

    opentrans bench peers torch-ms-deform-attn --setup
    python benchmarks/bench_deform.py --threads 1 --json deform-t1.json
    python benchmarks/bench_deform.py --case 5376-32-backward

A row is queries-D-pass. Queries are the pixels of three levels (an image of 512, and one of 800 x
1216, at strides 8, 16 and 32), eight heads of D channels, four points a level, batch 1. Passes:
*forward* from locations and weights; *fused* from offsets and logits, where the other sides compute
softmax and locations first; *backward* to value, locations and weights.

All sides run in one process on the same tensors, interleaved. The fastest dense side of a row,
eager or ``torch.compile``, is its baseline. Errors are against float64, of the first queries; ours
may err by twice what eager float32 does, or a row gets no speed-up. CPU time decides with one
thread, wall time with more. Exit code 1 if ours is inexact or slower than the baseline, 2 for bad
input.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

from opentrans.cli.bench_session import INTERRUPTED, Session
from opentrans.cli.options import positive
from opentrans.cli.render import Output
from opentrans_kernels import ops
from opentrans_kernels.bench.peers.environments import absent, default_home, python_of
from opentrans_kernels.bench.rows import command_words, matched
from opentrans_kernels.bench.timing import choose_cpus, interleave, pin
from opentrans_kernels.bench.variants import relative_error
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.ops.ms_deform_attn.points import attention_of, locations_of

KIND = "deform"
PEER = "torch-ms-deform-attn"
LEVELS = {
    "5376": [(64, 64), (32, 32), (16, 16)],
    "19950": [(100, 152), (50, 76), (25, 38)],
    "84": [(8, 8), (4, 4), (2, 2)],  # for a first look; not in the default rows
}
CHANNELS = (16, 32, 64)
PASSES = ("forward", "fused", "backward")
HEADS, POINTS = 8, 4
CHECKED = 1000  # queries that float64 computes
FLOOR = 1e-6  # of the largest value: an error below it is never a fault
Tensors = tuple[torch.Tensor, ...]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(levels: list[tuple[int, int]]) -> Attend:
    """Sampling by ``grid_sample``, level by level, in the dtype of its arguments."""

    def run(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        n, _, m, d = value.shape
        q = locations.shape[1]
        maps = value.split([h * w for h, w in levels], 1)
        grids = (2 * locations - 1).permute(0, 2, 1, 3, 4, 5).flatten(0, 1)  # [NM, Q, L, P, 2]
        shares = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)[:, None]  # [NM, 1, Q, L, P]
        total = value.new_zeros(n * m, d, q)
        for i, (h, w) in enumerate(levels):
            image = maps[i].permute(0, 2, 3, 1).reshape(n * m, d, h, w)
            found = F.grid_sample(image, grids[:, :, i], align_corners=False)
            total = total + (found * shares[:, :, :, i]).sum(-1)
        return total.view(n, m * d, q).transpose(1, 2).contiguous()

    return run


def inputs(levels: list[tuple[int, int]], d: int) -> dict[str, torch.Tensor]:
    """Random tensors of a row; no point lies where rounding would move it into another cell."""
    made = torch.Generator().manual_seed(0)
    pixels, count = sum(h * w for h, w in levels), len(levels)
    points = (1, pixels, HEADS, count, POINTS)
    size = torch.tensor([(w, h) for h, w in levels], dtype=torch.float32)[:, None]
    at = torch.rand(*points, 2, generator=made) * size - 0.5
    at = at.floor() + (at - at.floor()).clamp(0.01, 0.99)
    return {
        "value": torch.randn(1, pixels, HEADS, d, generator=made),
        "locations": (at + 0.5) / size,
        "logits": torch.randn(points, generator=made),
        "reference": torch.rand(1, pixels, count, 2, generator=made),
        "offsets": 3 * torch.randn(*points, 2, generator=made),
        "grad": torch.randn(1, pixels, HEADS * d, generator=made),
    }


def peer_kernel(home: Path, shapes: torch.Tensor) -> Attend | str:
    """The peer's operator, or why it is not timed."""
    if (why := absent(PEER, home)) is not None:
        return why
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run(
        [python_of(PEER, home), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    sys.path.append(place)  # behind ours: it was built for this torch, and shares it
    try:
        package = importlib.import_module("torch_ms_deform_attn")
    except ImportError as error:
        return f"{error}. It was built for another torch; delete {home / PEER} and set it up again"
    finally:
        sys.path.remove(place)
    pixels = shapes.prod(1)
    starts = pixels.cumsum(0) - pixels
    return lambda value, at, weights: package.ms_deform_attn(value, shapes, starts, at, weights)


def attends(levels: list[tuple[int, int]], home: Path) -> tuple[dict[str, Attend], str | None]:
    """Sides by name, and why the peer is not among them."""
    shapes = torch.tensor(levels)
    plain = dense(levels)
    functorch_config.donated_buffer = False  # a backward is timed more than once
    found: dict[str, Attend] = {
        "eager": plain,
        "compiled": torch.compile(plain),
        "ours": lambda value, at, weights: ops.ms_deform_attn(value, shapes, at, weights),
    }
    peer = peer_kernel(home, shapes)
    if isinstance(peer, str):
        return found, peer
    return found | {"peer": peer}, None


def calls_of(
    name: str, attend: Attend, kind: str, given: dict[str, torch.Tensor], shapes: torch.Tensor
) -> Callable[[], Tensors]:
    """What one side does in a pass."""
    value, at, logits = given["value"], given["locations"], given["logits"]
    if kind == "forward":
        return lambda: (attend(value, at, logits),)
    if kind == "backward":
        leaves = [t.detach().requires_grad_() for t in (value, at, logits)]
        with torch.enable_grad():
            out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, given["grad"], retain_graph=True)
    offsets, about = given["offsets"], given["reference"]
    if name == "ours":
        return lambda: (ops.ms_deform_attn(value, shapes, offsets, logits, reference=about),)

    def both(v: torch.Tensor, o: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return attend(v, locations_of(o, r, shapes.to(o.device)), attention_of(w))

    run = torch.compile(both) if name == "compiled" else both
    return lambda: (run(value, offsets, logits, about),)


def errors_of(
    kind: str, levels: list[tuple[int, int]], given: dict[str, torch.Tensor],
    sides: dict[str, Attend],
) -> dict[str, float]:  # fmt: skip
    """Per side: the largest error of the first queries, relative to the largest value."""
    shapes = torch.tensor(levels)
    some = {key: t if key == "value" else t[:, :CHECKED] for key, t in given.items()}
    exact = calls_of("eager", dense(levels), kind, {k: t.double() for k, t in some.items()}, shapes)
    right = exact()
    return {
        name: max(
            relative_error(a, b)
            for a, b in zip(calls_of(name, side, kind, some, shapes)(), right, strict=True)
        )
        for name, side in sides.items()
    }


def measure(row: str, options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """One row: errors first, then times."""
    queries, d, kind = row.split("-")
    levels, given = LEVELS[queries], inputs(LEVELS[queries], int(d))
    sides, why = attends(levels, home)
    shapes = torch.tensor(levels)
    with torch.no_grad():
        errors = errors_of(kind, levels, given, {k: v for k, v in sides.items() if k != "compiled"})
        calls = {name: calls_of(name, side, kind, given, shapes) for name, side in sides.items()}
        table = interleave(calls, rounds=options.rounds, warmup_s=0.3)
    torch.compiler.reset()
    clock = "cpu" if options.threads == 1 else "wall"
    match = matched(errors["ours"], max(FLOOR, 2 * errors["eager"]))
    best = table.fastest(("eager", "compiled"), clock)
    against_peer = table.ratio("peer", "ours", clock).to_dict() if "peer" in sides else None
    return {
        "name": row, "queries": int(queries), "d": int(d), "pass": kind, "clock": clock,
        "baseline": best, "match": match, "errors": errors, "peer_absent": why,
        "speedup": table.ratio(best, "ours", clock).to_dict() if match["equal"] else None,
        "speedup_of_peer": against_peer if match["equal"] else None,
        "timings": table.to_dict(),
        "command": command_words(
            ["python", "benchmarks/bench_deform.py"], threads=options.threads,
            rounds=options.rounds, case=row,
        ),
    }  # fmt: skip


def show(row: dict[str, Any], out: Output) -> None:
    """One line of times and what they mean."""

    def ms(name: str) -> str:
        spread = row["timings"][name][row["clock"]]
        return f"{spread['median']:.1f} ({spread['q1']:.1f}-{spread['q3']:.1f})"

    text = ", ".join(f"{name} {ms(name)}" for name in row["timings"])
    out.text(f"{row['name']}: {row['clock']} ms: {text}")
    if row["speedup"] is None:
        out.text(f"  INEXACT: {row['match']['error']:.1e} > {row['match']['bound']:.1e}")
        return
    said = f"  {row['speedup']['median']:.2f}x of {row['baseline']}"
    if row["speedup_of_peer"] is not None:
        said += f", {row['speedup_of_peer']['median']:.2f}x of the peer"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    out.text(f"{said}; error against float64: {errors}")


def all_rows() -> Iterator[str]:
    """The rows of a run without ``--case``."""
    return (f"{q}-{d}-{kind}" for q in ("5376", "19950") for d in CHANNELS for kind in PASSES)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", metavar="ROW", help="such as 5376-32-forward")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--peer-envs", type=Path, metavar="DIR", help="where --setup made them")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", default=None)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    options.arguments, options.isa = arguments, "native"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    out = Output(options.json)
    known = [f"{q}-{d}-{kind}" for q in LEVELS for d in CHANNELS for kind in PASSES]
    try:
        for row in options.case or ():
            if row not in known:
                raise OpenTransError(f"--case {row!r} is no row. Choose among {', '.join(known)}.")
        cpus = choose_cpus(options.threads)
    except OpenTransError as error:
        sys.stderr.write(f"bench_deform: {error}\n")
        return 2
    if cpus is not None:
        pin(cpus)
    torch.set_num_threads(options.threads)
    session = Session(KIND, options, out, cpus)
    words = session.result["command"][1:]
    session.result["command"] = ["python", "benchmarks/bench_deform.py", *words]
    rows = session.result["rows"] = []
    failed, complete = [], True
    try:
        for name in options.case or all_rows():
            row = measure(name, options, options.peer_envs or default_home())
            rows.append(row)
            show(row, out)
            if not row["match"]["equal"]:
                failed.append(f"{name}: inexact")
            elif row["speedup"]["median"] < 1:
                failed.append(f"{name}: slower than {row['baseline']}")
            session.save()
    except KeyboardInterrupt:
        if not rows:
            return INTERRUPTED
        complete = False
    if rows and rows[0]["peer_absent"]:
        out.warn(f"{PEER} was not timed: {rows[0]['peer_absent']}")
    return session.finish(complete=complete, failed=failed)


if __name__ == "__main__":
    sys.exit(main())
