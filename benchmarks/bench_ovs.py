"""Open-vocabulary segmentation on CLIP RN50: whole models, dense and accelerated; the text cache.

Example::

    python benchmarks/bench_ovs.py --compile --json ovs.json
    python benchmarks/bench_ovs.py --parts text --train-size 256 --rounds 3
    PYTHONPATH=detectron2 python benchmarks/bench_ovs.py --parts fc-clip --fc-clip fc-clip --compile

*inference*: DeepLabV3 on one image, its backbone alone and its head alone, every dense variant of
PyTorch beside the accelerated one, interleaved on one pinned CPU; the fastest dense one is the
baseline. Only the tower is accelerated, so Amdahl's law bounds the whole; the bound from the
measured shares is printed beside the measured speed-up.
*text*: a training step with 133 class names, with cached text embeddings and with the frozen text
encoder run in every step, as the published training does.
*fc-clip*: the same as *inference* for the real FC-CLIP; left out, with the reason, where its
checkout or detectron2 is missing.

CPU time of the process decides. Weights and masks are synthetic, predictions mean nothing. Errors
are taken first; a speed-up is shown only if ours errs by at most twice what dense float32 does.
Exit code 1 if the accelerated model is slower than the baseline or inexact, 2 for bad input, 130 if
interrupted (finished parts are kept).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from ovs_result import KIND, check_form  # noqa: E402

from opentrans.cli.bench_session import INTERRUPTED, Session  # noqa: E402
from opentrans.cli.options import positive  # noqa: E402
from opentrans.cli.render import Output  # noqa: E402
from opentrans_kernels.bench.timing import choose_cpus, pin  # noqa: E402
from opentrans_kernels.errors import OpenTransError  # noqa: E402
from opentrans_kernels.lazy import require_packages  # noqa: E402
from opentrans_kernels.synthetic import is_mask_spec  # noqa: E402

STRIDE = 32  # of a CLIP ResNet
PARTS = ("inference", "text", "fc-clip")
_CLIP = {"open_clip": "the tower is built from open_clip"}
_HEAD = {"torchvision": "the DeepLab head uses torchvision"}
NEEDS = {"inference": _CLIP | _HEAD, "text": _CLIP, "fc-clip": _CLIP}


def measure(part: str, options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """One part; imported when it is wanted, because each needs packages of its own."""
    if part == "inference":
        import ovs_inference

        return ovs_inference.measure(options, out)
    if part == "text":
        import ovs_text

        return ovs_text.measure(options, out)
    import ovs_fc_clip

    return ovs_fc_clip.measure(options, out, ovs_fc_clip.find_tree(options.fc_clip))


def absent(options: argparse.Namespace) -> str | None:
    """Why FC-CLIP cannot be measured here; None if it can."""
    if importlib.util.find_spec("detectron2") is None:
        return "detectron2 is not on PYTHONPATH"
    import ovs_fc_clip

    if ovs_fc_clip.find_tree(options.fc_clip) is None:
        return "no checkout of FC-CLIP is on PYTHONPATH or named by --fc-clip"
    return None


def spread(values: dict[str, Any], digits: int = 2) -> str:
    """Median (quartiles)."""
    return " ".join(
        (f"{values['median']:.{digits}f}", f"({values['q1']:.{digits}f}-{values['q3']:.{digits}f})")
    )


def variant(name: str) -> str:
    """'compiled' for 'whole: compiled'."""
    return name.partition(": ")[2]


def show(part: str, result: dict[str, Any], out: Output) -> None:
    """Times of every variant, then what they mean."""
    out.heading(f"{part}: CPU milliseconds, median (quartiles)")
    rows = [[name, spread(timing["cpu"], 0)] for name, timing in result["timings"].items()]
    out.table(None, ("what", "ms"), rows)
    if part == "text":
        out.text(
            f"step with cached text embeddings: {spread(result['speedup'])} times faster, "
            f"{result['prompts']} prompts"
        )
        return
    for name, why in result["unavailable"].items():
        out.text(f"not timed: {name}: {why}")
    for name, row in result["errors"].items():
        out.text(
            f"error of {name}: {row['ours']:.1e}, dense {row['dense']:.1e}, limit "
            f"{row['limit']:.1e}" + ("" if row["ours"] <= row["limit"] else "  INEXACT")
        )
    if "deformable_attention" in result:
        out.text(f"deformable attention: {result['deformable_attention']}")
    if not result["exact"]:
        out.text("no speed-up is given, because the output is not that of the dense masked model")
        return
    out.text(
        f"backbone: {spread(result['backbone_speedup'])} times faster than the fastest dense one "
        f"({variant(result['baseline']['backbone'])}); {result['accelerated_layers']} parts "
        "accelerated"
    )
    out.text(
        f"whole: {spread(result['speedup'])} times faster, {variant(result['accelerated'])} "
        f"against {variant(result['baseline']['whole'])}"
    )
    out.text(
        f"the backbone is {result['backbone_share_dense']:.0%} of the dense model, so Amdahl's law "
        f"allows {result['amdahl_bound']:.2f}x at most and predicts "
        f"{result['amdahl_predicted']:.2f}x; the rest is {result['head_share_accelerated']:.0%} of "
        "the accelerated one"
    )


def faults(part: str, result: dict[str, Any]) -> list[str]:
    """What makes the command fail."""
    if not result.get("exact", True):
        return [f"{part}: the accelerated output is inexact"]
    keys = ("speedup", "backbone_speedup")
    return [
        f"{part}: {key.replace('_', ' ')} {result[key]['median']:.2f} is below 1"
        for key in keys
        if key in result and result[key]["median"] < 1
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="default: all that can be measured here"
    )
    parser.add_argument("--mask", default="global:0.90", help="recipe")
    parser.add_argument("--size", type=positive, default=512, help="pixels, of inference")
    parser.add_argument("--train-size", type=positive, default=256, help="pixels, of training")
    parser.add_argument(
        "--prompts",
        type=positive,
        default=133,
        help="class names in training; 133: COCO panoptic's, as published",
    )
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile among the dense ones")
    parser.add_argument("--fc-clip", type=Path, metavar="DIR", help="checkout of FC-CLIP")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", default=None)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    options.arguments, options.isa = arguments, "native"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    out = Output(options.json)
    try:
        if not is_mask_spec(options.mask):
            raise OpenTransError(
                f"--mask {options.mask!r} is no recipe. Weights are synthetic here, so masks are "
                "too: write for instance global:0.90 or uniform:0.95."
            )
        for name, size in (("--size", options.size), ("--train-size", options.train_size)):
            if size % STRIDE:
                raise OpenTransError(f"{name} {size} must be a multiple of {STRIDE}, such as 512.")
        why = absent(options)
        if why and "fc-clip" in (options.parts or ()):
            raise OpenTransError(
                f"part fc-clip cannot be measured: {why}. Clone facebookresearch/detectron2 and "
                "bytedance/fc-clip, then run with PYTHONPATH=detectron2 and --fc-clip fc-clip."
            )
        parts = options.parts or [part for part in PARTS if part != "fc-clip" or not why]
        require_packages({name: use for part in parts for name, use in NEEDS[part].items()})
        if why and not options.parts:
            out.text(f"fc-clip is left out: {why}")
        return run(parts, options, out)
    except OpenTransError as error:
        sys.stderr.write(f"bench_ovs: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("bench_ovs: interrupted before a part was finished\n")
        return INTERRUPTED


def run(parts: Sequence[str], options: argparse.Namespace, out: Output) -> int:
    cpus = choose_cpus(options.threads)
    if cpus is not None:
        pin(cpus)
    torch.set_num_threads(options.threads)
    session = Session(KIND, options, out, cpus)
    session.result |= {
        "command": ["python", "benchmarks/bench_ovs.py", *session.result["command"][1:]],
        "weights": "synthetic",
        "mask": {"label": options.mask, "synthetic": True},
        "rounds": options.rounds,
        "compile": options.compile,
        "parts": {},
    }
    failed: list[str] = []
    complete = True
    try:
        for part in parts:
            result = session.result["parts"][part] = measure(part, options, out)
            show(part, result, out)
            failed += faults(part, result)
            check_form(session.result)
            session.save()
    except KeyboardInterrupt:
        if not session.result["parts"]:
            raise
        complete = False
    return session.finish(complete=complete, failed=failed)


if __name__ == "__main__":
    sys.exit(main())
