"""Count parameters and multiply-adds (1 FLOP = 1 MAC) of a backbone, and of a system around it.

Of every layer: nominal (dense), effective (nonzeros x output pixels) and executed (what the planned
kernels compute, padding included; plain PyTorch executes the nominal ones, whatever the mask). With
--system the parts behind the backbone are added, by the same counter.

--table paper prints the published table of parameters and FLOPs reproduced under its own mixed
counting (800x1216, 22 rounds at uniform density), each counter named, and beside it the same
systems with every layer counted by one counter and masked by its own density. --table training
prints the training FLOPs, by the published rule and by the honest one. --table tokens prints the
three published tables of token reduction in Segmenter ViT-L/16, every row with what it counts, and
beside it a count that leaves out no product.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from opentrans_kernels.errors import OpenTransError

from .options import add_json, add_model, positive, subject_of
from .render import Output

if TYPE_CHECKING:
    from opentrans_kernels.bench.subject import Subject
    from opentrans_kernels.plan import Plan

SUMMARY = "count parameters and multiply-adds; --table paper reproduces the published ones"
SYSTEM_NAMES = ("han", "deeplab", "fc-clip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans flops``."""
    parser.add_argument(
        "mask", metavar="MASK", nargs="?", help="mask file or recipe (default: dense; with "
        "--table a synthetic global mask as sparse as the published one)"
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "--size", "--input-size", type=positive, metavar="PX",
        help="image height, and width unless --size-w is given (default 512; tables: 800x1216, "
        "training 512)",
    )  # fmt: skip
    parser.add_argument("--size-w", type=positive, metavar="PX", help="image width")
    parser.add_argument(
        "--system", choices=SYSTEM_NAMES, help="add the parts behind the backbone (RN50 only)"
    )
    parser.add_argument(
        "--table",
        choices=("paper", "training", "tokens"),
        help="print a published table, reproduced",
    )
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Count; 1 if a published number is missed by more than 0.3 % (tokens: 0.1 %)."""
    if options.arch != "RN50" and (options.system or options.table):
        raise OpenTransError(
            f"--system and --table are counted for RN50, not {options.arch}: the parts behind the "
            "backbone belong to it. Leave --arch out, or count the backbone alone."
        )
    if options.table and options.system:
        raise OpenTransError("--table shows every system. Leave --system or --table out.")
    if options.table in ("training", "tokens") and options.mask:
        raise OpenTransError(f"--table {options.table} counts without a mask. Leave MASK out.")
    if options.table == "tokens":
        return _tokens(options, out)
    if options.table == "training":
        return _training(options, out)
    if options.table == "paper":
        return _paper(options, out)
    return _network(options, out)


def _size(options: argparse.Namespace, default: tuple[int, int]) -> tuple[int, int]:
    if options.size is None and options.size_w is None:
        return default
    height = options.size or default[0]
    return height, options.size_w or height


def _subject(options: argparse.Namespace, out: Output, recipe: str) -> Subject:
    options.mask = options.mask or (recipe if options.checkpoint is None else None)
    return subject_of(options, out)


def _plan(subject: Subject, size: tuple[int, int]) -> Plan:
    from opentrans_kernels.plan import make_plan

    return make_plan(subject.model, subject.masks, input_size=size, measure=False)


def _network(options: argparse.Namespace, out: Output) -> int:
    from opentrans.systems import head_parts

    size = _size(options, (512, 512))
    heads = head_parts(options.system, size) if options.system else []
    subject = _subject(options, out, "global:0")
    plan = _plan(subject, size)
    inside = [row for row in plan.rows if row.h_out]
    out.heading(f"{options.arch} trunk at {size[0]}x{size[1]}, MMAC per image")
    out.table(
        None,
        ("layer", "weights", "alive", "density", "nominal", "effective", "executed", "as"),
        [
            (
                row.name, row.numel, row.nnz, f"{row.density:.2%}", *_mega(row), row.kind,
            )
            for row in inside
        ],
        right=range(1, 7),
    )  # fmt: skip
    rest = sum(p.numel() for n, p in subject.model.named_parameters() if "attnpool" not in n)
    totals: dict[str, Any] = {
        "convolutions": len(inside),
        "weights": sum(row.numel for row in inside),
        "alive": sum(row.nnz for row in inside),
        "parameters": rest,
        **{
            key: sum(getattr(row, f"{key}_macs") for row in inside)
            for key in ("nominal", "effective", "executed")
        },
    }
    share = totals["alive"] / totals["weights"]
    totals["uniform"] = round(share * totals["nominal"])
    out.text(
        f"{totals['convolutions']} convolutions, {totals['alive']} of {totals['weights']} weights "
        f"alive ({share:.2%}), {rest} parameters with batch norms"
    )
    out.text(
        f"GMAC: nominal {_giga(totals['nominal'])}, effective {_giga(totals['effective'])} "
        f"({totals['effective'] / totals['nominal']:.2%}; density x nominal would say "
        f"{_giga(totals['uniform'])}), executed {_giga(totals['executed'])} as planned for "
        f"{plan.isa}, {_giga(totals['nominal'])} by plain PyTorch"
    )
    out.text("not counted here: batch norms, activations, pools, attention pool, text encoder")
    if heads:
        _show_heads(heads, totals, out)
    out.finish(
        {
            "input_size": list(size),
            "unit": "MAC, batch 1",
            "subject": subject.describe(),
            "isa": plan.isa,
            "totals": totals,
            "layers": [_row_record(row) for row in inside],
            "heads": [
                {"name": part.name, "parameters": dict(part.parameters), "macs": dict(part.macs)}
                for part in heads
            ],
        }
    )
    return 0


def _show_heads(heads: list[Any], totals: dict[str, Any], out: Output) -> None:
    out.heading("Behind the backbone, counted by fvcore")
    rows = [(part.name, *part.count("fvcore")) for part in heads]
    out.table(
        None, ("part", "parameters", "GMAC"), [(n, count, _giga(macs)) for n, count, macs in rows]
    )
    head = sum(macs for _, _, macs in rows)
    for key in ("nominal", "effective", "executed"):
        whole = head + totals[key]
        out.text(
            f"backbone and head, {key}: {_giga(whole)} GMAC, of which backbone "
            f"{totals[key] / whole:.0%}"
        )
    out.text(
        f"with a backbone that costs nothing: {_giga(head)} GMAC, "
        f"{(head + totals['nominal']) / head:.2f} times less work, the most any backbone method "
        "can reach (Amdahl)"
    )


def _paper(options: argparse.Namespace, out: Output) -> int:
    from opentrans.systems import PAPER_ROUNDS, PAPER_SIZE, PRUNABLE, density_after, reproduce
    from opentrans_kernels.audit import audit

    size = _size(options, PAPER_SIZE)
    density = density_after()
    subject = _subject(options, out, f"global:{1 - density:.6f}")
    counted = audit(subject.masks, subject.model, input_size=size)
    # What no mask names stays; the first convolution is not prunable.
    kept = PRUNABLE - sum(row.numel - row.nnz for row in counted.rows if row.h_out)
    effective = sum(row.effective_macs for row in counted.rows)
    share = effective / sum(row.nominal_macs for row in counted.rows)
    rows = reproduce(kept, share, size)
    published = size == PAPER_SIZE
    out.heading(f"Published table at {size[0]}x{size[1]}: M parameters and GMAC, dense -> masked")
    out.table(
        None,
        ("system", "published", "reproduced", "worst", "head's parameters, backbone, head by"),
        [
            (
                row.title,
                _pair(row.published_parameters, row.published_macs, 1),
                _pair(row.parameters, row.macs, 2),
                f"{row.worst:.2%}" if published else "other size",
                ", ".join(row.counted),
            )
            for row in rows
        ],
        right=(3,),
    )
    out.text(
        f"masked, as published: {PAPER_ROUNDS} rounds leave {density:.4%} of {PRUNABLE} weights, "
        "taken to be the same share of every layer's work. The three rows use different counters, "
        "so they cannot be compared with one another."
    )
    out.heading("The same, every layer counted: all parameters, fvcore for backbone and head")
    out.table(
        None,
        ("system", "M parameters, GMAC", "GMAC saved"),
        [
            (
                row.title,
                _pair(row.honest_parameters, row.honest_macs, 2),
                f"{1 - row.honest_macs[1] / row.honest_macs[0]:.1%}",
            )
            for row in rows
        ],
    )
    out.text(
        f"mask {subject.mask}: {kept / PRUNABLE:.2%} of the weights, but {share:.2%} of the "
        "trunk's multiply-adds (nonzeros x output pixels, by layer); FC-CLIP with 133 prompts"
    )
    missed = [row.title for row in rows if published and row.worst > 0.003]
    if missed:
        out.warn(f"more than 0.3 % off: {', '.join(missed)}")
    out.finish(
        {
            "table": "paper",
            "input_size": list(size),
            "rounds": PAPER_ROUNDS,
            "density": density,
            "mask": subject.describe(),
            "kept_weights": kept,
            "kept_macs_share": share,
            "rows": [{**vars(row), "worst": row.worst} for row in rows],
        }
    )
    return 1 if missed else 0


def _training(options: argparse.Namespace, out: Output) -> int:
    from opentrans.systems_training import training_table

    size = _size(options, (512, 512))
    rows = training_table(size)
    out.heading(f"Training FLOPs of Han et al. at {size[0]}x{size[1]}: PMAC of 1.4 M images")
    out.table(
        None,
        ("layers frozen", "published", "by the published rule", "honest", "honest saving"),
        [
            (
                row.title,
                f"{row.published:.1f}" if row.published is not None else "-",
                f"{row.paper:.2f}",
                f"{row.honest:.1f}",
                f"{row.saving:.1%}",
            )
            for row in rows
        ],
    )
    out.text(
        "published rule: forward and dgrad of every backbone layer, wgrad of those that train, the "
        "head's forward only; honest: every pass that autograd runs, head included; masks save "
        "nothing where PyTorch multiplies by the zeros. Frozen after a fifth of the images."
    )
    out.finish(
        {
            "table": "training",
            "input_size": list(size),
            "rows": [{**vars(row), "saving": row.saving} for row in rows],
        }
    )
    return 0


def _tokens(options: argparse.Namespace, out: Output) -> int:
    from opentrans.systems_tokens import published

    if options.size or options.size_w or options.checkpoint:
        raise OpenTransError(
            "--table tokens shows the published sizes. Leave --size, --size-w and --checkpoint "
            "out; 'opentrans bench tokens' counts and times other sizes."
        )
    rows = published()
    for table in dict.fromkeys(row.table for row in rows):
        own = [row for row in rows if row.table == table]
        size = own[0].size
        out.heading(f"{table}, Segmenter ViT-L/16 at {size}x{size}: GMAC of one image")
        out.table(
            None,
            ("method", "setting", "published", "reproduced", "off", "honest", "FPS", "mIoU"),
            [
                (
                    row.method, row.setting, f"{row.gflops:g}", f"{row.reproduced:.2f}",
                    f"{row.error:.3%}", f"{row.honest:.2f}", f"{row.fps:g}", f"{row.miou:.2f}",
                )
                for row in own
            ],
            right=range(2, 8),
        )  # fmt: skip
        for counted in dict.fromkeys(row.counted for row in own):
            told = [f"{row.method} {row.setting}" for row in own if row.counted == counted]
            out.text(f"published {', '.join(told)}: {counted}")
    out.text(
        "honest: encoder, decoder and the way back of every method, with the decoder's products, "
        "clustering as dense products, matching and hashing. FPS and mIoU are as published; no "
        "mIoU was reproduced here."
    )
    missed = [f"{row.table} {row.method} {row.setting}" for row in rows if row.error > 0.001]
    if missed:
        out.warn(f"more than 0.1 % off: {', '.join(missed)}")
    out.finish({"table": "tokens", "unit": "GMAC, batch 1",
                "rows": [{**vars(row), "error": row.error} for row in rows]})  # fmt: skip
    return 1 if missed else 0


def _row_record(row: Any) -> dict[str, Any]:
    keys = ("name", "kind", "numel", "nnz", "nominal_macs", "effective_macs", "executed_macs")
    return {key: getattr(row, key) for key in keys} | {"output": [row.h_out, row.w_out]}


def _mega(row: Any) -> list[str]:
    keys = ("nominal", "effective", "executed")
    return [f"{getattr(row, f'{key}_macs') / 1e6:.1f}" for key in keys]


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.2f}"


def _pair(parameters: tuple[float, float], macs: tuple[float, float], digits: int) -> str:
    (a, b), (c, d) = parameters, macs
    return f"{a:.{digits}f} / {c:.{digits}f} -> {b:.{digits}f} / {d:.{digits}f}"
