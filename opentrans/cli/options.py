"""Options that several commands share, so that they are spelt and explained once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentrans_kernels.bench.subject import Subject

    from .render import Output

#: Words after Python that start this command line again.
AGAIN = ("-m", "opentrans")
ARCH_HELP = (
    "RN50, RN101, RN50x4, ViT-B-32 (CLIP), HED, torchvision:NAME, timm:NAME, transformers:resnet50 "
    "(default RN50)"
)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json [PATH]``: a file, or stdout for "-" and for no value."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="also write the result as JSON to PATH; '-' or no value: JSON on stdout, nothing else",
    )


def arch_packages(options: argparse.Namespace) -> dict[str, str]:
    """The library that has ``--arch`` (RN50 where there is none), as ``require_packages`` takes it.

    Commands name such a function with ``set_defaults(packages=...)``; ``main`` calls it before
    torch is imported.
    """
    arch = (getattr(options, "arch", None) or "RN50").removeprefix("open_clip:")
    family = arch.partition(":")[0] if ":" in arch else "open_clip"
    if family == "open_clip" and not arch.startswith("ViT"):
        return {}  # CLIP's ResNets and HED are built here
    if family not in ("open_clip", "torchvision", "timm", "transformers"):
        return {}  # refused with the known ones when it is built
    return {family: f"arch {arch!r} needs {family}"}


def add_model(parser: argparse.ArgumentParser, *, checkpoint: bool = True) -> None:
    """``--arch``, ``--seed`` and, unless it is positional, ``--checkpoint``."""
    parser.set_defaults(packages=arch_packages)
    parser.add_argument("--arch", default="RN50", help=ARCH_HELP)
    if checkpoint:
        parser.add_argument(
            "--checkpoint", metavar="FILE", help="weights; without it they are synthetic"
        )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of synthetic weights (default 0)"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """``--size`` and ``--size-w``, pixels."""
    parser.add_argument(
        "--size", "--input-size", type=positive, default=224, metavar="PX",
        help="image height, and width unless --size-w is given (default 224)",
    )  # fmt: skip
    parser.add_argument("--size-w", type=positive, metavar="PX", help="image width")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``."""
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="CPU threads (default 1)"
    )


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def input_size(options: argparse.Namespace) -> tuple[int, int]:
    """(height, width) in pixels."""
    return options.size, options.size_w or options.size


def subject_of(
    options: argparse.Namespace, out: Output, *, match_is_shown: bool = False
) -> Subject:
    """The tower and masks the options name; a synthetic one is announced on stderr.

    ``match_is_shown``: the command shows on its own which masks found no place.
    """
    from opentrans_kernels.bench.subject import load_subject

    subject = load_subject(
        options.mask,
        arch=options.arch,
        checkpoint=options.checkpoint,
        seed=options.seed,
    )
    banner = subject.banner()
    if banner:
        out.warn(banner)
    if not subject.match.complete:
        which = "" if match_is_shown else f" {subject.match}"
        out.warn(f"{len(subject.match.unmatched_masks)} masks are not used.{which}")
    return subject
