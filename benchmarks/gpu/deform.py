"""Section of deformable attention: checked against float64, timed beside ``grid_sample``.

Levels of an image of 512 and of 1024 pixels at strides 8, 16 and 32, every pixel a query, eight
heads: a layer of Mask2Former's pixel decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sections import Context, check, section

from opentrans_kernels.ops.ms_deform_attn import reference as plain
from opentrans_kernels.ops.ms_deform_attn.points import attention_of, locations_of

TESTS = Path(__file__).resolve().parents[2] / "tests"
_SIZES = {"512": ((64, 64), (32, 32), (16, 16)), "1024": ((128, 128), (64, 64), (32, 32))}
_REHEARSAL = {"tiny": ((3, 4),)}
#: Of the largest value; float32 also as a multiple of what grid_sample errs by.
_ERRORS = {"float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}
_CHECKED = 256  # queries that float64 computes


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes that must move at least once."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _kernels(context: Context) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward: the operators, in a rehearsal the kernels themselves."""
    if context.rehearsal:
        from opentrans_kernels.ops.ms_deform_attn import triton as kernels

        return kernels.ms_deform_attn, kernels.ms_deform_attn_backward
    own = torch.ops.opentrans_kernels
    return own.ms_deform_attn.default, own.ms_deform_attn_backward.default


@section("deform", 45)
def deform(context: Context) -> dict[str, Any]:
    """Forward, fused forward and backward; grid_sample in the same dtype beside each."""
    sys.path.insert(0, str(TESTS))  # the same inputs and oracle that the tests use
    from deform_cases import as_double, boxes_and_offsets, make, sampled

    forward, backward = _kernels(context)
    found: dict[str, Any] = {}
    sizes = _REHEARSAL if context.rehearsal else _SIZES
    for name, levels in sizes.items():
        for d in (8,) if context.rehearsal else (16, 32, 64):
            q = 3 if context.rehearsal else sum(h * w for h, w in levels)
            m, p = (1, 1) if context.rehearsal else (8, 4)
            case = make(levels, n=1, m=m, d=d, q=q, p=p, spread=0.2)
            value, shapes, locations, weights = (t.to(context.device) for t in case)
            about, offsets = (t.to(context.device) for t in boxes_and_offsets(case[2], case[1], 2))
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                label = str(dtype).removeprefix("torch.")
                if context.rehearsal and label == "bfloat16":
                    continue  # the interpreter rounds it towards zero
                v, at, w, r, o = (t.to(dtype) for t in (value, locations, weights, about, offsets))
                grad = torch.randn(1, q, v.shape[2] * d, device=v.device).to(dtype)
                some = slice(0, _CHECKED)
                exact = plain.ms_deform_attn(
                    v.double(), shapes, at[:, some].double(), w[:, some].double()
                )
                fused_exact = plain.ms_deform_attn(
                    *as_double(v, shapes, o[:, some], w[:, some], r[:, some])
                )
                leaves = [t.detach().requires_grad_() for t in (v, at, w)]
                dense_out = sampled(leaves[0], shapes, leaves[1], leaves[2])
                dense = _error(dense_out[:, some], exact)
                bound = max(_ERRORS[label], 2 * dense if label == "float32" else 0.0)
                right = [t.float().requires_grad_() for t in (v, at, w)]
                wanted = torch.autograd.grad(
                    sampled(right[0], shapes, right[1], right[2]), right, grad.float()
                )
                grads = backward(grad, v, shapes, at, w)
                entry = {
                    "dense error": dense,
                    "error": _error(forward(v, shapes, at, w, None)[:, some], exact),
                    "fused error": _error(forward(v, shapes, o, w, r)[:, some], fused_exact),
                    "gradient error": [_error(a, b) for a, b in zip(grads, wanted, strict=True)],
                    "bound": bound,
                }
                found[f"{name}, {q} queries, D {d}, {label}"] = entry
                wrong = [entry["error"] > bound, entry["fused error"] > 10 * bound]
                # Rounding may put a point into the next cell, whose slope is another one.
                wrong += [error > 10 * bound for error in entry["gradient error"][::2]]
                check(not any(wrong), f"{name} D {d} {label} is inexact: {entry}")
                moved = bytes_of(v, at, w, grad)
                both = bytes_of(v, at, w, grad) + bytes_of(at, w) + 4 * v.numel()
                times = {
                    "ours": (lambda: forward(v, shapes, at, w, None), moved),  # noqa: B023
                    "grid_sample": (lambda: sampled(v, shapes, at, w), moved),  # noqa: B023
                    "ours fused": (lambda: forward(v, shapes, o, w, r), moved),  # noqa: B023
                    "softmax, locations, grid_sample": (
                        lambda: sampled(v, shapes, locations_of(o, r, shapes), attention_of(w)),  # noqa: B023
                        moved,
                    ),
                    "ours backward": (lambda: backward(grad, v, shapes, at, w), both),  # noqa: B023
                    "grid_sample backward": (
                        lambda: torch.autograd.grad(dense_out, leaves, grad, retain_graph=True),  # noqa: B023
                        both,
                    ),
                }
                for side, (run, size) in times.items():
                    if context.left() < 2:
                        context.notes.append(f"{side} of {name} D {d} {label}: no time left")
                        continue
                    entry[side] = _rate(context.time(run), size)
                context.save(found)
    context.notes.append(f"{len(found)} cases are right; GB/s: every tensor moved once")
    return found


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    largest = exact.abs().max().double()
    return float((found.double() - exact.double()).abs().max() / largest.clamp_min(1e-30))


def _rate(time: dict[str, float] | None, size: int) -> dict[str, float] | None:
    return None if time is None else time | {"gb_per_s": size / time["ms"] / 1e6}
