"""Audit a mask: per layer density, work, dead channels, structure and predicted cost.

A mask file needs nothing else: its names and shapes tell the architecture. With --checkpoint (or
--arch, for synthetic weights) the masks are matched to that network, and the constants of dead
channels are known.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import ARCH_HELP, add_json, add_size, arch_packages, input_size, subject_of
from .render import Cell, Output

if TYPE_CHECKING:
    from opentrans_kernels.audit import AuditReport, AuditRow

SUMMARY = "audit a mask file, layer by layer"

_COLUMNS = (
    "layer", "conv", "output", "density", "nnz", "MMAC", "effective", "dead", "unread", "width",
    "out of 2:4", "K32", "K64", "S64", "predicted",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans inspect``."""
    parser.add_argument("mask", metavar="MASK", help="mask file or recipe")
    parser.add_argument("--arch", help=f"match the masks to it: {ARCH_HELP}")
    parser.add_argument("--checkpoint", metavar="FILE", help="match the masks to these weights")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of synthetic weights")
    add_size(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if any mask has no place in the model"
    )
    add_json(parser)
    parser.set_defaults(packages=_packages)


def _packages(options: argparse.Namespace) -> dict[str, str]:
    """A mask file alone needs no network, so nothing that builds one."""
    recipe = options.mask.startswith(("global:", "uniform:"))
    return arch_packages(options) if recipe or options.arch or options.checkpoint else {}


def run(options: argparse.Namespace, out: Output) -> int:
    """Match and audit; 1 with ``--strict`` if masks are left over."""
    from opentrans_kernels.audit import audit
    from opentrans_kernels.bench.subject import load_masks_file
    from opentrans_kernels.synthetic import is_mask_spec

    size = input_size(options)
    payload: dict[str, Any] = {"mask": options.mask}
    unmatched: list[str] = []
    if is_mask_spec(options.mask) or options.arch or options.checkpoint:
        options.arch = options.arch or "RN50"
        subject = subject_of(options, out, match_is_shown=not out.quiet)
        masks, unmatched = subject.masks, subject.match.unmatched_masks
        report = audit(masks, subject.model, input_size=size)
        payload.update(
            subject=subject.describe(),
            unmatched_masks=unmatched,
            unmasked_convs=subject.match.unmasked_convs,
        )
        matched = str(subject.match)
    else:
        masks = load_masks_file(options.mask)
        if masks.source.synthetic:
            out.warn(f"{options.mask} says that its masks are SYNTHETIC")
        report = audit(masks, input_size=size)
        matched = ""
    payload.update(
        synthetic=masks.source.synthetic,
        content_hash=masks.content_hash(),
        audit=report.to_dict(),
    )
    out.heading(f"Masks of {options.mask}")
    out.text(str(masks))
    out.text(f"content hash {payload['content_hash']}")
    if matched:
        out.text(matched)
    show_audit(report, out)
    out.finish(payload)
    return 1 if options.strict and unmatched else 0


def show_audit(report: AuditReport, out: Output) -> None:
    """The table of layers, then the totals and notes."""
    out.heading(f"{report.architecture} at {report.input_size[0]}x{report.input_size[1]}")
    out.table(None, _COLUMNS, [_cells(row) for row in report.rows])
    out.text()
    out.text(str(report).split("\n\n")[-1])


def _cells(row: AuditRow) -> list[Cell]:
    width, predicted = row.width_out, f"{row.predicted_speedup:.1f}x"
    kept = f"{width.before}"
    if width.after != width.before:
        kept = f"{width.before}>{width.after}/{width.after_8}/{width.after_16}"
    stride = f" s{row.stride}" if row.stride > 1 else ""
    return [
        row.name,
        f"{row.cin}>{row.cout} k{row.kernel}{stride}",
        f"{row.h_out}x{row.w_out}",
        f"{row.density:.2%}" if row.masked or row.nnz < row.numel else "no mask",
        row.nnz,
        f"{row.nominal_macs / 1e6:.1f}",
        f"{row.effective_macs / 1e6:.1f}",
        row.dead,
        row.unread,
        kept,
        f"{row.outside_24 / max(1, row.nnz):.1%}",
        f"{row.k_union[32]:.0%}",
        f"{row.k_union[64]:.0%}",
        "-" if row.live_slices is None else f"{row.live_slices:.0%}",
        predicted if row.engine == "sparse" else "dense",
    ]
