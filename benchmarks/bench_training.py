"""Training step of the CLIP RN50 trunk: memory kept for backward and time, all variants.

Example::

    python benchmarks/bench_training.py --json training.json
    python benchmarks/bench_training.py --sets odd first27 --rounds 9 --mask none

A step is zero_grad, forward, mean of squares, backward; no optimizer. Variants of one freeze set
run interleaved on one pinned CPU and are compared by the ratio within a round; CPU time of the
process decides, because wall time counts what other processes take. The baseline is
``requires_grad = False`` with frozen batch norms (scale and shift in buffers), as detectron2 does;
"plain" is the usual eval-mode batch norm with trainable affine; "selective saving" is the baseline
with convolutions that keep their input only if their weight trains, the idea of memsave_torch
(Bhatia and Dangel, arXiv 2404.12406), written anew. Losing variants are in the table. An interrupt
keeps the freeze sets that were finished.
Weights and masks are synthetic. Exit code 1 if the step is slower than the baseline by more than
``--fail-above``, or keeps more.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from opentrans import skip_frozen
from opentrans_kernels.bench.environment import environment_block
from opentrans_kernels.bench.timing import TimingTable, choose_cpus, interleave, pin
from opentrans_kernels.cli.render import Output
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50

MIB = 2**20
SETS = ("none", "odd", "even", "3x3", "first27", "stem-layer2", "last28")


def freeze_set(model: nn.Module, kind: str) -> list[str]:
    """Names of the frozen convolutions, in registration order of the tower."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    sets = {
        "none": [],
        "odd": names[1::2],
        "even": names[::2],
        "3x3": [n for n in names if model.get_submodule(n).kernel_size == (3, 3)],
        "first27": names[:27],
        "stem-layer2": [n for n in names if not n.startswith(("layer3", "layer4"))],
        "last28": names[27:],
    }
    return sets[kind]


class FrozenNorm(nn.Module):
    """Frozen batch norm of the baseline: one native call without gradients, else scale and shift
    computed from buffers in each forward.
    """

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = bn.eps
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(bn, key).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def freeze_plainly(model: nn.Module, names: Sequence[str], frozen_norms: bool) -> nn.Module:
    for parent in list(model.modules()) if frozen_norms else ():
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, FrozenNorm(child))
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


class SelectiveConv(torch.autograd.Function):
    """Convolution that saves its input only for a weight gradient, and its weight only for an input
    gradient; torch's own saves both whenever either is needed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any):
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.shapes, ctx.stride, ctx.padding = (x.shape, weight.shape), stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        needs = [x_or_weight is not None for x_or_weight in (weight, x)]
        # Neither gradient reads the tensor it is of: one element stands for all of it.
        image, kernel = (
            grad.new_empty(1).expand(shape) if known is None else known
            for known, shape in zip((x, weight), ctx.shapes, strict=True)
        )
        found = torch.ops.aten.convolution_backward(
            grad, image, kernel, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1,
            [*needs, False],
        )  # fmt: skip
        return found[0], found[1], None, None


def save_selectively(model: nn.Module) -> nn.Module:
    """Let every convolution of ``model`` run as :class:`SelectiveConv`."""

    def forward_of(conv: nn.Conv2d) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: SelectiveConv.apply(x, conv.weight, conv.stride, conv.padding)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = forward_of(module)  # type: ignore[method-assign]
    return model


def run_trunk(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = model.stem(x)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
    return x


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    run_trunk(model, x).square().mean().backward()


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes saved for backward, each storage once, without what lasts: parameters, buffers, packed
    patterns, and the image.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        pattern = t.dtype == torch.int32  # of a sparse layer: lives as long as the model
        if storage.data_ptr() not in own and storage.nbytes() and not pattern:
            seen[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run_trunk(model, x)
    return sum(nbytes for nbytes, _ in seen.values())


def variants(masks: Any, names: Sequence[str]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Variant -> what turns a trainable tower into it; "baseline" first."""

    def skip(model: nn.Module, **arguments: Any) -> nn.Module:
        skip_frozen(model, names, **arguments)
        return model

    found = {
        "baseline": lambda m: freeze_plainly(m, names, True),
        "plain": lambda m: freeze_plainly(m, names, False),
        "selective saving": lambda m: save_selectively(freeze_plainly(m, names, True)),
        "skip": skip,
        "skip, affine trains": lambda m: skip(m, bn="affine"),
    }
    if masks is not None:
        found["skip, sparse kernels"] = lambda m: skip(m, masks=masks)
    return found


def gradient_error(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> float:
    """Largest relative difference of a convolution's gradient (2-norm), live weights only."""
    for subject in (model, reference):
        step(subject, x)
    worst = 0.0
    for name, module in reference.named_modules():
        grad = getattr(getattr(module, "weight", None), "grad", None)
        if isinstance(module, nn.Conv2d) and grad is not None:
            live = module.weight.detach() != 0
            found = model.get_submodule(name).weight.grad
            worst = max(worst, float(((found - grad)[live]).norm() / grad[live].norm()))
    return worst


def measure_set(kind: str, options: argparse.Namespace, out: Output) -> dict[str, Any]:
    tower = synthetic_rn50(image_size=options.size).requires_grad_(True)
    names = freeze_set(tower, kind)
    masks = None
    if options.mask != "none":
        masks = synthetic_masks(tower, options.mask)
        masks.apply_(tower)
    x = torch.randn(options.batch, 3, options.size, options.size,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        tower = tower.to(memory_format=torch.channels_last)
    models = {name: make(copy.deepcopy(tower)) for name, make in variants(masks, names).items()}
    with out.progress(f"bench training: {kind}") as told:
        table: TimingTable = interleave(
            {name: lambda m=m: step(m, x) for name, m in models.items()},
            rounds=options.rounds,
            warmup_s=0.1,
            settle=0,
            on_round=lambda done, total: told(f"round {done} of {total}"),
        )
    rows = []
    for name, model in models.items():
        ratio = table.ratio(name, "baseline", "cpu")
        rows.append(
            {
                "set": kind,
                "frozen": len(names),
                "variant": name,
                "kept_mib": kept_bytes(model, x) / MIB,
                "cpu_ms": table[name].cpu.to_dict(),
                "wall_ms": table[name].wall.to_dict(),
                "time_vs_baseline": ratio.to_dict(),
                "gradient_error": gradient_error(model, models["baseline"], x),
            }
        )
    return {"set": kind, "names": names, "rows": rows}


def show(result: dict[str, Any], out: Output) -> None:
    base = result["rows"][0]
    cells = []
    for row in result["rows"]:
        ratio = row["time_vs_baseline"]
        cells.append(
            [
                row["variant"],
                f"{row['kept_mib']:.1f}",
                f"{row['kept_mib'] / max(base['kept_mib'], 1e-9):.2f}",
                f"{row['cpu_ms']['median']:.0f}",
                f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f})",
                f"{1 / ratio['median']:.2f}x",
                f"{row['gradient_error']:.1e}",
                "LOSES" if ratio["median"] > 1 else "",
            ]
        )
    out.heading(f"{result['set']}: {len(result['names'])} of 55 convolutions frozen")
    columns = ("variant", "kept MiB", "of baseline", "CPU ms", "time of baseline (quartiles)")
    out.table(None, (*columns, "speed-up", "gradient error", ""), cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--mask", default="global:0.90", help="recipe, or none")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--fail-above", type=float, default=1.03, metavar="RATIO")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", default=None)
    options = parser.parse_args(argv)
    out = Output(options.json)
    try:
        cpus = choose_cpus(options.threads)
        if cpus is not None:
            pin(cpus)
        torch.set_num_threads(options.threads)
        results: list[dict[str, Any]] = []
        try:
            for kind in options.sets:
                results.append(measure_set(kind, options, out))
                show(results[-1], out)
        except KeyboardInterrupt:
            if not results:
                raise
            out.warn(f"interrupted: {len(results)} finished freeze sets were kept")
    except OpenTransError as error:
        sys.stderr.write(f"bench_training: {error}\n")
        return 2
    bad = [
        f"{row['set']}, {row['variant']}: {row['time_vs_baseline']['median']:.3f} of the "
        f"baseline's time, {row['kept_mib']:.1f} MiB against {result['rows'][0]['kept_mib']:.1f}"
        for result in results
        for row in result["rows"]
        if row["variant"].startswith("skip")
        and (
            row["time_vs_baseline"]["median"] > options.fail_above
            or row["kept_mib"] > result["rows"][0]["kept_mib"]
        )
    ]
    for line in bad:
        out.warn(line)
    out.finish(
        {
            "benchmark": "training",
            "weights": "synthetic",
            "mask": options.mask,
            "size": options.size,
            "batch": options.batch,
            "channels_last": options.channels_last,
            "rounds": options.rounds,
            "complete": len(results) == len(options.sets),
            "environment": environment_block(),
            "results": results,
        }
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
