"""``python -m opentrans.ovs shapes FOLDER`` and ``clip FILE``: what the tiny run starts from."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import require_packages

log = logging.getLogger("opentrans.ovs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with the reason on stderr."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options.run(options)
    except OpenTransError as error:
        log.error("error: %s", error)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opentrans.ovs")
    commands = parser.add_subparsers(required=True)
    shapes = commands.add_parser("shapes", help="draw the shapes dataset")
    shapes.add_argument("folder")
    shapes.add_argument("--train", type=int, default=400, help="training images")
    shapes.add_argument("--val", type=int, default=60, help="images of each other split")
    shapes.add_argument("--size", type=int, default=96, help="side in pixels")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.set_defaults(run=_shapes)
    clip = commands.add_parser("clip", help="train the tiny CLIP")
    clip.add_argument("file", help="to write, .safetensors")
    clip.add_argument("--steps", type=int, default=300)
    clip.add_argument("--seed", type=int, default=0)
    clip.set_defaults(run=_clip)
    return parser


def _shapes(options: argparse.Namespace) -> None:
    require_packages({"PIL": "images are read and written by Pillow"})
    from .folder import SPLITS, write_shapes

    count = options.train + options.val * (len(SPLITS) - 1)
    log.info("drawing %d images of %d pixels", count, options.size)
    folder = write_shapes(
        options.folder, train=options.train, val=options.val, size=options.size, seed=options.seed
    )
    log.info("wrote %s: splits %s", folder, ", ".join(SPLITS))


def _clip(options: argparse.Namespace) -> None:
    require_packages({"open_clip": "CLIP comes from open_clip"})
    from .tiny import train_tiny_clip

    def tell(step: int, loss: float) -> None:
        if step % 50 == 0 or step == options.steps:
            log.info("step %d of %d: loss %.3f", step, options.steps, loss)

    log.info("training a CLIP of width 16, %d steps", options.steps)
    file = train_tiny_clip(options.file, steps=options.steps, seed=options.seed, on_step=tell)
    log.info("wrote %s", file)


if __name__ == "__main__":
    sys.exit(main())
