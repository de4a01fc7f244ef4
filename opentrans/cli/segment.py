"""Pictures in; per picture a label PNG, an overlay with a legend and a record out.

IMAGE is a picture or a folder of them. Weights are a file of opentrans.ovs.save_segmenter, or with
--config a checkpoint of detectron2: one of our configs, or that of a tree on PYTHONPATH that takes
other classes, such as FC-CLIP. Started again, the command goes on where it stopped. --example needs
nothing: it trains a toy, draws pictures and segments them. docs/segment.md describes the outputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_json, add_threads, positive
from .progress import progress_bar
from .render import Output, check_writable, make_folder
from .training import example_images

if TYPE_CHECKING:
    from opentrans.segment import OutputFolder, Picture, Recipe

SUMMARY = "segment pictures by class names: labels, overlays, JSON"
#: Photographs behind the shapes of the example.
BACKDROPS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
SHOWN = 12  # rows of pictures in the summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans segment``."""
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures, or folders of them")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for results")
    parser.add_argument(
        "--example", action="store_true",
        help="train a toy on drawn shapes, draw pictures, segment them: about a minute",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="FILE", help="segmenter file, or checkpoint")
    parser.add_argument("--config", metavar="FILE", help="detectron2 config of the checkpoint")
    parser.add_argument(
        "--classes", metavar="A,B,...", help="class names, or @FILE with one per line"
    )
    parser.add_argument("--mask", metavar="MASK", help="mask file or recipe; else the own zeros")
    parser.add_argument("--no-accelerate", action="store_true", help="run densely, to compare")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
        help="of the config; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--setup", action="append", default=[], metavar="MODULE:FUNCTION",
        help="adds a tree's own keys to the config; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=positive, metavar="PX", help="short side for the network; default its own"
    )
    parser.add_argument(
        "--least", type=_score, default=0.0, metavar="P",
        help="pixels whose best score is below P have no class (default 0: all have one)",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N pictures now")
    parser.add_argument(
        "--overwrite", action="store_true", help="do all again, also with other settings"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N",
        help="models at work at once, each with --threads (default 1; with --ray one per machine)",
    )  # fmt: skip
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="spread over a Ray cluster; without ADDRESS that of RAY_ADDRESS or a local one",
    )  # fmt: skip
    parser.add_argument(
        "--text-cache", metavar="DIR",
        help="folder for text embeddings, 'none' for none (default: opentrans/text in the cache "
        "folder of the user)",
    )  # fmt: skip
    parser.add_argument("--font", metavar="FILE", help="of the legend, for scripts beyond Latin")
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(packages=packages)


def packages(options: argparse.Namespace) -> dict[str, str]:
    """What the command needs beside torch."""
    needs = {
        "PIL": "images are read and written by Pillow",
        "open_clip": "the text encoder is open_clip's",
    }
    if options.example:
        needs["torchvision"] = "the DeepLab head uses torchvision"
    if options.ray is not None:
        needs["ray"] = "--ray spreads pictures over machines with Ray Data"
    return needs


def run(options: argparse.Namespace, out: Output) -> int:
    """Segment what is not done yet; 2 if a picture failed, with the reasons on stderr."""
    output = Path(options.output)
    if not output.is_dir():
        check_writable(output, directory=True)
    import torch

    from opentrans.segment import OutputFolder, find_pictures
    from opentrans.segment.drawing import load_font

    load_font(16, options.font)
    if options.example:
        _example(options, out)
    torch.set_num_threads(options.threads)
    recipe = _recipe(options)
    folder = OutputFolder(output.resolve())
    find_pictures(options.images, without=output)  # before anything is written
    folder.open(recipe.settings(), overwrite=options.overwrite)
    pictures = find_pictures(options.images, folder.known(), without=output)
    waiting = [picture for picture in pictures if not folder.done(picture)]
    there = len(pictures) - len(waiting)
    if there:
        out.text(f"{there} of {len(pictures)} pictures are done already")
    later = len(waiting) - min(len(waiting), options.limit or len(waiting))
    waiting = waiting[: options.limit]
    failed, about = _work(options, out, recipe, waiting, folder) if waiting else ([], {})
    rows = folder.finish(failed, recipe.settings(), about)
    chosen = {picture.file for picture in pictures}
    _show(out, [row for row in rows if row["file"] in chosen], folder)
    if later:
        out.text(f"{later} pictures are left for the next run (--limit {options.limit})")
    for row in failed:
        out.warn(f"{row['file']}: {row['reason']}")
    if failed:
        out.warn(f"{len(failed)} of {len(waiting)} pictures failed, the others are done")
    out.finish(
        {"folder": str(folder.path), "model": about, "pictures": rows, "failed": failed,
         "done_before": there, "left": later}
    )  # fmt: skip
    return 2 if failed else 0


def _recipe(options: argparse.Namespace) -> Recipe:
    from opentrans.ovs.text_store import default_folder
    from opentrans.segment import Recipe, parse_classes
    from opentrans.segment.detectron import find_config
    from opentrans_kernels.errors import OpenTransError

    for option, value in (("IMAGE", options.images), ("--weights", options.weights),
                          ("--classes", options.classes)):  # fmt: skip
        if not value:
            raise OpenTransError(
                f"{option} is missing. Type opentrans segment IMAGE --weights FILE --classes "
                "'cat, road' -o DIR, or start with: opentrans segment --example -o DIR"
            )
    if not Path(options.weights).is_file():
        raise OpenTransError(f"--weights {options.weights!r} is not a file. Name a checkpoint.")
    cache = options.text_cache or str(default_folder())
    return Recipe(
        weights=str(Path(options.weights).resolve()),
        classes=parse_classes(options.classes),
        config=find_config(options.config) if options.config else None,
        options=tuple(word for pair in options.set for word in pair),
        setup=tuple(options.setup),
        mask=_absolute(options.mask),
        size=options.size,
        least=options.least,
        threads=options.threads,
        accelerate=not options.no_accelerate,
        text_cache=None if cache == "none" else str(Path(cache).resolve()),
    )


def _absolute(mask: str | None) -> str | None:
    """A mask that other processes find too; recipes and what does not exist stay as they are."""
    from opentrans_kernels.errors import MaskError
    from opentrans_kernels.masks import split_entry
    from opentrans_kernels.synthetic import is_mask_spec

    if mask is None or is_mask_spec(mask):
        return mask
    if not Path(mask).is_file() and not Path(split_entry(mask)[0]).is_file():
        raise MaskError(
            f"--mask {mask!r} is neither a file nor a recipe such as global:0.90. Name a mask file."
        )
    return str(Path(mask).resolve())


def _work(
    options: argparse.Namespace, out: Output, recipe: Recipe, pictures: list[Picture],
    folder: OutputFolder,
) -> tuple[list[dict[str, str]], dict[str, Any]]:  # fmt: skip
    """The pictures that failed, with reasons; what the model is."""
    failed: list[dict[str, str]] = []
    about: dict[str, Any] = {}
    finished = 0

    def ready(described: dict[str, Any]) -> None:
        if about:
            return  # every worker says the same
        about.update(described)
        out.text(described["report"])
        for note in described["notes"]:
            out.warn(note)

    with progress_bar(out, "segment") as bar:

        def done(picture: Picture, reason: str) -> None:
            nonlocal finished
            finished += 1
            if reason:
                failed.append({"file": picture.file, "reason": reason})
            bar(finished, len(pictures), picture.name + (" FAILED" if reason else ""))

        bar(0, len(pictures), "building the model")
        shared = {"font": options.font, "on_done": done, "on_ready": ready}
        if options.ray is not None:
            from opentrans.segment import work_with_ray

            work_with_ray(
                recipe, pictures, folder, address=options.ray, actors=options.processes, **shared
            )
        elif (options.processes or 1) > 1:
            from opentrans.segment import work_in_processes

            work_in_processes(recipe, pictures, folder, processes=options.processes, **shared)
        else:
            from opentrans.segment.job import tried
            from opentrans.segment.systems import build, describe

            segmenter = build(recipe)
            ready(describe(segmenter))
            for picture in pictures:
                done(picture, tried(segmenter, picture, folder, options.font))
    return failed, about


def _show(out: Output, rows: list[dict[str, Any]], folder: OutputFolder) -> None:
    cells = []
    for row in rows[:SHOWN]:
        named = [one for one in row["classes"] if one["name"] is not None][:3]
        most = ", ".join(f"{one['name']} {one['share']:.0%}" for one in named)
        size = f"{row['width']}x{row['height']}"
        cells.append([row["name"], size, most or "no class", f"{row['seconds']:.2f}"])
    if cells:
        out.table(None, ("picture", "size", "most of it", "seconds"), cells, right={1, 3})
    if len(rows) > SHOWN:
        out.text(f"and {len(rows) - SHOWN} more")
    out.text(f"results {folder.path / 'results.json'}\nlook at {folder.path / 'overlays'}",
             whole=True)  # fmt: skip


def _example(options: argparse.Namespace, out: Output) -> None:
    """Fill in what the command line must not give with ``--example``."""
    from opentrans.segment.example import CLASSES, train_example, write_pictures
    from opentrans_kernels.errors import OpenTransError

    given = ("images", "weights", "config", "classes")
    if any(getattr(options, name) for name in given):
        raise OpenTransError(
            "--example brings its own pictures, weights and classes. Leave out IMAGE, "
            f"{', '.join('--' + name for name in given[1:])}, or leave out --example."
        )
    import importlib.util

    import torch

    photos = []
    if importlib.util.find_spec("skimage") is not None:
        photos = sorted(file for file in example_images() if file.stem in BACKDROPS)
    else:
        out.note("scikit-image is not installed, so the shapes are drawn without photographs")
    folder = Path(options.output)
    make_folder(folder)
    weights = folder / "example.safetensors"
    torch.set_num_threads(options.threads)
    if not weights.exists():
        with progress_bar(out, "training a toy") as bar:
            train_example(weights, photos, on_step=bar)
    options.images = [str(file) for file in write_pictures(folder / "pictures", photos)]
    options.weights, options.classes = str(weights), ",".join(CLASSES)


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
