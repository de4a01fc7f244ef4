"""Memory and step time of MaskedOptimizer beside torch's AdamW with dense state.

Example::

    python benchmarks/bench_masked_optimizer.py --density 0.0985 --freeze half --json optimizer.json

The convolutions of CLIP's RN50 with gradients in place; timed is what comes between backward and
the next forward: masking the gradients, their norm for clipping, the step, and, for dense state,
nothing more, since zero weight, gradient and state stay zero. Dense rows differ in torch's
implementation (loop, foreach, fused); the fastest of them is the baseline. All rows are interleaved
in one process. Weights, gradients and masks are random. Before that, three steps of every row are
compared with three of AdamW in float64. Exit code 1 if a row errs by more than twice the dense
rows, a pruned weight moves or the state is larger than dense state of the live weights, 2 for bad
input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opentrans.cli.bench import chosen_cpus
from opentrans.cli.bench_rows import match_cell, ratio_cell, show_repeats
from opentrans.cli.options import add_json, add_threads, positive
from opentrans.cli.render import Output
from opentrans_kernels.bench.environment import portable_words
from opentrans_kernels.bench.rows import command_words, matched
from opentrans_kernels.errors import OpenTransError

sys.path.insert(0, str(Path(__file__).resolve().parent))

FREEZE = ("none", "half")
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--density", type=float, default=0.0985, metavar="D", help="weights alive")
    parser.add_argument("--freeze", choices=FREEZE, default="none", help="half: every second conv")
    parser.add_argument("--arch", default="RN50", help="a CLIP ResNet of open_clip")
    parser.add_argument("--rounds", type=positive, default=9, metavar="N")
    add_threads(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    try:
        return run(options, Output(options.json))
    except OpenTransError as error:
        sys.stderr.write(f"bench_masked_optimizer: {error}\n")
        return 2


def run(options: argparse.Namespace, out: Output) -> int:
    """The table; 1 if something is not as promised."""
    import torch
    from training_result import Watch

    from opentrans_kernels.bench.timing import interleave, pin

    if not 0 <= options.density <= 1:
        raise OpenTransError(f"--density {options.density:g} is not a share. Use 0 to 1.")
    cpus = chosen_cpus(None, options.threads)
    if cpus is not None:
        pin(cpus)
    torch.set_num_threads(options.threads)
    watch = Watch("masked optimizer", options.threads)
    rows = subjects(options.arch, options.density, options.freeze)
    matches = compared(rows, options)
    table = interleave(
        {name: row["step"] for name, row in rows.items()},
        rounds=options.rounds,
        warmup_s=0.2,
        settle=1,
    )
    dense = [name for name in rows if name.startswith("dense")]
    baseline = table.fastest(dense, "cpu")
    lines, record = [], {}
    for name, row in rows.items():
        state, index = row["bytes"]()
        cpu, ratio = table[name].cpu.median, table.ratio(baseline, name, "cpu")
        lines.append(
            [name, f"{state / 1e6:.1f}", f"{index / 1e6:.1f}", f"{table[name].wall.median:.1f}",
             f"{cpu:.1f}", ratio_cell(ratio.to_dict()), match_cell(matches[name])]
        )  # fmt: skip
        record[name] = {
            "state_bytes": state,
            "index_bytes": index,
            "wall_ms": table[name].wall.median,
            "cpu_ms": cpu,
            "speedup_cpu": ratio.to_dict(),
            "match": matches[name],
            "command": portable_words(row_command(options)),
        }
    moved = [name for name, row in rows.items() if row["moved"]()]
    wrong = [name for name, match in matches.items() if not match["equal"]]
    heavy = [n for n, row in rows.items() if not n.startswith("dense") and row["heavy"]()]
    out.table(
        f"AdamW, {options.arch} convolutions, density {options.density:g}, frozen: "
        f"{options.freeze}, {options.threads} thread(s); random weights and masks",
        ["optimizer", "state MB", "index MB", "wall ms", "cpu ms", f"against {baseline}", "match"],
        lines,
        right=range(1, 6),
    )
    show_repeats([("all", row_command(options))], out)
    out.finish(
        {
            **watch.result(),
            "weights": "random",
            "density": options.density,
            "freeze": options.freeze,
            "arch": options.arch,
            "rounds": options.rounds,
            "pinned_cpus": cpus,
            "baseline": baseline,
            "rows": record,
            "failed_checks": [f"{n}: other weights than dense AdamW's" for n in wrong]
            + [f"{n}: a pruned weight is not zero" for n in moved]
            + [f"{n}: state beyond two floats per weight" for n in heavy],
        }
    )
    for name in wrong:
        sys.stderr.write(
            f"bench_masked_optimizer: {name}: weights {matches[name]['error']:.1e} from float64, "
            f"bound {matches[name]['bound']:.1e}\n"
        )
    for name in moved:
        sys.stderr.write(f"bench_masked_optimizer: {name}: a pruned weight is not zero\n")
    for name in heavy:
        sys.stderr.write(f"bench_masked_optimizer: {name}: state beyond two floats per weight\n")
    return int(bool(wrong or moved or heavy))


def row_command(options: argparse.Namespace) -> list[str]:
    """What measures the rows again; they are ratios to each other."""
    return command_words(
        ("python", "benchmarks/bench_masked_optimizer.py"),
        density=options.density,
        freeze=options.freeze,
        arch=options.arch,
        rounds=options.rounds,
        threads=options.threads,
    )


def compared(rows: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Three steps of every row against three of AdamW in float64; the bound is twice the largest
    error of a dense row. Errors are relative to how far the weights went.
    """
    import torch

    model, masks, weights = _network(options.arch, options.density, options.freeze)
    start = [weight.detach().double() for weight in weights]
    names = {id(module.weight): name for name, module in model.named_modules()
             if isinstance(module, torch.nn.Conv2d)}  # fmt: skip
    exact = [torch.nn.Parameter(weight.clone()) for weight in start]
    for wide, weight in zip(exact, weights, strict=True):
        mask = masks.masks.get(names[id(weight)])
        wide.grad = weight.grad.double() if mask is None else weight.grad.double() * mask
    optimizer = torch.optim.AdamW(exact, lr=1e-4)
    for _ in range(3):
        optimizer.step()
    way = max(float((a.detach() - b).abs().max()) for a, b in zip(exact, start, strict=True))
    errors = {}
    for name, row in rows.items():
        for _ in range(3):
            row["step"]()
        errors[name] = max(
            float((weight.detach().double() - wide.detach()).abs().max()) / way
            for weight, wide in zip(row["weights"](), exact, strict=True)
        )
    bound = 2 * max(error for name, error in errors.items() if name.startswith("dense"))
    return {name: matched(error, bound) for name, error in errors.items()}


def subjects(arch: str, density: float, freeze: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """Row name -> its step, its (state, index) bytes and its checks."""
    rows: dict[str, dict[str, Callable[[], Any]]] = {}
    for kind, options in IMPLEMENTATIONS.items():
        rows[f"dense {kind}"] = _dense(*_network(arch, density, freeze), options)
    for kind, options in IMPLEMENTATIONS.items():
        rows[f"masked {kind}"] = _masked(*_network(arch, density, freeze), options)
    return rows


def _network(arch: str, density: float, freeze: str) -> tuple[Any, Any, list[Any]]:
    """(model, masks, conv weights that train), with gradients in place."""
    import torch

    from opentrans_kernels import MaskSet
    from opentrans_kernels.masks.names import conv_modules
    from opentrans_kernels.synthetic import maskable_convs, synthetic_rn50

    model = synthetic_rn50(arch)
    gen = torch.Generator().manual_seed(0)
    masks = MaskSet(
        {
            name: torch.rand(conv.weight.shape, generator=gen) < density
            for name, conv in maskable_convs(model).items()
        }
    )
    weights = [conv.weight for conv in conv_modules(model).values()]
    for number, weight in enumerate(weights):
        weight.requires_grad_(freeze == "none" or number % 2 == 1)
    masks.apply_(model)
    weights = [weight for weight in weights if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=gen)
    return model, masks, weights


def _clip(weights: list[Any]) -> None:
    import torch

    # A norm no gradient reaches: the norm is computed and nothing is scaled.
    torch.nn.utils.clip_grad_norm_(weights, 1e9)


def _dense(model: Any, masks: Any, weights: list[Any], options: dict[str, bool]) -> Any:
    import torch

    from opentrans_kernels.masks.names import conv_modules

    optimizer = torch.optim.AdamW(weights, lr=1e-4, **options)
    convs = conv_modules(model)
    pairs = [(convs[n].weight, m.float()) for n, m in masks.masks.items()]
    pairs = [(weight, mask) for weight, mask in pairs if weight.requires_grad]
    factors = [mask for _, mask in pairs]

    def step() -> None:
        torch._foreach_mul_([weight.grad for weight, _ in pairs], factors)
        _clip(weights)
        optimizer.step()

    def size() -> tuple[int, int]:
        tensors = [t for values in optimizer.state.values() for t in values.values()]
        return sum(t.numel() * t.element_size() for t in tensors), 0

    return {
        "step": step,
        "weights": lambda: weights,
        "bytes": size,
        "moved": lambda: any(bool((w.detach() * (1 - m)).any()) for w, m in pairs),
    }


def _masked(model: Any, masks: Any, weights: list[Any], options: dict[str, bool]) -> Any:
    import torch

    from opentrans.masked import MaskedOptimizer
    from opentrans_kernels import MaskError

    optimizer = MaskedOptimizer(
        torch.optim.AdamW, model, masks, weights, gradients="call", lr=1e-4, **options
    )
    live = sum(int(m.sum()) for n, m in masks.masks.items()
               if model.get_submodule(n).weight.requires_grad)  # fmt: skip
    masked = {id(model.get_submodule(name).weight) for name in masks.masks}
    live += sum(weight.numel() for weight in weights if id(weight) not in masked)

    def step() -> None:
        optimizer.clip_live_gradients(1e9)
        optimizer.step()

    def size() -> tuple[int, int]:
        memory = optimizer.state_bytes()
        return memory.state, memory.index

    def moved() -> bool:
        try:
            optimizer.check()
        except MaskError:
            return True
        return False

    return {
        "step": step,
        "weights": lambda: weights,
        "bytes": size,
        "moved": moved,
        "heavy": lambda: optimizer.state_bytes().state > 8 * live + 1024,
    }


if __name__ == "__main__":
    raise SystemExit(main())
