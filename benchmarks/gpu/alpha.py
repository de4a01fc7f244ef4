"""Sections of the alpha estimate: Gram matrices, solvers, own eigenvalue path, fit, all of it.

Every number is checked first, against float64 on the CPU. The weights have the shapes of the RN50
CLIP visual tower (59 layers, 211 matrices) and heavy-tailed synthetic values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sections import Context, check, section

from opentrans_kernels.ops import powerlaw_fit as fit_op
from opentrans_kernels.ops.powerlaw_fit import reference
from opentrans_kernels.spectrum import estimate_alpha, select
from opentrans_kernels.spectrum.cuda import SOLVERS, gram, solve, spectra

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width, blocks
_FITS = ("xmin_peak", "xmin_mid", "ks")
#: Relative to the largest eigenvalue; float64 solvers of order n err by a small multiple of n eps.
_EIGENVALUE_ERROR = 1e-12


def rn50_weights(context: Context) -> dict[str, torch.Tensor]:
    """The weights of the tower by name, on the device; a few tiny ones in a rehearsal."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1": (32, 3, 3, 3), "conv2": (32, 32, 3, 3), "conv3": (64, 32, 3, 3)
    }  # fmt: skip
    channels = 64
    for number, (width, blocks) in enumerate(_STAGES, 1):
        for block in range(blocks):
            name = f"layer{number}.{block}"
            shapes[f"{name}.conv1"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2"] = (width, width, 3, 3)
            shapes[f"{name}.conv3"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{name}.downsample.0"] = (4 * width, channels, 1, 1)
            channels = 4 * width
    for key in "qkv":
        shapes[f"attnpool.{key}_proj"] = (2048, 2048)
    shapes["attnpool.c_proj"] = (1024, 2048)
    if context.rehearsal:
        some = list(shapes.items())[-6:]
        shapes = {name: (max(2, o // 512), max(2, i // 512), *k) for name, (o, i, *k) in some}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        factor = torch.rand(shape[1], generator=generator).pow(-0.4)
        found[name] = (weight * factor.view(-1, *[1] * (len(shape) - 2))).to(context.device)
    return found


def orders_of(weights: dict[str, torch.Tensor]) -> dict[int, int]:
    """Order n -> how many matrices of it the estimate solves."""
    found: dict[int, int] = {}
    for layer in select(weights):
        found[layer.small] = found.get(layer.small, 0) + layer.positions
    return dict(sorted(found.items()))


def random_grams(orders: dict[int, int], device: torch.device) -> dict[int, torch.Tensor]:
    found = {}
    for n, count in orders.items():
        weight = torch.randn(count, n, n, dtype=torch.float64, device=device)
        found[n] = weight @ weight.mT / n
    return found


def relative_error(values: torch.Tensor, matrices: torch.Tensor, most: int) -> float:
    """Largest error of the first ``most`` matrices against LAPACK, over their norm."""
    exact = torch.linalg.eigvalsh(matrices[:most].cpu())
    found = values[:most].cpu()
    return float(((found - exact).abs().amax(1) / exact[:, -1]).max())


@section("gram", 60)
def gram_matrices(context: Context) -> dict[str, Any]:
    """All Gram matrices of the tower, group by group of equal shapes."""
    groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for layer in select(rn50_weights(context)):
        weight = layer.weight
        weight = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        groups.setdefault(tuple(weight.shape), []).append(weight)
    found: dict[str, Any] = {"groups": {}}
    total, operations = 0.0, 0.0
    for (rows, columns, positions), members in groups.items():
        n, count = min(rows, columns), len(members) * positions
        out = torch.empty(count, n, n, dtype=torch.float64, device=context.device)
        gram.gram_into(out, members, 0.5)
        matrix = members[0][:, :, 0].double().cpu()
        exact = 0.5 * (matrix @ matrix.T if rows <= columns else matrix.T @ matrix)
        error = float((out[0].cpu() - exact).abs().max() / exact.abs().max())
        check(error < 1e-14 * max(rows, columns), f"{rows}x{columns}: error {error:.1e}")
        timing = context.time(lambda o=out, m=members: gram.gram_into(o, m, 0.5))
        entry = {"matrices": count, "error": error, "time": timing}
        found["groups"][f"{rows}x{columns}x{positions}"] = entry
        operations += 2.0 * count * rows * columns * n
        total += timing["ms"] if timing else 0.0
    if not context.rehearsal:
        found["total_ms"] = total
        found["tflops"] = operations / total / 1e9
        context.notes.append(f"all Gram matrices {total:.2f} ms, {found['tflops']:.1f} TFLOP/s")
    return found


@section("solvers", 150)
def library_solvers(context: Context) -> dict[str, Any]:
    """Each cuSOLVER routine at each order and count of the tower; own path beside it."""
    orders = {3: 2, 9: 2} if context.rehearsal else orders_of(rn50_weights(context))
    routines = ("sturm",) if context.rehearsal else ("xsyev_batched", "xsyevd", "sturm")
    found: dict[str, Any] = {"orders": {}, "errors": []}
    for n, count in orders.items():
        matrices = random_grams({n: count}, context.device)
        entry: dict[str, Any] = {"matrices": count}
        for routine in routines:
            try:
                values = solve.solve({n: matrices[n].clone()}, routine).values[n]
                error = relative_error(values, matrices[n], 1 if n > 512 else 3)
                check(error < _EIGENVALUE_ERROR, f"{routine}, n = {n}: error {error:.1e}")
                timing = _solve_time(context, matrices, routine)
            except Exception as failure:
                found["errors"].append(f"{routine}, n = {n}: {type(failure).__name__}: {failure}")
                continue
            entry[routine] = {"error": error, "time": timing}
        found["orders"][n] = entry
        if not context.rehearsal:
            times = {r: entry[r]["time"]["ms"] for r in routines if r in entry}
            words = ", ".join(f"{r} {ms:.2f} ms" for r, ms in times.items())
            context.notes.append(f"{count} of n = {n}: {words}")
    check(not found["errors"], "\n".join(found["errors"]))
    return found


def _solve_time(
    context: Context, matrices: dict[int, torch.Tensor], routine: str
) -> dict[str, float] | None:
    """Milliseconds of a solve without the copy that it overwrites."""
    copies = {n: m.clone() for n, m in matrices.items()}

    def copy() -> None:
        for n, m in matrices.items():
            copies[n].copy_(m)

    def run() -> None:
        copy()
        solve.solve(copies, routine)

    both, alone = context.wall(run, 5), context.wall(copy, 5)
    if both is None or alone is None:
        return None
    return both | {"ms": both["ms"] - alone["ms"]}


@section("own eigenvalues", 90)
def own_eigenvalues(context: Context) -> dict[str, Any]:
    """Tridiagonalisation and bisection of the whole tower, each alone."""
    from opentrans_kernels.spectrum.cuda import sturm, tridiagonal

    orders = {2: 1, 18: 1} if context.rehearsal else orders_of(rn50_weights(context))
    matrices = random_grams(orders, context.device)
    diagonals, offs = tridiagonal.tridiagonalise(matrices)
    values = sturm.bisect(diagonals, offs)
    errors = {n: relative_error(values[n], m, 1 if n > 512 else 3) for n, m in matrices.items()}
    worst = max(errors.values())
    check(worst < _EIGENVALUE_ERROR, f"eigenvalues off by {errors}")
    found = {
        "errors": errors,
        "tridiagonalise": context.wall(lambda: tridiagonal.tridiagonalise(matrices), 5),
        "bisect": context.wall(lambda: sturm.bisect(diagonals, offs), 5),
    }
    if not context.rehearsal:
        context.notes.append(
            f"tridiagonalise {found['tridiagonalise']['ms']:.2f} ms, "
            f"bisect {found['bisect']['ms']:.2f} ms, worst error {worst:.1e}"
        )
    return found


@section("fit", 60)
def fit(context: Context) -> dict[str, Any]:
    """The powerlaw_fit op on spectra of the tower's sizes, every start, against the reference."""
    counts = [12, 40] if context.rehearsal else [
        layer.num_eigenvalues for layer in select(rn50_weights(context))
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    spectra_ = [
        (torch.rand(count, generator=generator, dtype=torch.float64) + 1e-3).pow(-1.4)
        for count in counts
    ]
    # Plateaus and a constant spectrum: equal distances must give the smallest index.
    spectra_[0] = (spectra_[0] * 4).ceil() / 4
    spectra_[1] = torch.full_like(spectra_[1], 0.5)
    x = torch.cat([values.sort().values for values in spectra_])
    sizes = torch.tensor([0, *counts])
    arguments = (x, sizes.cumsum(0), torch.zeros(len(counts)).long(), sizes[1:] - 1)
    exact = reference.powerlaw_fit(*arguments)
    on_device = tuple(a.to(context.device) for a in arguments)
    found = _fit(context)(*on_device).cpu()
    wrong = (found[:, 0] != exact[:, 0]).nonzero().flatten().tolist()
    check(not wrong, f"another start than the reference's in spectra {wrong}")
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12, equal_nan=True)
    timing = context.time(lambda: _fit(context)(*on_device))
    if timing:
        context.notes.append(f"fit of {len(counts)} spectra, every start: {timing['ms']:.3f} ms")
    return {"spectra": len(counts), "values": int(sizes.sum()), "time": timing}


def _fit(context: Context) -> Any:
    """The op as a user's tensors reach it; in a rehearsal the kernel itself, interpreted."""
    if not context.rehearsal:
        return fit_op
    from opentrans_kernels.ops.powerlaw_fit import triton as kernels

    return kernels.powerlaw_fit


@section("alpha", 180)
def alpha(context: Context) -> dict[str, Any]:
    """estimate_alpha from weights on the device to the table, for every solver and fit."""
    weights = rn50_weights(context)
    layers = select(weights)
    on_cpu = {name: weight.cpu() for name, weight in weights.items()}
    exact = {fit: estimate_alpha(on_cpu, fit, device="cpu") for fit in _FITS}
    found: dict[str, Any] = {"layers": len(layers), "solvers": {}, "errors": []}
    for solver in ("sturm",) if context.rehearsal else SOLVERS:
        try:
            found["solvers"][solver] = _alpha_of(context, weights, exact, solver)
            context.save(found)
        except Exception as failure:
            found["errors"].append(f"{solver}: {type(failure).__name__}: {failure}")
    check(not found["errors"], "\n".join(found["errors"]))
    return found


def _alpha_of(
    context: Context, weights: dict[str, torch.Tensor], exact: dict[str, Any], solver: str
) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for fit in _FITS:
        if context.rehearsal:
            found = spectra.spectra(select(weights), context.device, solver=solver)
            check(bool(found.values.isfinite().all()), "eigenvalues are not finite")
            break
        table = estimate_alpha(weights, fit, device="cuda", solver=solver)
        worst = 0.0
        for row, other in zip(exact[fit], table, strict=True):
            check(other.solver.startswith("cuda"), f"{row.name} ran on {other.solver}")
            check(row.num_evals == other.num_evals, f"{row.name}: another number is kept")
            if row.alpha != other.alpha and not row.ambiguous:
                worst = max(worst, abs(other.alpha / row.alpha - 1))
        check(worst < 1e-6, f"{solver}, {fit}: alpha off by {worst:.1e} relative")
        timing = context.wall(
            lambda fit=fit: estimate_alpha(weights, fit, device="cuda", solver=solver), 5
        )
        entry[fit] = {"error": worst, "time": timing}
        context.notes.append(f"{solver}, {fit}: {timing['ms']:.1f} ms, error {worst:.1e}")
    if not context.rehearsal:
        try:  # the profiler is the one part that a virtual machine may forbid
            entry["copies_to_host"] = _copies(weights, solver)
        except Exception as failure:
            entry["copies_to_host"] = f"not counted: {type(failure).__name__}: {failure}"
    return entry


def _copies(weights: dict[str, torch.Tensor], solver: str) -> dict[str, float]:
    """Copies from the device to the host of one estimate, and their bytes where known."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        estimate_alpha(weights, "ks", device="cuda", solver=solver)
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() if "Memcpy DtoH" in event.name]
    return {"copies": len(names)}
